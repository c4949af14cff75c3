//! Connections to both clusters, as one pass needs them.

use crate::cluster::{LocalSession, LocalStore, PeerSession, Store};
use crate::config::Config;
use crate::domain::Side;
use crate::replication::error::PassError;

/// The connections to both ends for one run.
pub struct Ends {
    pub local: LocalSession,
    pub peer: PeerSession,
    pub local_store: LocalStore,
    pub peer_store: Store,
}

impl Ends {
    pub async fn open(config: &Config) -> Result<Ends, PassError> {
        Ok(Ends {
            local: LocalSession::open_for_maintenance(&config.local.datastore).await?,
            local_store: LocalStore::open(&config.local.s3)?,
            peer: PeerSession::open(&config.peer.datastore).await?,
            peer_store: Store::open(Side::Peer, &config.peer.s3)?,
        })
    }
}
