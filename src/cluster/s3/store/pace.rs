//! A store that asks for fewer requests gets fewer.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// After so long without being asked, twice as many are tried.
const QUIET: Duration = Duration::from_secs(30);

/// When the store asked last. Cloned handles share it.
#[derive(Clone, Default)]
pub(super) struct Pace(Arc<Mutex<Option<Instant>>>);

impl Pace {
    /// The store asked for fewer requests.
    pub fn slow_down(&self) {
        *self.0.lock().expect("no holder panics") = Some(Instant::now());
    }

    /// How many of so many transfers at once it is to get now: one at first, then twice as many again and again.
    pub fn of(&self, most: usize) -> usize {
        let asked = *self.0.lock().expect("no holder panics");
        let Some(asked) = asked else { return most };
        let doublings = asked.elapsed().as_secs() / QUIET.as_secs();
        match 1_usize.checked_shl(u32::try_from(doublings).unwrap_or(u32::MAX)) {
            Some(now) => now.min(most),
            None => most,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_falls_to_one_and_doubles_when_left_alone() {
        let pace = Pace::default();
        assert_eq!(pace.of(32), 32);
        pace.slow_down();
        assert_eq!(pace.of(32), 1);
        for (seconds, expected) in [(29, 1), (31, 2), (65, 4), (155, 32), (100_000, 32)] {
            let Some(then) = Instant::now().checked_sub(Duration::from_secs(seconds)) else {
                continue;
            };
            *pace.0.lock().expect("no holder panics") = Some(then);
            assert_eq!(pace.of(32), expected, "{seconds} s ago");
        }
    }
}
