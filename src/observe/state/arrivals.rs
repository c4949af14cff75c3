//! The arrival of artifacts that the provider of the bucket replicates.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Number of the last arrivals from which the percentiles are taken.
const RECENT: usize = 1000;

/// Artifacts that are awaited, and the time that the last ones needed.
#[derive(Debug, Clone, Default)]
pub struct Arrivals {
    /// Keys of the artifacts that are awaited, with the time since then.
    awaited: BTreeMap<String, Instant>,
    recent: VecDeque<Duration>,
}

impl Arrivals {
    pub fn awaits(&mut self, key: &str) {
        self.awaited.insert(key.to_string(), Instant::now());
    }

    pub fn awaits_no_more(&mut self, key: &str) {
        self.awaited.remove(key);
    }

    pub fn arrived(&mut self, waited: Duration) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(waited);
    }

    pub fn awaited(&self) -> usize {
        self.awaited.len()
    }

    /// Returns the artifact that is awaited for the longest time, with that time.
    pub fn oldest(&self) -> Option<(&str, Duration)> {
        let oldest = self.awaited.iter().min_by_key(|(_, since)| **since);
        oldest.map(|(key, since)| (key.as_str(), since.elapsed()))
    }

    /// Returns the time within which that share of the last arrivals came. None: there was none.
    pub fn percentile(&self, share: f64) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.recent.iter().copied().collect();
        sorted.sort_unstable();
        let place = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(place.saturating_sub(1)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_of_the_last_arrivals() {
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.percentile(0.5), None);
        for second in 1..=1100 {
            arrivals.arrived(Duration::from_secs(second));
        }
        assert_eq!(arrivals.percentile(0.5), Some(Duration::from_secs(600)));
        assert_eq!(arrivals.percentile(0.99), Some(Duration::from_secs(1090)));
        assert_eq!(arrivals.percentile(1.0), Some(Duration::from_secs(1100)));
    }

    #[test]
    fn the_oldest_is_the_one_that_is_awaited_for_the_longest_time() {
        let mut arrivals = Arrivals::default();
        arrivals.awaits("z");
        std::thread::sleep(Duration::from_millis(2));
        arrivals.awaits("a");
        assert_eq!(arrivals.oldest().map(|(key, _)| key), Some("z"));
        arrivals.awaits_no_more("z");
        assert_eq!(arrivals.oldest().map(|(key, _)| key), Some("a"));
        assert_eq!(arrivals.awaited(), 1);
    }
}
