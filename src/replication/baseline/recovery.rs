//! The state of this cluster before a pass: the lock, the role, the fence, and what an interrupted pass left.

use super::checks::{self};
use super::incoming;
use super::switch;
use crate::cluster::{ByteBudget, LocalStore, Lock, State, Throttle, is_fenced, prove_fence};
use crate::config::{Config, WantedRole};
use crate::domain::{ErrorCode, EventKind, Role};
use crate::replication::artifact::courier::Courier;
use crate::replication::artifact::replacements;
use crate::replication::baseline::visible::reached;
use crate::replication::error::PassError;

/// Returns the cluster's id, if it has one already.
pub async fn existing_id(config: &Config) -> Result<Option<String>, PassError> {
    Ok(match State::open_existing(&config.local.datastore).await? {
        Some(state) => Some(state.cluster().await?.id),
        None => None,
    })
}

/// The state of this cluster, locked by us, and repaired.
pub(super) struct Held {
    pub(super) state: State,
    pub(super) lock: Lock,
    pub(super) mended: Mended,
}

impl Held {
    pub(super) async fn take(
        config: &Config,
        lock: Option<Lock>,
        recorded: bool,
    ) -> Result<Held, PassError> {
        let state = State::open(&config.local.datastore).await?;
        let lock = match lock {
            Some(held) => held,
            None => state.lock().await?,
        };
        // This cluster may have been promoted while we waited for the lock.
        let recorded = recorded || state.cluster().await?.role.is_some();
        if recorded {
            may_work(config).await?;
        }
        let mended = put_right(config, &state, lock, recorded).await?;
        Ok(Held {
            state,
            lock,
            mended,
        })
    }
}

/// The faults of the local side that were found and repaired before the run.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Mended {
    pub(super) undone: usize,
    pub(super) fence_reset: bool,
}

/// Repairs the leftovers of an interrupted run on the local side: half replaced bytes are restored,
/// its database is dropped. The peer is not asked, because it may be gone for good.
pub async fn mend(config: &Config, lock: Lock) -> Result<(), PassError> {
    let state = State::open(&config.local.datastore).await?;
    state.still_ours(lock).await?;
    if !state.replacements().await?.is_empty() {
        put_back(config, &state, lock).await?;
    }
    switch::drop_database(state.session(), &incoming::incoming_name(config)).await
}

async fn put_right(
    config: &Config,
    state: &State,
    lock: Lock,
    recorded: bool,
) -> Result<Mended, PassError> {
    let undone = put_back(config, state, lock).await?;
    // Before the first copy the visible database belongs to somebody else, and is no spare's.
    let fence_reset = recorded && keep_fenced(config, state).await?;
    Ok(Mended {
        undone,
        fence_reset,
    })
}

/// Restores replaced bytes. Returns the number of artifacts.
async fn put_back(config: &Config, state: &State, lock: Lock) -> Result<usize, PassError> {
    let local = LocalStore::open(&config.local.s3)?;
    let courier = Courier {
        // The peer is not asked here.
        peer: local.reading().clone(),
        local,
        budget: ByteBudget::new(config.replication.buffer),
        throttle: Throttle::new(None),
    };
    let reached = reached(config).await?;
    let undone = replacements::undo((state, lock), &courier, reached).await?;
    if undone > 0 {
        log::warn!(
            "local: an earlier run was interrupted while it replaced {undone} artifacts; the old bytes were restored"
        );
    }
    Ok(undone)
}

/// Returns whether this cluster is recorded as a spare already. A cluster whose role was never set
/// does nothing at all; a cluster that is no spare copies nothing over itself.
pub async fn may_work(config: &Config) -> Result<bool, PassError> {
    let recorded = match State::open_existing(&config.local.datastore).await? {
        Some(state) => state.cluster().await?.role,
        None => None,
    };
    match (config.role, recorded) {
        (WantedRole::Spare, None) => Ok(false),
        // Until it is promoted, a spare continues as a spare.
        (_, Some(Role::Spare)) => Ok(true),
        (WantedRole::Keep, None) => Err(PassError::Refused {
            rule: ErrorCode::RoleUnset,
            text: "the role of this cluster was never set, so nothing is done".into(),
            next_step: "set role = \"spare\" on the cluster that is to be the copy".into(),
        }),
        (_, recorded) => Err(PassError::Refused {
            rule: ErrorCode::Role,
            text: format!(
                "this cluster is recorded as {}",
                recorded.map_or("nothing", Into::into)
            ),
            next_step: "only a spare is copied to".into(),
        }),
    }
}

/// Keeps the fence. It is a condition, not an event: it is checked at every start, and set again if
/// somebody lifted it.
async fn keep_fenced(config: &Config, state: &State) -> Result<bool, PassError> {
    let database = &config.local.datastore.database;
    let there = checks::has_database(state.session(), database).await?;
    if !there {
        return Ok(false);
    }
    if !is_fenced(state.session(), database).await? {
        log::warn!("local: the fence on database {database} is missing; setting it again");
        state.fence_if_spare(database).await?;
    } else if !state.cluster().await?.fence_begun {
        prove_fence(state.session(), &config.local.datastore, database).await?;
        return Ok(false);
    }
    state
        .finish_fence(&config.local.datastore, database)
        .await?;
    let text = format!("the fence on {database} had been lifted; it was set again");
    state.event(EventKind::Fence, &text, &config.change).await?;
    Ok(true)
}
