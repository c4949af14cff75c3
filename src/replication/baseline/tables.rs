//! Copies the rows: parallel COPY from the snapshot into the incoming database, large tables split
//! into ranges of pages.

use super::content_hash::ContentHash;
use crate::cluster::preparation::COPIED_TABLES;
use crate::cluster::{
    DatastoreError, LocalSession, PeerSession, Session, Snapshot, Throttle, pipe, quote_ident,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Side};
use crate::observe::Step;
use crate::replication::error::PassError;
use chrono::{DateTime, Utc};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// Minimum size of a table that is split.
const SPLIT_BYTES: i64 = 32 << 20;

#[derive(Debug, Clone)]
pub struct Table {
    pub schema: String,
    pub name: String,
    pub columns: Vec<String>,
    /// The file that holds the rows, as the snapshot's catalog names it: a rewrite gives another
    /// file.
    pub file: i64,
    pub oid: u32,
    pub bytes: i64,
    pub pages: i64,
}

impl Table {
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }

    fn quoted_columns(&self) -> String {
        let quoted: Vec<String> = self.columns.iter().map(|c| quote_ident(c)).collect();
        quoted.join(", ")
    }

    /// Returns the statement that reads the whole table, in the form in which its rows are hashed.
    pub fn copy_out(&self) -> String {
        format!("COPY {}{} TO STDOUT", self.quoted(), self.column_list())
    }

    fn copy_in(&self) -> String {
        format!("COPY {}{} FROM STDIN", self.quoted(), self.column_list())
    }

    /// A table may have no column at all, and COPY accepts no empty list.
    fn column_list(&self) -> String {
        if self.columns.is_empty() {
            return String::new();
        }
        format!(" ({})", self.quoted_columns())
    }
}

/// A table, or some of its pages: from the first up to, but without, the last. None: to the end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unit {
    table: usize,
    from: i64,
    to: Option<i64>,
    bytes: i64,
}

const TABLES: &str = "
SELECT n.nspname::text, c.relname::text, array_remove(array_agg(a.attname::text ORDER BY a.attnum), NULL), c.relfilenode::int8, c.oid,
       coalesce(pg_table_size(c.oid), 0), coalesce(pg_relation_size(c.oid), 0) / current_setting('block_size')::int8
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
WHERE ";

const ORDER: &str = "
GROUP BY n.nspname, c.relname, c.relfilenode, c.oid
ORDER BY 6 DESC, 1, 2";

/// Returns the tables that the session's transaction sees, the largest first.
pub async fn tables(session: &Session) -> Result<Vec<Table>, PassError> {
    let sql = format!("{TABLES}{COPIED_TABLES}{ORDER}");
    let rows = session.rows("reading the tables", &sql, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| {
            Ok::<_, DatastoreError>(Table {
                schema: row.get(0)?,
                name: row.get(1)?,
                columns: row.get(2)?,
                file: row.get(3)?,
                oid: row.get(4)?,
                bytes: row.get(5)?,
                pages: row.get(6)?,
            })
        })
        .collect::<Result<_, _>>()?)
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
) -> Result<BTreeMap<String, ContentHash>, PassError> {
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
            let peer = PeerSession::open(&config.peer.datastore).await?;
            let local = LocalSession::open(&config.local.datastore, incoming).await?;
            peer.carry_bytes().await?;
            local.carry_bytes().await?;
            // The rename's own commit makes all of this durable before anybody sees it.
            local
                .batch("preparing the copy", "SET synchronous_commit = off")
                .await?;
            if lz4 {
                local
                    .batch(
                        "preparing the copy",
                        "SET default_toast_compression = 'lz4'",
                    )
                    .await?;
            }
            loop {
                let Some(unit) = queue.lock().expect("no holder panics").pop_front() else {
                    return Ok::<(), PassError>(());
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
pub(in crate::replication) fn changed_in_form(error: PassError, what: &str) -> PassError {
    use crate::cluster::SqlState;
    match &error {
        PassError::Datastore(e)
            if e.side == Side::Peer
                && [SqlState::UNDEFINED_COLUMN, SqlState::UNDEFINED_TABLE]
                    .iter()
                    .any(|state| e.sql_state.as_ref() == Some(state)) =>
        {
            PassError::Rewritten {
                tables: what.to_string(),
            }
        }
        _ => error,
    }
}

/// Returns the error for bytes that neither side can hold as text; another try would end the same
/// way.
fn of_another_encoding(error: PassError, table: &str) -> PassError {
    use crate::cluster::SqlState;
    match &error {
        PassError::Datastore(e)
            if [
                SqlState::CHARACTER_NOT_IN_REPERTOIRE,
                SqlState::UNTRANSLATABLE_CHARACTER,
            ]
            .iter()
            .any(|state| e.sql_state.as_ref() == Some(state)) =>
        {
            PassError::Unfit {
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
    peer: &PeerSession,
    local: &LocalSession,
    snapshot: &Snapshot,
    table: &Table,
    unit: &Unit,
    throttle: &Throttle,
    step: &Step,
) -> Result<ContentHash, PassError> {
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
        return Err(PassError::Unfit {
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
        let end = self
            .to
            .map(|to| format!(" AND ctid < '({to},0)'::tid"))
            .unwrap_or_default();
        format!(
            "COPY (SELECT {} FROM ONLY {} WHERE ctid >= '({},0)'::tid{end}) TO STDOUT",
            table.quoted_columns(),
            table.quoted(),
            self.from
        )
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
    peer: &PeerSession,
    tables: &[Table],
) -> Result<Vec<String>, PassError> {
    let oids: Vec<u32> = tables.iter().map(|t| t.oid).collect();
    let sql = "SELECT o, pg_relation_filenode(o)::int8 FROM unnest($1::oid[]) o";
    let rows = peer
        .rows("looking for rewritten tables", sql, &[&oids])
        .await?;
    let now: BTreeMap<u32, Option<i64>> = rows
        .iter()
        .map(|row| Ok::<_, DatastoreError>((row.get(0)?, row.get(1)?)))
        .collect::<Result<_, _>>()?;
    Ok(tables
        .iter()
        .filter(|table| now.get(&table.oid).copied().flatten() != Some(table.file))
        .map(Table::full_name)
        .collect())
}

/// Returns the lowest of Builder's ids that can have been made at that time.
pub fn first_id_of(time: DateTime<Utc>) -> i64 {
    (time.timestamp_millis() - IDS_BEGIN).max(0) << ID_BITS
}

/// Milliseconds since 1970 at which Builder's ids begin.
const IDS_BEGIN: i64 = 1_409_266_191_000;
/// Number of the bits of an id below its milliseconds.
const ID_BITS: u32 = 23;

/// Returns the time of the newest of Builder's ids, which are made of time. It reads primary keys,
/// so that no table is scanned. Ids made after `until` are left out: a clock was wrong then.
pub async fn newest_id(
    session: &LocalSession,
    until: Option<DateTime<Utc>>,
) -> Result<Option<DateTime<Utc>>, PassError> {
    let doing = "reading the newest id";
    let sql = "SELECT format('(SELECT max(id) FROM %I.%I WHERE id < $1)', n.nspname, c.relname) \
               FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
               JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0] \
               JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum \
               WHERE i.indisprimary AND i.indnkeyatts = 1 AND c.relkind = 'r' AND a.attname = 'id' \
                 AND a.atttypid = 'int8'::regtype AND pg_get_expr(d.adbin, d.adrelid) LIKE '%next_id_v1(%'";
    let tables = session.rows(doing, sql, &[]).await?;
    let newest: Vec<String> = tables
        .iter()
        .map(|row| row.get(0))
        .collect::<Result<_, _>>()?;
    if newest.is_empty() {
        return Ok(None);
    }
    let sql = format!("SELECT greatest({})", newest.join(", "));
    let bound = until.map_or(i64::MAX, first_id_of);
    let id: Option<i64> = session.row(doing, &sql, &[&bound]).await?.get(0)?;
    Ok(id.and_then(|id| DateTime::from_timestamp_millis((id >> ID_BITS) + IDS_BEGIN)))
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
        assert_eq!(
            units[0].copy_out(&tables[0]),
            r#"COPY "public"."small" ("a", "b c") TO STDOUT"#
        );
    }
}
