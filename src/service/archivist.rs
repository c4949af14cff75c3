//! Looks after the archives: makes a generation of each by its schedule, prunes, and reads a part of
//! the files back every day. The places do not wait for each other.
//!
//! It works beside replication, and also on a cluster without a role or a peer: an archive needs
//! only the local cluster. Of several processes of a cluster the one at work does it.

use super::{Configs, StatusWriter, next};
use crate::archive::{self, Extent, Making, Place, Pruning};
use crate::config::{ArchivePlan, Config};
use crate::domain::{ErrorCode, EventKind};
use crate::observe::{
    ArchiveFacts, ArchiveProof, ArchiveTrouble, NewestGeneration, Progress, Silent, Work,
};
use crate::replication::ReplicationError;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::join_all;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Longest interval between two looks at the clock, because a clock may be set.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Interval after a failure.
const RETRY_AFTER: TimeDelta = TimeDelta::minutes(1);
/// Percentage of the artifacts that one verification reads: each of them once in 30 days, if there is
/// a verification every day.
const DAILY_PERCENT: f64 = 100.0 / 30.0;

/// Works with the configuration in force, and starts again with another one.
pub(super) async fn keep_archiving(
    writer: &StatusWriter,
    mut configs: Configs,
    data: &Arc<Path>,
) -> Infallible {
    loop {
        let config = configs.borrow_and_update().clone();
        let plans = config.as_ref().map_or(&[][..], |config| &config.archives);
        let now = writer.now();
        let facts = plans.iter().map(|plan| ArchiveFacts {
            pause: plan
                .schedule
                .as_ref()
                .map(|schedule| delta(schedule.longest_pause())),
            ..ArchiveFacts::new(&plan.name, now)
        });
        let facts: Vec<ArchiveFacts> = facts.collect();
        writer.update(|state| state.archives = facts);
        let Some(config) = config.as_ref().filter(|config| !config.archives.is_empty()) else {
            next(&mut configs).await;
            continue;
        };
        let places = (0..plans.len()).map(|number| {
            let keeper = Keeper {
                writer,
                config,
                data,
                number,
            };
            Box::pin(async move { keeper.keep().await })
        });
        tokio::select! {
            _ = join_all(places) => {}
            () = changed(&mut configs, config) => {}
        }
    }
}

/// Waits for a configuration with other archives, or another local cluster.
async fn changed(configs: &mut Configs, config: &Config) {
    loop {
        next(configs).await;
        let same = configs.borrow_and_update().as_ref().is_some_and(|new| {
            new.archives == config.archives
                && new.local == config.local
                && new.verify.schedule == config.verify.schedule
                && new.artifacts.mode == config.artifacts.mode
        });
        if !same {
            return;
        }
    }
}

fn delta(duration: Duration) -> TimeDelta {
    TimeDelta::from_std(duration).unwrap_or(TimeDelta::MAX)
}

/// Looks after one archive.
struct Keeper<'a> {
    writer: &'a StatusWriter,
    config: &'a Arc<Config>,
    data: &'a Arc<Path>,
    /// Its place in the configuration.
    number: usize,
}

impl Keeper<'_> {
    fn plan(&self) -> &ArchivePlan {
        &self.config.archives[self.number]
    }

    fn update(&self, change: impl FnOnce(&mut ArchiveFacts)) {
        self.writer.update(|state| {
            if let Some(facts) = state.archives.get_mut(self.number) {
                change(facts);
            }
        });
    }

    async fn keep(&self) -> Infallible {
        let begun = self.writer.now();
        let mut looked = self.look().await;
        let (mut archived, mut verified) = (begun, begun);
        loop {
            let now = self.writer.now();
            // A clock that was set back must not stop the schedule.
            archived = archived.min(now);
            verified = verified.min(now);
            if !looked {
                self.wait_until(now + RETRY_AFTER).await;
                looked = self.look().await;
                continue;
            }
            let due = self
                .plan()
                .schedule
                .as_ref()
                .and_then(|s| s.next_after(archived));
            let check = self
                .config
                .verify
                .schedule
                .as_ref()
                .and_then(|s| s.next_after(verified));
            self.update(|facts| facts.due = due);
            let Some(first) = due.into_iter().chain(check).min() else {
                // Everything is done by hand.
                return std::future::pending().await;
            };
            if first > now {
                self.wait_until(first).await;
                continue;
            }
            if !self.may_work() {
                self.wait_until(now + delta(LOOK_INTERVAL)).await;
                continue;
            }
            if due.is_some_and(|due| due <= now) {
                archived = now;
                while !self.make().await && !self.is_due_again(archived) {
                    self.wait_until(self.writer.now() + RETRY_AFTER).await;
                }
            } else {
                verified = now;
                self.verify().await;
            }
        }
    }

    /// Waits for a time by the system's clock, which may be set in the meantime.
    async fn wait_until(&self, time: DateTime<Utc>) {
        let begun = self.writer.now();
        loop {
            let now = self.writer.now();
            if now >= time || now < begun - TimeDelta::seconds(2) {
                return;
            }
            let rest = (time - now).to_std().unwrap_or_default();
            tokio::time::sleep(rest.min(LOOK_INTERVAL)).await;
        }
    }

    fn is_due_again(&self, archived: DateTime<Utc>) -> bool {
        let next = self
            .plan()
            .schedule
            .as_ref()
            .and_then(|s| s.next_after(archived));
        next.is_some_and(|next| next <= self.writer.now())
    }

    /// Returns whether this process works on the cluster: it holds the working lock, or the cluster
    /// has no role, and so nobody takes the lock.
    fn may_work(&self) -> bool {
        self.writer.read(|state| match state.work {
            Work::Following | Work::Primary => state.lock.active,
            Work::Starting => state.cluster.role.is_none(),
            Work::Standby | Work::Fenced => false,
        })
    }

    /// Reads which generations are there. Returns whether it could.
    async fn look(&self) -> bool {
        let looked = async {
            let listed = archive::list(&Place::open(self.plan())?).await?;
            Ok((listed, archive::last_proof(self.plan(), Some(self.data))?))
        };
        let looked: Result<_, ReplicationError> = looked.await;
        match looked {
            Ok((listed, proof)) => {
                let newest = listed
                    .iter()
                    .find_map(|listed| listed.manifest.as_ref().ok());
                let newest = newest.map(newest_of);
                self.update(|facts| {
                    facts.generations = Some(listed.len() as u64);
                    facts.newest = newest;
                    facts.proof.verified = proof;
                });
                self.works();
                true
            }
            Err(error) => {
                self.failed(&error);
                false
            }
        }
    }

    /// Makes a generation, and prunes. Returns whether a generation was made, or another process has
    /// made one.
    async fn make(&self) -> bool {
        let now = self.writer.now();
        self.update(|facts| facts.making = Some(now));
        let (config, plan, data) = (self.config, self.plan(), Some(&**self.data));
        let made = async {
            let progress = Progress::new(Arc::new(Silent));
            let made = archive::create(config, plan, data, &Making::default(), &progress).await?;
            let pruned = archive::prune(config, plan, data, &Pruning::default()).await;
            Ok((made, pruned))
        };
        let made: Result<_, ReplicationError> = Box::pin(made).await;
        self.update(|facts| facts.making = None);
        match made {
            Ok((made, pruned)) => {
                let newest = newest_of(&made.manifest);
                log::info!(
                    "archive {}: generation {} was made: {} new artifacts",
                    self.plan().name,
                    newest.name,
                    made.new_artifacts
                );
                self.update(|facts| {
                    facts.newest = Some(newest);
                    facts.generations = facts.generations.map(|number| number + 1);
                });
                match pruned {
                    Ok(pruned) => {
                        let left = pruned
                            .generations
                            .iter()
                            .filter(|one| !one.reasons.is_empty());
                        let left = left.count() as u64;
                        self.update(|facts| facts.generations = Some(left));
                        self.works();
                    }
                    Err(error) => self.failed(&error),
                }
                true
            }
            // The verb, or the service of another node, is at work there.
            Err(error) if error.code() == ErrorCode::Locked => {
                log::info!("{error}");
                self.look().await
            }
            Err(error) => {
                self.failed(&error);
                false
            }
        }
    }

    /// Reads a part of the files back.
    async fn verify(&self) {
        let plan = self.plan();
        let extent = Extent {
            name: None,
            percent: DAILY_PERCENT,
            rate: plan
                .verify_budget
                .or(self.config.replication.bandwidth_limit),
        };
        let progress = Progress::new(Arc::new(Silent));
        let verified = archive::verify(plan, Some(self.data), &extent, &progress);
        match Box::pin(verified).await {
            Ok(verified) => {
                let example = verified.faults.first();
                let example = example.map(|fault| format!("{}: {}", fault.path, fault.text));
                if let Some(example) = &example {
                    let text = format!(
                        "archive {}: {} files are missing or damaged, for example {example}",
                        self.plan().name,
                        verified.faults.len()
                    );
                    log::error!("{text}");
                    self.writer.note(EventKind::Archive, &text);
                }
                let proof = ArchiveProof {
                    verified: Some(self.writer.now()),
                    faults: verified.faults.len() as u64,
                    example,
                    oldest: verified.oldest_proof,
                };
                self.update(|facts| facts.proof = proof);
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Shows the reason of a failure. An equal reason keeps its start time.
    fn failed(&self, error: &ReplicationError) {
        let code = error.code();
        self.writer.counters.error("archive", code.into_str());
        let mut begins = false;
        let now = self.writer.now();
        self.update(|facts| {
            let old = facts.trouble.take().filter(|old| old.code == code);
            begins = old.is_none();
            facts.trouble = Some(ArchiveTrouble {
                code,
                text: error.to_string(),
                next_step: error.next_step(),
                since: old.map_or(now, |old| old.since),
            });
        });
        if begins {
            log::warn!("{error}; next step: {}", error.next_step());
            self.writer.note(EventKind::Archive, &error.to_string());
        } else {
            log::debug!("{error}");
        }
    }

    fn works(&self) {
        let mut ended = None;
        self.update(|facts| ended = facts.trouble.take());
        if let Some(trouble) = ended {
            let text = format!(
                "archive {}: works again; {} ended after {} s",
                self.plan().name,
                trouble.code,
                (self.writer.now() - trouble.since).num_seconds()
            );
            log::info!("{text}");
            self.writer.note(EventKind::Archive, &text);
        }
    }
}

fn newest_of(manifest: &archive::Manifest) -> NewestGeneration {
    NewestGeneration {
        name: manifest.name.clone(),
        time: manifest.time,
        made: manifest.finished,
        joint: manifest.joint,
    }
}
