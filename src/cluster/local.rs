//! The handle of the local cluster.

use super::postgres::applying::ApplySession;
use super::postgres::datastore_error::{DatastoreError, DatastoreFault};
use super::postgres::session::WriteSession;
use super::postgres::walsender::WalSession;
use super::s3::lease_store::LeaseStore;
use super::s3::store::{LocalStore, Store};
use super::s3::store_error::StoreError;
use super::state_db::DATABASE;
use super::state_db::nodes::Node;
use super::state_db::state::{StateDb, StateError};
use crate::config::{ArtifactsMode, Config, Datastore, Direction};
use crate::domain::Side;

/// Opens the sessions on the local datastore, and the local artifact store. The rooms above have
/// no other way to them.
#[derive(Clone, Copy)]
pub struct LocalCluster<'a>(&'a Config);

impl<'a> LocalCluster<'a> {
    pub fn of(config: &'a Config) -> Self {
        LocalCluster(config)
    }

    /// Opens a session on Builder's database.
    pub async fn builder(self) -> Result<WriteSession, DatastoreError> {
        self.database(&self.0.local.datastore.database).await
    }

    /// Opens a session on Builder's database. None: it does not exist.
    pub async fn builder_if_there(self) -> Result<Option<WriteSession>, DatastoreError> {
        match self.builder().await {
            Ok(session) => Ok(Some(session)),
            Err(error) if error.fault == DatastoreFault::NoDatabase => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens a session on another database of the same server, for example on an incoming copy.
    pub async fn database(self, name: &str) -> Result<WriteSession, DatastoreError> {
        WriteSession::open(&self.0.local.datastore, name).await
    }

    /// Opens a session on any database that accepts our user, for work outside of them.
    pub async fn maintenance(self) -> Result<WriteSession, DatastoreError> {
        WriteSession::open_for_maintenance(&self.0.local.datastore).await
    }

    /// Opens a session that applies changes to a database, with triggers and foreign keys off.
    pub async fn applying(self, database: &str) -> Result<ApplySession, DatastoreError> {
        ApplySession::open(&self.0.local.datastore, database).await
    }

    /// Opens a session in the replication protocol.
    pub async fn replication(self) -> Result<WalSession, DatastoreError> {
        WalSession::open_local(&self.0.local.datastore).await
    }

    /// Opens our state database, and creates it if it does not exist.
    pub async fn state(self) -> Result<StateDb, StateError> {
        StateDb::open(&self.0.local.datastore).await
    }

    /// Opens our state database. None: it does not exist.
    pub async fn existing_state(self) -> Result<Option<StateDb>, StateError> {
        StateDb::open_existing(&self.0.local.datastore).await
    }

    /// Returns the living processes that wait at the spare's site while another one pushes. A server
    /// that does not answer tells of none.
    pub async fn living_standbys(self) -> Vec<Node> {
        let Ok(Some(state)) = self.existing_state().await else {
            return Vec::new();
        };
        let mut nodes = state.nodes(Direction::Pull).await.unwrap_or_default();
        nodes.retain(Node::is_alive);
        nodes
    }

    /// Opens a session on our state database, which exists.
    pub async fn state_session(self) -> Result<WriteSession, DatastoreError> {
        self.database(DATABASE).await
    }

    /// Opens the artifact store, for reading and writing. No request is sent. None: its artifacts
    /// are not ours to write.
    pub fn own_store(self) -> Result<Option<LocalStore>, StoreError> {
        match self.0.artifacts.mode {
            ArtifactsMode::Replicate => LocalStore::open(&self.0.local.s3).map(Some),
            ArtifactsMode::Shared | ArtifactsMode::External => Ok(None),
        }
    }

    /// Opens the artifact store to write marks of our own, such as a probe and the epoch. None: no
    /// object of ours may be there.
    pub fn mark_store(self) -> Result<Option<LocalStore>, StoreError> {
        let Some(prefix) = self.0.artifacts.marks() else {
            return Ok(None);
        };
        let store = LocalStore::open(&self.0.local.s3)?;
        Ok(Some(store.with_marks(prefix)))
    }

    /// Opens the artifact store to restore bytes that were replaced there, when its objects were
    /// ours.
    pub fn store_to_restore(self) -> Result<LocalStore, StoreError> {
        LocalStore::open(&self.0.local.s3)
    }

    /// Opens the artifact store to write artifacts that the provider never brings. None: this is
    /// not wanted.
    pub fn store_to_fill(self) -> Result<Option<LocalStore>, StoreError> {
        match self.0.artifacts.mode {
            ArtifactsMode::External if self.0.artifacts.fill => {
                LocalStore::open(&self.0.local.s3).map(Some)
            }
            ArtifactsMode::Replicate | ArtifactsMode::Shared | ArtifactsMode::External => Ok(None),
        }
    }

    /// Opens the store that has the artifacts of the local rows, for reading. No request is sent.
    /// Before a takeover brings a shared file system here, it is the peer's store.
    pub fn reading_store(self) -> Result<Store, StoreError> {
        match self.0.artifacts.are_detached() {
            true => Store::open(Side::Peer, &self.0.peer.s3),
            false => self.store_at_this_site(),
        }
    }

    /// Opens the artifact store of this site, for reading, whether the artifacts are here or not.
    pub fn store_at_this_site(self) -> Result<Store, StoreError> {
        Store::open(Side::Local, &self.0.local.s3)
    }

    /// Opens the store of the lease. None: the bucket is not shared.
    pub fn lease_store(self) -> Result<Option<LeaseStore>, StoreError> {
        if self.0.artifacts.mode != ArtifactsMode::Shared {
            return Ok(None);
        }
        let plan = &self.0.artifacts.lease;
        let to = plan.store.as_ref().unwrap_or(&self.0.local.s3);
        Ok(Some(LeaseStore::new(LocalStore::open(to)?, plan.ttl)))
    }
}

/// Returns what is on record in a cluster of which only the datastore is known: a role, or a fence that
/// another cluster has set. None: nothing is.
pub async fn on_record(local: &Datastore) -> Result<Option<String>, StateError> {
    let Some(state) = StateDb::open_existing(local).await? else {
        return Ok(None);
    };
    let (cluster, fence) = (state.cluster().await?, state.fence_record().await?);
    Ok(match (fence, cluster.role) {
        (Some(fence), _) => Some(format!(
            "this cluster was fenced by cluster {} under epoch {}",
            fence.by_cluster, fence.epoch
        )),
        (None, Some(role)) => Some(format!(
            "this cluster is on record as {role}, of epoch {}",
            cluster.epoch
        )),
        (None, None) => None,
    })
}
