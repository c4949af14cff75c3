//! Points at which a test may have the process killed, as if the machine had lost its power there.
//!
//! `WARM_SPARE_KILL_AT=apply.before_commit:3` kills a debug build when it reaches that point for
//! the third time. In a release build there is nothing of it.

/// The points of replication, in the order in which a baseline and the stream after it come by.
pub const REPLICATION: &[&str] = &[
    "baseline.snapshot",
    "baseline.tables",
    "slot.before_copy",
    "slot.after_copy",
    "catch_up.begin",
    "swap.staging",
    "swap.journalled",
    "swap.half",
    "switch.before_commit",
    "switch.after_commit",
    "gate.waiting",
    "apply.before_flush",
    "apply.before_commit",
    "apply.after_commit",
    "confirm.before_commit",
    "retention.before_delete",
];

/// The points of a change of roles.
const HANDOVER: &[&str] = &[
    "switchover.preflight",
    "switchover.fence",
    "switchover.drain",
    "switchover.compare",
    "switchover.sequences",
    "switchover.promote",
    "failover.preflight",
    "failover.fence",
    "failover.drain",
    "failover.sequences",
    "failover.promote",
    "failback.peer",
    "failback.fence",
    "failback.divergence",
    "failback.release",
    "failback.role",
    "undo.begin",
    "fence.recorded",
    "fence.set_again",
    "promote.before_commit",
    "promote.after_commit",
];

/// The points of a takeover by the lease of a shared bucket: `tests/arrangements/shared.rs` reaches
/// them.
pub const LEASE: &[&str] = &["lease.asked", "lease.taken", "lease.fence_recorded"];

/// The points of a generation for the archive.
pub const ARCHIVE: &[&str] = &[
    "archive.dumping",
    "archive.dumped",
    "archive.artifact",
    "archive.artifacts",
    "archive.lists",
    "archive.published",
    "prune.marked",
    "prune.manifest",
    "prune.file",
    "restore.created",
    "restore.rows",
    "restore.artifact",
    "restore.done",
];

/// The point before our slot is dropped: `tests/stream/slots.rs` waits there.
pub const SLOT: &[&str] = &["slot.before_drop"];

/// The point at which a step of a transition begins.
pub fn step(kind: &str, step: &str) {
    let name = format!("{kind}.{step}");
    if let Some(point) = HANDOVER.iter().find(|point| **point == name) {
        reach(point);
    }
}

#[cfg(not(debug_assertions))]
pub fn reach(_: &'static str) {}

#[cfg(debug_assertions)]
pub fn reach(point: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let mut listed = REPLICATION
        .iter()
        .chain(HANDOVER)
        .chain(LEASE)
        .chain(SLOT)
        .chain(ARCHIVE);
    debug_assert!(listed.any(|name| *name == point), "{point} is not listed");
    wait_at(point);
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("WARM_SPARE_KILL_AT").ok()?;
        let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
        Some((name.to_string(), count.parse().ok()?))
    });
    let Some((name, count)) = wanted else { return };
    if name == point && SEEN.fetch_add(1, Ordering::Relaxed) + 1 == *count {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal may take a moment, and nothing may happen in it.
        loop {
            std::thread::park();
        }
    }
}

/// `WARM_SPARE_WAIT_AT=switchover.drain:/some/directory`: the process says there that it has come
/// to the point, by a file `reached`, and goes on when there is a file `go`.
#[cfg(debug_assertions)]
fn wait_at(point: &str) {
    use std::path::Path;
    let Ok(wanted) = std::env::var("WARM_SPARE_WAIT_AT") else {
        return;
    };
    let Some((_, directory)) = wanted.split_once(':').filter(|(name, _)| *name == point) else {
        return;
    };
    let directory = Path::new(directory);
    if std::fs::write(directory.join("reached"), point).is_err() {
        return;
    }
    while !directory.join("go").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
