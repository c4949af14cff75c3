//! A session on a server for work outside its databases: listing databases, and creating another
//! one.

use super::per_server::PerServer;
use super::session::{Session, WriteSession};
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::cluster::state_db;
use crate::config::Datastore;
use crate::domain::Side;
use tokio_postgres::error::SqlState;

impl WriteSession {
    /// Opens a session in any database that accepts our user. A provider may have no database
    /// `postgres`, and `pg_hba.conf` may have a line only for Builder's database. `template1` comes
    /// last: while a session is in it, nobody can copy it.
    pub(in crate::cluster) async fn open_for_maintenance(
        to: &Datastore,
    ) -> Result<Self, DatastoreError> {
        WriteSession::open_for_maintenance_on(Side::Local, to).await
    }

    pub(in crate::cluster) async fn open_for_maintenance_on(
        side: Side,
        to: &Datastore,
    ) -> Result<Self, DatastoreError> {
        let candidates = ["postgres", &to.database, state_db::DATABASE, "template1"];
        let of_last_time = OPEN.known(to);
        let mut first = None;
        // A server writes each refusal into its log.
        for database in of_last_time.iter().map(String::as_str).chain(candidates) {
            match WriteSession::open_on(side, to, database).await {
                Err(error) if is_of_the_database(&error) => {
                    first.get_or_insert(error);
                }
                opened => {
                    if opened.is_ok() {
                        OPEN.remember(to, database.to_string());
                    }
                    return opened;
                }
            }
        }
        Err(first.expect("there is a first database"))
    }
}

/// Returns whether the session's server has a database of this name.
pub async fn has_database(
    session: &Session,
    name: &str,
    doing: &str,
) -> Result<bool, DatastoreError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_database WHERE datname = $1)";
    session.row(doing, sql, &[&name]).await?.get(0)
}

/// The database that accepted us last.
static OPEN: PerServer<String> = PerServer::new();

/// Returns whether another database of the same server may accept us: this one does not exist, no
/// line of `pg_hba.conf` names it, our user may not connect to it, or nobody may.
pub(in crate::cluster) fn is_of_the_database(error: &DatastoreError) -> bool {
    let state = error.sql_state.as_ref();
    error.fault == DatastoreFault::NoDatabase
        || [
            SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
            SqlState::INSUFFICIENT_PRIVILEGE,
            SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        ]
        .iter()
        .any(|one| state == Some(one))
}
