//! The plan: the duty that is due now, and the time of the next look. It decides from times alone;
//! other modules carry it out.

use crate::config::{Config, Schedule};
use chrono::{DateTime, TimeDelta, Utc};

/// Longest wait after a failure (`failure_tracker::Pace`, its jitter included).
pub(super) const LONGEST_WAIT: TimeDelta = TimeDelta::minutes(21);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Apply the stream, for as long as it continues.
    Follow,
    /// Ask the primary whether it has committed anything.
    Probe,
    Pass,
    /// Try again to copy the artifacts that the primary did not have.
    Retry,
    Verify,
    /// Nothing is due before this time.
    Sleep(DateTime<Utc>),
}

/// Times of the duties that were done, and the known outstanding work.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub looked: Option<DateTime<Utc>>,
    /// Time since which the primary is known to have changes that the spare does not have.
    pub waiting: Option<DateTime<Utc>>,
    /// True: a verification found differences, so a copy is made at once.
    pub repair: bool,
    /// True: a copy was made once.
    pub copied: bool,
    /// True: artifacts are missing on the primary.
    pub unavailable: bool,
    /// Earliest time of the next question to the peer, because the last one failed.
    pub not_before: Option<DateTime<Utc>>,
    pub passed: DateTime<Utc>,
    pub retried: DateTime<Utc>,
    pub verified: DateTime<Utc>,
    pub verifying: bool,
}

/// The part of the configuration that the plan needs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rules {
    pub interval: TimeDelta,
    pub schedule: Option<Schedule>,
    pub retry_missing: TimeDelta,
    pub verify: Option<Schedule>,
    pub paused: bool,
    pub paused_until: Option<DateTime<Utc>>,
}

impl Rules {
    pub(super) fn of(config: &Config) -> Self {
        let delta = |duration| TimeDelta::from_std(duration).unwrap_or(TimeDelta::MAX);
        Rules {
            interval: delta(config.replication.interval),
            schedule: config.replication.schedule.clone(),
            retry_missing: delta(config.replication.retry_missing),
            verify: config.verify.schedule.clone(),
            paused: config.paused,
            paused_until: config.paused_until,
        }
    }

    pub(super) fn is_paused(&self, now: DateTime<Utc>) -> bool {
        self.paused || self.paused_until.is_some_and(|until| now < until)
    }
}

impl Plan {
    pub(super) fn new(now: DateTime<Utc>) -> Self {
        Plan {
            looked: None,
            waiting: None,
            repair: false,
            copied: false,
            unavailable: false,
            not_before: None,
            passed: now,
            retried: now,
            verified: now,
            verifying: false,
        }
    }

    /// Corrects times after the system's clock was set back. A time in the future was noted before
    /// that, and would be waited for in vain.
    pub(super) fn mind_the_clock(&mut self, now: DateTime<Utc>) {
        self.looked = self.looked.filter(|looked| *looked <= now);
        self.not_before = self
            .not_before
            .filter(|earliest| *earliest - now <= LONGEST_WAIT);
        self.waiting = self.waiting.map(|since| since.min(now));
        self.passed = self.passed.min(now);
        self.retried = self.retried.min(now);
        self.verified = self.verified.min(now);
    }

    pub(super) fn next(&self, rules: &Rules, now: DateTime<Utc>) -> Next {
        let due = [
            (self.probe_at(rules), Next::Probe),
            (self.pass_at(rules, now), Next::Pass),
            (self.retry_at(rules, now), Next::Retry),
            (self.verify_at(rules), Next::Verify),
        ];
        Self::first(&due, rules, now)
    }

    /// Returns the duty that is due beside a stream. The stream looks, copies and retries by
    /// itself.
    pub(super) fn beside(&self, rules: &Rules, now: DateTime<Utc>) -> Next {
        Self::first(&[(self.verify_at(rules), Next::Verify)], rules, now)
    }

    fn first(due: &[(Option<DateTime<Utc>>, Next)], rules: &Rules, now: DateTime<Utc>) -> Next {
        let mut wake = rules.paused_until.filter(|until| *until > now);
        for (time, next) in due {
            match *time {
                Some(time) if time <= now => return *next,
                Some(time) => wake = Some(wake.map_or(time, |earlier| earlier.min(time))),
                None => {}
            }
        }
        Next::Sleep(wake.unwrap_or(now + rules.interval))
    }

    /// Returns the time, or the end of the wait after a failure if that is later.
    fn patiently(&self, time: DateTime<Utc>) -> DateTime<Utc> {
        self.not_before.map_or(time, |earliest| earliest.max(time))
    }

    fn probe_at(&self, rules: &Rules) -> Option<DateTime<Utc>> {
        let due = match self.looked {
            Some(looked) => looked.checked_add_signed(rules.interval)?,
            None => DateTime::UNIX_EPOCH,
        };
        Some(self.patiently(due))
    }

    fn pass_at(&self, rules: &Rules, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        if (self.waiting.is_none() && !self.repair) || self.verifying || rules.is_paused(now) {
            return None;
        }
        let due = match &rules.schedule {
            // The first copy does not wait for the schedule. Later copies wait for the first time
            // of the schedule after there was something to copy.
            Some(schedule) if self.copied && !self.repair => {
                let since = self
                    .waiting
                    .map_or(self.passed, |since| since.max(self.passed));
                schedule.next_after(since)?
            }
            _ => DateTime::UNIX_EPOCH,
        };
        Some(self.patiently(due))
    }

    fn retry_at(&self, rules: &Rules, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        if !self.unavailable || !self.copied || self.verifying || rules.is_paused(now) {
            return None;
        }
        Some(self.patiently(self.retried.checked_add_signed(rules.retry_missing)?))
    }

    fn verify_at(&self, rules: &Rules) -> Option<DateTime<Utc>> {
        if !self.copied || self.verifying {
            return None;
        }
        rules.verify.as_ref()?.next_after(self.verified)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    fn rules() -> Rules {
        Rules {
            interval: TimeDelta::minutes(1),
            schedule: None,
            retry_missing: TimeDelta::minutes(10),
            verify: None,
            paused: false,
            paused_until: None,
        }
    }

    fn settled(now: DateTime<Utc>) -> Plan {
        Plan {
            looked: Some(now),
            copied: true,
            ..Plan::new(now)
        }
    }

    #[test]
    fn the_first_thing_is_a_probe() {
        let now = at("2026-01-01T10:00:00Z");
        assert_eq!(Plan::new(now).next(&rules(), now), Next::Probe);
    }

    #[test]
    fn looks_come_at_the_interval_and_a_pass_when_something_waits() {
        let now = at("2026-01-01T10:00:00Z");
        let mut plan = settled(now);
        let next = now + TimeDelta::minutes(1);
        assert_eq!(plan.next(&rules(), now), Next::Sleep(next));
        assert_eq!(plan.next(&rules(), next), Next::Probe);
        plan.waiting = Some(now);
        assert_eq!(plan.next(&rules(), now), Next::Pass);
        let paused = Rules {
            paused: true,
            ..rules()
        };
        assert_eq!(plan.next(&paused, now), Next::Sleep(next));
    }

    #[test]
    fn a_schedule_holds_passes_back_but_not_looks_and_not_the_first_copy() {
        let now = at("2026-01-01T10:00:00Z");
        let rules = Rules {
            schedule: Some(Schedule::parse("0 3 * * *").expect("a schedule")),
            interval: TimeDelta::hours(6),
            ..rules()
        };
        let mut plan = settled(now);
        plan.waiting = Some(now);
        assert_eq!(
            plan.next(&rules, now),
            Next::Sleep(at("2026-01-01T16:00:00Z"))
        );
        assert_eq!(plan.next(&rules, at("2026-01-01T16:00:00Z")), Next::Probe);
        plan.looked = Some(at("2026-01-01T22:00:00Z"));
        assert_eq!(plan.next(&rules, at("2026-01-02T03:00:00Z")), Next::Pass);
        plan.copied = false;
        assert_eq!(plan.next(&rules, now), Next::Pass);
    }

    #[test]
    fn a_time_of_the_schedule_at_which_nothing_waited_is_not_made_up_for() {
        let now = at("2026-01-03T10:00:00Z");
        let rules = Rules {
            schedule: Some(Schedule::parse("0 3 * * *").expect("a schedule")),
            interval: TimeDelta::hours(24),
            ..rules()
        };
        let mut plan = settled(now);
        plan.passed = at("2026-01-01T03:00:05Z");
        plan.waiting = Some(now);
        assert_eq!(
            plan.next(&rules, now),
            Next::Sleep(at("2026-01-04T03:00:00Z"))
        );
    }

    #[test]
    fn after_a_failure_the_wait_comes_first() {
        let now = at("2026-01-01T10:00:00Z");
        let mut plan = Plan::new(now);
        plan.not_before = Some(now + TimeDelta::seconds(4));
        assert_eq!(
            plan.next(&rules(), now),
            Next::Sleep(now + TimeDelta::seconds(4))
        );
    }

    #[test]
    fn a_pause_with_an_end_wakes_at_its_end() {
        let now = at("2026-01-01T10:00:00Z");
        let rules = Rules {
            paused_until: Some(now + TimeDelta::seconds(20)),
            ..rules()
        };
        let mut plan = settled(now);
        plan.waiting = Some(now);
        assert_eq!(
            plan.next(&rules, now),
            Next::Sleep(now + TimeDelta::seconds(20))
        );
        assert_eq!(plan.next(&rules, now + TimeDelta::seconds(20)), Next::Pass);
    }

    #[test]
    fn a_verification_missed_while_we_were_down_is_made_up_for() {
        let now = at("2026-01-01T10:00:00Z");
        let rules = Rules {
            verify: Some(Schedule::parse("0 3 * * *").expect("a schedule")),
            ..rules()
        };
        let mut plan = settled(now);
        plan.verified = at("2025-12-31T03:00:05Z");
        assert_eq!(plan.next(&rules, now), Next::Verify);
        plan.verified = now;
        plan.looked = Some(at("2026-01-02T02:59:30Z"));
        assert_eq!(plan.next(&rules, at("2026-01-02T03:00:00Z")), Next::Verify);
        plan.verifying = true;
        assert_ne!(plan.next(&rules, at("2026-01-02T03:00:00Z")), Next::Verify);
    }

    #[test]
    fn a_clock_that_is_set_back_delays_nothing() {
        let later = at("2026-01-01T10:00:00Z");
        let mut plan = settled(later);
        plan.not_before = Some(later + TimeDelta::minutes(1));
        let now = at("2026-01-01T07:00:00Z");
        plan.mind_the_clock(now);
        assert_eq!(plan.next(&rules(), now), Next::Probe);
    }

    #[test]
    fn unavailable_artifacts_are_tried_again() {
        let now = at("2026-01-01T10:00:00Z");
        let mut plan = settled(now);
        plan.unavailable = true;
        plan.looked = Some(now + TimeDelta::minutes(10));
        assert_eq!(
            plan.next(&rules(), now + TimeDelta::minutes(10)),
            Next::Retry
        );
    }
}
