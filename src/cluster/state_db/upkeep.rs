//! Records of things that go: packages that vanished recently, artifacts that no row names any
//! more, and bytes that are being replaced under a key. It also records when tables were last found
//! equal.

use super::state::{StateDb, StateError};
use super::working_lock::Lock;
use chrono::{DateTime, Utc};
use std::collections::BTreeMap;
use std::time::Duration;

/// An object whose bytes are to change under a key that the visible database names.
#[derive(Debug, Clone)]
pub struct Replacement {
    pub key: String,
    pub old_checksum: String,
    pub new_checksum: String,
    /// In the stream: the bytes are right when the recovery point is reached. Empty: when the
    /// journal is emptied.
    pub lsn: String,
}

/// An artifact that a row named until the row was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retirement {
    pub key: String,
    pub checksum: String,
}

/// A table whose rows equalled the primary's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComparedTable {
    /// The primary's file that held its rows at that time.
    pub file: i64,
    pub time: DateTime<Utc>,
}

/// An artifact that a row names and that is not in the local bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbsentArtifact {
    pub key: String,
    pub ident: String,
    pub target: String,
}

/// Number of recorded absent artifacts from which on no more are added.
const ABSENT_MAX: i64 = 50;

/// The recently vanished packages (by ident and target) and artifacts (by key). Some of them may
/// exist again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vanished {
    pub packages: Vec<String>,
    pub artifacts: Vec<String>,
    /// Numbers of further packages and artifacts that an older program has counted.
    pub nameless: (u64, u64),
}

/// Records names of packages and artifacts, and the end of the transaction; empty: a full copy.
pub const NOTE_VANISHED: &str = "
INSERT INTO vanished (packages, artifacts, package_names, artifact_keys, lsn)
SELECT cardinality($1::text[]), cardinality($2::text[]), $1, $2, $3::text
WHERE $3 = '' OR NOT EXISTS (SELECT 1 FROM vanished WHERE lsn = $3)";

impl StateDb {
    /// Returns the journal. It waits for a switch whose commit is in progress although its process
    /// is gone: that empties the journal.
    pub async fn replacements(&self) -> Result<Vec<Replacement>, StateError> {
        let sql =
            "SELECT key, old_checksum, new_checksum, lsn FROM replacement ORDER BY key FOR UPDATE";
        let rows = self
            .session()
            .query("reading the replacements' journal", sql, &[])
            .await?;
        let replacement = |row: &tokio_postgres::Row| Replacement {
            key: row.get(0),
            old_checksum: row.get(1),
            new_checksum: row.get(2),
            lsn: row.get(3),
        };
        Ok(rows.iter().map(replacement).collect())
    }

    /// Writes the journal before the first byte is replaced. It is emptied by the rename's
    /// transaction, when the transaction that it is for is committed, or after undoing.
    pub async fn plan_replacements(&self, planned: &[Replacement]) -> Result<(), StateError> {
        let keys: Vec<&str> = planned.iter().map(|r| r.key.as_str()).collect();
        let old: Vec<&str> = planned.iter().map(|r| r.old_checksum.as_str()).collect();
        let new: Vec<&str> = planned.iter().map(|r| r.new_checksum.as_str()).collect();
        let lsns: Vec<&str> = planned.iter().map(|r| r.lsn.as_str()).collect();
        let sql = "INSERT INTO replacement (key, old_checksum, new_checksum, lsn) \
                   SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) ON CONFLICT (key) DO UPDATE SET \
                     old_checksum = excluded.old_checksum, new_checksum = excluded.new_checksum, lsn = excluded.lsn";
        self.session()
            .execute(
                "journalling the replacements",
                sql,
                &[&keys, &old, &new, &lsns],
            )
            .await?;
        Ok(())
    }

    pub async fn forget_replacements(&self) -> Result<(), StateError> {
        self.session()
            .batch(
                "emptying the replacements' journal",
                "DELETE FROM replacement",
            )
            .await?;
        Ok(())
    }

    /// Records that the rows equal the primary's since its server was started at that time. A
    /// holder that hung, and lost the lock in the meantime, writes nothing.
    pub async fn server_started(&self, lock: Lock, server_started: &str) -> Result<(), StateError> {
        let sql =
            "UPDATE copied SET server_started = $1 WHERE (SELECT token FROM meta FOR SHARE) = $2";
        self.session()
            .execute(
                "recording the server's start",
                sql,
                &[&server_started, &lock.token],
            )
            .await?;
        Ok(())
    }

    /// Records that every transaction of the primary that had ended in this snapshot is here.
    pub async fn transactions(&self, lock: Lock, snapshot: &str) -> Result<(), StateError> {
        let sql = "UPDATE copied SET transactions = $1 \
                   WHERE transactions <> $1 AND (SELECT token FROM meta FOR SHARE) = $2";
        self.session()
            .execute(
                "recording the ended transactions",
                sql,
                &[&snapshot, &lock.token],
            )
            .await?;
        Ok(())
    }

    /// Returns artifacts that were found absent from the local bucket, and not seen there since.
    pub async fn absent(&self) -> Result<Vec<AbsentArtifact>, StateError> {
        let sql = "SELECT key, ident, target FROM absent";
        let rows = self
            .session()
            .query("reading which artifacts are absent", sql, &[])
            .await?;
        let absent = |row: &tokio_postgres::Row| AbsentArtifact {
            key: row.get(0),
            ident: row.get(1),
            target: row.get(2),
        };
        Ok(rows.iter().map(absent).collect())
    }

    /// Records these while there are few: if many are absent, any sample finds some. Forgets
    /// `gone`.
    pub async fn note_absent(
        &self,
        absent: &[AbsentArtifact],
        gone: &[String],
    ) -> Result<(), StateError> {
        let doing = "recording absent artifacts";
        if !gone.is_empty() {
            let sql = "DELETE FROM absent WHERE key = ANY ($1)";
            self.session().execute(doing, sql, &[&gone]).await?;
        }
        if !absent.is_empty() {
            let keys: Vec<&str> = absent.iter().map(|a| a.key.as_str()).collect();
            let idents: Vec<&str> = absent.iter().map(|a| a.ident.as_str()).collect();
            let targets: Vec<&str> = absent.iter().map(|a| a.target.as_str()).collect();
            let sql = "INSERT INTO absent (key, ident, target) \
                       SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) \
                       LIMIT greatest($4 - (SELECT count(*) FROM absent), 0) ON CONFLICT DO NOTHING";
            let values: &[&(dyn tokio_postgres::types::ToSql + Sync)] =
                &[&keys, &idents, &targets, &ABSENT_MAX];
            self.session().execute(doing, sql, values).await?;
        }
        Ok(())
    }

    /// Returns every table that was compared with the primary's, or copied.
    pub async fn compared(&self) -> Result<BTreeMap<String, ComparedTable>, StateError> {
        let sql = "SELECT table_name, file, time FROM compared";
        let rows = self
            .session()
            .query("reading what was compared", sql, &[])
            .await?;
        let table = |row: &tokio_postgres::Row| ComparedTable {
            file: row.get(1),
            time: row.get(2),
        };
        Ok(rows.iter().map(|row| (row.get(0), table(row))).collect())
    }

    /// Records that these tables are equal on both sides, as of now.
    pub async fn record_compared(&self, tables: &[(String, i64)]) -> Result<(), StateError> {
        let names: Vec<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
        let files: Vec<i64> = tables.iter().map(|(_, file)| *file).collect();
        let sql = "INSERT INTO compared (table_name, file) SELECT * FROM unnest($1::text[], $2::int8[]) \
                   ON CONFLICT (table_name) DO UPDATE SET file = excluded.file, time = now()";
        self.session()
            .execute("recording the compared tables", sql, &[&names, &files])
            .await?;
        Ok(())
    }

    /// Ends the stream's record: the visible database is at `lsn`, and the next copy is a full one.
    pub async fn leave_stream(&self, lsn: &str) -> Result<(), StateError> {
        let sql = "UPDATE copied SET slot = '', transactions = '', lsn = $1";
        self.session()
            .execute("recording that there is no slot", sql, &[&lsn])
            .await?;
        Ok(())
    }

    /// Returns what vanished within the window, except in the transaction that ends at `but`.
    pub async fn vanished_lately(
        &self,
        window: Duration,
        but: &str,
    ) -> Result<Vanished, StateError> {
        let within = "FROM vanished WHERE time > now() - make_interval(secs => $1) AND (lsn = '' OR lsn <> $2)";
        let sql = format!(
            "SELECT ARRAY(SELECT DISTINCT unnest(package_names) {within}), ARRAY(SELECT DISTINCT unnest(artifact_keys) {within}), \
               (SELECT coalesce(sum(packages - cardinality(package_names)), 0)::int8 {within}), \
               (SELECT coalesce(sum(artifacts - cardinality(artifact_keys)), 0)::int8 {within})"
        );
        let doing = "reading what vanished recently";
        let values: &[&(dyn tokio_postgres::types::ToSql + Sync)] = &[&window.as_secs_f64(), &but];
        let row = self.session().query_one(doing, &sql, values).await?;
        Ok(Vanished {
            packages: row.get(0),
            artifacts: row.get(1),
            nameless: (
                row.get::<_, i64>(2).unsigned_abs(),
                row.get::<_, i64>(3).unsigned_abs(),
            ),
        })
    }

    /// Records a transaction once, however often the transaction that ends at `lsn` is tried.
    /// Changes that an operator approved are not counted, nor earlier ones; records older than the
    /// window are deleted.
    pub async fn vanished(
        &self,
        packages: &[String],
        artifacts: &[String],
        lsn: &str,
        approved: bool,
        window: Duration,
    ) -> Result<(), StateError> {
        if approved {
            let forget = "DELETE FROM vanished";
            self.session()
                .batch("resetting the fuse's count", forget)
                .await?;
            return Ok(());
        }
        let doing = "recording vanished packages";
        let sql = "DELETE FROM vanished WHERE time <= now() - make_interval(secs => $1)";
        self.session()
            .execute(doing, sql, &[&window.as_secs_f64()])
            .await?;
        self.session()
            .execute(doing, NOTE_VANISHED, &[&packages, &artifacts, &lsn])
            .await?;
        Ok(())
    }

    /// Records artifacts whose rows are removed, with their checksums.
    pub async fn retire(&self, gone: &[(String, &str)]) -> Result<(), StateError> {
        let keys: Vec<&str> = gone.iter().map(|(key, _)| key.as_str()).collect();
        let checksums: Vec<&str> = gone.iter().map(|(_, checksum)| *checksum).collect();
        let sql = "INSERT INTO retirement (key, checksum) SELECT * FROM unnest($1::text[], $2::text[]) \
                   ON CONFLICT (key, checksum) DO UPDATE SET since = now()";
        self.session()
            .execute(
                "recording artifacts of removed rows",
                sql,
                &[&keys, &checksums],
            )
            .await?;
        Ok(())
    }

    /// Does the same for artifacts that rows of `visible` name and no row of `wanted` does: working
    /// tables of this session.
    pub async fn retire_vanished(&self) -> Result<(), StateError> {
        let sql = "INSERT INTO retirement (key, checksum) SELECT v.key, v.checksum FROM visible v \
                   WHERE NOT EXISTS (SELECT 1 FROM wanted w WHERE w.key = v.key AND w.checksum = v.checksum) \
                   ON CONFLICT (key, checksum) DO UPDATE SET since = now()";
        self.session()
            .execute("recording artifacts of removed rows", sql, &[])
            .await?;
        Ok(())
    }

    /// Deletes the record of a deleted object.
    pub async fn forget_artifact(&self, key: &str) -> Result<(), StateError> {
        let sql = "DELETE FROM artifact WHERE key = $1";
        self.session()
            .execute("forgetting an artifact", sql, &[&key])
            .await?;
        Ok(())
    }

    /// Returns those that are older than `age`, the oldest first.
    pub async fn retirements(
        &self,
        age: Duration,
        limit: i64,
    ) -> Result<Vec<Retirement>, StateError> {
        let sql = "SELECT key, checksum FROM retirement WHERE since < now() - make_interval(secs => $1) \
                   ORDER BY since LIMIT $2";
        let rows = self
            .session()
            .query(
                "reading artifacts of removed rows",
                sql,
                &[&age.as_secs_f64(), &limit],
            )
            .await?;
        let retirement = |row: &tokio_postgres::Row| Retirement {
            key: row.get(0),
            checksum: row.get(1),
        };
        Ok(rows.iter().map(retirement).collect())
    }

    pub async fn forget_retirement(&self, gone: &Retirement) -> Result<(), StateError> {
        let sql = "DELETE FROM retirement WHERE key = $1 AND checksum = $2";
        self.session()
            .execute(
                "forgetting an artifact of a removed row",
                sql,
                &[&gone.key, &gone.checksum],
            )
            .await?;
        Ok(())
    }
}
