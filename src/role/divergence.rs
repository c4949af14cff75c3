//! The divergence: the changes that an old primary has and its successor does not have. It is found
//! before the old primary is copied over, and kept on record.
//!
//! The slot by which the successor followed holds exactly this list. Without the slot both sides
//! are compared as they are now, and the list is marked as approximate.

mod approximate;
mod book;
mod exact;
mod fetch;
mod judge;
mod slot;

use crate::cluster::{DatastoreFault, LocalSession, Promotion, RawRow, STATE_DATABASE, State};
use crate::config::Config;
use crate::domain::{ErrorCode, Lsn, PromotionKind, Side};
use crate::replication::{PassError, first_id_of};
use approximate::Bounds;
use book::Book;
pub use fetch::{Fetched, fetch, file_name};
use slot::{Server, Usable};

/// The summary of a divergence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Divergence {
    /// Epoch of the promotion that caused it.
    pub epoch: i64,
    pub exact: bool,
    /// The reason why it is not exact, or the way in which it was found.
    pub reason: String,
    /// The recovery point of the promotion, and the last position that the old primary had written.
    pub from: String,
    pub to: String,
    /// Number of transactions that changed a row; 0 where rows were compared.
    pub transactions: i64,
    pub rows: i64,
    pub packages: i64,
}

/// Number of changed rows of a table, by kind of change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableChanges {
    pub table: String,
    pub inserted: i64,
    pub updated: i64,
    pub deleted: i64,
    pub truncated: i64,
}

/// A changed package, as both sides have it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DivergedPackage {
    pub ident: String,
    pub target: String,
    /// Checksum on the old primary; empty: the old primary does not have the package any more.
    pub checksum: String,
    /// `only_here`, `other_bytes`, `gone_here` or `same`.
    pub class: String,
    /// Key of the artifact; empty: ident and target give no key.
    pub key: String,
    pub their_checksum: Option<String>,
}

/// The result of one of the two ways, apart from the rows.
struct Found {
    exact: bool,
    reason: String,
    to: String,
    transactions: i64,
}

/// Finds the divergence and records it in the local state database, in one transaction that
/// replaces the record of that epoch. It may be killed at any time and run again. `promotion` is
/// the peer's; `lifted`: the fence of this cluster was open after it.
pub async fn record(
    config: &Config,
    state: &State,
    promotion: &Promotion,
    lifted: bool,
) -> Result<Divergence, PassError> {
    let fenced_by = fence_number(config).await?;
    let behind = Behind { lifted, fenced_by };
    record_behind(config, state, promotion, &behind).await
}

/// The known facts about this cluster's fence since another cluster replaced it.
#[derive(Debug, Clone, Default)]
pub(super) struct Behind {
    /// True: the fence was found open in between.
    pub lifted: bool,
    /// Number of the transaction that set the fence, read before the fence is set again; None: not
    /// known.
    pub fenced_by: Option<String>,
}

/// Returns the number of the transaction that set this cluster's fence, or of a later one if no
/// client can have written between the two. The record of the fence is as old as its last change,
/// and so is the setting, which somebody may have removed for a while. The older of the two counts.
/// None: the cluster is not fenced.
pub(super) async fn fence_number(config: &Config) -> Result<Option<String>, PassError> {
    let local = &config.local.datastore;
    let session = LocalSession::open(local, STATE_DATABASE).await?;
    let sql = "SELECT number::text FROM ( \
                 SELECT s.xmin AS number FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase \
                 WHERE d.datname = $1 AND s.setrole = 0 UNION ALL SELECT xmin FROM fence) set_by \
               ORDER BY age(number) DESC LIMIT 1";
    let doing = "looking when the fence was set";
    let rows = session.query(doing, sql, &[&local.database]).await?;
    Ok(rows.first().map(|row| row.get(0)))
}

/// Returns the number of the next transaction of the local server.
pub(super) async fn next_number(config: &Config) -> Result<String, PassError> {
    let session = LocalSession::open_for_maintenance(&config.local.datastore).await?;
    let sql = "SELECT (txid_snapshot_xmax(txid_current_snapshot()) % 4294967296)::text";
    let row = session
        .query_one("reading the next transaction", sql, &[])
        .await?;
    Ok(row.get(0))
}

/// Adds the rows written since an earlier list. The list was made when that transaction was the
/// next one, and the slot may be gone.
pub(super) async fn record_again(
    config: &Config,
    state: &State,
    promotion: &Promotion,
    (behind, listed): (&Behind, &str),
) -> Result<Divergence, PassError> {
    let server = slot::ask(config, promotion).await?;
    if matches!(slot::usable(&server, promotion), Usable::From(_)) {
        return record_behind(config, state, promotion, behind).await;
    }
    let mut book = Book::open_again(config, promotion.epoch).await?;
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
    recorded(state).await?.ok_or_else(gone_again)
}

pub(super) async fn record_behind(
    config: &Config,
    state: &State,
    promotion: &Promotion,
    behind: &Behind,
) -> Result<Divergence, PassError> {
    let server = slot::ask(config, promotion).await?;
    let set_back = Behind {
        lifted: true,
        fenced_by: None,
    };
    match slot::usable(&server, promotion) {
        Usable::From(from) => match Box::pin(by_slot(config, promotion, &server, from)).await {
            Ok(()) => {}
            Err(PassError::Unfit {
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
    recorded(state).await?.ok_or_else(gone_again)
}

fn gone_again() -> PassError {
    PassError::Unfit {
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
) -> Result<(), PassError> {
    let mut book = Book::open(config, promotion.epoch).await?;
    let mut found = exact::read(config, promotion, from, &mut book).await?;
    if let Some(table) = &server.unpublished {
        found.exact = false;
        found.reason = format!(
            "{}, but table {table} is not in publication {}, so the list has no changes of this table",
            found.reason, promotion.publication
        );
    }
    judge::judge_packages(config, &mut book).await?;
    book.close(&promotion.lsn, &found).await
}

/// Compares both sides. A planned handover leaves nothing behind, so only rows written behind its
/// fence count: older rows belong to the new primary, which may have changed them.
async fn without_slot(
    config: &Config,
    promotion: &Promotion,
    behind: &Behind,
    wal: &str,
    reason: &str,
) -> Result<(), PassError> {
    let mut book = Book::open(config, promotion.epoch).await?;
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
    let found = Found {
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
    book.close(&promotion.lsn, &found).await
}

/// Returns the reason why the slot is of no use, if another try would not help.
fn unreadable(error: &PassError) -> Option<String> {
    let finally = match error {
        PassError::Datastore(e) => {
            e.side == Side::Local
                && matches!(
                    e.fault,
                    DatastoreFault::Statement
                        | DatastoreFault::Privilege
                        | DatastoreFault::Authentication
                )
        }
        PassError::Unfit { check, .. } => *check == ErrorCode::Undecoded,
        _ => false,
    };
    finally.then(|| format!("the slot cannot be read ({error})"))
}

/// Returns the recorded divergence of the latest epoch.
pub async fn recorded(state: &State) -> Result<Option<Divergence>, PassError> {
    let sql = "SELECT epoch, exact, reason, from_lsn, to_lsn, transactions, \
                 (SELECT count(*) FROM diverged_row r WHERE r.epoch = d.epoch), \
                 (SELECT count(*) FROM diverged_package p WHERE p.epoch = d.epoch) \
               FROM divergence d ORDER BY epoch DESC LIMIT 1";
    let doing = "reading the divergence";
    let rows = state.session().query(doing, sql, &[]).await?;
    Ok(rows.first().map(|row| Divergence {
        epoch: row.get(0),
        exact: row.get(1),
        reason: row.get(2),
        from: row.get(3),
        to: row.get(4),
        transactions: row.get(5),
        rows: row.get(6),
        packages: row.get(7),
    }))
}

pub async fn tables(state: &State, epoch: i64) -> Result<Vec<TableChanges>, PassError> {
    let sql = "SELECT table_name, count(*) FILTER (WHERE change = 'insert'), count(*) FILTER (WHERE change = 'update'), \
                 count(*) FILTER (WHERE change = 'delete'), count(*) FILTER (WHERE change = 'truncate') \
               FROM diverged_row WHERE epoch = $1 GROUP BY 1 ORDER BY 1";
    let doing = "counting the diverged rows";
    let rows = state.session().query(doing, sql, &[&epoch]).await?;
    let changes = |row: &RawRow| TableChanges {
        table: row.get(0),
        inserted: row.get(1),
        updated: row.get(2),
        deleted: row.get(3),
        truncated: row.get(4),
    };
    Ok(rows.iter().map(changes).collect())
}

pub async fn packages(state: &State, epoch: i64) -> Result<Vec<DivergedPackage>, PassError> {
    let sql = "SELECT ident, target, checksum, class, key, their_checksum FROM diverged_package \
               WHERE epoch = $1 ORDER BY ident, target";
    let doing = "reading the diverged packages";
    let rows = state.session().query(doing, sql, &[&epoch]).await?;
    let package = |row: &RawRow| DivergedPackage {
        ident: row.get(0),
        target: row.get(1),
        checksum: row.get(2),
        class: row.get(3),
        key: row.get(4),
        their_checksum: row.get(5),
    };
    Ok(rows.iter().map(package).collect())
}
