//! Connections to both clusters, as one pass needs them.

use crate::cluster::{LocalCluster, PeerCluster, ReadSession, Store, WriteSession};
use crate::config::Config;
use crate::replication::error::ReplicationError;

/// The connections to both ends for one run.
pub struct Ends {
    pub local: WriteSession,
    pub peer: ReadSession,
    pub local_store: Store,
    pub peer_store: Store,
}

impl Ends {
    pub async fn open(config: &Config) -> Result<Ends, ReplicationError> {
        Ok(Ends {
            local: LocalCluster::of(config).maintenance().await?,
            local_store: LocalCluster::of(config).reading_store()?,
            peer: PeerCluster::of(config).builder().await?,
            peer_store: PeerCluster::of(config).store()?,
        })
    }
}
