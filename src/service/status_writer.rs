//! The only way to write the state: the channel that all readers use, the meter, the counters, and
//! the events. Events wait here while the state database does not answer.

use crate::cluster::{self, Event, FenceError, ProgramError, StateError};
use crate::domain::{ErrorCode, EventKind, HoldReason, Side};
use crate::observe::{
    Clock, Counters, Hold, Meter, Progress, Reachability, ServiceState, ServiceView, SideStatus,
};
use crate::replication::{Policy, ReplicationError};
use chrono::{DateTime, Utc};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::{Notify, watch};

use super::failure_tracker::Pace;

/// Maximum number of events that wait to be written. Older ones are lost to the database, but not
/// to the log.
const MAX_PENDING: usize = 200;
const EVENTS_READ: i64 = 50;

#[derive(Clone)]
pub struct StatusWriter {
    state: watch::Sender<ServiceState>,
    /// Readers ask by it for a look at the local server.
    pub look: Arc<Notify>,
    pending: Arc<Mutex<VecDeque<Event>>>,
    pub meter: Arc<Meter>,
    pub counters: Counters,
    pub clock: Clock,
    /// The limit of all transfers, also of running ones.
    pub throttle: cluster::Throttle,
}

impl StatusWriter {
    pub fn new(clock: Clock) -> Self {
        let counters = Counters::default();
        let throttle = cluster::Throttle::default();
        let meter = Meter::new(clock.clone(), counters.clone(), throttle.clone());
        StatusWriter {
            state: watch::Sender::new(ServiceState::new(clock.now())),
            look: Arc::default(),
            pending: Arc::default(),
            meter: Arc::new(meter),
            counters,
            clock,
            throttle,
        }
    }

    pub fn view(&self) -> ServiceView {
        ServiceView::new(
            self.state.subscribe(),
            self.look.clone(),
            self.meter.clone(),
            self.counters.clone(),
            self.clock.clone(),
        )
    }

    pub fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    pub fn progress(&self) -> Progress {
        Progress::new(self.meter.clone())
    }

    pub fn read<T>(&self, read: impl FnOnce(&ServiceState) -> T) -> T {
        read(&self.state.borrow())
    }

    pub fn update(&self, change: impl FnOnce(&mut ServiceState)) {
        self.state.send_modify(change);
    }

    /// Waits until the state fulfils the condition.
    pub async fn wait_for(&self, condition: impl FnMut(&ServiceState) -> bool) {
        // This fails only if the channel is gone, and the writer holds the channel.
        let _ = self.state.subscribe().wait_for(condition).await;
    }

    /// Records an event of the history.
    pub fn note(&self, kind: EventKind, text: &str) {
        let event = Event {
            time: self.now(),
            kind: kind.to_string(),
            text: text.to_string(),
            change: self.read(|state| state.settings.change.clone()),
        };
        self.update(|state| state.remember(event.clone()));
        let mut pending = self.pending.lock().expect("no holder panics");
        if pending.len() == MAX_PENDING {
            pending.pop_front();
        }
        pending.push_back(event);
    }

    /// Writes the waiting events, and shows the history as the database has it. An event that
    /// cannot be written stops nothing: the code that needs the server finds out that it is away.
    pub async fn settle_events(&self, database: &cluster::StateDb) {
        loop {
            let next = self
                .pending
                .lock()
                .expect("no holder panics")
                .front()
                .cloned();
            let Some(event) = next else { break };
            match database.record_event(&event).await {
                Err(StateError::Datastore(error)) if error.is_transient() => return,
                // This event would block all later ones.
                Err(error) => log::warn!("{error}; the event is not kept: {}", event.text),
                Ok(()) => {}
            }
            self.pending.lock().expect("no holder panics").pop_front();
        }
        match database.events(EVENTS_READ).await {
            Ok(events) => self.update(|state| state.events = events.into()),
            Err(error) => log::debug!("{error}"),
        }
    }

    /// Shows the reason why no changes are applied. An equal reason keeps its start time.
    pub fn hold(&self, reason: HoldReason, detail: &str, next_step: &str, passing: bool) {
        // A transient fault must not hide a hold in which the operator waits for an answer.
        if passing
            && self.read(|state| {
                state
                    .hold
                    .as_ref()
                    .is_some_and(|hold| hold.reason.is_of_a_takeover())
            })
        {
            return;
        }
        let now = self.now();
        let mut begins = false;
        self.update(|state| {
            let old = state.hold.take().filter(|old| old.reason == reason);
            begins = old.is_none();
            state.hold = Some(Hold {
                reason,
                detail: detail.to_string(),
                next_step: next_step.to_string(),
                since: old.map_or(now, |old| old.since),
                passing,
            });
        });
        if begins {
            self.note(EventKind::Hold, &format!("{}: {detail}", reason));
        }
    }

    /// Counts a failure that ended a duty, shows it as a hold, and returns the pace of its retries.
    pub fn hold_for(&self, error: &ReplicationError) -> Pace {
        let verdict = Verdict::of(error);
        let side = error
            .side()
            .map_or_else(|| "none".to_string(), |side| side.to_string());
        self.counters.error(&side, error.code().into_str());
        let text = error.to_string();
        self.hold(
            verdict.reason,
            // Every output shows the reason before the text.
            text.strip_prefix(&format!("{}: ", verdict.reason))
                .unwrap_or(&text),
            &error.next_step(),
            verdict.passing,
        );
        self.sight_failure(error);
        verdict.pace
    }

    fn sight_failure(&self, error: &ReplicationError) {
        let (Some(side), true) = (error.side(), error.is_unreachable()) else {
            return;
        };
        let text = Some(error.to_string());
        if error.is_of_a_store() {
            self.see_store(side, text);
        } else {
            self.see_datastore(side, text);
        }
        if side == Side::Peer {
            self.update(|state| state.spare.waiting = None);
        }
    }

    /// Ends the hold, if `which` accepts it.
    pub fn release(&self, which: impl Fn(&Hold) -> bool) {
        let mut ended = None;
        self.update(|state| {
            if state.hold.as_ref().is_some_and(&which) {
                ended = state.hold.take();
            }
        });
        if let Some(hold) = ended {
            let seconds = (self.now() - hold.since).num_seconds();
            let text = format!("{} ended after {seconds} s", hold.reason);
            self.note(EventKind::HoldEnded, &text);
        }
    }

    pub fn see_store(&self, side: Side, error: Option<String>) {
        let now = self.now();
        self.update(|state| see(&mut sighting(state, side).s3, error, now));
    }

    pub fn see_datastore(&self, side: Side, error: Option<String>) {
        let now = self.now();
        self.update(|state| {
            if side == Side::Peer && error.is_none() {
                state.peer_record.answered = Some(Instant::now());
            }
            see(&mut sighting(state, side).datastore, error, now);
        });
    }
}

fn sighting(state: &mut ServiceState, side: Side) -> &mut SideStatus {
    match side {
        Side::Local => &mut state.local,
        Side::Peer => &mut state.peer,
    }
}

/// `since` is the time at which the store began to answer, or stopped.
fn see(reach: &mut Option<Reachability>, error: Option<String>, now: DateTime<Utc>) {
    let since = match reach {
        Some(old) if old.error.is_some() == error.is_some() => old.since,
        _ => now,
    };
    *reach = Some(Reachability { error, since });
}

/// Holds that end by an act on the other site, which does not notify us. Checking costs one
/// question.
const ENDED_THERE: [ErrorCode; 2] = [ErrorCode::PeerIsFenced, ErrorCode::PeerIsSpare];

/// The meaning of a failure for the service.
struct Verdict {
    reason: HoldReason,
    /// True: health warns, and becomes critical when the spare grows too old.
    passing: bool,
    pace: Pace,
}

impl Verdict {
    fn of(error: &ReplicationError) -> Verdict {
        let reason = reason(error);
        let passing = error.policy() == Policy::Retry
            || matches!(
                reason,
                // A password or a certificate may be changed, or a bucket made, without a notice to
                // us.
                HoldReason::LocalUnreachable | HoldReason::PeerUnreachable | HoldReason::Failed
            );
        // A fault that is not known to be transient is not worth a full copy every minute.
        let quick = passing && (reason != HoldReason::Failed || error.policy() == Policy::Retry)
            || ENDED_THERE.contains(&error.code());
        Verdict {
            reason,
            passing,
            pace: if quick { Pace::Passing } else { Pace::Operator },
        }
    }
}

/// Returns the hold of a code that has one of its own.
fn named(code: ErrorCode) -> Option<HoldReason> {
    Some(match code {
        ErrorCode::RoleUnset => HoldReason::RoleUnset,
        ErrorCode::PeerUnreachable => HoldReason::PeerUnreachable,
        ErrorCode::NotPrepared => HoldReason::NotPrepared,
        ErrorCode::Fuse => HoldReason::Fuse,
        ErrorCode::DiskFull => HoldReason::DiskFull,
        ErrorCode::Privilege => HoldReason::Privilege,
        ErrorCode::Version => HoldReason::Version,
        ErrorCode::SameServer => HoldReason::SameServer,
        ErrorCode::SameBucket => HoldReason::SameBucket,
        ErrorCode::UnsupportedStore => HoldReason::UnsupportedStore,
        ErrorCode::LeaseHeld => HoldReason::LeaseHeld,
        ErrorCode::LeaseUnanswered => HoldReason::LeaseUnanswered,
        ErrorCode::NotAttached => HoldReason::NotAttached,
        ErrorCode::NoLease => HoldReason::NotPrepared,
        ErrorCode::ForceNeeded | ErrorCode::PrimaryLives => HoldReason::ForceNeeded,
        _ => return None,
    })
}

fn reason(error: &ReplicationError) -> HoldReason {
    if let Some(named) = named(error.code()) {
        return named;
    }
    if error.is_unreachable() {
        return match error.side() {
            Some(Side::Peer) => HoldReason::PeerUnreachable,
            _ => HoldReason::LocalUnreachable,
        };
    }
    match error {
        ReplicationError::Refused { .. } | ReplicationError::Precondition { .. } => {
            HoldReason::Conflict
        }
        ReplicationError::Fence(FenceError::Open { .. }) => HoldReason::Conflict,
        // An older program with a newer state, or no client programs between the versions of the
        // two servers.
        ReplicationError::State(StateError::Newer { .. })
        | ReplicationError::Program(ProgramError::NoneFits { .. }) => HoldReason::Version,
        _ => HoldReason::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_that_ends_on_the_other_site_is_looked_at_every_minute() {
        let verdict = |rule| {
            Verdict::of(&ReplicationError::Refused {
                rule,
                text: String::new(),
                next_step: String::new(),
            })
        };
        for rule in ENDED_THERE {
            let verdict = verdict(rule);
            assert_eq!(verdict.reason, HoldReason::Conflict, "{rule}");
            assert_eq!(verdict.pace, Pace::Passing, "{rule}");
            assert!(!verdict.passing, "{rule}: health is critical");
        }
        assert_eq!(verdict(ErrorCode::Fuse).pace, Pace::Operator);
    }
}
