//! The handle of the local cluster.

use super::postgres::applying::ApplySession;
use super::postgres::datastore_error::{DatastoreError, DatastoreFault};
use super::postgres::session::WriteSession;
use super::postgres::walsender::WalSession;
use super::s3::store::{LocalStore, Store};
use super::s3::store_error::StoreError;
use super::state_db::DATABASE;
use super::state_db::state::{StateDb, StateError};
use crate::config::{self, ArtifactsMode, Config};
use crate::domain;

/// Opens the sessions on the local datastore, and the local artifact store. The rooms above have
/// no other way to them.
#[derive(Clone, Copy)]
pub struct LocalCluster<'a>(&'a config::Side, &'a config::Artifacts);

impl<'a> LocalCluster<'a> {
    pub fn of(config: &'a Config) -> Self {
        LocalCluster(&config.local, &config.artifacts)
    }

    /// Opens a session on Builder's database.
    pub async fn builder(self) -> Result<WriteSession, DatastoreError> {
        self.database(&self.0.datastore.database).await
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
        WriteSession::open(&self.0.datastore, name).await
    }

    /// Opens a session on any database that accepts our user, for work outside of them.
    pub async fn maintenance(self) -> Result<WriteSession, DatastoreError> {
        WriteSession::open_for_maintenance(&self.0.datastore).await
    }

    /// Opens a session that applies changes to a database, with triggers and foreign keys off.
    pub async fn applying(self, database: &str) -> Result<ApplySession, DatastoreError> {
        ApplySession::open(&self.0.datastore, database).await
    }

    /// Opens a session in the replication protocol.
    pub async fn replication(self) -> Result<WalSession, DatastoreError> {
        WalSession::open_local(&self.0.datastore).await
    }

    /// Opens our state database, and creates it if it does not exist.
    pub async fn state(self) -> Result<StateDb, StateError> {
        StateDb::open(&self.0.datastore).await
    }

    /// Opens our state database. None: it does not exist.
    pub async fn existing_state(self) -> Result<Option<StateDb>, StateError> {
        StateDb::open_existing(&self.0.datastore).await
    }

    /// Opens a session on our state database, which exists.
    pub async fn state_session(self) -> Result<WriteSession, DatastoreError> {
        self.database(DATABASE).await
    }

    /// Opens the artifact store, for reading and writing. No request is sent. None: its objects
    /// are not ours to write, not even a probe.
    pub fn own_store(self) -> Result<Option<LocalStore>, StoreError> {
        match self.1.mode {
            ArtifactsMode::Replicate => LocalStore::open(&self.0.s3).map(Some),
            ArtifactsMode::External => Ok(None),
        }
    }

    /// Opens the artifact store to restore bytes that were replaced there, when its objects were
    /// ours.
    pub fn store_to_restore(self) -> Result<LocalStore, StoreError> {
        LocalStore::open(&self.0.s3)
    }

    /// Opens the artifact store to write artifacts that the provider never brings. None: this is
    /// not wanted.
    pub fn store_to_fill(self) -> Result<Option<LocalStore>, StoreError> {
        match self.1.mode {
            ArtifactsMode::External if self.1.fill => LocalStore::open(&self.0.s3).map(Some),
            ArtifactsMode::Replicate | ArtifactsMode::External => Ok(None),
        }
    }

    /// Opens the artifact store, for reading. No request is sent.
    pub fn reading_store(self) -> Result<Store, StoreError> {
        Store::open(domain::Side::Local, &self.0.s3)
    }
}
