//! Leadership: the time in which this process holds the working lock for a role. A leadership ends
//! when its lock, its role or its servers change.

use super::Configs;
use crate::cluster::{Lock, StateDb};
use crate::config::Config;
use crate::replication::ReplicationError;
use std::path::Path;
use std::sync::Arc;

/// The right to work on this cluster. It lasts as long as the session in `state`.
pub(super) struct Leadership {
    pub config: Arc<Config>,
    /// Directory for files.
    pub data: Arc<Path>,
    pub state: StateDb,
    pub lock: Lock,
}

impl Leadership {
    /// Returns the configuration in force, which may have changed since the lock was taken.
    pub(super) fn in_force(&self, configs: &Configs) -> Arc<Config> {
        let current = configs.borrow().clone();
        current.unwrap_or_else(|| self.config.clone())
    }
}

/// The reason why a leadership ended.
pub(super) enum End {
    RoleChanged,
    /// A process that pushes waits for the lock, and gets it.
    Yielded,
    /// The cluster was about to be copied over for the first time, but it had been the primary
    /// before its peer: it comes back.
    WasPrimary,
    Failed(ReplicationError),
}
