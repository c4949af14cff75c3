//! The due verification. It runs beside the looks, but never beside a pass, and a repair follows it
//! if needed.

use super::{SpareWorker, Verifying};
use crate::cluster::VerificationRecord;
use crate::config::Config;
use crate::domain::EventKind;
use crate::observe::{Progress, Silent, Verified};
use crate::replication::ReplicationError;
use crate::service::plan::{Next, Plan, Rules};
use crate::verify::{Verification, verify};
use chrono::TimeDelta;
use std::sync::Arc;

/// Number of differences that are kept as text.
const EXAMPLES: usize = 5;
/// Wait before a verification that failed is tried again. It does not wait for the next day.
const VERIFY_RETRY_AFTER: TimeDelta = TimeDelta::minutes(30);

impl SpareWorker<'_> {
    pub(super) fn begin_verification(&mut self, config: &Arc<Config>) {
        self.set_verifying(true);
        self.plan.verified = self.writer.now();
        let config = config.clone();
        self.verification = Some(Box::pin(async move {
            let progress = Progress::new(Arc::new(Silent));
            verify(&config, config.verify.deep, &progress).await
        }));
    }

    pub(super) fn set_verifying(&mut self, verifying: bool) {
        self.plan.verifying = verifying;
        self.writer
            .update(|state| state.checks.verifying = verifying);
    }

    /// Gives the verification up if it delays a pass for too long. Passes wait for a verification,
    /// because a pass would replace its database.
    pub(super) fn give_up_verification_if_late(&mut self, config: &Config) {
        let now = self.writer.now();
        let behind = self
            .writer
            .read(|state| state.lag(now))
            .map_or(0.0, |lag| lag.seconds);
        let in_the_way = Plan {
            verifying: false,
            ..self.plan.clone()
        };
        let in_the_way = in_the_way.next(&Rules::of(config), now) == Next::Pass;
        let late = behind > config.replication.rpo.as_secs_f64() / 2.0;
        if self.plan.verifying && in_the_way && late {
            self.verification = None;
            self.set_verifying(false);
            let text = "given up, because changes waited for half of replication.rpo; verify.deep reads every artifact: schedule it for a quiet time";
            self.verification_failed(text);
        }
    }

    pub(super) fn verification_failed(&mut self, text: &str) {
        log::warn!("local: the verification could not be finished: {text}");
        self.verify_again = Some(self.writer.clock.steady() + VERIFY_RETRY_AFTER);
        self.writer.counters.error("local", "verification");
        self.writer
            .update(|state| state.checks.verification_error = Some(text.to_string()));
        self.writer.note(EventKind::Verification, text);
    }

    pub(super) async fn verified(&mut self, ended: Result<Verification, ReplicationError>) {
        self.verification = None;
        self.set_verifying(false);
        let found = match ended {
            Ok(found) => found,
            Err(error) => return self.verification_failed(&error.to_string()),
        };
        let number = found.differences.len();
        let record = VerificationRecord {
            time: self.writer.now(),
            deep: found.deep,
            differences: number as i64,
            lsn: found.point.lsn.clone(),
        };
        let examples: Vec<String> = found
            .differences
            .iter()
            .take(EXAMPLES)
            .map(|d| format!("{} {}: {}", d.kind, d.name, d.text))
            .collect();
        let depth = if found.deep {
            "deep verification"
        } else {
            "verification"
        };
        let text = match examples.first() {
            None => format!(
                "{depth}: no differences, {} artifacts, {} rows",
                found.artifacts, found.rows
            ),
            Some(first) => format!("{depth}: {number} differences, for example {first}"),
        };
        if number == 0 {
            log::info!("local: {text}");
        } else {
            log::warn!("local: {text}");
        }
        self.writer.note(EventKind::Verification, &text);
        if let Err(error) = self.leadership.state.record_verification(&record).await {
            log::warn!("{error}");
        }
        self.writer.update(|state| {
            state.checks.verification_error = None;
            state.checks.verified = Some(Verified { record, examples });
        });
        // Differences are repaired by another copy, and verified again after that. This happens
        // once, because a difference that stays cannot be repaired by more copies.
        if !std::mem::take(&mut self.rechecking) {
            let has = |kinds: &[&str]| found.differences.iter().any(|d| kinds.contains(&d.kind));
            self.rows_differ |= has(&["database", "table"]);
            self.plan.repair |= has(&["database", "table", "artifact"]);
        }
    }
}

/// Returns the result of the running verification; never returns if there is none.
pub(super) async fn finished(
    verification: &mut Option<Verifying>,
) -> Result<Verification, ReplicationError> {
    match verification {
        Some(verification) => verification.await,
        None => std::future::pending().await,
    }
}
