//! The processes of one cluster. The process at work writes into the state database whether the cluster
//! serves, so that every waiting node can answer a load balancer. Where the cluster is fed from its
//! primary's site, one process pushes and one waits at the spare's site: each also writes there what
//! the other one needs to know.

use super::leadership::{End, Leadership};
use super::{Configs, StatusWriter};
use crate::cluster::{Disk, Node, NodeTold, StateDb};
use crate::config::{Config, Direction, WantedRole};
use crate::domain::{HoldReason, Role};
use crate::observe::{PairFacts, ServiceState};
use crate::replication::{ReplicationError, disk};
use crate::role::{checks_of_this_node, checks_to_text, wishes_differ};
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Interval between two records of the process at work, and between two looks at the queue of the
/// lock.
const INTERVAL: Duration = Duration::from_secs(3);
/// Age from which on the checks of this node are made again, and their time limit.
const CHECKS_INTERVAL: Duration = Duration::from_secs(15);
const CHECKS_TIMEOUT: Duration = Duration::from_secs(5);

/// Tells and reads for as long as this process is at work.
pub(super) async fn keep_telling(
    writer: &StatusWriter,
    leadership: &Leadership,
    configs: Configs,
) -> Infallible {
    let mut teller = Teller::default();
    let mut alone = false;
    loop {
        let config = leadership.in_force(&configs);
        let told = async {
            if !alone {
                let (direction, own) = (config.replication.direction, name(&config));
                leadership.state.silence_others(direction, &own).await?;
                alone = true;
            }
            look(writer, &config, &leadership.state).await?;
            teller.tell(writer, &config, &leadership.state).await
        };
        if let Err(error) = told.await {
            log::debug!("{error}");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Waits until this process may leave the lock to one that waits in the queue. Only a process that
/// pushes waits there: it reaches both sites, and this one only its own. So it can also undo a handover
/// that was given up. A running or forced takeover is not left to it.
pub(super) async fn until_the_pusher_comes(
    writer: &StatusWriter,
    leadership: &Leadership,
    configs: Configs,
) -> End {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let config = leadership.in_force(&configs);
        // Two processes that push would hand the lock to and fro.
        if config.replication.direction == Direction::Push {
            continue;
        }
        match may_yield(writer, leadership, &config).await {
            Ok(true) => return End::Yielded,
            Ok(false) => {}
            // The guard finds out the same.
            Err(error) => log::debug!("{error}"),
        }
    }
}

async fn may_yield(
    writer: &StatusWriter,
    leadership: &Leadership,
    config: &Config,
) -> Result<bool, ReplicationError> {
    let is_busy = || {
        let tried = writer.read(|state| {
            let held = state.hold.as_ref().is_some_and(|hold| {
                hold.reason.is_of_a_takeover() && hold.reason != HoldReason::WishesDiffer
            });
            held || state.handover.undone.is_some()
        });
        let promoting = writer.read(|state| state.handover.transition.is_some());
        // A forced promotion that is refused must not keep the changes of the primary away.
        promoting || (forces_promotion(writer, config) && !tried)
    };
    Ok(!is_busy() && leadership.state.is_awaited().await? && !is_busy())
}

/// Returns whether the configuration asks for the promotion that would be next, whatever another
/// process is configured for.
pub(super) fn forces_promotion(writer: &StatusWriter, config: &Config) -> bool {
    let (role, next) = writer.read(|state| (state.cluster.role, state.next_epoch()));
    config.role == WantedRole::Primary
        && role == Some(Role::Spare)
        && next.is_some_and(|epoch| i64::try_from(config.force_epoch) == Ok(epoch))
}

/// Tells the other process about this one.
#[derive(Default)]
pub(super) struct Teller {
    /// The checks and the disk that only this node can see, with the time of the look.
    seen: Option<(Instant, String, Option<Disk>)>,
}

impl Teller {
    /// Records this process for the other one.
    pub(super) async fn tell(
        &mut self,
        writer: &StatusWriter,
        config: &Config,
        state: &StateDb,
    ) -> Result<(), ReplicationError> {
        let direction = config.replication.direction;
        // Only a process that pushes needs the checks. It may come back, and must find them then.
        if direction == Direction::Pull && writer.read(|state| state.pair.other.is_some()) {
            self.look_at_this_node(config, state).await;
        }
        let (checks, disk) = match &self.seen {
            Some((_, checks, disk)) => (checks.clone(), disk.clone()),
            None => (String::new(), None),
        };
        let (serves, hold) = writer.read(|state| {
            let hold = state.hold.as_ref();
            let hold = hold.map(|hold| format!("{}: {}", hold.reason, hold.detail));
            // A process that waits would only repeat what the one at work tells.
            let serves = state.lock.active && state.serves();
            (serves, hold.unwrap_or_default())
        });
        let told = NodeTold {
            direction,
            name: name(config),
            site: config.site.clone(),
            role: config.role,
            force_epoch: config.force_epoch,
            serves,
            hold,
            checks,
            disk,
        };
        Ok(state.tell(&told).await?)
    }

    /// Only a node of the spare's site can see these. A server that does not answer in time leaves
    /// the last results.
    async fn look_at_this_node(&mut self, config: &Config, state: &StateDb) {
        let fresh = |seen: &(Instant, String, Option<Disk>)| seen.0.elapsed() < CHECKS_INTERVAL;
        if self.seen.as_ref().is_some_and(fresh) {
            return;
        }
        let looking = async {
            let checks = checks_to_text(&checks_of_this_node(config).await);
            (checks, disk(config, state.session()).await)
        };
        if let Ok((checks, disk)) = tokio::time::timeout(CHECKS_TIMEOUT, looking).await {
            self.seen = Some((Instant::now(), checks, disk));
        }
    }
}

/// Returns a name of this process that stays over restarts.
fn name(config: &Config) -> String {
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy().into_owned();
    format!("{host}:{}", config.http.port)
}

/// Reads what the other process tells, and shows whether both are configured for one role.
pub(super) async fn look(
    writer: &StatusWriter,
    config: &Config,
    state: &StateDb,
) -> Result<(), ReplicationError> {
    let role = writer.read(|state| state.cluster.role);
    let nodes = others(config, state).await?;
    let told_to_serve = told_to_serve(&nodes);
    let other = speaker(config, nodes, role);
    let differing = differing(config, other.as_ref(), role);
    // A forced promotion at the spare's site needs nobody's consent.
    let forced =
        config.replication.direction == Direction::Pull && forces_promotion(writer, config);
    writer.update(|state| {
        state.pair = PairFacts {
            looked: true,
            other,
            told_to_serve,
        };
    });
    let other_hold = |writer: &StatusWriter| {
        writer.read(|state| {
            let hold = state.hold.as_ref();
            hold.is_some_and(|hold| hold.reason != HoldReason::WishesDiffer)
        })
    };
    match differing {
        Some(_) if other_hold(writer) => {}
        Some(text) if !forced => {
            let epoch = writer.read(|state| state.next_epoch()).unwrap_or(2);
            let force = match role {
                Some(Role::Spare) => format!(
                    "; or, if the primary is lost, set role = \"primary\" and force_epoch = {epoch} at the spare's site"
                ),
                _ => String::new(),
            };
            let step = format!(
                "set the same role at both sites, or role = \"keep\" at the site that does not push{force}"
            );
            writer.hold(HoldReason::WishesDiffer, &text, &step, false);
        }
        _ => writer.release(|hold| hold.reason == HoldReason::WishesDiffer),
    }
    Ok(())
}

/// Shows whether the process at work tells that the cluster serves. No process pushes.
pub(super) async fn look_at_the_worker(
    writer: &StatusWriter,
    state: &StateDb,
) -> Result<(), ReplicationError> {
    let told_to_serve = told_to_serve(&state.nodes(Direction::Pull).await?);
    writer.update(|state| {
        state.pair = PairFacts {
            told_to_serve,
            ..PairFacts::default()
        };
    });
    Ok(())
}

/// Returns the time of the last word that the cluster serves.
fn told_to_serve(nodes: &[Node]) -> Option<Instant> {
    let serving = nodes.iter().filter(|node| node.told.serves);
    serving.filter_map(|node| node.heard).max()
}

/// Returns the processes at the other site, the one that was heard of last first.
async fn others(config: &Config, state: &StateDb) -> Result<Vec<Node>, ReplicationError> {
    let direction = match config.replication.direction {
        Direction::Push => Direction::Pull,
        Direction::Pull => Direction::Push,
    };
    Ok(state.nodes(direction).await?)
}

/// Returns the one that counts: one that is configured for another role, and otherwise the one that
/// was heard of last.
fn speaker(config: &Config, mut nodes: Vec<Node>, role: Option<Role>) -> Option<Node> {
    let differs = |node: &Node| differing(config, Some(node), role).is_some();
    let chosen = nodes.iter().position(differs).unwrap_or_default();
    (!nodes.is_empty()).then(|| nodes.swap_remove(chosen))
}

/// Returns whether a process that pushes was at work on this cluster lately.
pub(super) async fn has_pusher(config: &Config, state: &StateDb) -> Result<bool, ReplicationError> {
    let pull = config.replication.direction == Direction::Pull;
    Ok(pull && !others(config, state).await?.is_empty())
}

/// Returns how the roles differ for which the two processes are configured. None: they do not, or
/// only one of them lives.
fn differing(config: &Config, other: Option<&Node>, role: Option<Role>) -> Option<String> {
    let other = other.filter(|node| node.is_alive())?;
    let (pusher, standby) = match config.replication.direction {
        Direction::Push => (config.role, other.told.role),
        Direction::Pull => (other.told.role, config.role),
    };
    wishes_differ(pusher, standby, role).then(|| {
        format!(
            "this warm-spare is configured for role \"{}\", and {} for role \"{}\": the role is not changed while both differ",
            config.role.as_str(),
            other.place(),
            other.told.role.as_str()
        )
    })
}

/// Waits until the process at the other site is configured for the same role, or is gone.
pub(super) async fn until_agreed(writer: &StatusWriter, config: &Config) {
    let agreed = |state: &ServiceState| {
        let other = state.pair.other.as_ref();
        state.pair.looked && differing(config, other, state.cluster.role).is_none()
    };
    writer.wait_for(agreed).await;
}

/// Returns whether this process must not change the role now, because a process at the other site is
/// configured for another one. It is asked immediately before a change. Only a forced promotion at
/// the spare's site goes on all the same.
pub(super) async fn is_contradicted(
    writer: &StatusWriter,
    config: &Config,
    state: &StateDb,
) -> Result<bool, ReplicationError> {
    if config.replication.direction == Direction::Pull && forces_promotion(writer, config) {
        return Ok(false);
    }
    let role = state.cluster().await?.role;
    let other = speaker(config, others(config, state).await?, role);
    Ok(differing(config, other.as_ref(), role).is_some())
}
