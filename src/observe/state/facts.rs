//! The facts that a service shows, by subject.

use super::Arrivals;
use crate::cluster::{
    Confirmation, DrillRecord, Footprint, Generation, Node, RecoveryPoint, VerificationRecord,
};
use crate::domain::{
    HoldReason, Lease, MissingReason, PreflightCheck, Role, Sampled, Transition, Verdict,
};
use chrono::{DateTime, Utc};
use std::time::Instant;

/// The record of this cluster, from the state database. None: it was not read yet, or does not
/// exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterFacts {
    pub id: Option<String>,
    pub role: Option<Role>,
    pub epoch: Option<i64>,
    /// Time since which it has this role.
    pub since: Option<DateTime<Utc>>,
    /// The highest epoch that is recorded outside PostgreSQL.
    pub witnessed_epoch: Option<i64>,
    /// The epoch and the cluster that have fenced this cluster, although it was no spare.
    pub fenced_by: Option<(i64, String)>,
    /// True: we have begun to fence our own database, and older sessions may still write.
    pub fence_begun: bool,
    /// True: the peer was asked whether it is a newer primary, or nobody is there who could be. No
    /// client is sent to a primary before that.
    pub peer_asked: bool,
}

/// The working lock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LockFacts {
    /// True: this process holds it.
    pub active: bool,
    /// The process that holds it while this process waits for it.
    pub holder: Option<String>,
    /// True: that process gives no sign of life.
    pub holder_is_silent: bool,
}

/// The rows and artifacts of a spare, and how they follow the primary.
#[derive(Debug, Clone, Default)]
pub struct SpareFacts {
    /// None: nothing was copied yet.
    pub point: Option<RecoveryPoint>,
    pub confirmation: Option<Confirmation>,
    /// Time of the confirmation, by a clock that nobody sets; None: another process made it.
    pub confirmed: Option<Instant>,
    /// True: the primary has committed something that is not here. None: not known now.
    pub waiting: Option<bool>,
    pub lag_bytes: Option<u64>,
    /// The mode (stream or full copies) and its reason.
    pub mode: Option<Mode>,
    /// Transactions that have arrived completely and wait, usually for their artifacts.
    pub gate_waiting: Option<u64>,
    pub baseline: Option<Baseline>,
    pub artifacts: Option<Artifacts>,
    /// Number of artifacts that the primary's store refuses while it serves others, and one of
    /// them.
    pub unreadable: Option<(u64, String)>,
    /// Number of artifacts under keys that a store cannot hold, and one of them.
    pub unstorable: Option<(u64, String)>,
    /// Number of artifacts that the provider of the bucket never brings, and one of them.
    pub not_replicated: Option<(u64, String)>,
    pub arrivals: Arrivals,
    pub unproven: Unproven,
    /// Some artifacts that local rows name, searched in the local bucket; None: not searched.
    pub sampled: Option<Sampled>,
    /// True: the visible database is not the database that was copied here, or it does not exist.
    pub unknown_database: bool,
}

/// The lease of a shared bucket, as it was seen last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseFacts {
    pub lease: Option<Lease>,
    /// Why it cannot be read, written or believed.
    pub trouble: Option<String>,
    /// True: it grants this primary live traffic now. None: this cluster is no primary.
    pub permitted: Option<bool>,
    /// The address at which Builder's API answers on this spare.
    pub builder_api: Option<String>,
}

/// The other process of a cluster that is fed from its primary's site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PairFacts {
    /// True: this process has looked for the other one.
    pub looked: bool,
    /// The process that waits at the spare's site, for one that pushes; and the one that pushes, for
    /// the others. None: none has told anything for a day.
    pub other: Option<Node>,
    /// Time of the last word of the process at work that clients may use this cluster as the primary.
    pub told_to_serve: Option<Instant>,
}

/// The checks that were made, and their results.
#[derive(Debug, Clone, Default)]
pub struct Checks {
    pub verified: Option<Verified>,
    pub verifying: bool,
    /// The reason why the last due verification could not finish.
    pub verification_error: Option<String>,
    /// The oldest time at which a table was found equal on both sides.
    pub compared: Option<DateTime<Utc>>,
    pub drill: Option<DrillRecord>,
    pub preflight: Option<Preflight>,
}

/// The replaced databases that are kept. None: not counted yet.
#[derive(Debug, Clone, Default)]
pub struct Generations {
    pub kept: Option<Vec<Generation>>,
    pub bytes: Option<u64>,
}

/// Our objects and sessions on the primary. None: not known.
#[derive(Debug, Clone, Default)]
pub struct OnPrimary {
    /// The log that the primary keeps for our slot.
    pub held: Option<Held>,
    pub ours: Option<Vec<String>>,
    /// Objects of other clusters' ids.
    pub orphans: Option<Vec<String>>,
    /// Our locks and sessions now.
    pub footprint: Option<Footprint>,
    /// Time since which there is more than the running work explains.
    pub left_over_since: Option<DateTime<Utc>>,
}

/// A change of role, and the situation of a primary and its peer.
#[derive(Debug, Clone, PartialEq)]
pub struct HandoverFacts {
    /// A change of role that is under way.
    pub transition: Option<Transition>,
    /// The reason why the last handover was undone or refused.
    pub undone: Option<String>,
    pub standing: Standing,
}

impl Default for HandoverFacts {
    fn default() -> Self {
        HandoverFacts {
            transition: None,
            undone: None,
            standing: Standing::Unknown,
        }
    }
}

/// The peer's own record of its role, as it was read last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerRecord {
    /// Time of the last answer of the peer's datastore, by a clock that nobody sets.
    pub answered: Option<Instant>,
    pub role: Option<Role>,
    pub epoch: Option<i64>,
    /// The epoch and the cluster that have fenced the peer.
    pub fenced_by: Option<(i64, String)>,
}

/// The state of the rendered configuration. An error means that another configuration is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigState {
    pub error: Option<String>,
    pub since: DateTime<Utc>,
}

/// The task of the service, apart from a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Starting,
    /// Another process holds the working lock.
    Standby,
    Following,
    /// A primary on record. Nothing is copied to it.
    Primary,
    /// An old primary that another cluster has replaced. It is read-only.
    Fenced,
}

/// The situation of a primary and its peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// The peer was not asked yet.
    Unknown,
    /// The peer is a spare of this cluster, and was complete lately.
    Followed,
    /// No spare could take over, with the reason.
    Alone(String),
    /// Clients may still write to the old primary, with the reason why it could not be fenced.
    PeerOpen(String),
}

/// The result of the checks before a promotion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preflight {
    pub time: DateTime<Utc>,
    pub planned: Verdict,
    pub unplanned: Verdict,
    pub checks: Vec<Check>,
}

/// A check before a promotion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub name: PreflightCheck,
    pub result: Verdict,
    pub reason: String,
    /// The step that an operator can take; empty if there is nothing to do.
    pub next_step: String,
    /// True: the check could not run, because the primary's datastore answered but refused the
    /// question.
    pub primary_lives: bool,
}

/// The reason why no changes are applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    pub reason: HoldReason,
    pub detail: String,
    pub next_step: String,
    pub since: DateTime<Utc>,
    /// True: a transient fault, which ends as soon as work succeeds again.
    pub passing: bool,
}

/// The mode of replication and its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mode {
    pub stream: bool,
    pub reason: String,
}

/// Write-ahead log that the primary keeps for our slot, and its maximum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub bytes: u64,
    pub bound: Option<u64>,
    /// Bytes of this log that our slot has not confirmed. The rest is kept for other reasons.
    pub unconfirmed: u64,
    /// The oldest transaction on the primary that writes.
    pub oldest_writer: Option<String>,
}

/// A pass that is running. The meter has its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Baseline {
    pub started: DateTime<Utc>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Artifacts {
    pub missing: u64,
    pub damaged: u64,
    /// Number of new artifacts that wait beside their key, and of old ones that were replaced.
    /// None: not counted yet.
    pub staged: Option<u64>,
    pub retired: Option<u64>,
    /// Some of the artifacts that the primary does not have, with key and reason.
    pub examples: Vec<(String, MissingReason)>,
}

/// The artifacts of a shared bucket that a copy has admitted by their presence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unproven {
    /// Number of those that were not hashed yet.
    pub left: u64,
    /// The largest number since there was none.
    pub of: u64,
}

impl Unproven {
    /// Notes how many are on record.
    pub fn count(&mut self, left: u64) {
        self.of = if left == 0 { 0 } else { self.of.max(left) };
        self.left = left;
    }

    /// Notes that one is settled.
    pub fn settled_one(&mut self) {
        self.count(self.left.saturating_sub(1));
    }
}

/// The last observation of the two stores of a cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SideStatus {
    pub datastore: Option<Reachability>,
    pub s3: Option<Reachability>,
    pub version: Option<String>,
    pub tls: Option<bool>,
    pub fenced: Option<bool>,
}

/// The local server as a client saw it, with the time by a clock that nobody sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub at: Instant,
    /// True: a primary on record that accepts writes.
    pub writable: bool,
    /// True: a spare on record whose database is the database that was copied.
    pub readable: bool,
}

/// The result of the last question to a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reachability {
    pub error: Option<String>,
    pub since: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub record: VerificationRecord,
    /// The first differences, as text.
    pub examples: Vec<String>,
}

/// The maximum lag of the spare. No lag exists before the first copy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lag {
    pub seconds: f64,
    pub bytes: Option<u64>,
    /// Time at which the spare was last known to be complete, by the primary's clock.
    pub complete_at: DateTime<Utc>,
}
