//! The witness: the epoch and the promotion of this cluster, remembered outside its PostgreSQL.
//!
//! A database can be restored from a time before a promotion. It has then forgotten the epoch that it took, and an old
//! consent to that epoch may still be in the configuration. The witness lies in the service's data directory and in the
//! local bucket. It only ever rises.

use crate::cluster::{Expected, LocalStore, State};
use crate::config::{Config, write_whole};
use crate::domain::Role;
use crate::observe;
use crate::replication::PassError;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

const FILE: &str = "epoch.json";
const KEY: &str = ".warm-spare/epoch.json";
/// For the bucket to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Bytes; a longer object is none of ours.
const LENGTH_MAX: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    pub epoch: i64,
    /// The promotion, by its id in the line of descent; empty: it has none.
    pub promotion: String,
    /// The cluster that bears witness, by its id.
    pub cluster: String,
}

/// Brings the witness and the state together at the start of a tenure: what the file remembers is shown, and what the
/// state has is written down where that is newer.
pub async fn bring_up_to_date(
    show: impl FnOnce(Option<i64>),
    state: &State,
    data: &Path,
) -> Result<(), PassError> {
    let known = read_file(data).unwrap_or_else(|error| {
        log::warn!(
            "local: {}: {error}; the epoch is not remembered there",
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
            "local: {}: {error}; epoch {} is not remembered there",
            data.join(FILE).display(),
            own.epoch
        );
    }
    show(known.map(|known| known.epoch));
    Ok(())
}

/// The same in the local bucket, which may be away.
pub async fn bring_up_to_date_in_bucket(
    config: &Config,
    state: &State,
) -> Result<Option<i64>, PassError> {
    let own = own(state).await?;
    let answered = tokio::time::timeout(PATIENCE, async {
        let store = LocalStore::open(&config.local.s3)?;
        // Whoever else writes meanwhile goes first, and is read the next time.
        let found = store.reading().head(KEY).await?;
        let known = read_object(&store).await?;
        let known = known.filter(|known| known.is_of(&own));
        if own.epoch > known.as_ref().map_or(0, |known| known.epoch) {
            let expected = Expected::as_found(found.as_ref());
            store.put(KEY, Bytes::from(own.text()), &expected).await?;
        }
        Ok(known.map(|known| known.epoch))
    });
    answered.await.unwrap_or_else(|_| {
        log::debug!(
            "local: the bucket does not say within {} s which epoch it remembers",
            PATIENCE.as_secs()
        );
        Ok(None)
    })
}

/// What this cluster has taken itself; 0: it is no primary now. What a spare has heard of is its primary's.
async fn own(state: &State) -> Result<Witness, PassError> {
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

    /// Of this cluster, and not of one whose bucket or directory was copied here, or of one before the state was removed.
    fn is_of(&self, own: &Witness) -> bool {
        self.cluster == own.cluster
    }

    /// None: the text is none of ours.
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

async fn read_object(store: &LocalStore) -> Result<Option<Witness>, PassError> {
    let Some(mut body) = store.reading().get(KEY).await? else {
        return Ok(None);
    };
    let mut text = Vec::new();
    while let Some(bytes) = body.next().await? {
        text.extend_from_slice(&bytes);
        if text.len() > LENGTH_MAX {
            return Ok(None);
        }
    }
    let witness = Witness::parse(&text);
    if witness.is_none() {
        log::warn!(
            "local: object {KEY} has no epoch in it; it is written anew at the next promotion"
        );
    }
    Ok(witness)
}

/// The epoch that is remembered outside PostgreSQL rises; it never falls.
pub fn remember(state: &mut observe::State, epoch: Option<i64>) {
    state.witnessed_epoch = state.witnessed_epoch.max(epoch);
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
