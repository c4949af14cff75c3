//! Copies the artifacts that the archive does not have yet, many at once, each hashed on the way.

use super::Work;
use super::snapshot::{Dumped, Wanted};
use crate::archive::format::{Absent, Entry};
use crate::archive::layout;
use crate::archive::place::{Place, Stored};
use crate::cluster::{ByteBudget, Download, LocalCluster, Store, Throttle};
use crate::config::ArtifactsMode;
use crate::domain::{ErrorCode, Role};
use crate::killpoint;
use crate::observe::{Phase, Progress};
use crate::package::{Checksum, Hasher};
use crate::replication::{RETIRED, ReplicationError};
use std::collections::HashMap;
use tokio::task::JoinSet;

/// Bytes of memory that one copy may hold.
const COPY_BYTES: u64 = 16 << 20;

/// A shard with its artifacts: those of the generation before that stay, and the new ones.
pub(super) struct Shard {
    pub name: String,
    pub entries: Vec<Entry>,
    /// The list of the generation before has exactly these entries.
    pub is_as_before: bool,
}

/// The result of the copying.
#[derive(Default)]
pub(super) struct Copied {
    pub shards: Vec<Shard>,
    pub gone: Vec<Absent>,
    pub new_artifacts: u64,
    pub new_bytes: u64,
}

/// The result for one artifact.
enum Outcome {
    /// It is in the archive. `new`: it was not there before.
    Here { entry: Entry, new: bool },
    /// No store has these bytes. The text says what was found.
    Gone(String),
}

#[derive(Clone)]
struct Carrier {
    store: Store,
    place: Place,
    budget: ByteBudget,
    throttle: Throttle,
    resumes: bool,
}

impl Work<'_> {
    pub(super) async fn copy_artifacts(
        &self,
        dumped: &Dumped,
        progress: &Progress,
    ) -> Result<Copied, ReplicationError> {
        let mut copied = Copied::default();
        let mut missing: Vec<(usize, Wanted)> = Vec::new();
        for (name, wanted) in &dumped.wanted {
            let known = self.known(name).await?;
            let number = copied.shards.len();
            let mut shard = Shard {
                name: name.clone(),
                entries: Vec::with_capacity(wanted.len()),
                is_as_before: known.len() == wanted.len(),
            };
            for wanted in wanted {
                match known.get(&wanted.key) {
                    Some(entry) if entry.checksum == wanted.checksum.to_string() => {
                        shard.entries.push(entry.clone());
                    }
                    _ => {
                        shard.is_as_before = false;
                        missing.push((number, wanted.clone()));
                    }
                }
            }
            copied.shards.push(shard);
        }
        self.copy_missing(missing, &mut copied, progress).await?;
        for shard in &mut copied.shards {
            shard.entries.sort_by(|a, b| a.key.cmp(&b.key));
        }
        copied.shards.retain(|shard| !shard.entries.is_empty());
        copied.gone.sort();
        Ok(copied)
    }

    /// Returns the artifacts of a shard in the generation before, by key.
    async fn known(&self, shard: &str) -> Result<HashMap<String, Entry>, ReplicationError> {
        let before = self.before.as_ref();
        let list = before.and_then(|before| before.lists.iter().find(|list| list.shard == shard));
        let Some(list) = list else {
            return Ok(HashMap::new());
        };
        let entries = match self.cache.list(self.place, &list.file).await {
            Ok(entries) => entries,
            // The artifacts are looked at one by one, and the list is written anew.
            Err(error) if error.code() == ErrorCode::ArchiveDamaged => {
                log::warn!("{error}");
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        Ok(entries
            .into_iter()
            .map(|entry| (entry.key.clone(), entry))
            .collect())
    }

    async fn copy_missing(
        &self,
        missing: Vec<(usize, Wanted)>,
        copied: &mut Copied,
        progress: &Progress,
    ) -> Result<(), ReplicationError> {
        let step = progress.begin(Phase::Artifacts, missing.len() as u64);
        let carrier = Carrier {
            store: LocalCluster::of(self.config).reading_store()?,
            place: self.place.clone(),
            budget: ByteBudget::new(self.config.replication.buffer.max(2 * COPY_BYTES)),
            throttle: Throttle::new(self.config.replication.bandwidth_limit),
            resumes: self.resumes,
        };
        let mut busy = JoinSet::new();
        let mut missing = missing.into_iter();
        loop {
            while busy.len() < self.config.replication.copies
                && let Some((number, wanted)) = missing.next()
            {
                let carrier = carrier.clone();
                busy.spawn(async move {
                    let outcome = carrier.bring(&wanted).await;
                    (number, wanted, outcome)
                });
            }
            let Some(done) = busy.join_next().await else {
                return Ok(());
            };
            let (number, wanted, outcome) = done.expect("no copy panics or is cancelled");
            match outcome? {
                Outcome::Here { entry, new } => {
                    if new {
                        copied.new_artifacts += 1;
                        copied.new_bytes += entry.bytes;
                    }
                    copied.shards[number].entries.push(entry);
                }
                Outcome::Gone(found) => copied.gone.push(self.may_be_gone(wanted, found)?),
            }
            step.add(1);
            killpoint::reach("archive.artifact");
        }
    }

    /// Returns the record of an artifact that nobody has. On a spare that is a fault of the copy,
    /// and no generation is made of it.
    fn may_be_gone(&self, wanted: Wanted, found: String) -> Result<Absent, ReplicationError> {
        let replicated = self.config.artifacts.mode == ArtifactsMode::Replicate;
        if self.turn.identity.role == Some(Role::Spare) && replicated {
            return Err(ReplicationError::Precondition {
                check: ErrorCode::ArtifactLacking,
                text: format!(
                    "local: the bucket should have {} with checksum {}: {found}",
                    wanted.key, wanted.checksum
                ),
                next_step: "run `warm-spare verify --deep`, which lists every artifact that differs, and `warm-spare sync --baseline`, which copies them again".into(),
            });
        }
        Ok(Absent {
            key: wanted.key,
            checksum: wanted.checksum.to_string(),
            reason: found,
        })
    }
}

impl Carrier {
    /// Brings one artifact into the archive, unless it is there.
    async fn bring(&self, wanted: &Wanted) -> Result<Outcome, ReplicationError> {
        let Wanted { key, checksum } = wanted;
        let first = layout::artifact(key);
        if self.resumes
            && let Some(bytes) = self.holds(&first, checksum).await?
        {
            return Ok(here(wanted, bytes, first, false));
        }
        let sources = [key.clone(), format!("{RETIRED}{checksum}")];
        let mut found = "no such object".to_string();
        for source in sources {
            match self.send(&source, &first, checksum).await? {
                Sent::Stored(bytes) => return Ok(here(wanted, bytes, first, true)),
                Sent::Occupied => return self.beside(&source, &first, wanted).await,
                Sent::Wrong(other) => found = format!("found checksum {other}"),
                Sent::Missing => {}
            }
        }
        Ok(Outcome::Gone(found))
    }

    /// Handles a key whose place is occupied: by the same bytes, from an earlier generation, or by
    /// other ones, which stay.
    async fn beside(
        &self,
        source: &str,
        first: &str,
        wanted: &Wanted,
    ) -> Result<Outcome, ReplicationError> {
        let Wanted { key, checksum } = wanted;
        if let Some(bytes) = self.holds(first, checksum).await? {
            return Ok(here(wanted, bytes, first.to_string(), false));
        }
        let path = layout::replaced(key, checksum);
        for _ in 0..2 {
            match self.send(source, &path, checksum).await? {
                Sent::Stored(bytes) => return Ok(here(wanted, bytes, path, true)),
                Sent::Occupied => {}
                Sent::Wrong(other) => return Ok(Outcome::Gone(format!("found checksum {other}"))),
                Sent::Missing => return Ok(Outcome::Gone("no such object".into())),
            }
            if let Some(bytes) = self.holds(&path, checksum).await? {
                return Ok(here(wanted, bytes, path, false));
            }
            // The path names its checksum, so these bytes are proved wrong.
            log::warn!(
                "archive {}: {path} is damaged, and is written again",
                self.place.name()
            );
            self.place.remove(&path).await?;
        }
        Err(crate::archive::error::damaged(
            self.place.name(),
            &path,
            "it was written twice, and other bytes are there",
        ))
    }

    /// Returns the length of the file if it has exactly these bytes.
    async fn holds(
        &self,
        path: &str,
        checksum: &Checksum,
    ) -> Result<Option<u64>, ReplicationError> {
        let Some(mut reading) = self.place.read(path).await? else {
            return Ok(None);
        };
        let mut hasher = Hasher::new();
        while let Some(bytes) = reading.next().await? {
            hasher.update(&bytes);
        }
        Ok((hasher.finalize() == *checksum).then(|| reading.bytes()))
    }

    async fn send(
        &self,
        source: &str,
        path: &str,
        checksum: &Checksum,
    ) -> Result<Sent, ReplicationError> {
        // Memory is reserved first, because a server gives up a body that is opened and not read.
        let _room = self.budget.room(COPY_BYTES).await;
        let Some(mut body) = self.store.get(source).await? else {
            return Ok(Sent::Missing);
        };
        let mut writing = self.place.write_artifact(path).await?;
        let mut hasher = Hasher::new();
        while let Some(bytes) = next(&mut body, &self.throttle).await? {
            hasher.update(&bytes);
            writing.add(bytes).await?;
        }
        let found = hasher.finalize();
        if found != *checksum {
            return Ok(Sent::Wrong(found));
        }
        let (sum, stored) = writing.finish().await?;
        Ok(match stored {
            Stored::New => Sent::Stored(sum.bytes),
            Stored::Occupied => Sent::Occupied,
        })
    }
}

enum Sent {
    Stored(u64),
    /// A file is there already.
    Occupied,
    /// The source has other bytes.
    Wrong(Checksum),
    Missing,
}

async fn next(
    body: &mut Download,
    throttle: &Throttle,
) -> Result<Option<bytes::Bytes>, ReplicationError> {
    let next = body.next().await?;
    if let Some(bytes) = &next {
        throttle.take(bytes.len()).await;
    }
    Ok(next)
}

fn here(wanted: &Wanted, bytes: u64, path: String, new: bool) -> Outcome {
    let entry = Entry {
        key: wanted.key.clone(),
        checksum: wanted.checksum.to_string(),
        bytes,
        path,
    };
    Outcome::Here { entry, new }
}
