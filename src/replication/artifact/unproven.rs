//! Reads and hashes the artifacts that a copy has admitted because a listing of the shared bucket
//! showed them: one after the other, within `replication.bandwidth_limit`. Each result is recorded
//! at once, so that a kill loses one object at most. No object is written.

use super::courier::hash;
use super::missing::{bucket_is_right, reason_of, serves_others};
use super::recording::Recording;
use crate::cluster::{
    BuilderDb, LocalCluster, Lock, SpareDb, StateDb, Store, StoreError, Stored, Throttle,
    Unavailable, Unproven, WriteSession,
};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::package::{Checksum, PackageRow, package_of_key};
use crate::replication::error::ReplicationError;
use crate::replication::fuse;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Mutex;

/// Number of artifacts whose rows are looked up at once.
const PAGE_ROWS: i64 = 1000;
/// Number of failed objects in a row from which on the fault is not of single objects.
const MANY_FAILED: usize = 3;

/// The result for one artifact that was not hashed before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// Its bytes are right.
    Proven,
    /// No row names it any more, or it is recorded already.
    Gone,
    /// It is recorded as unavailable now.
    Unavailable,
}

/// The other tasks of the process that hashes.
#[derive(Clone, Default)]
pub struct Beside {
    pub recording: Recording,
    /// Held by a pass, because it replaces the rows, and by each statement that records something
    /// about a row. A pass that has read the records would not see a later one.
    pub rows: Arc<Mutex<()>>,
}

/// Hashes unproven artifacts until none is left.
pub async fn prove_unproven(
    config: &Config,
    lock: Lock,
    throttle: &Throttle,
    beside: &Beside,
    report: impl Fn(Settled),
) -> Result<(), ReplicationError> {
    let prover = Prover {
        config,
        lock,
        throttle,
        beside,
        report,
        state: LocalCluster::of(config).state().await?,
        store: LocalCluster::of(config).reading_store()?,
    };
    while prover.round().await? {
        // The artifacts that are left were changed in the meantime, or are more than the fuse allows.
        tokio::time::sleep(config.replication.retry_missing).await;
    }
    Ok(())
}

struct Prover<'a, R> {
    config: &'a Config,
    lock: Lock,
    throttle: &'a Throttle,
    beside: &'a Beside,
    report: R,
    state: StateDb,
    store: Store,
}

/// An artifact that was not found as its row says. After `replication.gate_grace` it is looked at
/// again: Builder changes the object and the row one after the other.
struct Doubt {
    item: Unproven,
    since: Instant,
    found: Found,
}

enum Found {
    Right(Stored),
    Wrong(Checksum, Stored),
    Nothing,
    Refused(StoreError),
}

impl<R: Fn(Settled)> Prover<'_, R> {
    /// Looks at each once. Returns whether some are left.
    async fn round(&self) -> Result<bool, ReplicationError> {
        let (mut after, mut doubts) = (String::new(), VecDeque::new());
        let (mut failed, mut in_a_row) = (None, 0);
        loop {
            let page = self.state.unproven_after(&after, PAGE_ROWS).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.key);
            for (item, checksum) in self.named(page).await? {
                self.judge_old(&mut doubts).await?;
                match self.read(&item.key).await {
                    Ok(Found::Wrong(found, stored)) if found == checksum => {
                        in_a_row = 0;
                        self.settle(&item, Found::Right(stored)).await?;
                    }
                    Ok(found) => {
                        in_a_row = 0;
                        doubts.push_back(Doubt {
                            item,
                            since: Instant::now(),
                            found,
                        });
                    }
                    // An object that always fails does not keep the others waiting.
                    Err(error) if error.is_transient() && in_a_row + 1 < MANY_FAILED => {
                        in_a_row += 1;
                        failed.get_or_insert(error);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let grace = self.config.replication.gate_grace;
        while let Some(doubt) = doubts.pop_front() {
            tokio::time::sleep_until((doubt.since + grace).into()).await;
            self.judge(doubt).await?;
        }
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(self.state.count_unproven().await? > 0),
        }
    }

    /// Returns those artifacts that rows still name, and that are not recorded as unavailable. The
    /// others are settled.
    async fn named(
        &self,
        page: Vec<Unproven>,
    ) -> Result<Vec<(Unproven, Checksum)>, ReplicationError> {
        let _no_pass = self.beside.rows.lock().await;
        let session = LocalCluster::of(self.config).builder().await?;
        let packages: Vec<(String, String)> = page
            .iter()
            .filter_map(|item| package_of_key(&item.key))
            .map(|(ident, target)| (ident.to_string(), target.to_string()))
            .collect();
        let idents: Vec<&str> = packages.iter().map(|(ident, _)| ident.as_str()).collect();
        let targets: Vec<&str> = packages.iter().map(|(_, target)| target.as_str()).collect();
        let rows = BuilderDb::of(&session).packages_named(&idents, &targets);
        let rows: Vec<PackageRow> = rows.await?;
        let named: HashSet<(String, Checksum)> =
            rows.iter().filter_map(PackageRow::artifact).collect();
        let unavailable = SpareDb::of(&session).unavailable_bytes().await?;
        let mut left = Vec::new();
        for item in page {
            let checksum = item.checksum.parse::<Checksum>().ok();
            let checksum = checksum.filter(|checksum| {
                named.contains(&(item.key.clone(), *checksum))
                    && !unavailable.contains(&(item.key.clone(), item.checksum.clone()))
            });
            match checksum {
                Some(checksum) => left.push((item, checksum)),
                None => self.forget(&item, Settled::Gone).await?,
            }
        }
        Ok(left)
    }

    /// Reads and hashes an object. The bytes are called wrong until they are compared.
    async fn read(&self, key: &str) -> Result<Found, StoreError> {
        match hash(&self.store, key, Some(self.throttle)).await {
            Ok(Some((found, stored))) => Ok(Found::Wrong(found, stored)),
            Ok(None) => Ok(Found::Nothing),
            Err(error) if error.may_be_of_the_object() => Ok(Found::Refused(error)),
            Err(error) => Err(error),
        }
    }

    /// Judges the doubts whose grace is over.
    async fn judge_old(&self, doubts: &mut VecDeque<Doubt>) -> Result<(), ReplicationError> {
        let grace = self.config.replication.gate_grace;
        let is_old = |doubt: &Doubt| doubt.since.elapsed() >= grace;
        while doubts.front().is_some_and(is_old)
            && let Some(doubt) = doubts.pop_front()
        {
            self.judge(doubt).await?;
        }
        Ok(())
    }

    /// Looks again at an artifact, and records it if it is as before. Otherwise it stays unproven,
    /// and is read again.
    async fn judge(&self, doubt: Doubt) -> Result<(), ReplicationError> {
        let key = &doubt.item.key;
        let stays = match &doubt.found {
            Found::Right(_) => true,
            Found::Wrong(_, stored) => self.store.head(key).await?.as_ref() == Some(stored),
            Found::Nothing => {
                let session = LocalCluster::of(self.config).builder().await?;
                bucket_is_right(&self.store, &known_keys(&session).await?).await?;
                self.store.head(key).await?.is_none() && self.may_be_missing(key, &session).await?
            }
            Found::Refused(error) if error.is_of_the_key() => true,
            Found::Refused(_) => {
                let session = LocalCluster::of(self.config).builder().await?;
                serves_others(&self.store, &known_keys(&session).await?).await?
                    && matches!(self.read(key).await?, Found::Refused(_))
            }
        };
        match stays {
            true => self.settle(&doubt.item, doubt.found).await,
            false => Ok(()),
        }
    }

    /// Asks the fuse. Beyond its limit nothing is recorded: a sample of the artifacts shows that
    /// the bucket has lost many.
    async fn may_be_missing(
        &self,
        key: &str,
        session: &WriteSession,
    ) -> Result<bool, ReplicationError> {
        let admitted = fuse::admits_missing(self.config, &self.state, key, session).await?;
        if !admitted {
            log::warn!(
                "local: {key} is not in the shared bucket; it is not recorded as missing, because that is more than fuse.max_percent allows"
            );
        }
        Ok(admitted)
    }

    /// Records the result.
    async fn settle(&self, item: &Unproven, found: Found) -> Result<(), ReplicationError> {
        let _no_pass = self.beside.rows.lock().await;
        self.state.still_ours(self.lock).await?;
        let reason = match found {
            Found::Right(stored) => {
                self.state.prove(item, &stored).await?;
                (self.report)(Settled::Proven);
                return Ok(());
            }
            Found::Wrong(found, _) => {
                log::debug!(
                    "{} hashes to {found}, its row says {}",
                    item.key,
                    item.checksum
                );
                MissingReason::Damaged
            }
            Found::Nothing => MissingReason::Missing,
            Found::Refused(error) => reason_of(&error),
        };
        let settled = match self.record(item, reason).await? {
            true => Settled::Unavailable,
            false => Settled::Gone,
        };
        self.forget(item, settled).await
    }

    /// Records an artifact as unavailable, if its row still names these bytes. Returns whether it
    /// does.
    async fn record(
        &self,
        item: &Unproven,
        reason: MissingReason,
    ) -> Result<bool, ReplicationError> {
        let Some((ident, target)) = package_of_key(&item.key) else {
            return Ok(false);
        };
        let (ident, target) = (ident.to_string(), target.to_string());
        let unavailable = Unavailable {
            key: item.key.clone(),
            checksum: item.checksum.clone(),
            reason,
        };
        let session = LocalCluster::of(self.config).builder().await?;
        let spare = SpareDb::of(&session);
        let named = (ident.as_str(), target.as_str());
        let statement = spare.record_unavailable_beside(&unavailable, named, self.lock.token);
        let recorded = self.beside.recording.around(statement).await?;
        match recorded {
            true => log::warn!("peer: {} is {reason}; its row was copied before", item.key),
            // The row may be of another process by now.
            false => self.state.still_ours(self.lock).await?,
        }
        Ok(recorded)
    }

    async fn forget(&self, item: &Unproven, settled: Settled) -> Result<(), ReplicationError> {
        self.state.still_ours(self.lock).await?;
        self.state.forget_unproven(item).await?;
        (self.report)(settled);
        Ok(())
    }
}

/// Returns artifacts that local rows name.
async fn known_keys(session: &WriteSession) -> Result<Vec<String>, ReplicationError> {
    let rows = BuilderDb::of(session).some_packages().await?;
    let artifacts = rows.iter().filter_map(PackageRow::artifact);
    Ok(artifacts.map(|(key, _)| key).collect())
}
