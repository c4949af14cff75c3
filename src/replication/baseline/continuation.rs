//! Checks that the primary's content continues the spare's. This is needed before a full copy if
//! nothing else has proven it: the primary's server was restarted since its history was last
//! proven, and there is no stream that shows it.
//!
//! A primary that was restored from an older copy gives transaction numbers out again. So one of
//! its row versions may have the number of a transaction that had ended before our recovery point,
//! and yet not be here. The server that we have followed has no such row version: the row of such a
//! transaction is here, or was changed or deleted since then, and then is not there. Builder's own
//! ids show nothing of this kind, because they are made of time. A sequence whose value is lower
//! than here, although its table was not emptied, proves another history too.

use super::lock_watchdog::with_lock_watchdog;
use super::sequences::sequences;
use crate::cluster::preparation::COPIED_TABLES;
use crate::cluster::{
    DatastoreError, PeerCluster, ReadSession, RecoveryPoint, Sequence, Session, SqlState,
    WriteSession, quote_ident,
};
use crate::config::Config;
use crate::replication::descent::Doubt;
use crate::replication::error::ReplicationError;
use std::collections::BTreeMap;
use std::time::Duration;

/// Maximum number of row versions of each table that are checked: the youngest of those that must
/// be here.
const MAX_ROW_VERSIONS: usize = 1000;

/// The result of the check before a primary is copied over the visible database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Continuation {
    /// The start of its server for which this is valid; None: there is nothing here that could be
    /// lost.
    pub server_started: Option<String>,
    /// True: nothing contradicts it, and nothing proves it.
    pub unproven: bool,
}

impl Continuation {
    /// Checks that the copy's snapshot was taken on the server that was asked.
    pub(crate) fn still_holds(&self, point: &RecoveryPoint) -> Result<(), ReplicationError> {
        match &self.server_started {
            Some(started) if *started != point.server_started => Err(ReplicationError::NotMet {
                text: "the primary's server was restarted after its history was checked".into(),
            }),
            _ => Ok(()),
        }
    }
}

/// Checks the primary. `visible` is a session on the database that is at `point`. The inner Err is
/// a doubt, which an operator may overrule.
pub(crate) async fn look(
    config: &Config,
    visible: &WriteSession,
    point: &RecoveryPoint,
) -> Result<Result<Continuation, Doubt>, ReplicationError> {
    let peer = PeerCluster::of(config);
    let started = {
        let session = peer.builder().await?;
        let doing = "asking for the server's start";
        session.server_state(doing).await?.started
    };
    if started == point.server_started {
        return Ok(Ok(Continuation {
            server_started: Some(started),
            unproven: false,
        }));
    }
    // Reading holds locks on the primary like any other read, so it gives way like any other.
    let found = with_lock_watchdog(peer.clone(), async {
        let session = peer.builder().await?;
        let looking = Looking {
            peer: &session,
            here: visible,
            theirs: shapes(&session).await?,
            ours: shapes(visible).await?,
        };
        if let Some(text) = looking.sequence_that_went_back().await? {
            return Ok(Some(text));
        }
        let rows = looking.rows_that_are_not_here(&point.transactions);
        match tokio::time::timeout(READ_TIMEOUT, rows).await {
            Ok(found) => found,
            Err(_) => {
                let seconds = READ_TIMEOUT.as_secs();
                log::info!(
                    "peer: its rows could not all be checked within {seconds} s; the database that the copy replaces is pinned for replication.artifact_retention"
                );
                Ok(None)
            }
        }
    });
    if let Some(text) = Box::pin(found).await? {
        return Ok(Err(Doubt::set_back(
            point,
            format!(
                "since the primary's server was restarted, {text}: the primary was set back to an older copy, or rows of the spare were changed by hand"
            ),
        )));
    }
    Ok(Ok(Continuation {
        server_started: Some(started),
        unproven: true,
    }))
}

/// Types whose text is the same on every server.
const PLAIN: &str = "('bool', 'int2', 'int4', 'int8', 'numeric', 'text', 'varchar', 'bpchar', 'date', 'timestamp', 'timestamptz', 'uuid', '_text', '_varchar', '_int4', '_int8')";

/// Returns the SQL for the full transaction number of a row version, with the bits that the row
/// leaves out. `next` is the number that the server gives out next. A number that was frozen long
/// ago may seem younger than it is, and never older.
fn whole_number(xmin: &str, next: &str) -> String {
    format!(
        "CASE WHEN {xmin}::text::int8 < 3 THEN 0 \
         WHEN ({next} >> 32 << 32) + {xmin}::text::int8 < {next} THEN ({next} >> 32 << 32) + {xmin}::text::int8 \
         ELSE ({next} >> 32 << 32) + {xmin}::text::int8 - (1::int8 << 32) END"
    )
}

/// The next number, computed once for each statement: without OFFSET it would be computed for each
/// row.
const NEXT: &str =
    "(SELECT pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot()) AS next OFFSET 0)";

/// Maximum time to read all tables together. A primary whose tables take longer to read is copied
/// unproven.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Number of values that a sequence may lose in a crash: the server logs this many values ahead.
const LOGGED_AHEAD: i64 = 32;

/// The form of a table on one side.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shape {
    oid: u32,
    /// Columns with a type whose text can be compared, by name, with that type.
    columns: BTreeMap<String, String>,
    /// Columns of its primary key; empty: it has none.
    key: Vec<String>,
    /// The number of the transaction that gave it its form.
    formed: i64,
}

/// Returns the tables of a database by their quoted names.
async fn shapes(session: &Session) -> Result<BTreeMap<String, Shape>, ReplicationError> {
    let number = whole_number("x.xmin", "n.next");
    let of_table = whole_number("c.xmin", "n.next");
    let sql = format!(
        "SELECT format('%I.%I', n0.nspname, c.relname), c.oid, \
           coalesce((SELECT jsonb_object_agg(x.attname, t.typname)::text FROM pg_catalog.pg_attribute x \
             JOIN pg_catalog.pg_type t ON t.oid = x.atttypid \
             WHERE x.attrelid = c.oid AND x.attnum > 0 AND NOT x.attisdropped AND x.attgenerated = '' \
               AND t.typnamespace = 'pg_catalog'::regnamespace AND t.typname IN {PLAIN}), '{{}}'), \
           coalesce((SELECT array_agg(x.attname::text ORDER BY k.place) FROM pg_catalog.pg_index i \
             CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k (number, place) \
             JOIN pg_catalog.pg_attribute x ON x.attrelid = c.oid AND x.attnum = k.number \
             WHERE i.indrelid = c.oid AND i.indisprimary AND k.place <= i.indnkeyatts), '{{}}'), \
           greatest({of_table}, (SELECT max({number}) FROM pg_catalog.pg_attribute x \
             WHERE x.attrelid = c.oid AND x.attnum > 0))::int8 \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n0 ON n0.oid = c.relnamespace CROSS JOIN {NEXT} n \
         WHERE c.relpersistence = 'p' AND c.oid IN (SELECT c.oid FROM pg_catalog.pg_class c \
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE {COPIED_TABLES})"
    );
    let rows = session
        .rows("reading the tables' columns", &sql, &[])
        .await?;
    let shape = |row: &crate::cluster::Row| {
        let columns: String = row.get(2)?;
        let shape = Shape {
            oid: row.get(1)?,
            columns: serde_json::from_str(&columns).unwrap_or_default(),
            key: row.get(3)?,
            formed: row.get(4)?,
        };
        Ok::<_, DatastoreError>((row.get(0)?, shape))
    };
    Ok(rows.iter().map(shape).collect::<Result<_, _>>()?)
}

/// Row versions of the primary, each with its key and the hash of its comparable columns.
struct Versions {
    keys: Vec<Vec<String>>,
    hashes: Vec<String>,
}

/// The comparable columns of a table, and its key, as both sides have them.
struct Common<'a> {
    table: &'a str,
    columns: Vec<(&'a String, &'a String)>,
    key: Vec<(&'a String, &'a String)>,
}

impl<'a> Common<'a> {
    /// Returns the common part. None: no column can be compared.
    fn of(table: &'a str, there: &'a Shape, here: &Shape) -> Option<Common<'a>> {
        let same = |column: &(&String, &String)| here.columns.get(column.0) == Some(column.1);
        let columns: Vec<_> = there.columns.iter().filter(same).collect();
        let plain = |name: &String| columns.iter().find(|column| column.0 == name).copied();
        let key: Option<Vec<_>> = there.key.iter().map(plain).collect();
        let key = key.filter(|_| there.key == here.key).unwrap_or_default();
        (!columns.is_empty()).then_some(Common {
            table,
            columns,
            key,
        })
    }

    fn hash(&self, of: &str) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|(name, _)| format!("{of}.{}", quote_ident(name)))
            .collect();
        let columns = columns.join(", ");
        // The encoding is the same on both sides, so the bytes need not be converted.
        format!("encode(sha256(convert_to(ROW({columns})::text, getdatabaseencoding())), 'hex')")
    }

    /// Reads the row versions that `which`, a query for their positions, selects.
    async fn read(&self, peer: &ReadSession, which: &str) -> Result<Versions, ReplicationError> {
        let key: Vec<String> = self
            .key
            .iter()
            .map(|(name, _)| format!("t.{}::text", quote_ident(name)))
            .collect();
        let sql = format!(
            "SELECT {}, ARRAY[{}]::text[] FROM ONLY {} t WHERE t.ctid = ANY (ARRAY({which}))",
            self.hash("t"),
            key.join(", "),
            self.table
        );
        let doing = format!("reading the youngest rows of {}", self.table);
        let mut versions = Versions {
            keys: vec![Vec::new(); self.key.len()],
            hashes: Vec::new(),
        };
        let rows = match peer.rows(&doing, &sql, &[]).await {
            // The keys are not valid text: these rows cannot be compared.
            Err(error) if error.sql_state == Some(SqlState::CHARACTER_NOT_IN_REPERTOIRE) => {
                return Ok(versions);
            }
            rows => rows?,
        };
        for row in rows {
            let key: Vec<String> = row.get(1)?;
            if key.len() != self.key.len() {
                continue;
            }
            versions.hashes.push(row.get(0)?);
            for (column, value) in versions.keys.iter_mut().zip(key) {
                column.push(value);
            }
        }
        Ok(versions)
    }

    /// Returns how many of them are not here.
    async fn missing(
        &self,
        here: &WriteSession,
        versions: &Versions,
    ) -> Result<u64, ReplicationError> {
        if versions.hashes.is_empty() {
            return Ok(0);
        }
        let places: Vec<String> = (0..self.key.len())
            .map(|n| format!("${}::text[]", n + 2))
            .collect();
        let names: Vec<String> = (0..self.key.len()).map(|n| format!("k{n}")).collect();
        let mut unnested = vec!["$1::text[]".to_string()];
        unnested.extend(places);
        let mut columns = vec!["hash".to_string()];
        columns.extend(names);
        let mut is_here: Vec<String> = self
            .key
            .iter()
            .enumerate()
            .map(|(n, (name, kind))| format!("l.{} = v.k{n}::{kind}", quote_ident(name)))
            .collect();
        is_here.push(format!("{} = v.hash", self.hash("l")));
        let sql = format!(
            "SELECT count(*) FROM unnest({}) v ({}) WHERE NOT EXISTS (SELECT 1 FROM ONLY {} l WHERE {})",
            unnested.join(", "),
            columns.join(", "),
            self.table,
            is_here.join(" AND ")
        );
        let mut values: Vec<&(dyn crate::cluster::ToSql + Sync)> = vec![&versions.hashes];
        for key in &versions.keys {
            values.push(key);
        }
        let doing = format!("looking for rows of {}", self.table);
        let row = here.row(&doing, &sql, &values).await?;
        Ok(row.get::<i64>(0)?.unsigned_abs())
    }
}

/// Both sides, during the search for a contradiction.
struct Looking<'a> {
    peer: &'a ReadSession,
    here: &'a WriteSession,
    theirs: BTreeMap<String, Shape>,
    ours: BTreeMap<String, Shape>,
}

impl Looking<'_> {
    fn common<'a>(&'a self, name: &'a str, there: &'a Shape) -> Option<Common<'a>> {
        Common::of(name, there, self.ours.get(name)?)
    }

    /// Returns rows of the primary that must be here, by their transaction numbers, and are not.
    async fn rows_that_are_not_here(
        &self,
        transactions: &str,
    ) -> Result<Option<String>, ReplicationError> {
        let ended = transactions.split(':').next();
        let Some(ended) = ended.and_then(|xmin| xmin.parse::<i64>().ok()) else {
            return Ok(None);
        };
        for (name, there) in &self.theirs {
            let Some(both) = self.common(name, there) else {
                continue;
            };
            // A table that was created or changed since then may hold other rows under the same
            // name.
            if there.formed >= ended {
                continue;
            }
            let number = whole_number("t.xmin", "n.next");
            let which = format!(
                "SELECT t.ctid FROM ONLY {name} t CROSS JOIN {NEXT} n WHERE {number} < {ended} \
                 ORDER BY {number} DESC LIMIT {MAX_ROW_VERSIONS}"
            );
            let versions = both.read(self.peer, &which).await?;
            let missing = both.missing(self.here, &versions).await?;
            if missing > 0 {
                return Ok(Some(format!(
                    "{missing} rows of {name} are on the primary but not here, although the transactions that wrote them are older than the spare's recovery point"
                )));
            }
        }
        Ok(None)
    }

    /// Returns a sequence whose value is lower than here, although its table was not emptied.
    async fn sequence_that_went_back(&self) -> Result<Option<String>, ReplicationError> {
        let (peer, here) = (self.peer, self.here);
        let (now, then) = (sequences(peer).await?, sequences(here).await?);
        let steps = steps(peer).await?;
        for (sequence, before) in gone_back(&then, &now, &steps) {
            // TRUNCATE … RESTART IDENTITY sets it back too, and leaves no rows.
            for table in tables_of(peer, sequence).await? {
                let there = self.theirs.iter().find(|(_, shape)| shape.oid == table);
                let Some(both) = there.and_then(|(name, shape)| self.common(name, shape)) else {
                    continue;
                };
                let which = format!(
                    "SELECT t.ctid FROM ONLY {} t LIMIT {MAX_ROW_VERSIONS}",
                    both.table
                );
                let versions = both.read(peer, &which).await?;
                if both.missing(here, &versions).await? < versions.hashes.len() as u64 {
                    return Ok(Some(format!(
                        "sequence {} is at {} on the primary, but the spare knows that it was past {before}",
                        sequence.name.quoted(),
                        sequence.last_value
                    )));
                }
            }
        }
        Ok(None)
    }
}

/// Returns the steps of those sequences that only rise.
async fn steps(peer: &ReadSession) -> Result<BTreeMap<String, i64>, ReplicationError> {
    let sql = "SELECT n.nspname::text, c.relname::text, s.seqincrement FROM pg_catalog.pg_sequence s \
               JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid \
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
               WHERE s.seqincrement > 0 AND NOT s.seqcycle";
    let mut steps = BTreeMap::new();
    for row in peer.rows("reading the sequences' steps", sql, &[]).await? {
        let (schema, name): (String, String) = (row.get(0)?, row.get(1)?);
        let name = format!("{}.{}", quote_ident(&schema), quote_ident(&name));
        steps.insert(name, row.get(2)?);
    }
    Ok(steps)
}

/// Returns sequences with a lower value than before, by more than a crash explains, with their
/// former values.
fn gone_back<'a>(
    then: &[Sequence],
    now: &'a [Sequence],
    steps: &BTreeMap<String, i64>,
) -> impl Iterator<Item = (&'a Sequence, i64)> {
    let given = |sequence: &Sequence| sequence.last_value - i64::from(!sequence.is_called);
    let before: BTreeMap<String, i64> = then
        .iter()
        .filter_map(|sequence| {
            let name = sequence.name.quoted();
            let slack = steps.get(&name)?.saturating_mul(LOGGED_AHEAD);
            Some((name, given(sequence).saturating_sub(slack)))
        })
        .collect();
    now.iter().filter_map(move |sequence| {
        let least = *before.get(&sequence.name.quoted())?;
        (given(sequence) < least).then_some((sequence, least))
    })
}

/// Returns the tables whose columns take their values from the sequence.
async fn tables_of(peer: &ReadSession, sequence: &Sequence) -> Result<Vec<u32>, ReplicationError> {
    let sql = "SELECT DISTINCT a.adrelid FROM pg_catalog.pg_depend d \
               JOIN pg_catalog.pg_attrdef a ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid \
               WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = to_regclass($1) \
               UNION SELECT d.refobjid FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_class'::regclass \
                 AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND d.objid = to_regclass($1)";
    let name = sequence.name.quoted();
    let rows = peer
        .rows("looking for the tables of a sequence", sql, &[&name])
        .await?;
    Ok(rows
        .iter()
        .map(|row| row.get(0))
        .collect::<Result<_, _>>()?)
}
