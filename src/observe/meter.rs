//! The progress of a pass. Every worker writes it often, so it is not a part of the state's
//! channel.

use super::clock::Clock;
use super::counters::Counters;
use super::progress::{Listener, Phase};
use crate::cluster::Throttle;
use bytesize::ByteSize;
use chrono::{DateTime, Utc};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

pub struct Meter {
    clock: Clock,
    counters: Counters,
    phase: Mutex<Option<Phase>>,
    done: AtomicU64,
    total: AtomicU64,
    /// Milliseconds since the epoch.
    moved: AtomicI64,
    /// Counts the bytes of all transfers, because a large artifact is one step but shows progress
    /// by its bytes.
    throttle: Throttle,
    bytes_seen: AtomicU64,
    /// Artifacts that are awaited from the provider of the bucket.
    awaited: Mutex<Option<Awaited>>,
}

/// Artifacts that a pass awaits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awaited {
    pub artifacts: usize,
    /// The key of one of them.
    pub example: String,
    pub since: Instant,
}

impl Meter {
    pub fn new(clock: Clock, counters: Counters, throttle: Throttle) -> Self {
        let moved = AtomicI64::new(clock.now().timestamp_millis());
        Meter {
            clock,
            counters,
            phase: Mutex::new(None),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            moved,
            throttle,
            bytes_seen: AtomicU64::new(0),
            awaited: Mutex::default(),
        }
    }

    /// Returns the artifacts that the running pass awaits. None: no pass awaits any.
    pub fn awaited(&self) -> Option<Awaited> {
        self.waits().clone()
    }

    fn waits(&self) -> MutexGuard<'_, Option<Awaited>> {
        self.awaited.lock().expect("no holder panics")
    }

    fn lock(&self) -> MutexGuard<'_, Option<Phase>> {
        self.phase.lock().expect("no holder panics")
    }

    pub fn phase(&self) -> Option<Phase> {
        *self.lock()
    }

    /// Returns the units done and the units in total: bytes in the phase `tables`, items in other
    /// phases. A total of 0 means unknown.
    pub fn progress(&self) -> (u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed), total)
    }

    /// Returns whether the current phase reports steps.
    pub fn tells_steps(&self) -> bool {
        self.progress().1 > 0
    }

    /// Returns the time of the last step, or of the last look that saw transferred bytes.
    pub fn moved(&self) -> DateTime<Utc> {
        let bytes = self.throttle.moved();
        if self.bytes_seen.swap(bytes, Ordering::Relaxed) != bytes {
            self.touch();
        }
        DateTime::from_timestamp_millis(self.moved.load(Ordering::Relaxed)).unwrap_or_default()
    }

    pub fn describe(&self) -> String {
        let (done, total) = self.progress();
        match (self.phase(), total) {
            (None, _) => "begun".into(),
            (Some(phase), 0) => phase.name().into(),
            (Some(phase @ Phase::Tables), _) => {
                format!(
                    "{}, {} of about {}",
                    phase.name(),
                    ByteSize(done),
                    ByteSize(total)
                )
            }
            (Some(phase), _) => format!("{}, {done} of {total}", phase.name()),
        }
    }

    fn touch(&self) {
        let now = self.clock.now().timestamp_millis();
        self.moved.store(now, Ordering::Relaxed);
    }
}

impl Listener for Meter {
    fn phase(&self, phase: Phase, total: u64) {
        log::debug!("phase {}", phase.name());
        *self.lock() = Some(phase);
        *self.waits() = None;
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        self.touch();
    }

    fn step(&self, _: Phase, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        self.touch();
    }

    fn awaits(&self, artifacts: usize, example: &str) {
        let mut waits = self.waits();
        let since = waits.as_ref().map_or_else(Instant::now, |old| old.since);
        *waits = (artifacts > 0).then(|| Awaited {
            artifacts,
            example: example.to_string(),
            since,
        });
    }

    fn copied(&self, bytes: u64) {
        self.counters.artifacts_copied.inc();
        self.counters.artifact_bytes_copied.inc_by(bytes);
    }
}
