//! The witness: copies of the epoch and the promotion of this cluster outside its PostgreSQL.
//!
//! A database can be restored from a time before a promotion. Then it has lost the epoch that the
//! cluster took, and the configuration may still hold an old consent to that epoch. The witness is
//! in the service's data directory and in the local bucket. Its epoch never falls.

use crate::cluster::{Expected, LocalCluster, LocalStore, StateDb};
use crate::config::{Config, write_whole};
use crate::domain::Role;
use crate::observe;
use crate::replication::ReplicationError;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

const FILE: &str = "epoch.json";
/// Time limit for the answer of the bucket.
const BUCKET_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of bytes of the object; a longer one is not a witness.
const MAX_BYTES: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Witness {
    pub epoch: i64,
    /// Id of the promotion in the line of descent; empty: there is none.
    pub promotion: String,
    /// Id of the cluster that wrote the witness.
    pub cluster: String,
}

/// Compares the witness file with the state at the start of a leadership: shows the epoch of the
/// file, and writes the epoch of the state if that is newer.
pub(super) async fn bring_up_to_date(
    show: impl FnOnce(Option<i64>),
    state: &StateDb,
    data: &Path,
) -> Result<(), ReplicationError> {
    let known = read_file(data).unwrap_or_else(|error| {
        log::warn!(
            "local: {}: {error}; no epoch is read from this file",
            data.join(FILE).display()
        );
        None
    });
    let own = own(state).await?;
    let known = known.filter(|known| known.is_of(&own));
    if own.epoch > known.as_ref().map_or(0, |known| known.epoch)
        && let Err(error) = write_file(data, &own)
    {
        log::warn!(
            "local: {}: {error}; epoch {} is not recorded in this file",
            data.join(FILE).display(),
            own.epoch
        );
    }
    show(known.map(|known| known.epoch));
    Ok(())
}

/// Does the same with the object in the local bucket, which may not answer.
pub(super) async fn bring_up_to_date_in_bucket(
    config: &Config,
    state: &StateDb,
) -> Result<Option<i64>, ReplicationError> {
    let own = own(state).await?;
    let answered = tokio::time::timeout(BUCKET_TIMEOUT, async {
        // A bucket that takes no object of ours remembers no epoch.
        let Some(store) = LocalCluster::of(config).mark_store()? else {
            return Ok(None);
        };
        // If another process writes at the same time, its object stays, and is read next time.
        let key = store.mark(FILE);
        let found = store.reading().head(&key).await?;
        let known = read_object(&store).await?;
        let known = known.filter(|known| known.is_of(&own));
        if own.epoch > known.as_ref().map_or(0, |known| known.epoch) {
            let expected = Expected::as_found(found.as_ref());
            store.put(&key, Bytes::from(own.text()), &expected).await?;
        }
        Ok(known.map(|known| known.epoch))
    });
    answered.await.unwrap_or_else(|_| {
        log::debug!(
            "local: the bucket did not return its recorded epoch within {} s",
            BUCKET_TIMEOUT.as_secs()
        );
        Ok(None)
    })
}

/// Returns the highest epoch that is on record outside PostgreSQL, for a verb. None: there is none, or
/// it cannot be read.
pub async fn witnessed_epoch(config: &Config, data: &Path) -> Option<i64> {
    let state = LocalCluster::of(config).existing_state().await.ok()??;
    let own = own(&state).await.ok()?;
    let file = read_file(data).ok().flatten();
    let in_file = file
        .filter(|known| known.is_of(&own))
        .map(|known| known.epoch);
    let in_bucket = bring_up_to_date_in_bucket(config, &state).await;
    in_file.max(in_bucket.ok().flatten())
}

/// Records outside PostgreSQL what a verb has promoted. A place that cannot be written is a warning.
pub async fn remember_promotion(config: &Config, data: &Path) {
    let recorded = async {
        let Some(state) = LocalCluster::of(config).existing_state().await? else {
            return Ok(());
        };
        bring_up_to_date(|_| (), &state, data).await?;
        if let Err(error) = give_to_owner_of(data) {
            log::warn!("local: {}: {error}", data.join(FILE).display());
        }
        bring_up_to_date_in_bucket(config, &state).await.map(drop)
    };
    if let Err(error) = recorded.await {
        log::warn!("the promotion is on record in the datastore, and not outside of it: {error}");
    }
}

/// Gives the file to the owner of its directory: an operator runs a verb as root, and the service
/// must be able to read the file.
fn give_to_owner_of(data: &Path) -> io::Result<()> {
    let (file, directory) = (data.join(FILE), std::fs::metadata(data)?);
    if !rustix::process::geteuid().is_root() || !file.exists() {
        return Ok(());
    }
    std::os::unix::fs::chown(file, Some(directory.uid()), Some(directory.gid()))
}

/// Returns the epoch that this cluster has taken itself; 0: it is no primary now. An epoch that a
/// spare knows belongs to its primary.
async fn own(state: &StateDb) -> Result<Witness, ReplicationError> {
    let record = state.own_record().await?;
    let head = record.lineage.head();
    let primary = record.role == Some(Role::Primary);
    Ok(Witness {
        epoch: if primary { record.epoch } else { 0 },
        promotion: head.map_or_else(String::new, |head| head.id.clone()),
        cluster: record.cluster_id,
    })
}

impl Witness {
    fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Returns whether the witness belongs to this cluster, and not to one whose bucket or
    /// directory was copied here, or to one before the state was removed.
    fn is_of(&self, own: &Witness) -> bool {
        self.cluster == own.cluster
    }

    /// Reads a witness. None: the text is not a witness.
    fn parse(text: &[u8]) -> Option<Witness> {
        let witness: Witness = serde_json::from_slice(text).ok()?;
        (witness.epoch >= 0).then_some(witness)
    }
}

fn read_file(data: &Path) -> io::Result<Option<Witness>> {
    match std::fs::read(data.join(FILE)) {
        Ok(text) => Witness::parse(&text)
            .map(Some)
            .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "no epoch in it")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn write_file(data: &Path, witness: &Witness) -> io::Result<()> {
    std::fs::create_dir_all(data)?;
    write_whole(&data.join(FILE), witness.text().as_bytes())
}

async fn read_object(store: &LocalStore) -> Result<Option<Witness>, ReplicationError> {
    let key = store.mark(FILE);
    let Some(mut body) = store.reading().get(&key).await? else {
        return Ok(None);
    };
    let mut text = Vec::new();
    while let Some(bytes) = body.next().await? {
        text.extend_from_slice(&bytes);
        if text.len() > MAX_BYTES {
            return Ok(None);
        }
    }
    let witness = Witness::parse(&text);
    if witness.is_none() {
        log::warn!("local: object {key} has no epoch in it; the next promotion overwrites it");
    }
    Ok(witness)
}

/// Raises the epoch that is recorded outside PostgreSQL. It never falls.
pub(super) fn remember(state: &mut observe::ServiceState, epoch: Option<i64>) {
    state.cluster.witnessed_epoch = state.cluster.witnessed_epoch.max(epoch);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_what_was_written_or_that_it_is_spoilt() {
        let data = tempfile::tempdir().expect("a directory");
        assert_eq!(read_file(data.path()).expect("no file is no error"), None);
        let witness = Witness {
            epoch: 4,
            promotion: "x".into(),
            cluster: "aaaaaaaa".into(),
        };
        write_file(data.path(), &witness).expect("it is written");
        assert_eq!(read_file(data.path()).expect("it is read"), Some(witness));
        for spoilt in [
            "",
            "{}",
            "{\"epoch\": -1, \"promotion\": \"\", \"cluster\": \"\"}",
        ] {
            std::fs::write(data.path().join(FILE), spoilt).expect("it is written");
            assert!(read_file(data.path()).is_err(), "{spoilt}");
        }
    }
}
