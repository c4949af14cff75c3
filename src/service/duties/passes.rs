//! Passes, and the care of artifacts that the primary did not have.

use super::Duties;
use super::interrupts::{given_up, release_when_moving};
use crate::cluster::{Confirmation, LocalStore, Store};
use crate::config::Config;
use crate::domain::{EventKind, Side};
use crate::observe::{Baseline, State};
use crate::replication::{
    Courier, Options, Outcome, PassError, RETIRED, Report, STAGED, retry_unavailable, sweep, sync,
};
use crate::service::tenure::recall;
use crate::service::{Desk, sight};
use std::sync::Arc;
use std::time::Instant;

impl Duties<'_> {
    pub(super) async fn pass(&mut self, config: &Arc<Config>) -> Result<(), PassError> {
        let (started, begun) = (self.desk.now(), Instant::now());
        self.desk
            .update(|state| state.baseline = Some(Baseline { started }));
        let options = Options {
            lock: Some(self.tenure.lock),
            throttle: Some(self.desk.throttle.clone()),
            baseline: self.rows_differ,
            spool: Some(self.tenure.data.clone()),
            fenced_by_us: false,
        };
        let progress = self.desk.progress();
        let report = tokio::select! {
            report = sync(config, options, &progress) => Some(report),
            why = given_up(self.desk, self.configs.clone(), config) => {
                log::info!("the running pass was given up: {why}");
                None
            }
            never = release_when_moving(self.desk) => match never {},
        };
        // The counters come first: a reader who sees that the pass is over also finds it in the
        // metrics.
        let counters = &self.desk.counters;
        match &report {
            None => counters.baseline("given_up"),
            Some(Err(_)) => counters.baseline("failed"),
            Some(Ok(report)) if matches!(report.outcome, Outcome::Copied(_)) => {
                counters.baseline("done");
            }
            Some(Ok(_)) => {}
        }
        self.desk.update(|state| state.baseline = None);
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
    ) -> Result<(), PassError> {
        let now = self.desk.now();
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
        sight::look_again(self.desk, config).await;
        let differed = self.desk.read(|state| {
            state
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
        self.plan.lacking = !report.unavailable.is_empty();
        self.desk.update(|state| {
            state.local.fenced = Some(true);
            state.astray = false;
        });
        self.settled();
        if let Outcome::Copied(copied) = &report.outcome {
            let confirmation = Confirmation {
                time: copied.point.commit_time,
                clock_offset_seconds: self.clock_offset,
            };
            self.tenure.state.confirm(confirmation).await?;
            // The confirmation is at least as fresh as the start of the pass.
            self.desk.update(|state| state.confirmed = Some(begun));
        }
        recall(self.desk, config, &self.tenure.state).await?;
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
            let store = LocalStore::open(&config.local.s3)?;
            sweep(config, &self.tenure.state, self.tenure.lock, &store, |_| {
                Some(())
            })
            .await
        };
        if let Err(error) = swept.await {
            log::warn!("{error}; artifacts of deleted packages are removed later");
        }
    }

    /// Counts our objects beside the artifacts. An unknown number is no failure.
    async fn count_aside(&self, config: &Config) {
        let Ok(store) = Store::open(Side::Local, &config.local.s3) else {
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
        self.desk.update(|state| {
            if let Some(artifacts) = &mut state.artifacts {
                artifacts.staged = staged;
                artifacts.retired = retired;
            }
        });
    }

    pub(super) async fn retry(&mut self, config: &Config) -> Result<(), PassError> {
        self.plan.retried = self.desk.now();
        // Between two passes no other task works on a key.
        let courier = Courier::open(config, &self.desk.throttle)?;
        let brought = retry_unavailable(config, self.tenure.lock, &courier, |_| Some(())).await?;
        if brought > 0 {
            note_brought(self.desk, brought);
            recall(self.desk, config, &self.tenure.state).await?;
        }
        self.plan.lacking = self.desk.read(State::waits_for_artifacts);
        Ok(())
    }
}

pub(super) fn note_brought(desk: &Desk, brought: usize) {
    log::info!("peer: {brought} artifacts that were missing there exist now, and were copied");
    let text = format!("{brought} artifacts that were missing on the primary were copied");
    desk.note(EventKind::Artifacts, &text);
}
