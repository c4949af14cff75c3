//! Interruptions of a duty before its own end, and the end of a hold while a duty makes progress.

use crate::config::{Config, Replication};
use crate::domain::Step;
use crate::observe::Phase;
use crate::replication::ReplicationError;
use crate::role::{request_id, wants_promotion};
use crate::service::plan::Rules;
use crate::service::{Configs, StatusWriter, next};
use std::convert::Infallible;
use std::time::Duration;

/// Time in which a quick question is answered.
const QUICK_ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// Interval between two looks at the progress of a pass.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(60);

/// Runs the duty, unless another configuration comes into force while the duty has no answer; the
/// duty then starts again with that one. A quick duty is always finished, because otherwise a storm
/// of changes would let none finish.
pub(super) async fn unless_other(
    mut configs: Configs,
    doing: impl Future<Output = Result<(), ReplicationError>>,
) -> Result<(), ReplicationError> {
    let other = async {
        next(&mut configs).await;
        tokio::time::sleep(QUICK_ANSWER_LIMIT).await;
    };
    tokio::select! {
        done = doing => done,
        () = other => Ok(()),
    }
}

/// Ends the hold of a transient fault when the next pass makes progress, which may be hours before
/// the pass ends.
pub(super) async fn release_when_moving(writer: &StatusWriter) -> Infallible {
    loop {
        // The hold does not end at once: a pass that always fails at the same place would end and
        // begin the hold at every try.
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        let moves = match writer.meter.phase() {
            None | Some(Phase::Checks) => false,
            Some(Phase::Artifacts) => writer.meter.progress().0 > 0,
            Some(_) => true,
        };
        if moves {
            writer.release(|hold| hold.passing);
        }
    }
}

/// Waits for a configuration that stops the running pass, and returns the reason.
pub(super) async fn given_up(
    writer: &StatusWriter,
    mut configs: Configs,
    begun: &Config,
) -> &'static str {
    loop {
        let current = configs.borrow_and_update().clone();
        // The replacement of bytes takes only moments, and half of it would be neither the old nor
        // the new state.
        let late = matches!(
            writer.meter.phase(),
            Some(Phase::Replacements | Phase::Switch)
        );
        if let Some(current) = current.filter(|_| !late) {
            if another_wish(&current, begun) {
                return "the configuration asks for another role";
            }
            if Rules::of(&current).is_paused(writer.now()) {
                return "paused";
            }
            let early = matches!(
                writer.meter.phase(),
                None | Some(Phase::Checks | Phase::Artifacts)
            );
            // Later a pass ends with the configuration of its start: a copy of rows would have to
            // start from its beginning.
            if early && !same_for_a_pass(&current, begun) {
                return "it starts again with the new configuration";
            }
        }
        next(&mut configs).await;
    }
}

/// Waits for a configuration that no longer asks for the running handover. It does not interrupt
/// the commit of the promotion, because that takes only moments, and its result must be known.
pub(super) async fn called_off(writer: &StatusWriter, mut configs: Configs, begun: &Config) {
    loop {
        let current = configs.borrow_and_update().clone();
        let other = current.is_some_and(|current| another_wish(&current, begun));
        let late = writer.read(|state| {
            let step = state
                .handover
                .transition
                .as_ref()
                .and_then(|entry| entry.step);
            matches!(step, Some(Step::Promote | Step::Undo))
        });
        if other && !late {
            return;
        }
        next(&mut configs).await;
    }
}

/// Returns whether the two configurations need different streams.
pub(super) fn another_stream(a: &Config, b: &Config) -> bool {
    let settings = |config: &Config| Config {
        replication: Replication {
            // A running stream takes over changes of these keys.
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
        || a.artifacts != b.artifacts
        || a.fuse != b.fuse
        || another_wish(&a, &b)
        || a.force_epoch != b.force_epoch
        || (a.paused, a.paused_until) != (b.paused, b.paused_until)
}

/// Returns whether the two configurations ask for different handovers.
fn another_wish(a: &Config, b: &Config) -> bool {
    let request = |config: &Config| wants_promotion(config).then(|| request_id(config));
    request(a) != request(b)
}

fn same_for_a_pass(a: &Config, b: &Config) -> bool {
    let (r, s) = (&a.replication, &b.replication);
    a.artifacts == b.artifacts
        && a.fuse == b.fuse
        && a.force_epoch == b.force_epoch
        && (r.jobs, r.copies, r.buffer, r.gate_grace, r.keep_generations)
            == (s.jobs, s.copies, s.buffer, s.gate_grace, s.keep_generations)
}
