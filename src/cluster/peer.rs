//! The handle of the peer's cluster.

use super::fence::peer_fence::PeerFence;
use super::postgres::datastore_error::DatastoreError;
use super::postgres::footprint::{Footprint, footprint};
use super::postgres::kept::KeptSessions;
use super::postgres::room::make_room;
use super::postgres::session::ReadSession;
use super::postgres::walsender::WalSession;
use super::preparation::Preparation;
use super::s3::store::Store;
use super::s3::store_error::StoreError;
use super::state_db::roles::{Record, peers_record};
use super::state_db::state::StateError;
use crate::config::{self, Config};
use crate::domain;

/// Opens the sessions on the peer's datastore, and the peer's artifact store. The rooms above have
/// no other way to them. A session that only asked is kept for the next question, for as long as
/// one clone of the handle exists: the peer may be far away, and a new session costs several round
/// trips.
#[derive(Clone)]
pub struct PeerCluster<'a> {
    config: &'a config::Side,
    kept: KeptSessions,
}

impl<'a> PeerCluster<'a> {
    pub fn of(config: &'a Config) -> Self {
        PeerCluster {
            config: &config.peer,
            kept: KeptSessions::default(),
        }
    }

    /// Opens a new session on Builder's database, whatever is kept. This shows whether the server
    /// lets anybody in now.
    pub async fn connect(&self) -> Result<ReadSession, DatastoreError> {
        ReadSession::open(&self.config.datastore).await
    }

    /// Closes the sessions that nobody uses at present.
    pub fn close_idle(&self) {
        self.kept.close_idle();
    }

    /// Returns a session on Builder's database, which only reads.
    pub async fn builder(&self) -> Result<ReadSession, DatastoreError> {
        let to = &self.config.datastore;
        self.kept.open(to, &to.database).await
    }

    /// Opens a session in the replication protocol.
    pub async fn replication(&self) -> Result<WalSession, DatastoreError> {
        WalSession::open(&self.config.datastore).await
    }

    /// Reads the peer's record of its role and its epoch. None: it keeps no state of ours.
    pub async fn record(&self) -> Result<Option<Record>, DatastoreError> {
        peers_record(&self.config.datastore, &self.kept).await
    }

    /// Opens the capability to prepare the primary for the stream, and to withdraw that.
    pub async fn preparation(&self) -> Result<Preparation, DatastoreError> {
        Preparation::open(&self.config.datastore).await
    }

    /// Opens the capability to fence the server with this identity. None: the address leads to
    /// another server.
    pub async fn fence(&self, system_id: &str) -> Result<Option<PeerFence>, StateError> {
        PeerFence::open(&self.config.datastore, system_id).await
    }

    /// Ends idle sessions of Builder if the server with this identity has none left for us.
    pub async fn make_room(&self, system_id: &str) -> Result<(), DatastoreError> {
        make_room(&self.config.datastore, system_id).await
    }

    /// Reads what our sessions hold on the peer's server. `cluster_id` is our own.
    pub async fn footprint(&self, cluster_id: &str) -> Result<Footprint, DatastoreError> {
        footprint(&self.config.datastore, cluster_id).await
    }

    /// Opens the artifact store, for reading. No request is sent.
    pub fn store(&self) -> Result<Store, StoreError> {
        Store::open(domain::Side::Peer, &self.config.s3)
    }
}
