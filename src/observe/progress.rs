//! Progress reports of a pass. Outputs (a bar, plain lines, the service's state) only listen to
//! them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The phases of a pass, in the order of a baseline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Checks,
    /// Artifacts of the rows that a plain read sees, before a snapshot is held.
    Artifacts,
    Snapshot,
    Schema,
    /// The dump for a generation of the archive.
    Dump,
    Tables,
    /// Dumps and lists of the archive, which are read back.
    Files,
    Indexes,
    /// Artifacts of the snapshot's own rows that are still missing here.
    RemainingArtifacts,
    /// Transactions committed since the snapshot, from the stream.
    CatchUp,
    /// Changed bytes under keys that the visible database names.
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
            Phase::Dump => "dump",
            Phase::Tables => "tables",
            Phase::Files => "files",
            Phase::Indexes => "indexes",
            Phase::RemainingArtifacts => "remaining artifacts",
            Phase::CatchUp => "catching up",
            Phase::Replacements => "replacements",
            Phase::Switch => "switch",
        }
    }
}

/// Receives every phase and every step. It is called often, so it must be quick.
pub trait Listener: Send + Sync {
    /// A new phase with `total` units: bytes for tables, items for other phases, 0 if unknown.
    fn phase(&self, phase: Phase, total: u64);
    fn step(&self, phase: Phase, done: u64, total: u64);
    /// An artifact of this number of bytes was copied from the primary and checked.
    fn copied(&self, _bytes: u64) {}
    /// The provider of the bucket has not brought this number of artifacts yet. The example is the
    /// key of one of them.
    fn awaits(&self, _artifacts: usize, _example: &str) {}
}

/// A listener that does nothing.
pub struct Silent;

impl Listener for Silent {
    fn phase(&self, _: Phase, _: u64) {}
    fn step(&self, _: Phase, _: u64, _: u64) {}
}

/// Counts the steps of the current phase. It is cheap to clone for every worker.
#[derive(Clone)]
pub struct Progress {
    listener: Arc<dyn Listener>,
}

/// The current phase.
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

    pub fn awaits(&self, artifacts: usize, example: &str) {
        self.listener.awaits(artifacts, example);
    }
}
