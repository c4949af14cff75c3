//! The work of the gate on one artifact: is it here, may it be copied, is it missing?

use super::{Admission, Item, MAX_PAUSE, MIN_PAUSE, RequestId, Shared, Table};
use crate::cluster::{Artifact, BuilderDb, LocalCluster, WriteSession, recorded_artifact};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::package::Checksum;
use crate::replication::artifact::inventory::Todo;
use crate::replication::artifact::missing::reason_of;
use crate::replication::artifact::round::{ArtifactOutcome, Swap};
use crate::replication::error::{Policy, ReplicationError};
use crate::replication::stream::StreamObserver;
use std::str::FromStr;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

impl Shared {
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder panics")
    }

    /// Records the result. Returns the next request for the same key in the same transaction, which
    /// waits for no commit.
    pub(super) fn decided(&self, id: RequestId, outcome: Admission) -> Option<(RequestId, Item)> {
        let mut table = self.table();
        let want = table.wants.get_mut(&id)?;
        want.settled = Some(outcome);
        let (tx, key) = (want.tx, want.item.as_ref()?.key.clone());
        if let Some(late) = table.next_late(&key) {
            let want = table.wants.get_mut(&late)?;
            want.begun = true;
            return Some((late, want.item.clone()?));
        }
        let queue = table.keys.get(&key)?;
        let at = queue.iter().position(|other| *other == id)?;
        let next = *queue.get(at + 1)?;
        let next_want = table.wants.get_mut(&next)?;
        if next_want.tx != tx || std::mem::replace(&mut next_want.begun, true) {
            return None;
        }
        Some((next, next_want.item.clone()?))
    }

    pub(super) fn is_released(&self, id: RequestId) -> bool {
        self.table().wants.get(&id).is_none_or(|want| want.released)
    }

    pub(super) fn trouble(&self, id: RequestId, trouble: Option<ReplicationError>) {
        let mut table = self.table();
        if table
            .trouble
            .as_ref()
            .is_some_and(|(other, _)| *other != id)
        {
            return;
        }
        let news = trouble.is_some() || table.trouble.is_some();
        table.trouble = trouble.map(|error| (id, Arc::new(error)));
        drop(table);
        if news {
            self.changed.notify_waiters();
        }
    }

    /// Works until a request is decided. Returns also the record of an artifact that was checked:
    /// nobody waits for it, because an object without it is only read once more.
    pub(super) async fn work(&self, id: RequestId, item: &Item) -> (Admission, Option<Artifact>) {
        let mut checked = None;
        let admission = self.decide(id, item, &mut checked).await;
        (admission, checked)
    }

    pub(super) async fn record(&self, checked: Artifact) {
        let recorded = crate::cluster::record_artifacts(&self.state, &[checked]).await;
        if let Err(error) = recorded {
            // The run ends with the session.
            log::debug!("{error}");
        }
    }

    async fn decide(
        &self,
        id: RequestId,
        item: &Item,
        checked: &mut Option<Artifact>,
    ) -> Admission {
        if self
            .proven
            .clone()
            .wait_for(|proven| *proven)
            .await
            .is_err()
        {
            // The run has ended.
            return std::future::pending().await;
        }
        let mut unavailable_since: Option<Instant> = None;
        let mut found: Option<MissingReason> = None;
        // True: the object was asked for once more after the bucket had proved to be the right one.
        let mut doubted = false;
        let mut awaited: Option<Awaited> = None;
        let mut pause = MIN_PAUSE;
        loop {
            let tried = {
                let _copying = self.copies.acquire_many(self.share()).await;
                self.try_once(item).await
            };
            let reason = match tried {
                Ok(Tried::Here(record)) => {
                    self.trouble(id, None);
                    *checked = record;
                    if self.carrier.courier().is_none() {
                        let waited = awaited.as_ref().map(Awaited::waited);
                        self.observer.arrived(waited.unwrap_or_default());
                    }
                    return Admission::Here;
                }
                Ok(Tried::Staged(swap)) => {
                    self.trouble(id, None);
                    return Admission::Staged(swap);
                }
                Ok(Tried::Awaited) => {
                    self.trouble(id, None);
                    if awaited.is_none() {
                        awaited = Some(Awaited::begin(item, &self.observer));
                    }
                    // A row that is deleted later in the stream does not wait.
                    self.is_released(id).then_some(MissingReason::NotReplicated)
                }
                Ok(Tried::Unavailable(reason)) => {
                    self.trouble(id, None);
                    Some(reason)
                }
                Err(error) if error.policy() == Policy::Retry => {
                    self.trouble(id, Some(error));
                    None
                }
                Err(ReplicationError::Store(error)) if self.is_of_the_object(&error).await => {
                    self.trouble(id, None);
                    let reason = reason_of(&error);
                    if found != Some(reason) {
                        log::warn!("{error}; no other artifact waits for it");
                    }
                    Some(reason)
                }
                Err(error) => return Admission::Failed(Arc::new(error)),
            };
            // A reason that comes and goes is not a property of the object.
            if reason.is_none() || reason != found {
                (unavailable_since, doubted) = (None, false);
            }
            found = reason;
            if let Some(reason) = reason {
                let since = *unavailable_since.get_or_insert_with(Instant::now);
                let released = self.is_released(id);
                if released || doubted {
                    return Admission::Unavailable {
                        key: item.key.clone(),
                        checksum: item.checksum.to_string(),
                        reason,
                        quiet: released,
                    };
                }
                if since.elapsed() >= self.grace {
                    match self.believe().await {
                        // Several servers may answer behind one address. So the object is asked for
                        // once more after the bucket has proved to be the right one.
                        Ok(()) => {
                            doubted = true;
                            continue;
                        }
                        Err(error) => self.trouble(id, Some(error)),
                    }
                }
            }
            let released = self.released.notified();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = released => {}
            }
            pause = (pause * 2).min(MAX_PAUSE).min(self.grace.max(MIN_PAUSE));
        }
    }

    /// Returns the number of copy permits that one copy takes: more while a store asks for fewer
    /// copies at once.
    pub(super) fn share(&self) -> u32 {
        (self.most / self.carrier.at_once(self.most)) as u32
    }

    pub(super) async fn try_once(&self, item: &Item) -> Result<Tried, ReplicationError> {
        let todo = self.look(item).await?;
        let stored = match self.carrier.ensure(&todo).await? {
            ArtifactOutcome::Copied(stored) => {
                self.observer.copied(stored.bytes);
                stored
            }
            ArtifactOutcome::Verified(stored) => stored,
            ArtifactOutcome::Staged(swap) => return Ok(Tried::Staged(swap)),
            ArtifactOutcome::Missing => return Ok(Tried::Unavailable(MissingReason::Missing)),
            ArtifactOutcome::Awaited => return Ok(Tried::Awaited),
            ArtifactOutcome::NotReplicated => {
                return Ok(Tried::Unavailable(MissingReason::NotReplicated));
            }
            ArtifactOutcome::Damaged(_) => return Ok(Tried::Unavailable(MissingReason::Damaged)),
            ArtifactOutcome::Refused(error) | ArtifactOutcome::Failed(error) => {
                return Err(error.into());
            }
        };
        let is_news = todo.known != Some(item.checksum) || todo.present.as_ref() != Some(&stored);
        Ok(Tried::Here(is_news.then(|| Artifact {
            key: item.key.clone(),
            checksum: item.checksum.to_string(),
            bytes: stored.bytes,
            etag: stored.etag,
        })))
    }

    /// Returns the known facts about the key: in the local bucket, in our records, and in the rows
    /// that Builder sees.
    pub(super) async fn look(&self, item: &Item) -> Result<Todo, ReplicationError> {
        let (present, recorded, named) = tokio::join!(
            self.carrier.local().peek(&item.key),
            recorded_artifact(&self.state, &item.key),
            async {
                match &self.visible {
                    Some(visible) => {
                        let visible = BuilderDb::of(visible);
                        visible.checksums_of(&item.ident, &item.target).await
                    }
                    None => Ok(Vec::new()),
                }
            },
        );
        let (present, recorded, named) = (present?, recorded?, named?);
        let known = recorded.and_then(|artifact| {
            let same = present.as_ref().is_some_and(|stored| {
                stored.bytes == artifact.bytes && stored.etag == artifact.etag
            });
            same.then(|| Checksum::from_str(&artifact.checksum).ok())?
        });
        let visible = named.first().and_then(|checksum| checksum.parse().ok());
        Ok(Todo {
            key: item.key.clone(),
            checksum: item.checksum,
            present,
            known,
            visible,
        })
    }
}

/// Opens a session on the database that Builder sees, if that database exists and is Builder's.
pub(super) async fn visible(config: &Config) -> Result<Option<WriteSession>, ReplicationError> {
    let Some(session) = LocalCluster::of(config).builder_if_there().await? else {
        return Ok(None);
    };
    let packages = BuilderDb::of(&session).has_packages().await?;
    Ok(packages.then_some(session))
}

/// An artifact that the provider has not brought yet. It is shown until this is dropped.
struct Awaited {
    key: String,
    since: Instant,
    observer: Arc<dyn StreamObserver>,
}

impl Awaited {
    fn begin(item: &Item, observer: &Arc<dyn StreamObserver>) -> Awaited {
        observer.awaits(&item.key);
        Awaited {
            key: item.key.clone(),
            since: Instant::now(),
            observer: observer.clone(),
        }
    }

    fn waited(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.observer.awaits_no_more(&self.key);
    }
}

pub(super) enum Tried {
    /// It is here. The record of it, if it is not recorded yet.
    Here(Option<Artifact>),
    Staged(Swap),
    Unavailable(MissingReason),
    /// The provider has not brought it yet.
    Awaited,
}
