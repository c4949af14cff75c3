//! Selects the mode of replication for the present state of both sides, and finds the changes on
//! the primary that it still needs.

use super::choice::{Because, Choice, choose};
use crate::cluster::preparation::{
    Names, PreparationError, Prepared, Step, Wanted, extension, inspect,
};
use crate::cluster::{PeerCluster, ReadSession, WriteSession, may_apply};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::error::ReplicationError;
use std::time::Duration;

/// Maximum time to wait for locks when tables are added to the publication, because clients work
/// with the primary.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// The selected mode, and the reason.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// None: snapshots.
    pub stream: Option<Names>,
    /// The reason, and the way to change it.
    pub reason: String,
    /// Our objects on the primary, and objects of other clusters.
    pub ours: Vec<String>,
    pub orphans: Vec<String>,
    /// True: a slot may be copied there, so a copy begins with a temporary one.
    pub copies_slots: bool,
    /// The steps that new or removed tables need, before a slot is made.
    pub extension: Vec<Step>,
}

/// Selects the mode from the state of both sides; changes nothing.
pub async fn decide(
    config: &Config,
    cluster_id: &str,
    local: &WriteSession,
    peer: &ReadSession,
) -> Result<Chosen, ReplicationError> {
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
            "the primary is prepared, and limits the log that it holds for us".to_string(),
        ),
        Choice::Snapshot(because) => (None, snapshot(because)),
        Choice::NotPrepared(because) => {
            return Err(ReplicationError::Precondition {
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
        copies_slots: prepared.rights.copies_slots,
        extension: extension(&prepared),
    })
}

fn orphans(prepared: &Prepared) -> Vec<String> {
    let told = prepared.orphans().into_iter();
    told.map(|(id, what)| format!("{id}: {}", what.join(", ")))
        .collect()
}

/// Adds new tables to the publication: an operator prepared this primary, and a table that is not
/// published would be lost.
pub(crate) async fn extend(peer: &PeerCluster<'_>, steps: &[Step]) -> Result<(), ReplicationError> {
    if steps.is_empty() {
        return Ok(());
    }
    let hand = peer.preparation().await?;
    let told = |step: &Step| log::info!("peer: {}: {}", step.what, step.reason);
    match hand.carry_out(steps, LOCK_TIMEOUT, told).await {
        Ok(()) => Ok(()),
        Err(PreparationError::Datastore(error)) => Err(error.into()),
        Err(busy) => Err(ReplicationError::Busy {
            what: "the publication could not be extended".into(),
            seconds: LOCK_TIMEOUT.as_secs(),
            waits_for: busy.to_string(),
        }),
    }
}
