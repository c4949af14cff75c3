//! Compares the artifact of every row: it exists and has its recorded length. A deep verification
//! also checks its bytes and its signature.

use super::Difference;
use crate::cluster::{BuilderDb, StateDb, Store, StoreError, WriteSession};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::observe::{Phase, Progress, Step};
use crate::package::{Checksum, Inspection, Inspector, PublicKey, Signature};
use crate::replication::{Inventory, ReplicationError};
use std::collections::{HashMap, HashSet};
use tokio::task::JoinSet;

/// Maximum number of artifacts read from the list at once.
const PAGE_ROWS: i64 = 1000;

#[derive(Default)]
pub(crate) struct Compared {
    pub checked: u64,
    pub bytes: u64,
    pub signatures_good: u64,
    pub signatures_unknown: u64,
    pub differences: Vec<Difference>,
}

pub(super) async fn compare(
    config: &Config,
    state: &StateDb,
    session: &WriteSession,
    store: &Store,
    unavailable: &[(String, MissingReason)],
    deep: bool,
    progress: &Progress,
) -> Result<Compared, ReplicationError> {
    let inventory = Inventory::new(state.session()).await?;
    let loaded = inventory.load_wanted_from(session).await?;
    let known: HashSet<&str> = unavailable.iter().map(|(key, _)| key.as_str()).collect();
    let mut compared = Compared::default();
    let unsound = loaded.unsound.into_iter();
    compared.differences.extend(
        unsound
            .filter(|name| !known.contains(name.as_str()))
            .map(|name| difference(name, "its row names no possible artifact".into())),
    );
    if deep {
        let step = progress.begin(Phase::Artifacts, inventory.wanted().await?);
        let mut reading = Reading::begin(config, session, store, step).await?;
        let mut after = String::new();
        loop {
            let page = inventory.wanted_page(&after, PAGE_ROWS).await?;
            let Some((last, _)) = page.last() else { break };
            after = last.clone();
            for (key, checksum) in page {
                if !known.contains(key.as_str()) {
                    reading.add(key, checksum).await?;
                }
            }
        }
        compared.absorb(reading.finish().await?);
    } else {
        inventory.load_present(store).await?;
        let known_keys = unavailable
            .iter()
            .filter(|(_, reason)| *reason != MissingReason::Unsound)
            .count() as u64;
        compared.checked = inventory.wanted().await?.saturating_sub(known_keys);
        let unproven = inventory.unproven().await?;
        compared.differences.extend(
            unproven
                .into_iter()
                .filter(|(key, _)| !known.contains(key.as_str()))
                .map(|(key, why)| difference(key, why.into())),
        );
    }
    Ok(compared)
}

fn difference(name: String, text: String) -> Difference {
    Difference {
        kind: "artifact",
        name,
        text,
    }
}

struct Inspected {
    key: String,
    wanted: Checksum,
    /// None: the bucket has no such object.
    found: Option<Inspection>,
}

async fn inspect(store: &Store, key: String, wanted: Checksum) -> Result<Inspected, StoreError> {
    let found = match store.get(&key).await? {
        None => None,
        Some(mut body) => {
            let mut inspector = Inspector::new();
            while let Some(bytes) = body.next().await? {
                inspector.update(&bytes);
            }
            Some(inspector.finish())
        }
    };
    Ok(Inspected { key, wanted, found })
}

/// Artifacts that are being read, several at once. Their bytes are compared with the checksums of
/// their rows, and their signatures are checked with the keys in the database.
pub(crate) struct Reading {
    store: Store,
    keys: HashMap<String, PublicKey>,
    copies: usize,
    step: Step,
    busy: JoinSet<Result<Inspected, StoreError>>,
    compared: Compared,
}

impl Reading {
    pub(crate) async fn begin(
        config: &Config,
        session: &WriteSession,
        store: &Store,
        step: Step,
    ) -> Result<Reading, ReplicationError> {
        Ok(Reading {
            store: store.clone(),
            keys: public_keys(session).await?,
            copies: config.replication.copies,
            step,
            busy: JoinSet::new(),
            compared: Compared::default(),
        })
    }

    /// Adds an artifact. Returns when a reader has begun it, which is before it was read.
    pub(crate) async fn add(
        &mut self,
        key: String,
        checksum: Checksum,
    ) -> Result<(), ReplicationError> {
        while self.busy.len() >= self.copies {
            self.take().await?;
        }
        let store = self.store.clone();
        self.busy
            .spawn(async move { inspect(&store, key, checksum).await });
        Ok(())
    }

    pub(crate) async fn finish(mut self) -> Result<Compared, ReplicationError> {
        while !self.busy.is_empty() {
            self.take().await?;
        }
        Ok(self.compared)
    }

    async fn take(&mut self) -> Result<(), ReplicationError> {
        let Some(joined) = self.busy.join_next().await else {
            return Ok(());
        };
        self.step.add(1);
        let inspected = joined.expect("an inspection neither panics nor is cancelled")?;
        self.compared.judge(inspected, &self.keys);
        Ok(())
    }
}

impl Compared {
    fn absorb(&mut self, other: Compared) {
        self.checked += other.checked;
        self.bytes += other.bytes;
        self.signatures_good += other.signatures_good;
        self.signatures_unknown += other.signatures_unknown;
        self.differences.extend(other.differences);
        self.differences.sort_by(|a, b| a.name.cmp(&b.name));
    }

    fn judge(&mut self, inspected: Inspected, keys: &HashMap<String, PublicKey>) {
        let Inspected { key, wanted, found } = inspected;
        self.checked += 1;
        let Some(found) = found else {
            self.differences
                .push(difference(key, "is not in the local bucket".into()));
            return;
        };
        self.bytes += found.bytes;
        if found.checksum != wanted {
            let text = format!(
                "its bytes hash to {}, its row says {wanted}",
                found.checksum
            );
            self.differences.push(difference(key, text));
            return;
        }
        let problem = match &found.hart {
            Err(error) => Some(format!("is not a package file: {error}")),
            Ok(facts) => match facts.verify(keys.get(&facts.key_name)) {
                Signature::Good => {
                    self.signatures_good += 1;
                    None
                }
                Signature::KeyUnknown(_) => {
                    self.signatures_unknown += 1;
                    None
                }
                Signature::Bad(name) => Some(format!(
                    "is not signed by key {name}, which its header names"
                )),
                Signature::PayloadDiffers => {
                    Some("its payload is not the one that was signed".into())
                }
            },
        };
        self.differences.extend(problem.map(|text| Difference {
            kind: "signature",
            name: key,
            text,
        }));
    }
}

/// Returns the public keys by full name. A key that cannot be parsed counts as absent, so its
/// signatures count as unknown.
async fn public_keys(
    session: &WriteSession,
) -> Result<HashMap<String, PublicKey>, ReplicationError> {
    let mut keys = HashMap::new();
    for (name, body) in BuilderDb::of(session).public_keys().await? {
        match PublicKey::parse(&body) {
            Ok(key) => {
                keys.insert(name, key);
            }
            Err(error) => log::warn!("local: public key {name} cannot be read: {error}"),
        }
    }
    Ok(keys)
}
