//! A schedule: a cron line of five fields, in UTC.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Days, NaiveTime, TimeDelta, Utc};
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

use super::units::expected;

/// First time of the search for occurrences. It is in a leap year, so that the following days
/// include every date of the calendar.
const START: DateTime<Utc> = match DateTime::from_timestamp(1_704_067_200, 0) {
    Some(time) => time,
    None => DateTime::UNIX_EPOCH,
};

/// Days in which occurrences are searched: a little more than a year, so that a yearly occurrence
/// is found twice.
const SEARCHED: TimeDelta = TimeDelta::days(370);

/// A cron schedule: minute, hour, day of the month, month, day of the week.
#[derive(Clone, PartialEq, Eq)]
pub struct Schedule {
    text: String,
    cron: Cron,
}

impl Schedule {
    /// Reads a cron line. An error is the rest of a sentence that begins with the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || expected("five cron fields (in UTC) such as \"0 3 * * *\"", text);
        if text.split_whitespace().count() != 5 {
            return Err(wrong());
        }
        let parser = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .build();
        let cron = parser.parse(text).map_err(|_| wrong())?;
        // The 31st of February is well-formed, but never comes.
        cron.find_next_occurrence(&START, true)
            .map_err(|_| expected("a schedule with a date that exists", text))?;
        Ok(Self {
            text: text.to_string(),
            cron,
        })
    }

    /// Returns the line as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the first occurrence after `time`. An occurrence at `time` itself does not count.
    pub fn next_after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.cron.find_next_occurrence(&time, false).ok()
    }

    /// Returns the longest time between two consecutive occurrences.
    ///
    /// All days with occurrences have the same times of day. So the function goes through the times
    /// of one day, and of every other day only looks at the first time. A step for every minute
    /// would take long, and a limit on the number of steps would never reach the weekend.
    pub fn longest_pause(&self) -> Duration {
        let Some(first) = self.next_after(START - TimeDelta::seconds(1)) else {
            return Duration::MAX;
        };
        let mut longest = TimeDelta::zero();
        let mut last = first;
        while let Some(next) = self.next_after(last)
            && next.date_naive() == first.date_naive()
        {
            longest = longest.max(next - last);
            last = next;
        }
        let busy = last - first;
        let mut day = first;
        while day - first <= SEARCHED {
            let midnight = (day.date_naive() + Days::new(1)).and_time(NaiveTime::MIN);
            let Some(next) = self.next_after(midnight.and_utc() - TimeDelta::seconds(1)) else {
                return Duration::MAX;
            };
            longest = longest.max(next - day - busy);
            day = next;
        }
        longest.to_std().unwrap_or(Duration::MAX)
    }
}

/// Shows the line only: the result of the parser says nothing to people.
impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Schedule").field(&self.text).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(text: &str) -> Schedule {
        Schedule::parse(text).unwrap()
    }

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn lines() {
        for good in ["0 3 * * *", "*/5 * * * *", "0 0 29 2 *", "30 22 * * 1-5"] {
            assert!(Schedule::parse(good).is_ok(), "{good:?} was refused");
        }
        for bad in [
            "",
            "@daily",
            "0 3 * *",
            "0 0 3 * * *",
            "61 3 * * *",
            "0 0 31 2 *",
            "a b c d e",
        ] {
            let problem = Schedule::parse(bad).unwrap_err();
            assert!(problem.ends_with(&format!("found {bad:?}")), "{problem}");
        }
    }

    #[test]
    fn the_next_time_is_never_the_same_one() {
        let nightly = schedule("0 3 * * *");
        for (from, to) in [
            ("2026-11-24T02:59:59.999Z", "2026-11-24T03:00:00Z"),
            ("2026-11-24T03:00:00Z", "2026-11-25T03:00:00Z"),
            ("2026-11-24T03:00:00.001Z", "2026-11-25T03:00:00Z"),
            ("2026-12-31T12:00:00Z", "2027-01-01T03:00:00Z"),
        ] {
            assert_eq!(nightly.next_after(time(from)), Some(time(to)), "{from}");
        }
        let leap = schedule("0 0 29 2 *").next_after(time("2024-02-29T00:00:00Z"));
        assert_eq!(leap, Some(time("2028-02-29T00:00:00Z")));
    }

    #[test]
    fn the_longest_pause() {
        let (minute, hour) = (60, 3600);
        let day = 24 * hour;
        for (text, pause) in [
            ("* * * * *", minute),
            ("*/15 * * * *", 15 * minute),
            ("0,10 * * * *", 50 * minute),
            ("0 3 * * *", day),
            ("0 0,6 * * *", 18 * hour),
            ("0 1,2,22 * * *", 20 * hour),
            ("*/30 8-17 * * *", 14 * hour + 30 * minute),
            // From Friday to Monday.
            ("0 3 * * 1-5", 3 * day),
            ("* * * * 1-5", 2 * day + minute),
            ("* 9-17 * * 1-5", 2 * day + 15 * hour + minute),
            ("0 3 1 * *", 31 * day),
            // Pauses that are longer than the searched time.
            ("0 0 1 1 *", 366 * day),
            ("0 0 29 2 *", 4 * 365 * day + day),
        ] {
            let found = schedule(text).longest_pause();
            assert_eq!(found, Duration::from_secs(pause), "{text}");
        }
    }

    #[test]
    fn shows_itself_as_it_was_written() {
        let nightly = schedule("0  3 * * *");
        assert_eq!(nightly.text(), "0  3 * * *");
        assert_eq!(format!("{nightly:?}"), r#"Schedule("0  3 * * *")"#);
        assert_eq!(nightly, nightly.clone());
        assert_ne!(nightly, schedule("0 4 * * *"));
    }
}
