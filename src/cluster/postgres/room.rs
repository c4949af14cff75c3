//! Makes room for our session on a server that has no free connection.

use super::session::quote_literal;
use crate::cluster::WalSession;
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::config::Datastore;

/// Maximum number of sessions ended at once: fencing opens a few sessions, one after the other.
const MAX_ENDED: u32 = 8;

/// Ends the sessions of Builder's database that were idle longest: a fence ends them anyway.
/// Replication sessions have their own limit, and are not ended. Nothing is ended on another server
/// than the intended one.
pub(in crate::cluster) async fn make_room(
    to: &Datastore,
    system_id: &str,
) -> Result<(), DatastoreError> {
    let mut session = WalSession::open(to).await?;
    let sql = format!(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
         WHERE datname = {} AND backend_type = 'client backend' AND application_name <> 'warm-spare' \
           AND (SELECT system_identifier::text FROM pg_catalog.pg_control_system()) = {} \
         ORDER BY state_change NULLS FIRST LIMIT {MAX_ENDED}",
        quote_literal(&to.database),
        quote_literal(system_id)
    );
    session
        .query("making room for a session of ours", &sql)
        .await?;
    Ok(())
}

impl DatastoreError {
    /// Returns whether the server has no connection left for us, and is in order otherwise.
    pub fn is_for_want_of_room(&self) -> bool {
        // A replication session, which would make the room, has its own limit.
        self.fault == DatastoreFault::Refusing
            && !self.text.contains("max_wal_senders")
            && self.sql_state == Some(tokio_postgres::error::SqlState::TOO_MANY_CONNECTIONS)
    }

    /// Returns false only if the server is known to be gone. It is not if it has answered, or if we
    /// have not asked it. It may serve other clients; a server that shuts down still may, and one
    /// that starts will soon. A session that was ended, and a connection without an answer, prove
    /// nothing.
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
