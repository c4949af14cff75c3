//! Keeps sessions on the peer that only asked questions, and hands them out again.

use super::session::{ReadSession, Session};
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::config::Datastore;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Sessions that nobody uses at present, each with its database.
type Idle = Mutex<Vec<(String, Session)>>;

/// The sessions that one handle of the peer keeps. They end with its last clone.
#[derive(Clone, Default)]
pub(in crate::cluster) struct KeptSessions(Arc<Idle>);

impl KeptSessions {
    /// Returns a kept session on this database, or opens one.
    pub(in crate::cluster) async fn open(
        &self,
        to: &Datastore,
        database: &str,
    ) -> Result<ReadSession, DatastoreError> {
        let session = match self.take(database) {
            Some(session) => session,
            None => ReadSession::session(to, database).await?,
        };
        Ok(ReadSession::kept_by(session, self.way_back(database)))
    }

    pub(in crate::cluster) fn close_idle(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn take(&self, database: &str) -> Option<Session> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The server may have ended some of them in the meantime.
        idle.retain(|(_, session)| session.is_as_opened());
        let place = idle.iter().position(|(of, _)| of == database)?;
        Some(idle.swap_remove(place).1)
    }

    fn way_back(&self, database: &str) -> WayBack {
        WayBack {
            idle: Arc::downgrade(&self.0),
            database: database.to_string(),
        }
    }
}

/// The place to which a session returns when its user drops it.
pub(super) struct WayBack {
    idle: Weak<Idle>,
    database: String,
}

impl WayBack {
    /// Keeps the session if it is as it was opened; otherwise it ends here.
    pub(super) fn give(self, session: Session) {
        if let Some(idle) = self.idle.upgrade()
            && session.is_as_opened()
        {
            let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.push((self.database, session));
        }
    }
}
