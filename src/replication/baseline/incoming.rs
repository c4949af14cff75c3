//! The database that a copy fills, before it becomes the visible one.

use super::checks::Facts;
use super::gate::SyncContext;
use crate::cluster::{DatabaseProperties, DatastoreFault, LocalCluster, SpareDb, SqlState};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::error::ReplicationError;
use crate::replication::names::beside;

/// The database that is being filled; only we ever see it under this name.
pub(crate) struct Incoming {
    pub(in crate::replication) name: String,
    /// Owner of the replaced database, if that is not our own user.
    pub(in crate::replication) owner: Option<String>,
    pub(in crate::replication) properties: DatabaseProperties,
}

pub(crate) fn incoming_name(config: &Config) -> String {
    beside(&config.local.datastore.database, "_incoming")
}

impl Incoming {
    pub(crate) async fn create(
        work: &SyncContext<'_>,
        facts: &Facts,
    ) -> Result<Incoming, ReplicationError> {
        let local = &work.config.local.datastore;
        let name = incoming_name(work.config);
        let session = work.state.session();
        let properties = session.database_properties(&local.database, &name).await?;
        let owner = properties
            .owner
            .clone()
            .filter(|owner| *owner != local.user);
        session
            .create_database(
                "creating the incoming database",
                &name,
                &facts.locale,
                owner.as_deref(),
                &properties,
            )
            .await
            .map_err(|error| match error.fault {
                // The database belongs to an interrupted run whose statement the server had not
                // finished: the next run drops it.
                DatastoreFault::Statement
                    if error.sql_state == Some(SqlState::DUPLICATE_DATABASE) =>
                {
                    error.into()
                }
                DatastoreFault::Statement => ReplicationError::Precondition {
                    check: ErrorCode::Locale,
                    text: format!("{error} ({})", facts.locale),
                    next_step: "give the spare's system the locale of the primary's database"
                        .into(),
                },
                _ => error.into(),
            })?;
        // This comes before the primary's event triggers exist, because they would fire for it.
        let made = async {
            let inside = LocalCluster::of(work.config).database(&name).await?;
            SpareDb::of(&inside).create().await
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
    pub(crate) async fn give_up(&self, work: &SyncContext<'_>) {
        if let Err(error) = work.state.session().drop_database(&self.name).await {
            log::debug!("{error}");
        }
    }
}
