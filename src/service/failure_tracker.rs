//! Loops that fail do so calmly: waits grow to a cap; the first failure, a reminder, and the
//! recovery are logged.

use crate::domain::ErrorCode;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use chrono::{DateTime, TimeDelta, Utc};
use std::time::Duration;

/// Interval between two reminders of the same failure.
const REMINDER_INTERVAL: TimeDelta = TimeDelta::minutes(10);

/// Interval between retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// The next try may succeed in a moment: waits from 1 s to 1 min.
    Passing,
    /// Somebody must act first: waits from 15 s to 10 min. A changed configuration ends the wait.
    Operator,
}

impl Pace {
    fn waits(self) -> ExponentialBackoff {
        let (least, most) = match self {
            Pace::Passing => (1, 60),
            Pace::Operator => (15, 600),
        };
        ExponentialBuilder::default()
            .with_min_delay(Duration::from_secs(least))
            .with_max_delay(Duration::from_secs(most))
            .without_max_times()
            .with_jitter()
            .build()
    }
}

/// A task that may fail for a long time.
pub(super) struct FailureTracker {
    /// The working state of the task, for the line of its recovery.
    about: &'static str,
    standing: Option<Standing>,
}

struct Standing {
    /// The kind of the failure. Another kind is logged; the same kind with another text is not.
    code: ErrorCode,
    since: DateTime<Utc>,
    logged: DateTime<Utc>,
    tries: u32,
    pace: Pace,
    waits: ExponentialBackoff,
}

impl FailureTracker {
    pub(super) fn new(about: &'static str) -> Self {
        FailureTracker {
            about,
            standing: None,
        }
    }

    pub(super) fn stands(&self) -> bool {
        self.standing.is_some()
    }

    /// Logs the failure if it is new or due for a reminder, and returns the wait before the next
    /// try.
    pub(super) fn failed(
        &mut self,
        now: DateTime<Utc>,
        code: ErrorCode,
        text: &str,
        pace: Pace,
    ) -> Duration {
        let news = self.standing.as_ref().is_none_or(|old| old.code != code);
        if news {
            log::warn!("{text}");
        }
        let since = self.standing.as_ref().map_or(now, |old| old.since);
        let old = self.standing.take().filter(|old| old.pace == pace);
        let mut standing = Standing {
            code,
            since,
            logged: match &old {
                Some(old) if !news => old.logged,
                _ => now,
            },
            tries: old.as_ref().map_or(0, |old| old.tries) + 1,
            pace,
            waits: old.map_or_else(|| pace.waits(), |old| old.waits),
        };
        if now - standing.logged >= REMINDER_INTERVAL {
            standing.logged = now;
            let minutes = (now - since).num_minutes();
            log::warn!(
                "still failing after {minutes} min and {} tries: {text}",
                standing.tries
            );
        }
        let wait = standing.waits.next().unwrap_or(Duration::from_secs(600));
        self.standing = Some(standing);
        wait
    }

    /// Resets the waits, so that the next failure is tried again soon. Something has changed that
    /// may help.
    pub(super) fn begin_anew(&mut self) {
        if let Some(standing) = &mut self.standing {
            standing.waits = standing.pace.waits();
        }
    }

    pub(super) fn over(&mut self, now: DateTime<Utc>) {
        if let Some(standing) = self.standing.take() {
            let seconds = (now - standing.since).num_seconds();
            log::info!(
                "{} again, after {seconds} s and {} failed tries",
                self.about,
                standing.tries
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_cap_and_begin_anew() {
        let mut failures = FailureTracker::new("works");
        let now = DateTime::default();
        let mut waits = Vec::new();
        for _ in 0..12 {
            waits.push(failures.failed(now, ErrorCode::PeerUnreachable, "refused", Pace::Passing));
        }
        assert!(waits[0] < Duration::from_secs(3), "{waits:?}");
        assert!(
            waits.iter().all(|wait| *wait <= Duration::from_secs(121)),
            "{waits:?}"
        );
        assert!(waits[11] >= Duration::from_secs(60), "{waits:?}");
        failures.begin_anew();
        let wait = failures.failed(now, ErrorCode::PeerUnreachable, "refused", Pace::Passing);
        assert!(wait < Duration::from_secs(3));
        failures.over(now);
        assert!(!failures.stands());
    }
}
