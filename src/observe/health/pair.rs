//! Health of the two processes of a cluster that is fed from its primary's site.

use super::{Findings, Level};
use crate::config::Direction;
use crate::domain::{HealthCode, Role};
use crate::observe::state::ServiceState;
use crate::observe::text::span;

/// Adds a reason if the process at the other site is gone.
pub(super) fn of_the_pair(state: &ServiceState, found: &mut Findings) {
    let pair = &state.pair;
    if !state.lock.active || !pair.looked {
        return;
    }
    let alive = pair.other.as_ref().is_some_and(|node| node.is_alive());
    let since = pair.other.as_ref().map(|node| {
        let place = node.place();
        match node.age() {
            Some(age) => format!("{place} was last heard of {} ago", span(age.as_secs_f64())),
            None => format!("{place} has told nothing for a long time"),
        }
    });
    match state.settings.direction {
        Direction::Push if !alive => {
            let text = format!(
                "no warm-spare waits at the spare's site{}: if this site is lost, nobody there takes over",
                since.map_or(String::new(), |since| format!(", and {since}"))
            );
            found.add(Level::Warning, HealthCode::NoStandby, text);
        }
        Direction::Pull if !alive && state.cluster.role == Some(Role::Spare) => {
            // A process that reaches the primary itself needs no other one.
            let peer = state.peer.datastore.as_ref();
            if let Some(since) = since
                && peer.is_none_or(|peer| peer.error.is_some())
            {
                let text = format!("the warm-spare at the primary's site is gone: {since}");
                found.add(Level::Warning, HealthCode::NoPusher, text);
            }
        }
        _ => {}
    }
}

/// Adds a reason if the process at work gives no sign of life.
pub(super) fn of_silence(state: &ServiceState, found: &mut Findings) {
    if state.lock.holder_is_silent {
        let who = state.lock.holder.as_deref().unwrap_or("not known");
        let text = format!("the warm-spare at work ({who}) gives no sign of life");
        found.add(Level::Warning, HealthCode::SilentHolder, text);
    }
}
