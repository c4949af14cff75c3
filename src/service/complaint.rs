//! Loops that fail, fail calmly: waits that grow to a cap, the first failure logged, a reminder, and the recovery.

use crate::domain::ErrorCode;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use chrono::{DateTime, TimeDelta, Utc};
use std::time::Duration;

const REMINDER: TimeDelta = TimeDelta::minutes(10);

/// How eagerly something is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// It may well work in a moment: from 1 s to 1 min.
    Passing,
    /// It waits for somebody to act: from 15 s to 10 min. A changed configuration ends the wait.
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

/// One thing that may fail for a long time.
pub struct Complaint {
    /// What fails, for the lines of recovery.
    about: &'static str,
    standing: Option<Standing>,
}

struct Standing {
    /// The kind of failure: another one is news, the same in other words is not.
    code: ErrorCode,
    since: DateTime<Utc>,
    told: DateTime<Utc>,
    tries: u32,
    pace: Pace,
    waits: ExponentialBackoff,
}

impl Complaint {
    pub fn new(about: &'static str) -> Self {
        Complaint {
            about,
            standing: None,
        }
    }

    pub fn stands(&self) -> bool {
        self.standing.is_some()
    }

    /// Logs what is worth a line, and returns how long to wait before the next try.
    pub fn failed(
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
            told: match &old {
                Some(old) if !news => old.told,
                _ => now,
            },
            tries: old.as_ref().map_or(0, |old| old.tries) + 1,
            pace,
            waits: old.map_or_else(|| pace.waits(), |old| old.waits),
        };
        if now - standing.told >= REMINDER {
            standing.told = now;
            let minutes = (now - since).num_minutes();
            log::warn!(
                "still so after {minutes} min and {} tries: {text}",
                standing.tries
            );
        }
        let wait = standing.waits.next().unwrap_or(Duration::from_secs(600));
        self.standing = Some(standing);
        wait
    }

    /// The next failure is tried again soon. Something has changed that may help.
    pub fn begin_anew(&mut self) {
        if let Some(standing) = &mut self.standing {
            standing.waits = standing.pace.waits();
        }
    }

    pub fn over(&mut self, now: DateTime<Utc>) {
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
        let mut complaint = Complaint::new("works");
        let now = DateTime::default();
        let mut waits = Vec::new();
        for _ in 0..12 {
            waits.push(complaint.failed(now, ErrorCode::PeerUnreachable, "refused", Pace::Passing));
        }
        assert!(waits[0] < Duration::from_secs(3), "{waits:?}");
        assert!(
            waits.iter().all(|wait| *wait <= Duration::from_secs(121)),
            "{waits:?}"
        );
        assert!(waits[11] >= Duration::from_secs(60), "{waits:?}");
        complaint.begin_anew();
        let wait = complaint.failed(now, ErrorCode::PeerUnreachable, "refused", Pace::Passing);
        assert!(wait < Duration::from_secs(3));
        complaint.over(now);
        assert!(!complaint.stands());
    }
}
