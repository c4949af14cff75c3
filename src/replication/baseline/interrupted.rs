//! The state of this cluster before a pass: the lock, the role, the fence, and what an interrupted
//! pass left.

use super::incoming;
use crate::cluster::{
    FenceCheck, FenceReason, KeptFence, LocalCluster, Lock, StateDb, prove_fence,
};
use crate::config::{ArtifactsMode, Config, WantedRole};
use crate::domain::{ErrorCode, EventKind, Role};
use crate::replication::artifact::place::{has_unproved_place, undo_what_was_begun};
use crate::replication::error::ReplicationError;

/// Returns the cluster's id, if it has one already.
pub async fn existing_id(config: &Config) -> Result<Option<String>, ReplicationError> {
    Ok(match LocalCluster::of(config).existing_state().await? {
        Some(state) => Some(state.cluster().await?.id),
        None => None,
    })
}

/// The state of this cluster, locked by us, and repaired.
pub(super) struct Held {
    pub(super) state: StateDb,
    pub(super) lock: Lock,
    pub(super) mended: Recovery,
}

impl Held {
    pub(super) async fn take(
        config: &Config,
        lock: Option<Lock>,
        recorded: bool,
    ) -> Result<Held, ReplicationError> {
        let state = LocalCluster::of(config).state().await?;
        let lock = match lock {
            Some(held) => held,
            None => state.lock(config.replication.direction).await?,
        };
        // This cluster may have been promoted while we waited for the lock.
        let recorded = recorded || state.cluster().await?.role.is_some();
        if recorded {
            may_work(config).await?;
        }
        has_unproved_place(config, &state, lock).await?;
        let mended = recover_local(config, &state, lock, recorded).await?;
        Ok(Held {
            state,
            lock,
            mended,
        })
    }
}

/// The faults of the local side that were found and repaired before the run.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Recovery {
    pub(super) undone: usize,
    pub(super) fence_reset: bool,
}

/// Repairs the leftovers of an interrupted run on the local side: half replaced bytes are restored,
/// its database is dropped. The peer is not asked, because it may be gone for good.
pub async fn mend(config: &Config, lock: Lock) -> Result<(), ReplicationError> {
    let state = LocalCluster::of(config).state().await?;
    state.still_ours(lock).await?;
    if !state.replacements().await?.is_empty() {
        undo_replacements(config, &state, lock).await?;
    }
    let incoming = incoming::incoming_name(config);
    Ok(state.session().drop_database(&incoming).await?)
}

async fn recover_local(
    config: &Config,
    state: &StateDb,
    lock: Lock,
    recorded: bool,
) -> Result<Recovery, ReplicationError> {
    let undone = undo_replacements(config, state, lock).await?;
    // Before the first copy the visible database belongs to somebody else, and is no spare's.
    let fence_reset = recorded && keep_fenced(config, state).await?;
    Ok(Recovery {
        undone,
        fence_reset,
    })
}

/// Restores replaced bytes. Returns the number of artifacts.
async fn undo_replacements(
    config: &Config,
    state: &StateDb,
    lock: Lock,
) -> Result<usize, ReplicationError> {
    if config.artifacts.mode != ArtifactsMode::Replicate {
        return Ok(0);
    }
    let undone = undo_what_was_begun(config, state, lock).await?;
    if undone > 0 {
        log::warn!(
            "local: an earlier run was interrupted while it replaced {undone} artifacts; the old bytes were restored"
        );
    }
    Ok(undone)
}

/// Returns whether this cluster is recorded as a spare already. A cluster whose role was never set
/// does nothing at all; a cluster that is no spare copies nothing over itself.
pub async fn may_work(config: &Config) -> Result<bool, ReplicationError> {
    let recorded = match LocalCluster::of(config).existing_state().await? {
        Some(state) => state.cluster().await?.role,
        None => None,
    };
    match (config.role, recorded) {
        (WantedRole::Spare, None) => Ok(false),
        // Until it is promoted, a spare continues as a spare.
        (_, Some(Role::Spare)) => Ok(true),
        (WantedRole::Keep, None) => Err(ReplicationError::Refused {
            rule: ErrorCode::RoleUnset,
            text: "the role of this cluster was never set, so nothing is done".into(),
            next_step: "set role = \"spare\" on the cluster that is to be the copy".into(),
        }),
        (_, recorded) => Err(ReplicationError::Refused {
            rule: ErrorCode::Role,
            text: match recorded {
                Some(role) => format!("this cluster is recorded as {role}"),
                None => "no role of this cluster is recorded, and it is to be the primary".into(),
            },
            next_step: "only a spare is copied to: set role = \"spare\" on the cluster that is to be the copy".into(),
        }),
    }
}

/// Keeps the fence at the start of a run. Returns whether it was set again.
async fn keep_fenced(config: &Config, state: &StateDb) -> Result<bool, ReplicationError> {
    let local = &config.local.datastore;
    let begun = state.cluster().await?.fence_begun;
    let kept = state
        .keep_fence(
            local,
            FenceReason::Spare { begun },
            FenceCheck::Proof,
            || (),
        )
        .await?;
    match kept {
        KeptFence::NoDatabase | KeptFence::Holds => return Ok(false),
        // No run may go on over a database to which clients can write: the proof fails, and says
        // so.
        KeptFence::NotSet => prove_fence(state.session(), local, &local.database).await?,
        KeptFence::SetAgain => {}
    }
    let text = KeptFence::set_again(&local.database);
    log::warn!("local: {text}");
    state.event(EventKind::Fence, &text, &config.change).await?;
    Ok(true)
}
