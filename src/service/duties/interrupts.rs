//! What may end a duty before its own end, and what happens to a hold while one gets on.

use super::super::plan::Rules;
use super::super::{Configs, Desk, next};
use crate::config::{Config, Replication};
use crate::domain::Step;
use crate::observe::Phase;
use crate::replication::PassError;
use crate::role::{asked, is_asked_for};
use std::convert::Infallible;
use std::time::Duration;

/// For a question that will be answered.
const ENOUGH: Duration = Duration::from_secs(1);
const MOVING_LOOK: Duration = Duration::from_secs(60);

/// Does it, unless another configuration comes in force while it has no answer: then it begins anew with that. A quick
/// one is always finished, or a storm of changes would leave none.
pub(super) async fn unless_other(
    mut configs: Configs,
    doing: impl Future<Output = Result<(), PassError>>,
) -> Result<(), PassError> {
    let other = async {
        next(&mut configs).await;
        tokio::time::sleep(ENOUGH).await;
    };
    tokio::select! {
        done = doing => done,
        () = other => Ok(()),
    }
}

/// A passing fault is over when the next pass gets on; that may be hours before it is done.
pub(super) async fn release_when_moving(desk: &Desk) -> Infallible {
    loop {
        // Not at once: a pass that always fails at the same place would end and begin the hold at every try.
        tokio::time::sleep(MOVING_LOOK).await;
        let moves = match desk.meter.phase() {
            None | Some(Phase::Checks) => false,
            Some(Phase::Artifacts) => desk.meter.progress().0 > 0,
            Some(_) => true,
        };
        if moves {
            desk.release(|hold| hold.passing);
        }
    }
}

/// Waits for a configuration by which the pass under way should not go on, and says why.
pub(super) async fn given_up(desk: &Desk, mut configs: Configs, begun: &Config) -> &'static str {
    loop {
        let current = configs.borrow_and_update().clone();
        // Once bytes are being replaced it is a matter of moments, and half of it would be neither the old nor the new.
        let late = matches!(
            desk.meter.phase(),
            Some(Phase::Replacements | Phase::Switch)
        );
        if let Some(current) = current.filter(|_| !late) {
            if another_wish(&current, begun) {
                return "another role is asked for";
            }
            if Rules::of(&current).is_paused(desk.now()) {
                return "paused";
            }
            let early = matches!(
                desk.meter.phase(),
                None | Some(Phase::Checks | Phase::Artifacts)
            );
            // Later a pass ends with what it began with: a copy of rows would begin at its beginning.
            if early && !same_for_a_pass(&current, begun) {
                return "it begins again with the new configuration";
            }
        }
        next(&mut configs).await;
    }
}

/// Waits for a configuration that does not ask for the handover under way any more. Not once its promotion is at its commit:
/// that is a matter of moments, and what came of it must be known.
pub(super) async fn called_off(desk: &Desk, mut configs: Configs, begun: &Config) {
    loop {
        let current = configs.borrow_and_update().clone();
        let other = current.is_some_and(|current| another_wish(&current, begun));
        let late = desk.read(|state| {
            let step = state.transition.as_ref().and_then(|entry| entry.step);
            matches!(step, Some(Step::Promote | Step::Undo))
        });
        if other && !late {
            return;
        }
        next(&mut configs).await;
    }
}

/// Whether a stream begun with one of them would be another one with the other.
pub(super) fn another_stream(a: &Config, b: &Config) -> bool {
    let settings = |config: &Config| Config {
        replication: Replication {
            // These are heard of while it goes.
            bandwidth_limit: None,
            interval: Duration::ZERO,
            schedule: None,
            lag_warn: Duration::ZERO,
            rpo: Duration::ZERO,
            keep_generations: 0,
            ..config.replication.clone()
        },
        ..config.clone()
    };
    let (a, b) = (settings(a), settings(b));
    a.replication != b.replication
        || a.fuse != b.fuse
        || another_wish(&a, &b)
        || a.force_epoch != b.force_epoch
        || (a.paused, a.paused_until) != (b.paused, b.paused_until)
}

/// Whether a handover is asked for by one of them, and not, or otherwise, by the other.
fn another_wish(a: &Config, b: &Config) -> bool {
    let wish = |config: &Config| is_asked_for(config).then(|| asked(config));
    wish(a) != wish(b)
}

fn same_for_a_pass(a: &Config, b: &Config) -> bool {
    let (r, s) = (&a.replication, &b.replication);
    a.fuse == b.fuse
        && a.force_epoch == b.force_epoch
        && (r.jobs, r.copies, r.buffer, r.gate_grace, r.keep_generations)
            == (s.jobs, s.copies, s.buffer, s.gate_grace, s.keep_generations)
}
