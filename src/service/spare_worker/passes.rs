//! Passes, and the care of artifacts that the primary did not have.

use super::SpareWorker;
use super::interrupts::{given_up, release_when_moving};
use super::proving::proving_ended;
use crate::cluster::{Confirmation, LocalCluster};
use crate::config::Config;
use crate::domain::EventKind;
use crate::observe::{Baseline, ServiceState};
use crate::replication::{
    Carrier, Options, Outcome, RETIRED, ReplicationError, Report, STAGED, retry_unavailable, sweep,
    sync,
};
use crate::service::load_state::recall;
use crate::service::{StatusWriter, sight};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

impl SpareWorker<'_> {
    pub(super) async fn pass(&mut self, config: &Arc<Config>) -> Result<(), ReplicationError> {
        let (started, begun) = (self.writer.now(), Instant::now());
        self.prove_if_due(config);
        self.writer
            .update(|state| state.spare.baseline = Some(Baseline { started }));
        let options = Options {
            lock: Some(self.leadership.lock),
            throttle: Some(self.writer.throttle.clone()),
            baseline: self.rows_differ,
            spool: Some(self.leadership.data.clone()),
            fenced_by_us: false,
        };
        let progress = self.writer.progress();
        let rows = self.beside.rows.clone();
        let mut proved = None;
        let report = tokio::select! {
            report = async {
                let _no_judgement = rows.lock().await;
                sync(config, options, &progress).await
            } => Some(report),
            why = given_up(self.writer, self.configs.clone(), config) => {
                log::info!("the running pass was given up: {why}");
                None
            }
            never = release_when_moving(self.writer) => match never {},
            never = async {
                proved = Some(proving_ended(&mut self.proving).await);
                std::future::pending::<Infallible>().await
            } => match never {},
        };
        if let Some(ended) = proved {
            self.proved(ended);
        }
        // The counters come first: a reader who sees that the pass is over also finds it in the
        // metrics.
        let counters = &self.writer.counters;
        match &report {
            None => counters.baseline("given_up"),
            Some(Err(_)) => counters.baseline("failed"),
            Some(Ok(report)) if matches!(report.outcome, Outcome::Copied(_)) => {
                counters.baseline("done");
            }
            Some(Ok(_)) => {}
        }
        self.writer.update(|state| state.spare.baseline = None);
        self.unsettled = !matches!(report, Some(Ok(_)));
        match report {
            None => Ok(()),
            Some(Err(error)) => Err(error),
            Some(Ok(report)) => self.passed(config, &report, begun).await,
        }
    }

    async fn passed(
        &mut self,
        config: &Config,
        report: &Report,
        begun: Instant,
    ) -> Result<(), ReplicationError> {
        let now = self.writer.now();
        self.show_mode(&report.chosen);
        if let Outcome::Copied(copied) = &report.outcome {
            log::info!(
                "copied: {} packages at {}, {} artifacts copied",
                report.packages,
                copied.point.lsn,
                report.artifacts.copied
            );
        }
        self.plan.copied = true;
        self.plan.waiting = None;
        sight::look_again(self.writer, config).await;
        let differed = self.writer.read(|state| {
            state
                .checks
                .verified
                .as_ref()
                .is_some_and(|verified| verified.record.differences > 0)
        });
        if differed {
            self.rechecking |= self.plan.repair;
            self.plan.verified = chrono::DateTime::UNIX_EPOCH;
        }
        self.plan.repair = false;
        self.rows_differ = false;
        self.plan.passed = now;
        self.plan.retried = now;
        self.wait_no_more();
        // Commits since the snapshot are not known yet.
        self.plan.looked = None;
        self.plan.unavailable = !report.unavailable.is_empty();
        self.writer.update(|state| {
            state.local.fenced = Some(true);
            state.spare.unknown_database = false;
        });
        self.settled();
        if let Outcome::Copied(copied) = &report.outcome {
            let confirmation = Confirmation {
                time: copied.point.commit_time,
                clock_offset_seconds: self.clock_offset,
            };
            self.leadership.state.confirm(confirmation).await?;
            // The confirmation is at least as fresh as the start of the pass.
            self.writer
                .update(|state| state.spare.confirmed = Some(begun));
        }
        recall(self.writer, config, &self.leadership.state).await?;
        if report.chosen.stream.is_none() {
            self.sweep(config).await;
        }
        self.count_aside(config).await;
        Ok(())
    }

    /// Deletes artifacts whose packages were deleted. Between two passes no other task works on a
    /// key. Deletion is never urgent.
    async fn sweep(&self, config: &Config) {
        let swept = async {
            let Some(store) = LocalCluster::of(config).own_store()? else {
                return Ok(());
            };
            let leadership = self.leadership;
            sweep(config, &leadership.state, leadership.lock, &store, |_| {
                Some(())
            })
            .await
            .map(drop)
        };
        let swept: Result<(), ReplicationError> = swept.await;
        if let Err(error) = swept {
            log::warn!("{error}; artifacts of deleted packages are removed later");
        }
    }

    /// Counts our objects beside the artifacts. An unknown number is no failure.
    async fn count_aside(&self, config: &Config) {
        let Ok(store) = LocalCluster::of(config).reading_store() else {
            return;
        };
        let count = async |prefix: &str| {
            let mut found = 0;
            let listed = store
                .list(prefix, async |page| {
                    found += page.len() as u64;
                    Ok(())
                })
                .await;
            listed.is_ok().then_some(found)
        };
        let (staged, retired) = (count(STAGED).await, count(RETIRED).await);
        self.writer.update(|state| {
            if let Some(artifacts) = &mut state.spare.artifacts {
                artifacts.staged = staged;
                artifacts.retired = retired;
            }
        });
    }

    pub(super) async fn retry(&mut self, config: &Config) -> Result<(), ReplicationError> {
        self.plan.retried = self.writer.now();
        // Between two passes no other task works on a key.
        let carrier = Carrier::open(config, &self.writer.throttle)?;
        let brought =
            retry_unavailable(config, self.leadership.lock, &carrier, |_| Some(())).await?;
        if brought > 0 {
            note_brought(self.writer, brought);
            recall(self.writer, config, &self.leadership.state).await?;
        }
        self.plan.unavailable = self.writer.read(ServiceState::waits_for_artifacts);
        Ok(())
    }
}

pub(super) fn note_brought(writer: &StatusWriter, brought: usize) {
    let text = format!("{brought} artifacts that were unavailable are here now");
    log::info!("local: {text}");
    writer.note(EventKind::Artifacts, &text);
}
