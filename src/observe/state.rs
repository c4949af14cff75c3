//! The state of a service: plain facts that only the service writes. Values that depend on the time
//! (lag, health) are computed on request, so that they are right even if nothing happens.

use super::settings::{Addresses, Settings};
use crate::cluster::{
    Confirmation, CopiedPoint, DrillRecord, EPOCH_STEP_MAX, Event, Footprint, Generation,
    VerificationRecord,
};
use crate::config::WantedRole;
use crate::domain::Sampled;
use crate::domain::{
    HoldReason, PreflightCheck, Role, StateName, Transition, TransitionKind, Verdict,
};
use chrono::{DateTime, TimeDelta, Utc};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Number of events kept in memory and shown; the state database keeps more.
const EVENTS_SHOWN: usize = 50;
/// Age of our transaction on the primary, in seconds, that is normal only during a copy or a
/// verification.
const LONG_TRANSACTION_SECONDS: f64 = 600.0;
/// Time for which an observation of our own server counts.
const SEEN_LATELY: Duration = Duration::from_secs(8);

#[derive(Debug, Clone)]
pub struct State {
    pub started: DateTime<Utc>,
    pub settings: Settings,
    pub config: ConfigState,
    /// From the state database; None: it was not read yet, or does not exist.
    pub cluster_id: Option<String>,
    pub role: Option<Role>,
    pub epoch: Option<i64>,
    pub role_since: Option<DateTime<Utc>>,
    /// True: this process holds the working lock.
    pub active: bool,
    /// The process that holds the working lock while this process waits for it.
    pub holder: Option<String>,
    /// True: that process gives no sign of life.
    pub holder_is_silent: bool,
    pub work: Work,
    pub hold: Option<Hold>,
    pub point: Option<CopiedPoint>,
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
    pub held: Option<Held>,
    /// The oldest time at which a table was found equal on both sides.
    pub compared: Option<DateTime<Utc>>,
    /// Our objects on the primary, and objects of other clusters' ids.
    pub ours: Option<Vec<String>>,
    pub orphans: Option<Vec<String>>,
    /// Our locks and sessions on the primary now; None: not known.
    pub footprint: Option<Footprint>,
    /// Time since which there is more than the running work explains.
    pub left_over_since: Option<DateTime<Utc>>,
    pub baseline: Option<Baseline>,
    pub artifacts: Option<Artifacts>,
    /// Number of artifacts that the primary's store refuses while it serves others, and one of
    /// them.
    pub unreadable: Option<(u64, String)>,
    /// Number of artifacts under keys that a store cannot hold, and one of them.
    pub unstorable: Option<(u64, String)>,
    /// Some artifacts that local rows name, searched in the local bucket; None: not searched.
    pub sampled: Option<Sampled>,
    pub local: Sighting,
    pub peer: Sighting,
    /// Time of the last answer of the peer's datastore, by a clock that nobody sets.
    pub peer_answered: Option<Instant>,
    /// The epoch and the cluster that have fenced the peer, as the peer reports.
    pub peer_fenced_by: Option<(i64, String)>,
    pub generations: Option<Vec<Generation>>,
    pub generations_bytes: Option<u64>,
    pub verified: Option<Verified>,
    /// True: the visible database is not the database that was copied here, or it does not exist.
    pub astray: bool,
    /// The local server as a client sees it; None: the server does not answer.
    pub seen: Option<Seen>,
    pub verifying: bool,
    /// The reason why the last due verification could not finish.
    pub verification_error: Option<String>,
    /// A change of role that is under way.
    pub transition: Option<Transition>,
    /// The reason why the last handover was undone or refused.
    pub undone: Option<String>,
    /// True: we have begun to fence our own database, and older sessions may still write.
    pub fence_begun: bool,
    /// The situation of a primary and its peer.
    pub standing: Standing,
    /// Role and epoch that the peer reports.
    pub peer_role: Option<Role>,
    pub peer_epoch: Option<i64>,
    /// The highest epoch that is recorded outside PostgreSQL.
    pub witnessed_epoch: Option<i64>,
    /// The epoch and the cluster that have fenced this cluster, although it was no spare.
    pub fenced_by: Option<(i64, String)>,
    pub preflight: Option<Preflight>,
    pub drill: Option<DrillRecord>,
    /// Revisions of the builder keys in `local.builder_keys_dir`, the newest last.
    pub builder_keys: Option<Vec<String>>,
    pub events: VecDeque<Event>,
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
    pub examples: Vec<(String, String)>,
}

/// The last observation of the two stores of a cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sighting {
    pub datastore: Option<Reach>,
    pub s3: Option<Reach>,
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
pub struct Reach {
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

impl State {
    pub fn new(started: DateTime<Utc>) -> Self {
        State {
            started,
            settings: Settings {
                site: String::new(),
                change: String::new(),
                wanted: WantedRole::Keep,
                interval: TimeDelta::minutes(1),
                lag_warn: TimeDelta::minutes(1),
                rpo: TimeDelta::minutes(5),
                wal_hold_limit: u64::MAX,
                quiet_until: None,
                local: Addresses::default(),
                peer: Addresses::default(),
            },
            config: ConfigState {
                error: None,
                since: started,
            },
            cluster_id: None,
            role: None,
            epoch: None,
            role_since: None,
            active: false,
            holder: None,
            holder_is_silent: false,
            work: Work::Starting,
            hold: None,
            point: None,
            confirmation: None,
            confirmed: None,
            waiting: None,
            lag_bytes: None,
            mode: None,
            gate_waiting: None,
            held: None,
            compared: None,
            ours: None,
            orphans: None,
            footprint: None,
            left_over_since: None,
            baseline: None,
            artifacts: None,
            unreadable: None,
            unstorable: None,
            sampled: None,
            local: Sighting::default(),
            peer: Sighting::default(),
            peer_answered: None,
            peer_fenced_by: None,
            generations: None,
            generations_bytes: None,
            verified: None,
            astray: false,
            seen: None,
            verifying: false,
            verification_error: None,
            transition: None,
            undone: None,
            fence_begun: false,
            standing: Standing::Unknown,
            peer_role: None,
            peer_epoch: None,
            witnessed_epoch: None,
            fenced_by: None,
            preflight: None,
            drill: None,
            builder_keys: None,
            events: VecDeque::new(),
        }
    }

    pub fn name(&self) -> StateName {
        match self.work {
            // A fenced cluster is read-only, whatever else is asked of it.
            Work::Fenced => StateName::Fenced,
            _ if self.is_promoting() => StateName::Promoting,
            Work::Primary if self.active && !self.holds(HoldReason::TwoPrimaries) => {
                StateName::Primary
            }
            _ if self.hold.is_some() => StateName::Holding,
            Work::Standby => StateName::Standby,
            Work::Primary => StateName::Primary,
            _ if self.baseline.is_some() => StateName::Baselining,
            Work::Following if self.point.is_some() => StateName::Following,
            _ => StateName::Starting,
        }
    }

    pub fn peer_answered_within(&self, limit: Duration) -> bool {
        self.peer_answered
            .is_some_and(|then| then.elapsed() <= limit)
    }

    /// Returns whether artifacts are recorded that the primary did not deliver, but may deliver
    /// later.
    pub fn waits_for_artifacts(&self) -> bool {
        let recorded = self.artifacts.as_ref();
        recorded.is_some_and(|found| found.missing + found.damaged > 0)
            || self.unreadable.is_some()
            || self.unstorable.is_some()
    }

    /// Returns whether clients may be sent to this cluster as the primary. Only an observation of
    /// the last seconds counts.
    pub fn serves(&self) -> bool {
        self.name() == StateName::Primary
            && self.active
            && self.local.fenced != Some(true)
            && self.seen_lately().is_some_and(|seen| seen.writable)
    }

    /// Returns whether readers may be sent to this spare. Its database is at a point of the
    /// primary's history, and was seen in the last seconds.
    pub fn can_be_read(&self) -> bool {
        !self.astray && self.seen_lately().is_some_and(|seen| seen.readable)
    }

    fn seen_lately(&self) -> Option<Seen> {
        self.seen.filter(|seen| seen.at.elapsed() <= SEEN_LATELY)
    }

    fn is_promoting(&self) -> bool {
        let transition = self.transition.as_ref();
        transition.is_some_and(|transition| transition.kind != TransitionKind::Failback)
    }

    fn holds(&self, reason: HoldReason) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.reason == reason)
    }

    /// Returns the epoch that the next promotion here would take.
    pub fn next_epoch(&self) -> Option<i64> {
        let fenced = self.fenced_by.as_ref().map(|(epoch, _)| *epoch);
        // The peer's epoch counts only within a limit: a number far above it would leave no epochs
        // for later promotions.
        let local = self.epoch.unwrap_or_default().max(1);
        let believed = local.saturating_add(EPOCH_STEP_MAX);
        let peer = self.peer_epoch.filter(|epoch| *epoch <= believed);
        let known = [self.epoch, peer, fenced, self.witnessed_epoch];
        known
            .into_iter()
            .flatten()
            .max()
            .map(|epoch| epoch.max(1).saturating_add(1))
    }

    /// Returns now minus the time at which the spare was last known to be complete, both by the
    /// primary's clock. The lag grows while the primary is silent or gone, because nothing is
    /// assumed without a confirmation.
    pub fn lag(&self, now: DateTime<Utc>) -> Option<Lag> {
        let point = self.point.as_ref()?;
        // A pass confirms its own point. So a later confirmation counts before the point, whatever
        // the primary's clock showed when that confirmation was made.
        let complete_at = self.confirmation.map_or(point.commit_time, |c| c.time);
        let offset = self.confirmation.map_or(0.0, |c| c.clock_offset_seconds);
        let behind = (now - complete_at).num_milliseconds() as f64 / 1e3 + offset;
        // The local clock may have been set back since.
        let at_least = match (self.confirmed, self.confirmation) {
            (Some(then), Some(confirmed)) if confirmed.time == complete_at => {
                then.elapsed().as_secs_f64()
            }
            _ => 0.0,
        };
        Some(Lag {
            seconds: behind.max(at_least),
            bytes: match self.waiting {
                Some(false) => Some(0),
                Some(true) => self.lag_bytes,
                None => None,
            },
            complete_at,
        })
    }

    pub fn see_footprint(&mut self, found: Option<Footprint>, now: DateTime<Utc>) {
        self.footprint = found;
        let left_over = self.left_over();
        self.left_over_since = left_over.map(|_| self.left_over_since.unwrap_or(now));
    }

    /// Returns an object of warm-spare on the primary that no running work explains.
    pub fn left_over(&self) -> Option<String> {
        let found = self.footprint.as_ref()?;
        let copying = i64::from(self.baseline.is_some());
        let reading = self.baseline.is_some() || self.verifying;
        let open = found.transaction_seconds.unwrap_or_default();
        if found.temporary_slots > copying {
            return Some(format!("{} temporary slots", found.temporary_slots));
        }
        if found.walsenders > 1 + copying {
            return Some(format!("{} walsenders", found.walsenders));
        }
        (!reading && open > LONG_TRANSACTION_SECONDS)
            .then(|| format!("a transaction that has been open for {open:.0} s"))
    }

    pub fn remember(&mut self, event: Event) {
        self.events.push_back(event);
        while self.events.len() > EVENTS_SHOWN {
            self.events.pop_front();
        }
    }
}

#[cfg(test)]
mod tests;
