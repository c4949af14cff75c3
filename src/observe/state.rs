//! The state of a service: plain facts that only the service writes. Values that depend on the time
//! (lag, health) are computed on request, so that they are right even if nothing happens.

use super::settings::{Addresses, Settings};
use crate::cluster::{EPOCH_STEP_MAX, Event, Footprint};
use crate::config::{Direction, WantedRole};
use crate::domain::{HoldReason, Role, StateName, TransitionKind};
use chrono::{DateTime, TimeDelta, Utc};
use std::collections::VecDeque;
use std::time::Duration;

/// Number of events kept in memory and shown; the state database keeps more.
const EVENTS_SHOWN: usize = 50;
/// Age of our transaction on the primary, in seconds, that is normal only during a copy or a
/// verification.
const LONG_TRANSACTION_SECONDS: f64 = 600.0;
/// Time for which an observation of our own server counts.
const SEEN_LATELY: Duration = Duration::from_secs(8);
/// Age up to which the judgement of the process at work counts when it is read.
const TOLD_LATELY: Duration = Duration::from_secs(10);

mod archives;
mod arrivals;
mod facts;

pub use archives::{ArchiveFacts, ArchiveProof, ArchiveTrouble, NewestGeneration};
pub use arrivals::Arrivals;
pub use facts::{
    Artifacts, Baseline, Check, Checks, ClusterFacts, ConfigState, Generations, HandoverFacts,
    Held, Hold, Lag, LeaseFacts, LockFacts, Mode, OnPrimary, PairFacts, PeerRecord, Preflight,
    Reachability, Seen, SideStatus, SpareFacts, Standing, Unproven, Verified, Work,
};

#[derive(Debug, Clone)]
pub struct ServiceState {
    pub started: DateTime<Utc>,
    pub settings: Settings,
    pub config: ConfigState,
    pub cluster: ClusterFacts,
    pub lock: LockFacts,
    pub lease: LeaseFacts,
    pub pair: PairFacts,
    pub work: Work,
    pub hold: Option<Hold>,
    pub spare: SpareFacts,
    pub checks: Checks,
    pub generations: Generations,
    /// The archives of the configuration, in its order.
    pub archives: Vec<ArchiveFacts>,
    pub on_primary: OnPrimary,
    pub handover: HandoverFacts,
    pub local: SideStatus,
    pub peer: SideStatus,
    pub peer_record: PeerRecord,
    /// The local server as a client sees it; None: the server does not answer.
    pub seen: Option<Seen>,
    /// Revisions of the builder keys in `local.builder_keys_dir`, the newest last.
    pub builder_keys: Option<Vec<String>>,
    pub events: VecDeque<Event>,
}

impl ServiceState {
    pub fn new(started: DateTime<Utc>) -> Self {
        ServiceState {
            started,
            settings: Settings {
                site: String::new(),
                change: String::new(),
                wanted: WantedRole::Keep,
                direction: Direction::Pull,
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
            cluster: ClusterFacts::default(),
            lock: LockFacts::default(),
            lease: LeaseFacts::default(),
            pair: PairFacts::default(),
            work: Work::Starting,
            hold: None,
            spare: SpareFacts::default(),
            checks: Checks::default(),
            generations: Generations::default(),
            archives: Vec::new(),
            on_primary: OnPrimary::default(),
            handover: HandoverFacts::default(),
            local: SideStatus::default(),
            peer: SideStatus::default(),
            peer_record: PeerRecord::default(),
            seen: None,
            builder_keys: None,
            events: VecDeque::new(),
        }
    }

    pub fn name(&self) -> StateName {
        match self.work {
            // A fenced cluster is read-only, whatever else is asked of it.
            Work::Fenced => StateName::Fenced,
            _ if self.is_promoting() => StateName::Promoting,
            Work::Primary if self.lock.active && !self.holds(HoldReason::TwoPrimaries) => {
                StateName::Primary
            }
            _ if self.hold.is_some() => StateName::Holding,
            Work::Standby => StateName::Standby,
            Work::Primary => StateName::Primary,
            _ if self.spare.baseline.is_some() => StateName::Baselining,
            Work::Following if self.spare.point.is_some() => StateName::Following,
            _ => StateName::Starting,
        }
    }

    pub fn peer_answered_within(&self, limit: Duration) -> bool {
        self.peer_record
            .answered
            .is_some_and(|then| then.elapsed() <= limit)
    }

    /// Returns whether artifacts are recorded that the primary did not deliver, but may deliver
    /// later.
    pub fn waits_for_artifacts(&self) -> bool {
        let recorded = self.spare.artifacts.as_ref();
        recorded.is_some_and(|found| found.missing + found.damaged > 0)
            || self.spare.unreadable.is_some()
            || self.spare.not_replicated.is_some()
            || self.spare.unstorable.is_some()
    }

    /// Returns whether clients may be sent to this cluster as the primary. Only an observation of
    /// the last seconds counts.
    pub fn serves(&self) -> bool {
        if self.work == Work::Standby {
            return self.serves_as_told();
        }
        self.name() == StateName::Primary
            && self.lock.active
            && self.cluster.peer_asked
            && self.local.fenced != Some(true)
            && self.seen_lately().is_some_and(|seen| seen.writable)
    }

    /// Returns whether a process that waits may send clients here: the one at work has told so a
    /// moment ago, and the local server is seen to be writable.
    fn serves_as_told(&self) -> bool {
        let told = self.pair.told_to_serve;
        self.cluster.role == Some(Role::Primary)
            && self.cluster.fenced_by.is_none()
            && told.is_some_and(|told| told.elapsed() <= TOLD_LATELY)
            && self.seen_lately().is_some_and(|seen| seen.writable)
    }

    /// Returns whether readers may be sent to this spare. Its database is at a point of the
    /// primary's history, and was seen in the last seconds.
    pub fn can_be_read(&self) -> bool {
        !self.spare.unknown_database && self.seen_lately().is_some_and(|seen| seen.readable)
    }

    fn seen_lately(&self) -> Option<Seen> {
        self.seen.filter(|seen| seen.at.elapsed() <= SEEN_LATELY)
    }

    fn is_promoting(&self) -> bool {
        let transition = self.handover.transition.as_ref();
        transition.is_some_and(|transition| transition.kind != TransitionKind::Failback)
    }

    fn holds(&self, reason: HoldReason) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.reason == reason)
    }

    /// Returns the epoch that the next promotion here would take.
    pub fn next_epoch(&self) -> Option<i64> {
        let fenced = self.cluster.fenced_by.as_ref().map(|(epoch, _)| *epoch);
        // The peer's epoch counts only within a limit: a number far above it would leave no epochs
        // for later promotions.
        let local = self.cluster.epoch.unwrap_or_default().max(1);
        let believed = local.saturating_add(EPOCH_STEP_MAX);
        let peer = self.peer_record.epoch.filter(|epoch| *epoch <= believed);
        let lease = self.lease.lease.as_ref().map(|lease| lease.line.epoch);
        let lease = lease.filter(|epoch| self.lease.trouble.is_none() && *epoch <= believed);
        let known = [
            self.cluster.epoch,
            peer,
            lease,
            fenced,
            self.cluster.witnessed_epoch,
        ];
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
        let point = self.spare.point.as_ref()?;
        // A pass confirms its own point. So a later confirmation counts before the point, whatever
        // the primary's clock showed when that confirmation was made.
        let complete_at = self
            .spare
            .confirmation
            .map_or(point.commit_time, |c| c.time);
        let offset = self
            .spare
            .confirmation
            .map_or(0.0, |c| c.clock_offset_seconds);
        let behind = (now - complete_at).num_milliseconds() as f64 / 1e3 + offset;
        // The local clock may have been set back since.
        let at_least = match (self.spare.confirmed, self.spare.confirmation) {
            (Some(then), Some(confirmed)) if confirmed.time == complete_at => {
                then.elapsed().as_secs_f64()
            }
            _ => 0.0,
        };
        Some(Lag {
            seconds: behind.max(at_least),
            bytes: match self.spare.waiting {
                Some(false) => Some(0),
                Some(true) => self.spare.lag_bytes,
                None => None,
            },
            complete_at,
        })
    }

    pub fn see_footprint(&mut self, found: Option<Footprint>, now: DateTime<Utc>) {
        self.on_primary.footprint = found;
        let left_over = self.left_over();
        self.on_primary.left_over_since =
            left_over.map(|_| self.on_primary.left_over_since.unwrap_or(now));
    }

    /// Returns an object of warm-spare on the primary that no running work explains.
    pub fn left_over(&self) -> Option<String> {
        let found = self.on_primary.footprint.as_ref()?;
        let copying = i64::from(self.spare.baseline.is_some());
        let reading = self.spare.baseline.is_some() || self.checks.verifying;
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
