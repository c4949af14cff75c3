//! The waits before a retry, by a time that no change of a clock delays.

use super::SpareWorker;
use crate::service::plan::LONGEST_WAIT;
use chrono::TimeDelta;

/// Minimum interval between two verifications that missing local artifacts start.
const MISSING_VERIFY_INTERVAL: TimeDelta = TimeDelta::minutes(30);

impl SpareWorker<'_> {
    pub(super) fn verify_if_due(&mut self) {
        let steady = self.writer.clock.steady();
        if self.verify_again.is_some_and(|again| again <= steady) {
            self.verify_again = None;
            self.plan.verified = chrono::DateTime::UNIX_EPOCH;
        }
        self.verify_what_is_missing();
    }

    /// Starts a verification if artifacts are missing in the local bucket. The verification finds
    /// all of them and has them copied again. It is started only once in a while, because a copy
    /// cannot bring back artifacts that are missing on the primary too.
    pub(super) fn verify_what_is_missing(&mut self) {
        let missing = self.writer.read(|state| {
            let sampled = state.spare.sampled.as_ref();
            sampled.is_some_and(|sampled| !sampled.absent.is_empty())
        });
        let steady = self.writer.clock.steady();
        let lately = self
            .missing_since
            .is_some_and(|then| steady - then < MISSING_VERIFY_INTERVAL);
        if missing && !lately && !self.plan.verifying {
            self.missing_since = Some(steady);
            self.plan.verified = chrono::DateTime::UNIX_EPOCH;
        }
    }

    /// Converts the waits into times of the clock. The plan uses the clock; the waits use a time
    /// that nobody sets.
    pub(super) fn mind_the_clock(&mut self) {
        let now = self.writer.now();
        self.plan.mind_the_clock(now);
        let clock = &self.writer.clock;
        self.wait_until = self.wait_until.filter(|until| *until > clock.steady());
        self.plan.not_before = self.wait_until.map(|until| clock.from_steady(until));
    }

    pub(super) fn wait_no_more(&mut self) {
        self.wait_until = None;
        self.plan.not_before = None;
    }

    pub(super) fn wait_for(&mut self, wait: TimeDelta) {
        self.wait_until = Some(self.writer.clock.steady() + wait.min(LONGEST_WAIT));
        self.mind_the_clock();
    }

    /// Returns the earlier of `until` and the next retry.
    pub(super) fn soonest(
        &self,
        until: chrono::DateTime<chrono::Utc>,
    ) -> chrono::DateTime<chrono::Utc> {
        // Half replaced bytes come before a handover.
        let handover = self.handover_at.filter(|_| !self.unsettled);
        let again = [self.verify_again, self.prove_again, handover];
        again
            .into_iter()
            .flatten()
            .map(|steady| self.writer.clock.from_steady(steady))
            .fold(until, chrono::DateTime::min)
    }
}
