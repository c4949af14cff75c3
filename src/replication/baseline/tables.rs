//! Copies the rows: parallel COPY from the snapshot into the incoming database, large tables split
//! into ranges of pages.

use super::content_hash::ContentHash;
use crate::cluster::{
    LocalCluster, PeerCluster, ReadSession, Snapshot, Table, Throttle, WriteSession, pipe,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Side};
use crate::observe::Step;
use crate::replication::error::ReplicationError;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// Minimum size of a table that is split.
const SPLIT_BYTES: i64 = 32 << 20;

/// A table, or some of its pages: from the first up to, but without, the last. None: to the end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unit {
    table: usize,
    from: i64,
    to: Option<i64>,
    bytes: i64,
}

/// Copies all rows. Returns each table's content as the primary sent it.
pub(crate) async fn copy_all(
    config: &Config,
    snapshot: &Snapshot,
    tables: &[Table],
    incoming: &str,
    lz4: bool,
    throttle: &Throttle,
    step: &Step,
) -> Result<BTreeMap<String, ContentHash>, ReplicationError> {
    let jobs = config.replication.jobs;
    let queue = Arc::new(Mutex::new(plan(tables, jobs)));
    let contents = Arc::new(Mutex::new(BTreeMap::from_iter(
        tables
            .iter()
            .map(|table| (table.full_name(), ContentHash::default())),
    )));
    let workers = (0..jobs).map(|_| {
        let (queue, contents) = (queue.clone(), contents.clone());
        async move {
            let peer = PeerCluster::of(config).builder().await?;
            let local = LocalCluster::of(config).database(incoming).await?;
            peer.carry_bytes().await?;
            local.prepare_to_copy(lz4).await?;
            loop {
                let Some(unit) = queue.lock().expect("no holder panics").pop_front() else {
                    return Ok::<(), ReplicationError>(());
                };
                let table = &tables[unit.table];
                let content = copy_unit(&peer, &local, snapshot, table, &unit, throttle, step)
                    .await
                    .map_err(|error| changed_in_form(error, &table.full_name()))
                    .map_err(|error| of_another_encoding(error, &table.full_name()))?;
                let mut contents = contents.lock().expect("no holder panics");
                contents
                    .entry(table.full_name())
                    .or_default()
                    .merge(content);
            }
        }
    });
    // As tasks of this one future they all end when it is dropped.
    futures_util::future::try_join_all(workers).await?;
    let contents = contents.lock().expect("no holder panics");
    Ok(contents.clone())
}

/// Returns the error for a column or table that was dropped after the snapshot: this is no error of
/// the statement, and the copy begins again.
pub(in crate::replication) fn changed_in_form(
    error: ReplicationError,
    what: &str,
) -> ReplicationError {
    use crate::cluster::SqlState;
    match &error {
        ReplicationError::Datastore(e)
            if e.side == Side::Peer
                && [SqlState::UNDEFINED_COLUMN, SqlState::UNDEFINED_TABLE]
                    .iter()
                    .any(|state| e.sql_state.as_ref() == Some(state)) =>
        {
            ReplicationError::Rewritten {
                tables: what.to_string(),
            }
        }
        _ => error,
    }
}

/// Returns the error for bytes that neither side can hold as text; another try would end the same
/// way.
fn of_another_encoding(error: ReplicationError, table: &str) -> ReplicationError {
    use crate::cluster::SqlState;
    match &error {
        ReplicationError::Datastore(e)
            if [
                SqlState::CHARACTER_NOT_IN_REPERTOIRE,
                SqlState::UNTRANSLATABLE_CHARACTER,
            ]
            .iter()
            .any(|state| e.sql_state.as_ref() == Some(state)) =>
        {
            ReplicationError::Precondition {
                check: ErrorCode::Encoding,
                text: format!(
                    "table {table} of the primary holds bytes that are no text in its database's encoding: {e}"
                ),
                next_step: format!(
                    "find the rows by these bytes, and correct them on the primary (UPDATE {table} …); PostgreSQL itself could not dump and restore them"
                ),
            }
        }
        _ => error,
    }
}

async fn copy_unit(
    peer: &ReadSession,
    local: &WriteSession,
    snapshot: &Snapshot,
    table: &Table,
    unit: &Unit,
    throttle: &Throttle,
    step: &Step,
) -> Result<ContentHash, ReplicationError> {
    let doing = format!("copying table {}", table.full_name());
    // A transaction for each unit, so that its lock on the table ends with it.
    peer.adopt(snapshot).await?;
    let rows = peer.copy_out(&doing, &unit.copy_out(table)).await?;
    let sink = local.copy_in(&doing, &table.copy_in()).await?;
    let mut content = ContentHash::default();
    let stored = pipe(rows, sink, throttle, |row| {
        content.add(row);
        step.add(row.len() as u64);
    })
    .await?;
    peer.end().await?;
    if stored != content.rows() {
        return Err(ReplicationError::Precondition {
            check: ErrorCode::RowCount,
            text: format!(
                "{doing}: {} rows were sent and {stored} stored",
                content.rows()
            ),
            next_step: "run it again; if it stays, report it".into(),
        });
    }
    Ok(content)
}

impl Unit {
    fn copy_out(&self, table: &Table) -> String {
        if self.from == 0 && self.to.is_none() {
            return table.copy_out();
        }
        table.copy_pages_out(self.from, self.to)
    }
}

/// Plans the units: large tables first, in ranges small enough that no worker is left alone with a
/// long one.
fn plan(tables: &[Table], jobs: usize) -> VecDeque<Unit> {
    let total: i64 = tables.iter().map(|t| t.bytes).sum();
    let target = (total / (4 * jobs as i64)).max(SPLIT_BYTES);
    let mut units = Vec::new();
    for (index, table) in tables.iter().enumerate() {
        let pieces = if jobs == 1 {
            1
        } else {
            (table.bytes / target).clamp(1, table.pages.max(1))
        };
        for piece in 0..pieces {
            let page = |n: i64| table.pages * n / pieces;
            units.push(Unit {
                table: index,
                from: page(piece),
                // Rows of the snapshot may be past the counted pages.
                to: (piece + 1 < pieces).then(|| page(piece + 1)),
                bytes: table.bytes / pieces,
            });
        }
    }
    units.sort_by_key(|unit| std::cmp::Reverse(unit.bytes));
    units.into()
}

/// Returns tables whose rows were rewritten, or that were dropped, since the snapshot: an old
/// snapshot sees a rewritten table empty.
pub(crate) async fn rewritten(
    peer: &ReadSession,
    tables: &[Table],
) -> Result<Vec<String>, ReplicationError> {
    let oids: Vec<u32> = tables.iter().map(|t| t.oid).collect();
    let now = peer.table_files(&oids).await?;
    Ok(tables
        .iter()
        .filter(|table| now.get(&table.oid).copied().flatten() != Some(table.file))
        .map(Table::full_name)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, bytes: i64, pages: i64) -> Table {
        Table {
            schema: "public".into(),
            name: name.into(),
            columns: vec!["a".into(), "b c".into()],
            file: 1,
            oid: 1,
            bytes,
            pages,
        }
    }

    #[test]
    fn ranges_cover_every_page_once_and_the_last_is_open() {
        let tables = [table("big", 1 << 30, 1001), table("small", 10, 1)];
        let mut ranges: Vec<Unit> = plan(&tables, 2)
            .into_iter()
            .filter(|u| u.table == 0)
            .collect();
        ranges.sort_by_key(|unit| unit.from);
        assert!(ranges.len() > 2, "{ranges:?}");
        assert_eq!(ranges[0].from, 0);
        for pair in ranges.windows(2) {
            assert_eq!(pair[0].to, Some(pair[1].from));
        }
        assert_eq!(ranges.last().map(|unit| unit.to), Some(None));
    }

    #[test]
    fn a_small_table_is_copied_whole() {
        let tables = [table("small", 10, 1)];
        let units = plan(&tables, 2);
        assert_eq!(units.len(), 1);
        assert_eq!(units[0].copy_out(&tables[0]), tables[0].copy_out());
    }
}
