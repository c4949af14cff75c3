//! Room for a session of ours on a server that is out of connections.

use super::datastore::{DatastoreError, DatastoreFault};
use super::session::quote_literal;
use crate::cluster::WalSession;
use crate::config::Datastore;

/// Sessions ended at once: whatever fences opens a few, one after the other.
const SOME: u32 = 8;

/// Ends the sessions of Builder's database that have rested longest: those that a fence ends anyway. A replication session
/// is none of those that the server has no room for. Nothing is ended on another server than the one that is meant.
pub async fn make_room(to: &Datastore, system_id: &str) -> Result<(), DatastoreError> {
    let mut session = WalSession::open(to).await?;
    let sql = format!(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
         WHERE datname = {} AND backend_type = 'client backend' AND application_name <> 'warm-spare' \
           AND (SELECT system_identifier::text FROM pg_catalog.pg_control_system()) = {} \
         ORDER BY state_change NULLS FIRST LIMIT {SOME}",
        quote_literal(&to.database),
        quote_literal(system_id)
    );
    session
        .query("making room for a session of ours", &sql)
        .await?;
    Ok(())
}

impl DatastoreError {
    /// The server has no connection left for us, and is well otherwise.
    pub fn is_for_want_of_room(&self) -> bool {
        // A replication session, which would make the room, has a limit of its own.
        self.fault == DatastoreFault::Refusing
            && !self.text.contains("max_wal_senders")
            && self.sql_state == Some(tokio_postgres::error::SqlState::TOO_MANY_CONNECTIONS)
    }

    /// The server is not known to be gone: it has answered, or we have not asked it. It may serve others, and one that
    /// shuts down or starts may soon, or still. A session that was ended, and a line on which nobody answers, say nothing.
    pub fn shows_life(&self) -> bool {
        match self.fault {
            DatastoreFault::Refusing
            | DatastoreFault::Pooler
            | DatastoreFault::Authentication
            | DatastoreFault::Tls
            | DatastoreFault::Malformed => true,
            _ => {
                let state = self.sql_state.as_ref();
                state.is_some_and(|state| !state.code().starts_with("57P"))
            }
        }
    }
}
