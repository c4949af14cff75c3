//! The state's only writers go through here: the channel that everything reads from, the meter, the counters, and the
//! events, which wait here while the state database is away.

use crate::cluster::{self, Event, FenceError, ProgramError, StateError};
use crate::domain::HoldReason;
use crate::domain::{ErrorCode, EventKind, Side};
use crate::observe::{Clock, Counters, Hold, Meter, Progress, Reach, Sighting, State, Watched};
use crate::replication::{PassError, Policy};
use chrono::{DateTime, Utc};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::watch;

use super::complaint::Pace;

/// Events that wait to be written; beyond that the oldest are lost to the database, not to the log.
const MOST_PENDING: usize = 200;
const EVENTS_READ: i64 = 50;

#[derive(Clone)]
pub struct Desk {
    state: watch::Sender<State>,
    pending: Arc<Mutex<VecDeque<Event>>>,
    pub meter: Arc<Meter>,
    pub counters: Counters,
    pub clock: Clock,
    /// What all transfers are held to, those under way included.
    pub throttle: cluster::Throttle,
}

impl Desk {
    pub fn new(clock: Clock) -> Self {
        let counters = Counters::default();
        let throttle = cluster::Throttle::default();
        let meter = Meter::new(clock.clone(), counters.clone(), throttle.clone());
        Desk {
            state: watch::Sender::new(State::new(clock.now())),
            pending: Arc::default(),
            meter: Arc::new(meter),
            counters,
            clock,
            throttle,
        }
    }

    pub fn watched(&self) -> Watched {
        Watched::new(
            self.state.subscribe(),
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

    pub fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.borrow())
    }

    pub fn update(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }

    /// Waits until the state is so.
    pub async fn wait_for(&self, so: impl FnMut(&State) -> bool) {
        // Fails only if the channel is gone, which we hold.
        let _ = self.state.subscribe().wait_for(so).await;
    }

    /// Something that stays in the history.
    pub fn note(&self, kind: EventKind, text: &str) {
        let event = Event {
            time: self.now(),
            kind: kind.to_string(),
            text: text.to_string(),
            change: self.read(|state| state.settings.change.clone()),
        };
        self.update(|state| state.remember(event.clone()));
        let mut pending = self.pending.lock().expect("no holder panics");
        if pending.len() == MOST_PENDING {
            pending.pop_front();
        }
        pending.push_back(event);
    }

    /// Writes the events that wait, and shows the history as the database has it. What cannot be written is no reason to
    /// stop: a server that is away is found by whoever needs it.
    pub async fn settle_events(&self, database: &cluster::State) {
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
                // It would stand in the way of all later ones.
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

    /// Shows why nothing is applied; an equal reason keeps its beginning.
    pub fn hold(&self, reason: HoldReason, detail: &str, next_step: &str, passing: bool) {
        // What an operator asked for, and waits for an answer to, is not hidden by what passes.
        if passing
            && self.read(|state| {
                state
                    .hold
                    .as_ref()
                    .is_some_and(|hold| hold.reason == HoldReason::ForceNeeded)
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

    /// A failure that ended a duty: counted, shown as a hold, and sorted into how it is tried again.
    pub fn hold_for(&self, error: &PassError) -> Pace {
        let verdict = Verdict::of(error);
        let side = error
            .side()
            .map_or_else(|| "none".to_string(), |side| side.to_string());
        self.counters.error(&side, error.code().into_str());
        let text = error.to_string();
        self.hold(
            verdict.reason,
            // The reason stands before it wherever it is shown.
            text.strip_prefix(&format!("{}: ", verdict.reason))
                .unwrap_or(&text),
            &error.next_step(),
            verdict.passing,
        );
        self.sight_failure(error);
        verdict.pace
    }

    fn sight_failure(&self, error: &PassError) {
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
            self.update(|state| state.waiting = None);
        }
    }

    /// Ends a hold, if it is of a kind that `which` names.
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
                state.peer_answered = Some(Instant::now());
            }
            see(&mut sighting(state, side).datastore, error, now);
        });
    }
}

fn sighting(state: &mut State, side: Side) -> &mut Sighting {
    match side {
        Side::Local => &mut state.local,
        Side::Peer => &mut state.peer,
    }
}

/// `since` is when it began to answer, or not to.
fn see(reach: &mut Option<Reach>, error: Option<String>, now: DateTime<Utc>) {
    let since = match reach {
        Some(old) if old.error.is_some() == error.is_some() => old.since,
        _ => now,
    };
    *reach = Some(Reach { error, since });
}

/// Holds that end by an act on the other site, of which nobody tells us. To look costs one question.
const ENDED_THERE: [ErrorCode; 2] = [ErrorCode::PeerIsFenced, ErrorCode::PeerIsSpare];

/// What a failure means for the service.
struct Verdict {
    reason: HoldReason,
    /// Health warns, and is critical when the spare grows too old by it.
    passing: bool,
    pace: Pace,
}

impl Verdict {
    fn of(error: &PassError) -> Verdict {
        let reason = reason(error);
        let passing = error.policy() == Policy::Retry
            || matches!(
                reason,
                // A password or a certificate may be rotated, a bucket made, without our being told.
                HoldReason::LocalUnreachable | HoldReason::PeerUnreachable | HoldReason::Failed
            );
        // A fault that nobody knows to be passing is not worth a full copy every minute.
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
        ErrorCode::ForceNeeded | ErrorCode::PrimaryLives => HoldReason::ForceNeeded,
        _ => return None,
    })
}

fn reason(error: &PassError) -> HoldReason {
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
        PassError::Refused { .. } | PassError::Unfit { .. } => HoldReason::Conflict,
        PassError::Fence(FenceError::Open { .. }) => HoldReason::Conflict,
        // An older program on a newer state, or no client programs between the two servers' versions.
        PassError::State(StateError::Newer { .. })
        | PassError::Program(ProgramError::NoneFits { .. }) => HoldReason::Version,
        _ => HoldReason::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_that_ends_on_the_other_site_is_looked_at_every_minute() {
        let verdict = |rule| {
            Verdict::of(&PassError::Refused {
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
