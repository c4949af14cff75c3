//! The clock of schedules and of lag. A test may set it; time limits of servers always use real
//! time.

use chrono::{DateTime, Utc};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Longest sleep before the system's clock is read again.
const SLEEP_SLICE: Duration = Duration::from_secs(30);

#[derive(Clone, Default)]
pub struct Clock(Option<watch::Sender<Simulated>>);

#[derive(Default)]
struct Simulated {
    now: DateTime<Utc>,
    /// The sleepers, each with the time at which it wakes.
    sleepers: BTreeMap<u64, DateTime<Utc>>,
    next_sleeper: u64,
}

/// Moves a clock by hand.
pub struct Simulation(watch::Sender<Simulated>);

impl Clock {
    pub fn real() -> Self {
        Clock(None)
    }

    pub fn simulated(now: DateTime<Utc>) -> (Self, Simulation) {
        let sender = watch::Sender::new(Simulated {
            now,
            ..Simulated::default()
        });
        (Clock(Some(sender.clone())), Simulation(sender))
    }

    pub fn now(&self) -> DateTime<Utc> {
        match &self.0 {
            None => Utc::now(),
            Some(simulated) => simulated.borrow().now,
        }
    }

    /// Returns a time that never goes back, whatever the system's clock is set to: the time of the
    /// first call in this process plus the time that has passed since. Retries use it.
    pub fn steady(&self) -> DateTime<Utc> {
        static FIRST: OnceLock<(DateTime<Utc>, Instant)> = OnceLock::new();
        match &self.0 {
            None => {
                let (time, then) = FIRST.get_or_init(|| (Utc::now(), Instant::now()));
                *time + then.elapsed()
            }
            Some(simulated) => simulated.borrow().now,
        }
    }

    /// Returns a time of [`Clock::steady`] as the clock will show it, if nobody sets the clock
    /// until then.
    pub fn from_steady(&self, time: DateTime<Utc>) -> DateTime<Utc> {
        self.now() + (time - self.steady())
    }

    pub async fn sleep_until(&self, time: DateTime<Utc>) {
        match &self.0 {
            None => {
                // The system's clock may be set during the sleep. A jump forward is seen between
                // the slices. After a jump back the sleep still ends no later than planned at its
                // start.
                let left = |now: DateTime<Utc>| (time - now).to_std().unwrap_or_default();
                let latest = Instant::now() + left(Utc::now());
                while !left(Utc::now()).is_zero() && Instant::now() < latest {
                    tokio::time::sleep(left(Utc::now()).min(SLEEP_SLICE)).await;
                }
            }
            Some(simulated) => {
                let _asleep = Asleep::until(simulated, time);
                let mut now = simulated.subscribe();
                // This fails only if the clock is gone, and this function holds the clock.
                let _ = now.wait_for(|state| state.now >= time).await;
            }
        }
    }
}

struct Asleep<'a>(&'a watch::Sender<Simulated>, u64);

impl<'a> Asleep<'a> {
    fn until(clock: &'a watch::Sender<Simulated>, time: DateTime<Utc>) -> Self {
        let mut number = 0;
        clock.send_modify(|state| {
            number = state.next_sleeper;
            state.next_sleeper += 1;
            state.sleepers.insert(number, time);
        });
        Asleep(clock, number)
    }
}

impl Drop for Asleep<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|state| {
            state.sleepers.remove(&self.1);
        });
    }
}

impl Simulation {
    /// Waits until a task sleeps, which means that all due work is done.
    pub async fn asleep(&self) {
        let mut watch = self.0.subscribe();
        let due = |state: &Simulated| state.sleepers.values().any(|time| *time > state.now);
        // This fails only if the clock is gone, and this function holds the clock.
        let _ = watch.wait_for(|state| due(state)).await;
    }

    /// Waits until a task sleeps, moves the clock to the next wake-up, and returns that time.
    pub async fn to_next_wake(&self) -> DateTime<Utc> {
        self.asleep().await;
        let mut now = DateTime::default();
        self.0.send_modify(|state| {
            let next = state.sleepers.values().filter(|time| **time > state.now);
            if let Some(next) = next.min().copied() {
                state.now = next;
            }
            now = state.now;
        });
        now
    }

    pub fn now(&self) -> DateTime<Utc> {
        self.0.borrow().now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeDelta;

    #[tokio::test]
    async fn a_day_passes_as_fast_as_its_sleepers_wake() {
        let end = DateTime::UNIX_EPOCH + TimeDelta::days(1);
        let (clock, simulation) = Clock::simulated(DateTime::UNIX_EPOCH);
        let sleeper = tokio::spawn(async move {
            let mut wakes = 0;
            while clock.now() < end {
                clock
                    .sleep_until(clock.now() + TimeDelta::minutes(10))
                    .await;
                wakes += 1;
            }
            wakes
        });
        while simulation.now() < end {
            simulation.to_next_wake().await;
        }
        assert_eq!(
            sleeper.await.expect("it neither panics nor is cancelled"),
            144
        );
    }
}
