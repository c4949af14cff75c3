//! Decides which generations stay. A pure function of their times and the rules.
//!
//! Ages count back from the newest generation, not from the clock: an archive that gets nothing new
//! loses nothing.

use crate::config::Keep;
use chrono::{DateTime, Datelike, Timelike, Utc};

/// A generation as the rules see it.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub time: DateTime<Utc>,
    /// The reason of its pin.
    pub pinned: Option<String>,
    /// Each of its files was read and was right after it was made.
    pub is_good: bool,
    /// Its manifest cannot be read, so nobody knows which files it names.
    pub is_unreadable: bool,
}

/// Returns the reasons for which each generation stays; without a reason it goes. The generations
/// are in the order of their times, the newest first.
pub(super) fn reasons(keep: &Keep, generations: &[Candidate]) -> Vec<Vec<String>> {
    let mut reasons = vec![Vec::new(); generations.len()];
    for (reasons, generation) in reasons.iter_mut().zip(generations) {
        match &generation.pinned {
            Some(reason) if reason.is_empty() => reasons.push("pinned".to_string()),
            Some(reason) => reasons.push(format!("pinned: {reason}")),
            None => {}
        }
        if generation.is_unreadable {
            reasons.push("its manifest cannot be read".to_string());
        }
    }
    for (number, reasons) in reasons.iter_mut().take(keep.last as usize).enumerate() {
        reasons.push(format!("last {} of {}", number + 1, keep.last));
    }
    type Bucket = fn(DateTime<Utc>) -> (i32, u32);
    let buckets: [(&str, u32, Bucket); 4] = [
        ("hourly", keep.hourly, |time| {
            (time.num_days_from_ce(), time.hour())
        }),
        ("daily", keep.daily, |time| (time.num_days_from_ce(), 0)),
        ("weekly", keep.weekly, |time| {
            let week = time.iso_week();
            (week.year(), week.week())
        }),
        ("monthly", keep.monthly, |time| (time.year(), time.month())),
    ];
    for (word, number, bucket) in buckets {
        let (mut found, mut last) = (0, None);
        for (reasons, generation) in reasons.iter_mut().zip(generations) {
            let of = Some(bucket(generation.time));
            if found == number || of == last {
                continue;
            }
            last = of;
            found += 1;
            reasons.push(format!("{word} {found} of {number}"));
        }
    }
    if let (Some(within), Some(newest)) = (keep.within, generations.first()) {
        for (reasons, generation) in reasons.iter_mut().zip(generations) {
            let age = (newest.time - generation.time).to_std().unwrap_or_default();
            if age <= within {
                reasons.push(format!("within {}", humantime::format_duration(within)));
            }
        }
    }
    // The newest generation is the base of the next one. The newest good one is the last resort.
    for (word, first) in [
        ("newest", generations.first().map(|_| 0)),
        ("newest proved", generations.iter().position(|g| g.is_good)),
    ] {
        if let Some(reasons) = first.and_then(|first| reasons.get_mut(first))
            && reasons.is_empty()
        {
            reasons.push(word.to_string());
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeDelta;
    use std::time::Duration;

    const NONE: Keep = Keep {
        last: 0,
        hourly: 0,
        daily: 0,
        weekly: 0,
        monthly: 0,
        within: None,
    };

    /// Generations of these ages in hours, from Monday, 2026-11-30 23:30 UTC.
    fn of(hours: &[i64]) -> Vec<Candidate> {
        let newest: DateTime<Utc> = "2026-11-30T23:30:00Z".parse().unwrap();
        let made = |hours: &i64| Candidate {
            time: newest - TimeDelta::hours(*hours),
            pinned: None,
            is_good: false,
            is_unreadable: false,
        };
        hours.iter().map(made).collect()
    }

    fn kept(keep: &Keep, generations: &[Candidate]) -> Vec<usize> {
        let reasons = reasons(keep, generations);
        let kept = reasons
            .iter()
            .enumerate()
            .filter(|(_, why)| !why.is_empty());
        kept.map(|(number, _)| number).collect()
    }

    #[test]
    fn each_rule_keeps_the_newest_of_its_period() {
        let of_hours = of(&[0, 1, 2, 23, 24, 25, 24 * 7, 24 * 8, 24 * 31]);
        assert_eq!(kept(&Keep { last: 2, ..NONE }, &of_hours), [0, 1]);
        assert_eq!(kept(&Keep { hourly: 3, ..NONE }, &of_hours), [0, 1, 2]);
        // Number 3 is of 00:30 on the same day.
        assert_eq!(kept(&Keep { daily: 3, ..NONE }, &of_hours), [0, 4, 6]);
        // The newest is alone in its week, which began that day with numbers 0 to 3.
        assert_eq!(kept(&Keep { weekly: 3, ..NONE }, &of_hours), [0, 4, 7]);
        assert_eq!(kept(&Keep { monthly: 2, ..NONE }, &of_hours), [0, 8]);
        let within = Some(Duration::from_secs(24 * 3600));
        assert_eq!(kept(&Keep { within, ..NONE }, &of_hours), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn the_rules_add_up_and_say_why() {
        let keep = Keep {
            last: 1,
            daily: 2,
            ..NONE
        };
        let reasons = reasons(&keep, &of(&[0, 1, 24]));
        assert_eq!(reasons[0], ["last 1 of 1", "daily 1 of 2"]);
        assert!(reasons[1].is_empty());
        assert_eq!(reasons[2], ["daily 2 of 2"]);
    }

    #[test]
    fn pinned_unreadable_newest_and_newest_good_ones_stay() {
        let mut generations = of(&[0, 24, 48, 72, 96]);
        generations[1].pinned = Some("before the upgrade".into());
        generations[2].is_unreadable = true;
        generations[3].is_good = true;
        generations[4].is_good = true;
        assert_eq!(kept(&NONE, &generations), [0, 1, 2, 3]);
        let reasons = reasons(&NONE, &generations);
        assert_eq!(reasons[1], ["pinned: before the upgrade"]);
        assert_eq!(reasons[3], ["newest proved"]);
    }

    #[test]
    fn no_generation_is_no_error() {
        assert!(reasons(&Keep { daily: 7, ..NONE }, &[]).is_empty());
    }
}
