//! The database that a copy fills, before it becomes the visible one.

use super::checks::Facts;
use super::gate::Work;
use super::silenced::SILENCED;
use super::switch::{self, Properties};
use crate::cluster::SqlState;
use crate::cluster::{DatastoreFault, LocalSession, quote_ident};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::baseline::copy::OUR_SCHEMA;
use crate::replication::error::PassError;
use crate::replication::names::beside;

/// The database that is being filled; only we ever see it under this name.
pub(crate) struct Incoming {
    pub(in crate::replication) name: String,
    /// Owner of the replaced database, if that is not our own user.
    pub(in crate::replication) owner: Option<String>,
    pub(in crate::replication) properties: Properties,
}

pub(crate) fn incoming_name(config: &Config) -> String {
    beside(&config.local.datastore.database, "_incoming")
}

impl Incoming {
    pub(crate) async fn create(work: &Work<'_>, facts: &Facts) -> Result<Incoming, PassError> {
        let local = &work.config.local.datastore;
        let name = incoming_name(work.config);
        let session = work.state.session();
        let properties = switch::properties(session, &local.database, &name).await?;
        let owner = properties
            .owner
            .clone()
            .filter(|owner| *owner != local.user);
        let mut sql = format!(
            "CREATE DATABASE {} TEMPLATE template0 {}",
            quote_ident(&name),
            facts.locale
        );
        if let Some(owner) = &owner {
            sql.push_str(&format!(" OWNER {}", quote_ident(owner)));
        }
        sql.push_str(&properties.tablespace_option());
        session
            .long("creating the incoming database", &sql)
            .await
            .map_err(|error| match error.fault {
                // The database belongs to an interrupted run whose statement the server had not
                // finished: the next run drops it.
                DatastoreFault::Statement
                    if error.sql_state == Some(SqlState::DUPLICATE_DATABASE) =>
                {
                    error.into()
                }
                DatastoreFault::Statement => PassError::Unfit {
                    check: ErrorCode::Locale,
                    text: format!("{error} ({})", facts.locale),
                    next_step: "give the spare's system the locale of the primary's database"
                        .into(),
                },
                _ => error.into(),
            })?;
        // This comes before the primary's event triggers exist, because they would fire for it.
        let made = async {
            let inside = LocalSession::open(local, &name).await?;
            let schema = format!("{OUR_SCHEMA}{SILENCED}");
            inside.batch("making our schema", &schema).await
        };
        let made = made.await;
        let incoming = Incoming {
            name,
            owner,
            properties,
        };
        if let Err(error) = made {
            incoming.give_up(work).await;
            return Err(error.into());
        }
        Ok(incoming)
    }

    /// Drops the database, as a best effort: the next run drops it anyway, but its disk space is
    /// needed now.
    pub(crate) async fn give_up(&self, work: &Work<'_>) {
        if let Err(error) = switch::drop_database(work.state.session(), &self.name).await {
            log::debug!("{error}");
        }
    }
}
