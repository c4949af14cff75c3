//! Two limits that all transfers share: bytes per second, and bytes in memory.

use governor::clock::DefaultClock;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a cell. A limiter counts cells in 32 bits; with a cell of a KiB it reaches 4 TiB/s.
const CELL_BYTES: u64 = 1024;

type Limiter = RateLimiter<NotKeyed, InMemoryState, DefaultClock>;

/// Bytes per second, of all transfers together. Cloned handles share one limit, which may change
/// while they wait.
#[derive(Clone, Default)]
pub struct Throttle(Arc<Shared>);

#[derive(Default)]
struct Shared {
    rate: RwLock<Option<Rate>>,
    moved: AtomicU64,
}

#[derive(Clone)]
struct Rate {
    bytes_per_second: u64,
    limiter: Arc<Limiter>,
    /// Number of cells: a tenth of a second's worth, enough to be efficient, little enough to be
    /// even.
    burst: NonZeroU32,
}

impl Rate {
    fn new(bytes_per_second: u64) -> Self {
        let cells = u32::try_from(bytes_per_second / CELL_BYTES)
            .unwrap_or(u32::MAX)
            .max(1);
        let per_second = NonZeroU32::new(cells).unwrap_or(NonZeroU32::MIN);
        let burst = NonZeroU32::new(cells / 10).unwrap_or(NonZeroU32::MIN);
        Rate {
            bytes_per_second,
            limiter: Arc::new(RateLimiter::direct(
                Quota::per_second(per_second).allow_burst(burst),
            )),
            burst,
        }
    }
}

impl Throttle {
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let throttle = Self::default();
        throttle.set(bytes_per_second);
        throttle
    }

    /// Sets the limit. Running transfers use it from their next burst on. An equal limit leaves the
    /// count as it is.
    pub fn set(&self, bytes_per_second: Option<u64>) {
        let mut rate = self.0.rate.write().expect("no holder panics");
        if rate.as_ref().map(|rate| rate.bytes_per_second) != bytes_per_second {
            *rate = bytes_per_second.map(Rate::new);
        }
    }

    /// Returns the number of bytes moved until now, of all transfers together.
    pub fn moved(&self) -> u64 {
        self.0.moved.load(Ordering::Relaxed)
    }

    /// Waits until `bytes` more may be moved.
    pub async fn take(&self, bytes: usize) {
        self.0.moved.fetch_add(bytes as u64, Ordering::Relaxed);
        let mut cells = u32::try_from((bytes as u64).div_ceil(CELL_BYTES)).unwrap_or(u32::MAX);
        while let Some(wanted) = NonZeroU32::new(cells) {
            let Some(rate) = self.0.rate.read().expect("no holder panics").clone() else {
                return;
            };
            let now = wanted.min(rate.burst);
            // This cannot fail: `now` never exceeds the burst.
            let _ = rate.limiter.until_n_ready(now).await;
            cells -= now.get();
        }
    }
}

/// Maximum number of bytes of all transfer buffers together. Cloned handles share one budget.
#[derive(Clone)]
pub struct ByteBudget {
    cells: Arc<Semaphore>,
    total: u32,
}

impl ByteBudget {
    pub fn new(bytes: u64) -> Self {
        let total = u32::try_from(bytes / CELL_BYTES).unwrap_or(u32::MAX).max(1);
        ByteBudget {
            cells: Arc::new(Semaphore::new(total as usize)),
            total,
        }
    }

    /// Waits for room; the room is returned when the permit is dropped. A request beyond the whole
    /// budget gets all of it.
    pub async fn room(&self, bytes: u64) -> OwnedSemaphorePermit {
        let cells = u32::try_from(bytes.div_ceil(CELL_BYTES))
            .unwrap_or(u32::MAX)
            .clamp(1, self.total);
        self.cells
            .clone()
            .acquire_many_owned(cells)
            .await
            .expect("the budget's semaphore is never closed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_budget_is_shared_and_given_back() {
        let budget = ByteBudget::new(10 * CELL_BYTES);
        let clone = budget.clone();
        let first = budget.room(8 * CELL_BYTES).await;
        assert!(
            tokio::time::timeout(
                std::time::Duration::from_millis(20),
                clone.room(8 * CELL_BYTES)
            )
            .await
            .is_err(),
            "eight of ten are taken, eight more must wait"
        );
        drop(first);
        let _all = clone.room(1 << 60).await;
    }

    #[tokio::test]
    async fn no_limit_never_waits() {
        Throttle::new(None).take(usize::MAX).await;
    }

    #[tokio::test]
    async fn a_limit_may_be_lifted_under_way() {
        let throttle = Throttle::new(Some(1024 * 1024));
        let clone = throttle.clone();
        let moving = tokio::spawn(async move { clone.take(1 << 30).await });
        tokio::task::yield_now().await;
        throttle.set(None);
        // At the first rate this would take 17 minutes.
        moving.await.expect("it neither panics nor is cancelled");
    }

    #[tokio::test]
    async fn a_limit_waits_for_what_exceeds_the_burst() {
        let throttle = Throttle::new(Some(10 * 1024 * 1024));
        let start = std::time::Instant::now();
        throttle.take(3 * 1024 * 1024).await;
        // 3 MiB at 10 MiB/s, with a tenth of a second of it at once: never under 0.15 s, however
        // fast the machine is.
        assert!(start.elapsed() > std::time::Duration::from_millis(150));
    }
}
