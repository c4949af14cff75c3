//! Implements `prepare` and `release` on the peer. First it checks that the peer is another server;
//! then it makes a plan, and carries out its steps.

use super::choice::{Choice, choose};
use crate::cluster::preparation::{
    Names, Plan, PreparationError, Prepared, Step, Wanted, inspect, is_cluster_id, plan_to_prepare,
    plan_to_release,
};
use crate::cluster::{LocalCluster, PeerCluster, ReadSession, StateDb, WriteSession, may_apply};
use crate::config::{Config, WantedRole};
use crate::domain::{ErrorCode, EventKind, PromotionKind, Role};
use crate::replication::baseline::checks;
use crate::replication::baseline::interrupted::may_work;
use crate::replication::error::ReplicationError;
use std::time::Duration;

/// Maximum time to wait for locks on Builder's tables.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Maximum number of rounds. A service that follows may create its slot again while we remove it;
/// it stops when the publication is gone.
const MAX_ROUNDS: usize = 3;

/// The things that a verb made, removed, or would make or remove.
#[derive(Debug)]
pub struct Prepare {
    pub database: String,
    /// The steps that were carried out or, with `only_ask`, all steps that would be.
    pub plan: Plan,
    /// The state of the primary after that.
    pub prepared: Prepared,
    pub choice: Choice,
}

#[derive(Debug)]
pub struct Release {
    pub names: Names,
    pub database: String,
    pub plan: Plan,
}

/// Makes everything on the primary that the stream needs; with `only_ask`, only returns the plan.
/// `done` is called after each step. `bound_others`: also sets a limit that applies to other slots.
pub async fn prepare(
    config: &Config,
    only_ask: bool,
    bound_others: bool,
    mut done: impl FnMut(&Step),
) -> Result<Prepare, ReplicationError> {
    // A declared role is enough: an old primary has the new one prepared before it comes back.
    if config.role != WantedRole::Spare {
        may_work(config).await?;
    }
    let (local, peer) = two_servers(config).await?;
    checks::is_builder(&peer).await?;
    checks::is_primary(&peer, false).await?;
    let may_apply = may_apply(&local).await?;
    let state = LocalCluster::of(config).state().await?;
    let names = Names::of(&state.cluster().await?.id, &config.replication);
    let wanted = Wanted::of(&config.replication);
    let mut prepared = inspect(&peer, &names).await?;
    let mut plan = plan_to_prepare(&prepared, wanted);
    if bound_others {
        plan.consent_to(ErrorCode::OtherSlots);
    }
    if !only_ask {
        refuse_obstacles(&plan)?;
        if !plan.steps.is_empty() {
            let writing = PeerCluster::of(config).preparation().await?;
            writing.carry_out(&plan.steps, PATIENCE, &mut done).await?;
            prepared = writing.inspect(&names).await?;
            plan.notes = plan_to_prepare(&prepared, wanted).notes;
            let text = format!("made on the primary: {}", in_words(&plan.steps));
            state
                .event(EventKind::Prepared, &text, &config.change)
                .await?;
        }
    }
    Ok(Prepare {
        database: prepared.database.clone(),
        choice: choose(config.replication.mode, &prepared, wanted, may_apply),
        plan,
        prepared,
    })
}

/// Removes our objects on the primary, or objects that another cluster has left there.
pub async fn release(
    config: &Config,
    cluster: Option<&str>,
    only_ask: bool,
    mut done: impl FnMut(&Step),
) -> Result<Release, ReplicationError> {
    let state = LocalCluster::of(config).existing_state().await?;
    let own = match &state {
        Some(state) => Some(state.cluster().await?.id),
        None => None,
    };
    let names = whose(config, own.as_deref(), cluster)?;
    let (_local, peer) = two_servers(config).await?;
    let wanted = Wanted::of(&config.replication);
    let prepared = inspect(&peer, &names).await?;
    let mut plan = plan_to_release(&prepared, wanted);
    let released = |plan: Plan| Release {
        names: names.clone(),
        database: prepared.database.clone(),
        plan,
    };
    if only_ask {
        return Ok(released(plan));
    }
    refuse_obstacles(&plan)?;
    if plan.steps.is_empty() {
        return Ok(released(plan));
    }
    if let Some(state) = state.as_ref().filter(|_| cluster.is_none()) {
        keep_the_list(config, state).await?;
    }
    let writing = PeerCluster::of(config).preparation().await?;
    let mut next = plan.steps.clone();
    for _ in 0..MAX_ROUNDS {
        writing.carry_out(&next, PATIENCE, &mut done).await?;
        next = plan_to_release(&writing.inspect(&names).await?, wanted).steps;
        if next.is_empty() {
            break;
        }
        plan.steps.extend(next.clone());
    }
    if !next.is_empty() {
        let what = in_words(&next);
        return Err(PreparationError::InUse { what }.into());
    }
    if let Some(state) = &state {
        let text = format!("removed from the primary: {}", in_words(&plan.steps));
        state
            .event(EventKind::Released, &text, &config.change)
            .await?;
    }
    Ok(released(plan))
}

/// Fails after a failover, while the old primary has not come back: our slot there is the list of
/// lost changes.
async fn keep_the_list(config: &Config, state: &StateDb) -> Result<(), ReplicationError> {
    let primary = state.cluster().await?.role == Some(Role::Primary);
    let promotion = state.promotion().await?;
    if !primary || promotion.is_none_or(|promotion| promotion.kind != PromotionKind::Failover) {
        return Ok(());
    }
    let record = PeerCluster::of(config).record().await?;
    if record.is_some_and(|record| record.role == Some(Role::Spare)) {
        return Ok(());
    }
    Err(ReplicationError::Refused {
        rule: ErrorCode::ListOfLosses,
        text: "this cluster was promoted by a failover, and our slot on the old primary is the list of lost changes".into(),
        next_step: "let the old primary come back first (docs/failback.md); if nobody wants the list, drop the slot there by hand".into(),
    })
}

/// Returns our names, by the id on record; or another cluster's.
fn whose(
    config: &Config,
    own: Option<&str>,
    cluster: Option<&str>,
) -> Result<Names, ReplicationError> {
    match (own, cluster) {
        (Some(own), Some(cluster)) if own != cluster && is_cluster_id(cluster) => {
            Ok(Names::of_cluster(cluster))
        }
        (None, Some(cluster)) if is_cluster_id(cluster) => Ok(Names::of_cluster(cluster)),
        (Some(own), _) => Ok(Names::of(own, &config.replication)),
        (None, _) => Err(ReplicationError::Precondition {
            check: ErrorCode::NoClusterId,
            text:
                "this cluster has no id on record, so nothing on the peer can have it in its name"
                    .into(),
            next_step:
                "name the cluster whose slot and publication shall be removed: release --cluster ID"
                    .into(),
        }),
    }
}

/// Opens sessions on both sides, and checks that they are two servers.
async fn two_servers(config: &Config) -> Result<(WriteSession, ReadSession), ReplicationError> {
    let local = LocalCluster::of(config).maintenance().await?;
    let peer = PeerCluster::of(config).builder().await?;
    checks::two_servers(config, &local, &peer).await?;
    Ok((local, peer))
}

fn refuse_obstacles(plan: &Plan) -> Result<(), ReplicationError> {
    let Some(first) = plan.obstacles.first() else {
        return Ok(());
    };
    let texts: Vec<&str> = plan.obstacles.iter().map(|o| o.text.as_str()).collect();
    Err(ReplicationError::Precondition {
        check: first.check,
        text: texts.join("; "),
        next_step: first.next_step.clone(),
    })
}

fn in_words(steps: &[Step]) -> String {
    let what: Vec<&str> = steps.iter().map(|step| step.what.as_str()).collect();
    what.join(", ")
}

impl From<PreparationError> for ReplicationError {
    fn from(error: PreparationError) -> Self {
        let text = error.to_string();
        match error {
            PreparationError::Datastore(error) => ReplicationError::Datastore(error),
            PreparationError::Busy { .. } => ReplicationError::Precondition {
                check: ErrorCode::TableBusy,
                text,
                next_step: "wait until the blocking session ends, or end it; then run it again: it continues where it stopped".into(),
            },
            PreparationError::InUse { .. } => ReplicationError::Precondition {
                check: ErrorCode::SlotInUse,
                text,
                next_step: "stop the service on the spare, or set replication.mode = \"snapshot\" there, then run it again".into(),
            },
        }
    }
}
