//! Gives a store fewer requests if it asks for fewer.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Time without such an answer after which twice as many transfers are tried.
const DOUBLE_AFTER: Duration = Duration::from_secs(30);

/// Time at which the store asked last. Cloned handles share it.
#[derive(Clone, Default)]
pub(super) struct Pace(Arc<Mutex<Option<Instant>>>);

impl Pace {
    /// Notes that the store asked for fewer requests.
    pub(super) fn slow_down(&self) {
        *self.0.lock().expect("no holder panics") = Some(Instant::now());
    }

    /// Returns how many of `most` transfers at once the store shall get now: one at first, then
    /// twice as many again and again.
    pub(super) fn of(&self, most: usize) -> usize {
        let asked = *self.0.lock().expect("no holder panics");
        let Some(asked) = asked else { return most };
        let doublings = asked.elapsed().as_secs() / DOUBLE_AFTER.as_secs();
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
