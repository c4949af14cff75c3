//! What a pass tells while it works. Whoever shows it (a bar, plain lines, the service's state) only listens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is being done, in the order in which a baseline does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Checks,
    /// Artifacts of the rows that a plain read sees, before any snapshot is held.
    Artifacts,
    Snapshot,
    Schema,
    Tables,
    Indexes,
    /// What the snapshot's own rows still lack.
    RemainingArtifacts,
    /// What was committed since the snapshot, from the stream.
    CatchUp,
    /// Bytes changed under keys that the visible database names.
    Replacements,
    Switch,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Checks => "checks",
            Phase::Artifacts => "artifacts",
            Phase::Snapshot => "snapshot",
            Phase::Schema => "schema",
            Phase::Tables => "tables",
            Phase::Indexes => "indexes",
            Phase::RemainingArtifacts => "remaining artifacts",
            Phase::CatchUp => "catching up",
            Phase::Replacements => "replacements",
            Phase::Switch => "switch",
        }
    }
}

/// Hears of every phase and every step within it. Called often: it must be quick.
pub trait Listener: Send + Sync {
    /// A new phase of `total` units (bytes for tables, else items; 0 where it is not known).
    fn phase(&self, phase: Phase, total: u64);
    fn step(&self, phase: Phase, done: u64, total: u64);
    /// An artifact of so many bytes was brought from the primary and found right.
    fn copied(&self, _bytes: u64) {}
}

/// Says nothing.
pub struct Silent;

impl Listener for Silent {
    fn phase(&self, _: Phase, _: u64) {}
    fn step(&self, _: Phase, _: u64, _: u64) {}
}

/// Counts the steps of the current phase; cheap to clone into every worker.
#[derive(Clone)]
pub struct Progress {
    listener: Arc<dyn Listener>,
}

/// One phase under way.
#[derive(Clone)]
pub struct Step {
    listener: Arc<dyn Listener>,
    phase: Phase,
    done: Arc<AtomicU64>,
    total: u64,
}

impl Progress {
    pub fn new(listener: Arc<dyn Listener>) -> Self {
        Progress { listener }
    }

    pub fn begin(&self, phase: Phase, total: u64) -> Step {
        self.listener.phase(phase, total);
        Step {
            listener: self.listener.clone(),
            phase,
            done: Arc::default(),
            total,
        }
    }
}

impl Step {
    pub fn add(&self, units: u64) {
        let done = self.done.fetch_add(units, Ordering::Relaxed) + units;
        self.listener.step(self.phase, done, self.total);
    }

    pub fn copied(&self, bytes: u64) {
        self.listener.copied(bytes);
    }
}
