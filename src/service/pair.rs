//! The two processes of a cluster that is fed from its primary's site: one pushes, and one waits at
//! the spare's site. Each writes into the state database what the other one needs to know.

use super::leadership::{End, Leadership};
use super::{Configs, StatusWriter};
use crate::cluster::{Node, NodeDisk, NodeTold, StateDb};
use crate::config::{Config, Direction, WantedRole};
use crate::domain::{HoldReason, Role};
use crate::observe::{PairFacts, ServiceState};
use crate::replication::{ReplicationError, disk};
use crate::role::{checks_of_this_node, checks_to_text, wishes_differ};
use std::convert::Infallible;
use std::time::Duration;

/// Interval between two records of the process at work, and between two looks at the queue of the
/// lock.
const INTERVAL: Duration = Duration::from_secs(3);

/// Tells and reads for as long as this process is at work.
pub(super) async fn keep_telling(
    writer: &StatusWriter,
    leadership: &Leadership,
    configs: Configs,
) -> Infallible {
    loop {
        let config = configs.borrow().clone();
        let config = config.unwrap_or_else(|| leadership.config.clone());
        let told = async {
            if config.replication.direction == Direction::Push {
                tell(writer, &config, &leadership.state).await?;
            }
            look(writer, &config, &leadership.state).await
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
        let config = configs.borrow().clone();
        let config = config.unwrap_or_else(|| leadership.config.clone());
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
    let promoting = writer.read(|state| state.handover.transition.is_some());
    if promoting || forces_promotion(writer, config) {
        return Ok(false);
    }
    Ok(leadership.state.is_awaited().await?)
}

/// Returns whether the configuration asks for the promotion that would be next, whatever another
/// process is configured for.
pub(super) fn forces_promotion(writer: &StatusWriter, config: &Config) -> bool {
    let (role, next) = writer.read(|state| (state.cluster.role, state.next_epoch()));
    config.role == WantedRole::Primary
        && role == Some(Role::Spare)
        && next.is_some_and(|epoch| i64::try_from(config.force_epoch) == Ok(epoch))
}

/// Records this process for the other one.
pub(super) async fn tell(
    writer: &StatusWriter,
    config: &Config,
    state: &StateDb,
) -> Result<(), ReplicationError> {
    let direction = config.replication.direction;
    // Only a node of the spare's site can see these.
    let (checks, seen) = match direction {
        Direction::Push => (String::new(), None),
        Direction::Pull => (
            checks_to_text(&checks_of_this_node(config).await),
            disk(config, state.session()).await,
        ),
    };
    let (serves, hold) = writer.read(|state| {
        let hold = state.hold.as_ref();
        let hold = hold.map(|hold| format!("{}: {}", hold.reason, hold.detail));
        // A process that waits would only repeat what the one at work tells.
        (
            state.lock.active && state.serves(),
            hold.unwrap_or_default(),
        )
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
        disk: seen.map(|disk| NodeDisk {
            directory: disk.directory,
            free: disk.free,
            total: disk.total,
        }),
    };
    Ok(state.tell(&told).await?)
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
    let other = other(config, state, role).await?;
    let differing = differing(config, other.as_ref(), role);
    // A forced promotion at the spare's site needs nobody's consent.
    let forced =
        config.replication.direction == Direction::Pull && forces_promotion(writer, config);
    writer.update(|state| {
        state.pair = PairFacts {
            looked: true,
            other,
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

/// Returns the process at the other site: one that is configured for another role, and otherwise the
/// one that was heard of last.
async fn other(
    config: &Config,
    state: &StateDb,
    role: Option<Role>,
) -> Result<Option<Node>, ReplicationError> {
    let direction = match config.replication.direction {
        Direction::Push => Direction::Pull,
        Direction::Pull => Direction::Push,
    };
    let mut nodes = state.nodes(direction).await?;
    let differs = |node: &Node| differing(config, Some(node), role).is_some();
    let chosen = nodes.iter().position(differs).unwrap_or_default();
    Ok((!nodes.is_empty()).then(|| nodes.swap_remove(chosen)))
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

/// Returns whether this process must not change the role now, because the process at the spare's
/// site is configured for another one. It is asked immediately before a change.
pub(super) async fn is_contradicted(
    config: &Config,
    state: &StateDb,
) -> Result<bool, ReplicationError> {
    if config.replication.direction == Direction::Pull {
        return Ok(false);
    }
    let role = state.cluster().await?.role;
    let other = other(config, state, role).await?;
    Ok(differing(config, other.as_ref(), role).is_some())
}
