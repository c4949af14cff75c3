//! The lease of a shared bucket. Two sites that cannot see each other, but both see the bucket,
//! agree by it which cluster takes live traffic.
//!
//! The acting primary renews the lease. A promotion asks in it, the holder fences itself and writes
//! so, and only then the lease is taken. `decide.rs` has the rules, as pure functions.

mod attach;
mod decide;
mod fence_command;
mod hand;
mod holder;
mod spare;
mod taker;

pub(super) use attach::attach;
pub use fence_command::run_fence_command;
pub use holder::{Holder, Tended};
pub use taker::{LeaseTaker, Proof, Taken};

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Maximum time that the fence of a holder takes: its sessions end within 10 s, and the proof opens
/// one connection.
pub(super) const FENCE_BOUND: Duration = Duration::from_secs(15);

/// Returns the time since the start of the machine. Unlike `Instant` it goes on while the machine
/// sleeps, and nobody sets it.
pub(super) fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(
        now.tv_sec.try_into().unwrap_or_default(),
        now.tv_nsec.try_into().unwrap_or_default(),
    )
}
