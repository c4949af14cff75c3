//! Which of the two ways is gone, as both sides stand now; and what is still to be made on the primary for it.

use super::choice::{Because, Choice, choose};
use crate::cluster::preparation::{
    Names, Preparation, PreparationError, Prepared, Step, Wanted, extension, inspect,
};
use crate::cluster::{LocalSession, PeerSession};
use crate::config::{Config, Datastore};
use crate::domain::ErrorCode;
use crate::replication::error::PassError;
use std::time::Duration;

/// For new tables on a primary that somebody works with.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was chosen, and why.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// None: snapshots.
    pub stream: Option<Names>,
    /// Why, and what would change it.
    pub reason: String,
    /// What is ours on the primary, and what is of other clusters.
    pub ours: Vec<String>,
    pub orphans: Vec<String>,
    /// What tables that came or went ask for, before a slot is made.
    pub extension: Vec<Step>,
}

/// Looks at both sides; changes nothing.
pub async fn decide(
    config: &Config,
    cluster_id: &str,
    local: &LocalSession,
    peer: &PeerSession,
) -> Result<Chosen, PassError> {
    let replication = &config.replication;
    let names = Names::of(cluster_id, replication);
    let prepared = inspect(peer, &names).await?;
    let may_apply = may_apply(local).await?;
    let wanted = Wanted::of(replication);
    let snapshot =
        |because: Because| format!("{}; to change that: {}", because.reason, because.change);
    let (stream, reason) = match choose(replication.mode, &prepared, wanted, may_apply) {
        Choice::Stream => (
            Some(names),
            "the primary is prepared, and bounds what it holds for us".to_string(),
        ),
        Choice::Snapshot(because) => (None, snapshot(because)),
        Choice::NotPrepared(because) => {
            return Err(PassError::Unfit {
                check: ErrorCode::NotPrepared,
                text: format!("replication.mode is stream: {}", because.reason),
                next_step: because.change,
            });
        }
    };
    Ok(Chosen {
        stream,
        reason,
        ours: prepared.ours(),
        orphans: orphans(&prepared),
        extension: extension(&prepared),
    })
}

fn orphans(prepared: &Prepared) -> Vec<String> {
    let told = prepared.orphans().into_iter();
    told.map(|(id, what)| format!("{id}: {}", what.join(", ")))
        .collect()
}

/// Triggers and cascades have done their work on the primary; here they must not.
pub async fn may_apply(local: &LocalSession) -> Result<bool, PassError> {
    let sql = "SELECT rolsuper, current_setting('server_version_num')::int4 >= 150000 \
               FROM pg_roles WHERE rolname = current_user";
    let doing = "asking whether we may apply changes";
    let row = local.row(doing, sql, &[]).await?;
    if row.get(0)? || !row.get::<bool>(1)? {
        return Ok(row.get(0)?);
    }
    let sql = "SELECT has_parameter_privilege('session_replication_role', 'SET')";
    Ok(local.row(doing, sql, &[]).await?.get(0)?)
}

/// Makes what new tables ask for: an operator prepared this primary, and a table that is not published would be lost.
pub async fn extend(peer: &Datastore, steps: &[Step]) -> Result<(), PassError> {
    if steps.is_empty() {
        return Ok(());
    }
    let hand = Preparation::open(peer).await?;
    let told = |step: &Step| log::info!("peer: {}: {}", step.what, step.reason);
    match hand.carry_out(steps, PATIENCE, told).await {
        Ok(()) => Ok(()),
        Err(PreparationError::Datastore(error)) => Err(error.into()),
        Err(busy) => Err(PassError::Busy {
            what: "the publication could not be extended".into(),
            seconds: PATIENCE.as_secs(),
            waits_for: busy.to_string(),
        }),
    }
}
