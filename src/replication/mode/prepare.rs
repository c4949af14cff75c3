//! Implements `prepare` and `release` on the peer. First it checks that the peer is another server;
//! then it makes a plan, and carries out its steps.

use super::choice::{Choice, choose};
use crate::cluster::preparation::{
    Names, Plan, Preparation, PreparationError, Prepared, Step, Wanted, inspect, is_cluster_id,
    plan_to_prepare, plan_to_release,
};
use crate::cluster::{LocalSession, PeerSession, State, peers_record};
use crate::config::{Config, WantedRole};
use crate::domain::{ErrorCode, EventKind, PromotionKind, Role};
use crate::replication::baseline::checks;
use crate::replication::baseline::recovery::may_work;
use crate::replication::error::PassError;
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
) -> Result<Prepare, PassError> {
    // A declared role is enough: an old primary has the new one prepared before it comes back.
    if config.role != WantedRole::Spare {
        may_work(config).await?;
    }
    let (local, peer) = two_servers(config).await?;
    checks::is_builder(&peer).await?;
    checks::is_primary(&peer, false).await?;
    let may_apply = may_apply(&local).await?;
    let state = State::open(&config.local.datastore).await?;
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
            let writing = Preparation::open(&config.peer.datastore).await?;
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
) -> Result<Release, PassError> {
    let state = State::open_existing(&config.local.datastore).await?;
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
    let writing = Preparation::open(&config.peer.datastore).await?;
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
async fn keep_the_list(config: &Config, state: &State) -> Result<(), PassError> {
    let primary = state.cluster().await?.role == Some(Role::Primary);
    let promotion = state.promotion().await?;
    if !primary || promotion.is_none_or(|promotion| promotion.kind != PromotionKind::Failover) {
        return Ok(());
    }
    let record = peers_record(&config.peer.datastore).await?;
    if record.is_some_and(|record| record.role == Some(Role::Spare)) {
        return Ok(());
    }
    Err(PassError::Refused {
        rule: ErrorCode::ListOfLosses,
        text: "this cluster was promoted by a failover, and our slot on the old primary is the list of lost changes".into(),
        next_step: "let the old primary come back first (docs/failback.md); if nobody wants the list, drop the slot there by hand".into(),
    })
}

/// Returns our names, by the id on record; or another cluster's.
fn whose(config: &Config, own: Option<&str>, cluster: Option<&str>) -> Result<Names, PassError> {
    match (own, cluster) {
        (Some(own), Some(cluster)) if own != cluster && is_cluster_id(cluster) => {
            Ok(Names::of_cluster(cluster))
        }
        (None, Some(cluster)) if is_cluster_id(cluster) => Ok(Names::of_cluster(cluster)),
        (Some(own), _) => Ok(Names::of(own, &config.replication)),
        (None, _) => Err(PassError::Unfit {
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
async fn two_servers(config: &Config) -> Result<(LocalSession, PeerSession), PassError> {
    let local = LocalSession::open_for_maintenance(&config.local.datastore).await?;
    let peer = PeerSession::open(&config.peer.datastore).await?;
    checks::two_servers(config, &local, &peer).await?;
    Ok((local, peer))
}

/// Returns whether rows can be applied on the spare without its own triggers and cascades.
async fn may_apply(local: &LocalSession) -> Result<bool, PassError> {
    let doing = "reading our privileges";
    let sql = "SELECT rolsuper, current_setting('server_version_num')::int4 >= 150000 FROM pg_roles WHERE rolname = current_user";
    let row = local.row(doing, sql, &[]).await?;
    if row.get(0)? || !row.get::<bool>(1)? {
        return Ok(row.get(0)?);
    }
    let sql = "SELECT has_parameter_privilege('session_replication_role', 'SET')";
    Ok(local.row(doing, sql, &[]).await?.get(0)?)
}

fn refuse_obstacles(plan: &Plan) -> Result<(), PassError> {
    let Some(first) = plan.obstacles.first() else {
        return Ok(());
    };
    let texts: Vec<&str> = plan.obstacles.iter().map(|o| o.text.as_str()).collect();
    Err(PassError::Unfit {
        check: first.check,
        text: texts.join("; "),
        next_step: first.next_step.clone(),
    })
}

fn in_words(steps: &[Step]) -> String {
    let what: Vec<&str> = steps.iter().map(|step| step.what.as_str()).collect();
    what.join(", ")
}

impl From<PreparationError> for PassError {
    fn from(error: PreparationError) -> Self {
        let text = error.to_string();
        match error {
            PreparationError::Datastore(error) => PassError::Datastore(error),
            PreparationError::Busy { .. } => PassError::Unfit {
                check: ErrorCode::TableBusy,
                text,
                next_step: "wait until the blocking session ends, or end it; then run it again: it continues where it stopped".into(),
            },
            PreparationError::InUse { .. } => PassError::Unfit {
                check: ErrorCode::SlotInUse,
                text,
                next_step: "stop the service on the spare, or set replication.mode = \"snapshot\" there, then run it again".into(),
            },
        }
    }
}
