//! Refuses to run when local and peer are the same server or the same bucket. That happens when
//! both zones share one store, as Chef's guide advises, or when an address was moved. Then nothing
//! is read and nothing is done.

use super::postgres::session::{ReadSession, Session, WriteSession};
use super::s3::probe::{is_same_bucket, unpredictable};
use super::s3::store::{LocalStore, ReplicationStatus, Source, Store};
use super::s3::store_error::StoreError;
use crate::cluster::postgres::datastore_error::DatastoreError;

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "same_server: peer.datastore and local.datastore are one and the same PostgreSQL server"
    )]
    SameServer,
    /// `seen`: what the two buckets have in common.
    #[error(
        "same_bucket: peer.s3 and local.s3 are one and the same bucket ({bucket}), or a replication between two buckets makes them look so: {seen}"
    )]
    SameBucket { bucket: String, seen: &'static str },
}

/// Returns the number that distinguishes one PostgreSQL server's data from another's.
pub async fn system_id(server: &Session) -> Result<String, DatastoreError> {
    let sql = "SELECT system_identifier::text FROM pg_control_system()";
    let row = server.row("reading the system id", sql, &[]).await?;
    row.get(0)
}

/// Takes a random lock on the local server. If the peer's session cannot take it too, both are on
/// the same server. `local` is a session on the local database with the peer database's name, if
/// there is one; otherwise on any database.
pub async fn differ_in_server(
    local: &WriteSession,
    peer: &ReadSession,
) -> Result<(), IdentityError> {
    let key = unpredictable() as i64;
    local
        .rows(
            "taking the probe lock",
            "SELECT pg_advisory_lock($1)",
            &[&key],
        )
        .await?;
    let row = peer
        .row(
            "trying the probe lock",
            "SELECT pg_try_advisory_lock($1)",
            &[&key],
        )
        .await?;
    if !row.get::<bool>(0)? {
        return Err(IdentityError::SameServer);
    }
    let unlocked = peer
        .rows(
            "giving the probe lock back",
            "SELECT pg_advisory_unlock($1)",
            &[&key],
        )
        .await;
    if unlocked.is_err() {
        peer.mark_altered();
    }
    unlocked?;
    local
        .rows(
            "giving the probe lock back",
            "SELECT pg_advisory_unlock($1)",
            &[&key],
        )
        .await?;
    // Locks belong to a database. Databases of two names on one server differ in their locks, but
    // not in the start of their server, which is given to the microsecond.
    let sql = "SELECT system_identifier::text || '/' || pg_postmaster_start_time()::text FROM pg_control_system()";
    let (ours, theirs) = (
        local.row("reading the server's identity", sql, &[]).await?,
        peer.row("reading the server's identity", sql, &[]).await?,
    );
    if ours.get::<String>(0)? == theirs.get::<String>(0)? {
        return Err(IdentityError::SameServer);
    }
    Ok(())
}

/// Puts an object into the local bucket, and changes it. A peer that shows both reads the same
/// bucket.
pub async fn differ_in_bucket(local: &LocalStore, peer: &Store) -> Result<(), IdentityError> {
    match is_same_bucket(local, peer).await? {
        false => Ok(()),
        true => Err(IdentityError::SameBucket {
            bucket: peer.bucket().to_string(),
            seen: "an object that was written through local.s3 was there through peer.s3 at once, and so was its change",
        }),
    }
}

/// Compares two buckets without writing into one of them. One bucket under one address is found,
/// and so is one under two addresses if the provider replicates it: a copy does not have the status
/// and the time of its source. `keys` are objects of the primary.
pub async fn differ_by_reading(
    local: &Store,
    peer: &Store,
    keys: &[String],
) -> Result<(), IdentityError> {
    let same = |seen| IdentityError::SameBucket {
        bucket: peer.bucket().to_string(),
        seen,
    };
    if local.endpoint() == peer.endpoint() && local.bucket() == peer.bucket() {
        return Err(same("both have one endpoint and one name"));
    }
    let mut compared = 0;
    for key in keys {
        let (Some(here), Some(there)) = (local.source(key).await?, peer.source(key).await?) else {
            continue;
        };
        let is_one = here.stored == there.stored && here.written == there.written;
        // A copy on either side came from the other one, and keeps its time.
        let is_copy = |of: &Source| of.status == ReplicationStatus::Replica;
        if !is_one || is_copy(&here) || is_copy(&there) {
            return Ok(());
        }
        let is_source = |of: &Source| of.status != ReplicationStatus::Absent;
        if is_source(&here) && is_source(&there) {
            compared += 1;
        }
    }
    match compared {
        0 => Ok(()),
        _ => Err(same(
            "objects have the same bytes, times and replication status in both",
        )),
    }
}
