//! The divergence: the changes that an old primary has and its successor does not have. It is found
//! before the old primary is copied over, and kept on record.
//!
//! The slot by which the successor followed holds exactly this list. Without the slot both sides
//! are compared as they are now, and the list is marked as approximate.

mod approximate;
mod exact;
mod fetch;
mod judge;
mod slot;

use crate::cluster::{
    DatastoreFault, Divergence, FoundDivergence, LocalCluster, Promotion, StateDb, fence_number_of,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Lsn, PromotionKind, Side};
use crate::package::first_id_of;
use crate::replication::ReplicationError;
use approximate::Bounds;
pub use fetch::{Fetched, fetch, file_name};
use slot::{Server, Usable};

/// Finds the divergence and records it in the local state database, in one transaction that
/// replaces the record of that epoch. It may be killed at any time and run again. `promotion` is
/// the peer's; `lifted`: the fence of this cluster was open after it.
pub async fn record(
    config: &Config,
    state: &StateDb,
    promotion: &Promotion,
    lifted: bool,
) -> Result<Divergence, ReplicationError> {
    let fenced_by = fence_number(config).await?;
    let behind = OpenFence { lifted, fenced_by };
    record_behind(config, state, promotion, &behind).await
}

/// The known facts about this cluster's fence since another cluster replaced it.
#[derive(Debug, Clone, Default)]
pub(super) struct OpenFence {
    /// True: the fence was found open in between.
    pub lifted: bool,
    /// Number of the transaction that set the fence, read before the fence is set again; None: not
    /// known.
    pub fenced_by: Option<String>,
}

/// Returns the number of the transaction that set this cluster's fence. None: it is not fenced.
pub(super) async fn fence_number(config: &Config) -> Result<Option<String>, ReplicationError> {
    let local = &config.local.datastore;
    let session = LocalCluster::of(config).state_session().await?;
    Ok(fence_number_of(&session, &local.database).await?)
}

/// Returns the number of the next transaction of the local server.
pub(super) async fn next_number(config: &Config) -> Result<String, ReplicationError> {
    let session = LocalCluster::of(config).maintenance().await?;
    Ok(session.next_transaction().await?)
}

/// Adds the rows written since an earlier list. The list was made when that transaction was the
/// next one, and the slot may be gone.
pub(super) async fn record_again(
    config: &Config,
    state: &StateDb,
    promotion: &Promotion,
    (behind, listed): (&OpenFence, &str),
) -> Result<Divergence, ReplicationError> {
    let server = slot::ask(config, promotion).await?;
    if matches!(slot::usable(&server, promotion), Usable::From(_)) {
        return record_behind(config, state, promotion, behind).await;
    }
    let mut book = LocalCluster::of(config)
        .amended_divergence(promotion.epoch)
        .await?;
    let bounds = Bounds {
        written_since: Some(listed.to_string()),
        made_before: made_before(promotion),
    };
    Box::pin(approximate::compare(config, &mut book, &bounds)).await?;
    if book.added() > 0 {
        book.forget_packages().await?;
        judge::judge_packages(config, &mut book).await?;
        let why = format!(
            "; then the local fence was open, and {} more rows were found by comparison",
            book.added()
        );
        book.close_again(&why).await?;
    }
    state.divergence().await?.ok_or_else(gone_again)
}

pub(super) async fn record_behind(
    config: &Config,
    state: &StateDb,
    promotion: &Promotion,
    behind: &OpenFence,
) -> Result<Divergence, ReplicationError> {
    let server = slot::ask(config, promotion).await?;
    let set_back = OpenFence {
        lifted: true,
        fenced_by: None,
    };
    match slot::usable(&server, promotion) {
        Usable::From(from) => match Box::pin(by_slot(config, promotion, &server, from)).await {
            Ok(()) => {}
            Err(ReplicationError::Precondition {
                check: ErrorCode::SetBack,
                text,
                ..
            }) => {
                without_slot(config, promotion, &set_back, &server.wal, &text).await?;
            }
            Err(error) => {
                let Some(reason) = unreadable(&error) else {
                    return Err(error);
                };
                without_slot(config, promotion, behind, &server.wal, &reason).await?;
            }
        },
        Usable::Not(reason) => {
            without_slot(config, promotion, behind, &server.wal, &reason).await?
        }
        // The server was open since, whatever its fence is now.
        Usable::SetBack(reason) => {
            without_slot(config, promotion, &set_back, &server.wal, &reason).await?
        }
    }
    state.divergence().await?.ok_or_else(gone_again)
}

fn gone_again() -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::Divergence,
        text: "the record of the divergence was made just now, and is gone again".into(),
        next_step: "find out who else writes into the local database warm_spare".into(),
    }
}

/// Returns the limit of ids: rows with lower ids were made before the promotion. A cluster that was
/// made the primary by hand has no such time.
fn made_before(promotion: &Promotion) -> Option<i64> {
    promotion.commit_time.map(first_id_of)
}

async fn by_slot(
    config: &Config,
    promotion: &Promotion,
    server: &Server,
    from: Lsn,
) -> Result<(), ReplicationError> {
    let mut book = LocalCluster::of(config)
        .new_divergence(promotion.epoch)
        .await?;
    let mut found = exact::read(config, promotion, from, &mut book).await?;
    if let Some(table) = &server.unpublished {
        found.exact = false;
        found.reason = format!(
            "{}, but table {table} is not in publication {}, so the list has no changes of this table",
            found.reason, promotion.publication
        );
    }
    judge::judge_packages(config, &mut book).await?;
    Ok(book.close(&promotion.lsn, &found).await?)
}

/// Compares both sides. A planned handover leaves nothing behind, so only rows written behind its
/// fence count: older rows belong to the new primary, which may have changed them.
async fn without_slot(
    config: &Config,
    promotion: &Promotion,
    behind: &OpenFence,
    wal: &str,
    reason: &str,
) -> Result<(), ReplicationError> {
    let mut book = LocalCluster::of(config)
        .new_divergence(promotion.epoch)
        .await?;
    let planned = promotion.kind == PromotionKind::Switchover && !behind.lifted;
    let bounds = Bounds {
        written_since: behind.fenced_by.clone().filter(|_| planned),
        made_before: made_before(promotion),
    };
    Box::pin(approximate::compare(config, &mut book, &bounds)).await?;
    judge::judge_packages(config, &mut book).await?;
    let nothing = planned && book.added() == 0;
    let deletions = match bounds.made_before {
        Some(_) => "",
        None => "; rows deleted here cannot be listed",
    };
    let found = FoundDivergence {
        exact: nothing,
        reason: match (nothing, planned) {
            (true, _) => format!(
                "a planned switchover loses nothing ({reason}), and a comparison found nothing that was written behind its fence"
            ),
            (false, true) => format!(
                "a planned switchover loses nothing ({reason}), but rows were written behind its fence: compared with the new primary as it is now{deletions}"
            ),
            (false, false) => format!(
                "{reason}: compared with the new primary as it is now, so changes made there since count too{deletions}"
            ),
        },
        to: wal.to_string(),
        transactions: 0,
    };
    Ok(book.close(&promotion.lsn, &found).await?)
}

/// Returns the reason why the slot is of no use, if another try would not help.
fn unreadable(error: &ReplicationError) -> Option<String> {
    let finally = match error {
        ReplicationError::Datastore(e) => {
            e.side == Side::Local
                && matches!(
                    e.fault,
                    DatastoreFault::Statement
                        | DatastoreFault::Privilege
                        | DatastoreFault::Authentication
                )
        }
        ReplicationError::Precondition { check, .. } => *check == ErrorCode::Undecoded,
        _ => false,
    };
    finally.then(|| format!("the slot cannot be read ({error})"))
}
