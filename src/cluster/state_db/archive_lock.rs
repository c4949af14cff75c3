//! The locks of an archive: advisory locks, held as long as their session lives.
//!
//! One lock keeps two writers of one cluster apart, for each place. The other one keeps the bytes
//! that a generation in the making names: artifacts are deleted only while nobody holds it.

use super::state::StateDb;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::session::WriteSession;

/// Key of the lock on the bytes: "arch" in ASCII.
const BYTES_KEY: i64 = 0x6172_6368;

impl WriteSession {
    /// Takes the lock of the only writer into a place. `place`: a number made from its address.
    /// False: another session holds it. All writers of a cluster must use one database.
    pub async fn lock_archive(&self, place: i64) -> Result<bool, DatastoreError> {
        let sql = "SELECT pg_try_advisory_lock($1)";
        let doing = "taking the lock of the archive";
        self.mark_altered();
        self.row(doing, sql, &[&place]).await?.get(0)
    }
}

impl StateDb {
    /// Keeps all artifacts until the session of this value ends. Waits for a deletion that has
    /// begun.
    pub async fn keep_all_artifacts(&self) -> Result<(), DatastoreError> {
        let sql = "SELECT pg_advisory_lock_shared($1)";
        let doing = "keeping the artifacts for the archive";
        self.session.mark_altered();
        let waiting = self.session.client().execute(sql, &[&BYTES_KEY]);
        self.session.unlimited(doing, waiting).await.map(drop)
    }

    /// Begins a deletion of artifacts, which ends with the session of this value. False: a
    /// generation is being made, and may name them.
    pub async fn begin_deletion(&self) -> Result<bool, DatastoreError> {
        let sql = "SELECT pg_try_advisory_lock($1)";
        let doing = "looking for a generation in the making";
        self.session.row(doing, sql, &[&BYTES_KEY]).await?.get(0)
    }
}
