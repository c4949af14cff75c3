//! Finds the divergence without a slot: every row that is here but not on the peer, as both sides
//! are now, and every row that is on the peer but not here and was made before the new primary made
//! any.
//!
//! Rows are compared by hash, on the local server, so that memory does not grow with them.

use crate::cluster::{
    CopyRows, DivergedRow, DivergenceBook, LocalCluster, PeerCluster, ReadSession, Table, Throttle,
    WriteSession, pipe, quote_ident, quote_literal,
};
use crate::config::Config;
use crate::replication::{ReplicationError, with_lock_watchdog};
use std::collections::HashMap;

/// Maximum number of rows read at once; one row may have tens of KB.
const PAGE_ROWS: usize = 200;

/// Limits of the rows that count as a difference.
#[derive(Debug, Clone, Default)]
pub(super) struct Bounds {
    /// Only local rows count that a transaction of this number or a later one wrote. None: all rows
    /// count.
    pub written_since: Option<String>,
    /// Ids are made of time: a row on the peer with a lower id was not made by the new primary, so
    /// it was deleted here. None: deleted rows cannot be recognised.
    pub made_before: Option<i64>,
}

pub(super) async fn compare(
    config: &Config,
    book: &mut DivergenceBook,
    bounds: &Bounds,
) -> Result<(), ReplicationError> {
    let database = &config.local.datastore.database;
    let local = LocalCluster::of(config).database(database).await?;
    // Rows are identified by their position, which must not change.
    local.begin_snapshot("beginning to compare").await?;
    let throttle = Throttle::new(config.replication.bandwidth_limit);
    for table in local.tables().await? {
        let by_id = has_ids(&local, &table).await?;
        let loading = load(config, book, &local, (&table, by_id), (bounds, &throttle));
        // Reading holds a lock on the primary like any other read, so it gives way like any other.
        let there = Box::pin(with_lock_watchdog(PeerCluster::of(config), loading)).await?;
        record(config, book, &local, &table, there).await?;
        if let (true, true, Some(bound)) = (there, by_id, bounds.made_before) {
            record_gone(config, book, &table, bound).await?;
        }
    }
    Ok(())
}

/// Loads the hashes of both sides into the working tables. False: the peer has no such table.
async fn load(
    config: &Config,
    book: &DivergenceBook,
    local: &WriteSession,
    (table, by_id): (&Table, bool),
    (bounds, throttle): (&Bounds, &Throttle),
) -> Result<bool, ReplicationError> {
    let id = if by_id { "id" } else { "NULL::int8" };
    let late = match &bounds.written_since {
        Some(number) => format!("age(xmin) <= age({}::xid)", quote_literal(number)),
        None => "true".into(),
    };
    let quoted = table.quoted();
    let doing = format!("comparing table {}", table.full_name());
    book.session()
        .batch("emptying working tables", "TRUNCATE ours, theirs")
        .await?;
    let ours = format!(
        "COPY (SELECT ctid, md5(whole_row::text), {id}, {late} FROM ONLY {quoted} whole_row) TO STDOUT"
    );
    let rows = local.copy_out(&doing, &ours).await?;
    fill(book.session(), "ours", rows, throttle).await?;
    let peer = PeerCluster::of(config).builder().await?;
    let sql = "SELECT to_regclass($1) IS NOT NULL";
    let there: bool = peer.row(&doing, sql, &[&quoted]).await?.get(0)?;
    if there {
        let theirs = format!(
            "COPY (SELECT md5(whole_row::text), {id} FROM ONLY {quoted} whole_row) TO STDOUT"
        );
        let rows = peer.copy_out(&doing, &theirs).await?;
        fill(book.session(), "theirs", rows, throttle).await?;
    }
    Ok(there)
}

async fn fill(
    into: &WriteSession,
    table: &str,
    rows: CopyRows<'_>,
    throttle: &Throttle,
) -> Result<(), ReplicationError> {
    let sql = format!("COPY {table} FROM STDIN");
    let sink = into.copy_in("filling a working table", &sql).await?;
    pipe(rows, sink, throttle, |_| {}).await?;
    Ok(())
}

/// A row that exists twice on one side and once on the other counts as one row more.
const ONLY_HERE: &str = "
DECLARE only_here CURSOR FOR
SELECT o.at FROM (SELECT at, hash, late, row_number() OVER (PARTITION BY hash ORDER BY late) AS number FROM ours) o
LEFT JOIN (SELECT hash, count(*) AS rows FROM theirs GROUP BY hash) t ON t.hash = o.hash
WHERE o.number > coalesce(t.rows, 0) AND o.late";

/// Ids of rows that were deleted here. Rows that are on record as deleted already are left out.
const GONE_HERE: &str = "
SELECT t.id FROM theirs t WHERE t.id > $1 AND t.id < $2 AND NOT EXISTS (SELECT FROM ours o WHERE o.id = t.id)
  AND NOT EXISTS (SELECT FROM diverged_row r WHERE r.epoch = $3 AND r.table_name = $4 AND r.change = 'delete' AND r.old->>'id' = t.id::text)
ORDER BY t.id LIMIT $5";

async fn record(
    config: &Config,
    book: &mut DivergenceBook,
    local: &WriteSession,
    table: &Table,
    there: bool,
) -> Result<(), ReplicationError> {
    let keys = match there {
        true => primary_key(local, table).await?,
        false => Vec::new(),
    };
    let peer = PeerCluster::of(config).builder().await?;
    let doing = format!("reading the rows of {}", table.full_name());
    book.session().batch(&doing, ONLY_HERE).await?;
    loop {
        let fetch = format!("FETCH {PAGE_ROWS} FROM only_here");
        let places = book.session().rows(&doing, &fetch, &[]).await?;
        if places.is_empty() {
            break;
        }
        let places: Vec<String> = places
            .iter()
            .map(|row| row.get(0))
            .collect::<Result<_, _>>()?;
        let sql = format!(
            "SELECT to_jsonb(whole_row)::text FROM ONLY {} whole_row WHERE ctid = ANY ($1::text[]::tid[])",
            table.quoted()
        );
        let rows = local.rows(&doing, &sql, &[&places]).await?;
        let rows: Vec<String> = rows
            .iter()
            .map(|row| row.get(0))
            .collect::<Result<_, _>>()?;
        let mut theirs = namesakes(&peer, table, &keys, &rows).await?;
        for row in rows {
            let old = key_of(&keys, &row).and_then(|key| theirs.remove(&key));
            let change = DivergedRow {
                table: table.full_name(),
                kind: if old.is_some() { "update" } else { "insert" },
                old,
                new: Some(row),
            };
            book.add(change).await?;
        }
    }
    book.session().batch(&doing, "CLOSE only_here").await?;
    Ok(())
}

/// Returns whether the ids of the table's rows are made by Builder's own function.
async fn has_ids(local: &WriteSession, table: &Table) -> Result<bool, ReplicationError> {
    let sql = "SELECT EXISTS (SELECT FROM pg_attribute a \
                 JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
                 WHERE a.attrelid = $1 AND a.attname = 'id' AND a.atttypid = 'int8'::regtype AND NOT a.attisdropped \
                   AND pg_get_expr(d.adbin, d.adrelid) LIKE '%next_id_v1(%')";
    let doing = "looking for the ids of rows";
    Ok(local.row(doing, sql, &[&table.oid]).await?.get(0)?)
}

async fn record_gone(
    config: &Config,
    book: &mut DivergenceBook,
    table: &Table,
    bound: i64,
) -> Result<(), ReplicationError> {
    book.flush().await?;
    let peer = PeerCluster::of(config).builder().await?;
    let doing = format!("reading the rows of {}", table.full_name());
    let (name, epoch, page) = (table.full_name(), book.epoch, PAGE_ROWS as i64);
    let rows = format!(
        "SELECT to_jsonb(whole_row)::text FROM ONLY {} whole_row WHERE id = ANY ($1)",
        table.quoted()
    );
    let mut after = i64::MIN;
    loop {
        let session = book.session();
        let found = session
            .rows(&doing, GONE_HERE, &[&after, &bound, &epoch, &name, &page])
            .await?;
        let Some(last) = found.last() else {
            return Ok(());
        };
        after = last.get(0)?;
        let ids: Vec<i64> = found
            .iter()
            .map(|row| row.get(0))
            .collect::<Result<_, _>>()?;
        for row in peer.rows(&doing, &rows, &[&ids]).await? {
            let change = DivergedRow {
                table: name.clone(),
                kind: "delete",
                old: Some(row.get(0)?),
                new: None,
            };
            book.add(change).await?;
        }
    }
}

async fn primary_key(local: &WriteSession, table: &Table) -> Result<Vec<String>, ReplicationError> {
    let sql = "SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey) \
               WHERE i.indrelid = $1 AND i.indisprimary ORDER BY a.attnum";
    let rows = local
        .rows("reading the primary key", sql, &[&table.oid])
        .await?;
    Ok(rows
        .iter()
        .map(|row| row.get(0))
        .collect::<Result<_, _>>()?)
}

/// Returns the peer's rows with the same keys, by key.
async fn namesakes(
    peer: &ReadSession,
    table: &Table,
    keys: &[String],
    rows: &[String],
) -> Result<HashMap<String, String>, ReplicationError> {
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let columns: Vec<String> = keys.iter().map(|key| quote_ident(key)).collect();
    let (columns, quoted) = (columns.join(", "), table.quoted());
    let sql = format!(
        "SELECT to_jsonb(whole_row)::text FROM ONLY {quoted} whole_row WHERE ({columns}) IN \
           (SELECT {columns} FROM jsonb_populate_recordset(NULL::{quoted}, $1::text::jsonb))"
    );
    let ours = format!("[{}]", rows.join(","));
    let doing = format!("reading the rows of {}", table.full_name());
    let found = peer.rows(&doing, &sql, &[&ours]).await?;
    let found: Vec<String> = found
        .iter()
        .map(|row| row.get(0))
        .collect::<Result<_, _>>()?;
    let keyed = found
        .into_iter()
        .filter_map(|row| Some((key_of(keys, &row)?, row)));
    Ok(keyed.collect())
}

/// Returns the key of a row as text. None: the table has no key.
fn key_of(keys: &[String], row: &str) -> Option<String> {
    if keys.is_empty() {
        return None;
    }
    let row: serde_json::Value = serde_json::from_str(row).ok()?;
    let values: Vec<&serde_json::Value> = keys.iter().map(|key| &row[key]).collect();
    serde_json::to_string(&values).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_told_by_its_columns_alone() {
        let keys = ["id".to_string(), "name".to_string()];
        let one = key_of(&keys, r#"{"id": 7, "name": "x", "more": 1}"#);
        assert_eq!(one, key_of(&keys, r#"{"more": 2, "name": "x", "id": 7}"#));
        assert_eq!(one.as_deref(), Some(r#"[7,"x"]"#));
        assert_eq!(key_of(&[], "{}"), None);
    }
}
