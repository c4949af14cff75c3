//! Keeps a fence: it is a condition, not an event. Each look sets it again if somebody lifted it.

use super::proof::prove_fence;
use super::setting::{FenceError, is_fenced};
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::maintenance::has_database;
use crate::cluster::state_db::state::{StateDb, StateError};
use crate::config::Datastore;

/// The reason why the local database is fenced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FenceReason {
    /// This cluster is a spare. `begun`: the fence was set again before, and sessions from before
    /// that may still exist.
    Spare { begun: bool },
    /// Another cluster has replaced this primary, and recorded its fence here.
    Replaced,
}

/// The check of a fence that is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FenceCheck {
    /// The setting is enough, because the fence was proved lately.
    Setting,
    /// A plain client's write must fail.
    Proof,
    /// Sessions from before the setting are ended, and then a plain client's write must fail.
    Enforcement,
}

/// The fence as a look left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptFence {
    NoDatabase,
    /// The setting is not there: the cluster may have become the primary at this very moment, or
    /// the fence was withdrawn or lifted again.
    NotSet,
    Holds,
    /// It had been lifted, or was not complete, and was set again.
    SetAgain,
}

impl KeptFence {
    /// Describes, for the log and the events, that the fence of a database was set again.
    pub fn set_again(database: &str) -> String {
        format!("the fence on {database} had been lifted; it was set again")
    }
}

/// A failure to keep the fence.
#[derive(Debug)]
pub enum KeepError {
    /// The server did not answer the question, or refused it.
    Look(DatastoreError),
    /// The fence's setting is missing, and the server refuses to set it.
    Set(StateError),
    /// The fence is set and does not hold, or could not be proved. `was_set`: nobody had lifted it.
    Proof { was_set: bool, error: FenceError },
}

impl StateDb {
    /// Looks at the fence of a database, sets it again if it was lifted, and checks it. `check` is
    /// used if it was set and complete. `on_lifted` is called before a lifted one is set again.
    pub async fn keep_fence(
        &self,
        local: &Datastore,
        reason: FenceReason,
        check: FenceCheck,
        on_lifted: impl Fn() + Send,
    ) -> Result<KeptFence, KeepError> {
        let (session, database) = (&self.session, &local.database);
        let look = KeepError::Look;
        if !has_database(session, database, "looking for our database")
            .await
            .map_err(look)?
        {
            return Ok(KeptFence::NoDatabase);
        }
        let was_set = is_fenced(session, database).await.map_err(look)?;
        if !was_set {
            on_lifted();
            let set = match reason {
                FenceReason::Spare { .. } => self.fence_if_spare(database).await,
                FenceReason::Replaced => self.fence_if_recorded(database).await,
            };
            set.map_err(KeepError::Set)?;
            if !is_fenced(session, database).await.map_err(look)? {
                return Ok(KeptFence::NotSet);
            }
        }
        let set_again = !was_set || reason == FenceReason::Spare { begun: true };
        let proved = match (reason, check) {
            (FenceReason::Spare { .. }, _) if set_again => self.finish_fence(local, database).await,
            (FenceReason::Replaced, _) if set_again => self.enforce(local, database).await,
            (_, FenceCheck::Setting) => Ok(()),
            (_, FenceCheck::Proof) => prove_fence(session, local, database).await,
            (_, FenceCheck::Enforcement) => self.enforce(local, database).await,
        };
        match proved {
            Ok(()) if set_again => Ok(KeptFence::SetAgain),
            Ok(()) => Ok(KeptFence::Holds),
            Err(error) => Err(KeepError::Proof { was_set, error }),
        }
    }
}
