//! The record of a divergence: the changes that an old primary has and its successor does not have.
//! It is made in one transaction, in a session of its own. If the process stops in the middle, the
//! old record stays.

use super::state::StateDb;
use crate::cluster::local::LocalCluster;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::rows::Row;
use crate::cluster::postgres::session::WriteSession;
use crate::domain::DivergedClass;
use crate::package::PackageRow;
use tokio_postgres::types::ToSql;

/// Maximum number of rows in one statement, and of their bytes.
const MAX_ROWS: usize = 500;
const MAX_BYTES: usize = 1 << 20;

const TABLES: &str = "
CREATE TEMP TABLE touched (ident text, target text, deleted boolean NOT NULL, PRIMARY KEY (ident, target)) ON COMMIT DROP;
CREATE TEMP TABLE ours (at text NOT NULL, hash text NOT NULL, id int8, late boolean NOT NULL) ON COMMIT DROP;
CREATE TEMP TABLE theirs (hash text NOT NULL, id int8) ON COMMIT DROP;";

/// Ident and target of a package.
pub type PackageName = (String, String);

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
    pub class: DivergedClass,
    /// Key of the artifact; empty: ident and target give no key.
    pub key: String,
    pub their_checksum: Option<String>,
}

/// The result of one of the two ways, apart from the rows.
#[derive(Debug, Clone)]
pub struct FoundDivergence {
    pub exact: bool,
    pub reason: String,
    pub to: String,
    pub transactions: i64,
}

/// A change of a row, or of a whole table. Rows are JSON.
pub struct DivergedRow {
    pub table: String,
    pub kind: &'static str,
    pub old: Option<String>,
    pub new: Option<String>,
}

impl DivergedRow {
    fn bytes(&self) -> usize {
        let row = |row: &Option<String>| row.as_ref().map_or(0, String::len);
        self.table.len() + row(&self.old) + row(&self.new)
    }
}

/// The record that is being made.
pub struct DivergenceBook {
    session: WriteSession,
    pub epoch: i64,
    added: usize,
    waiting: Vec<DivergedRow>,
    bytes: usize,
}

impl DivergenceBook {
    async fn open(cluster: LocalCluster<'_>, epoch: i64) -> Result<Self, DatastoreError> {
        let book = DivergenceBook::open_again(cluster, epoch).await?;
        for table in ["divergence", "diverged_row", "diverged_package"] {
            let sql = format!("DELETE FROM {table} WHERE epoch = $1");
            book.session
                .execute("replacing the old record", &sql, &[&epoch])
                .await?;
        }
        Ok(book)
    }

    async fn open_again(cluster: LocalCluster<'_>, epoch: i64) -> Result<Self, DatastoreError> {
        let session = cluster.state_session().await?;
        // With two processes at once, the second replaces the result of the first.
        let begin = "BEGIN; LOCK TABLE divergence IN SHARE ROW EXCLUSIVE MODE";
        session.batch("beginning the record", begin).await?;
        session.batch("making working tables", TABLES).await?;
        Ok(DivergenceBook {
            session,
            epoch,
            added: 0,
            waiting: Vec::new(),
            bytes: 0,
        })
    }

    /// Returns the number of rows added since the record was opened.
    pub fn added(&self) -> usize {
        self.added
    }

    /// Deletes the recorded judgement of packages, so that it can be made again over all rows.
    pub async fn forget_packages(&self) -> Result<(), DatastoreError> {
        let sql = "DELETE FROM diverged_package WHERE epoch = $1";
        self.session
            .execute("replacing the old record", sql, &[&self.epoch])
            .await?;
        Ok(())
    }

    /// Closes an amended record, which is no longer exact.
    pub async fn close_again(mut self, why: &str) -> Result<(), DatastoreError> {
        self.flush().await?;
        let sql = "UPDATE divergence SET exact = false, reason = reason || $2 WHERE epoch = $1";
        self.session
            .execute("amending the divergence", sql, &[&self.epoch, &why])
            .await?;
        self.session.batch("ending the record", "COMMIT").await
    }

    /// Returns the session of the transaction, for working tables.
    pub fn session(&self) -> &WriteSession {
        &self.session
    }

    pub async fn add(&mut self, change: DivergedRow) -> Result<(), DatastoreError> {
        self.bytes += change.bytes();
        self.added += 1;
        self.waiting.push(change);
        if self.waiting.len() >= MAX_ROWS || self.bytes >= MAX_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    /// Writes the waiting rows.
    pub async fn flush(&mut self) -> Result<(), DatastoreError> {
        let changes = std::mem::take(&mut self.waiting);
        self.bytes = 0;
        if changes.is_empty() {
            return Ok(());
        }
        let tables: Vec<&str> = changes.iter().map(|c| c.table.as_str()).collect();
        let kinds: Vec<&str> = changes.iter().map(|c| c.kind).collect();
        let old: Vec<Option<&str>> = changes.iter().map(|c| c.old.as_deref()).collect();
        let new: Vec<Option<&str>> = changes.iter().map(|c| c.new.as_deref()).collect();
        let sql = "INSERT INTO diverged_row (epoch, table_name, change, old, new) \
                   SELECT $1, t, c, o::jsonb, n::jsonb \
                   FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) WITH ORDINALITY u(t, c, o, n, number) \
                   ORDER BY number";
        self.session
            .execute(
                "recording diverged rows",
                sql,
                &[&self.epoch, &tables, &kinds, &old, &new],
            )
            .await?;
        Ok(())
    }

    /// Notes the packages of the recorded rows that were written.
    pub async fn note_written(&self, packages: &str) -> Result<(), DatastoreError> {
        let sql = "INSERT INTO touched SELECT DISTINCT new->>'ident', new->>'target', false FROM diverged_row \
                   WHERE epoch = $1 AND table_name = $2 AND new->>'ident' IS NOT NULL AND new->>'target' IS NOT NULL";
        let doing = "looking for packages";
        self.session
            .execute(doing, sql, &[&self.epoch, &packages])
            .await?;
        Ok(())
    }

    /// Returns the ids of the next recorded rows that were deleted from a table, after a number of
    /// a row, and the number of the last one. None: there is no further row.
    pub async fn deleted_ids(
        &self,
        table: &str,
        after: i64,
        limit: i64,
    ) -> Result<Option<(Vec<i64>, i64)>, DatastoreError> {
        let sql = "SELECT id, (old->>'id')::int8 FROM diverged_row WHERE epoch = $1 AND table_name = $2 \
                     AND change = 'delete' AND old->>'id' IS NOT NULL AND id > $3 ORDER BY id LIMIT $4";
        let doing = "looking for deleted packages";
        let rows = self
            .session
            .rows(doing, sql, &[&self.epoch, &table, &after, &limit])
            .await?;
        let Some(last) = rows.last() else {
            return Ok(None);
        };
        let ids: Result<_, _> = rows.iter().map(|row| row.get(1)).collect();
        Ok(Some((ids?, last.get(0)?)))
    }

    /// Notes packages that were deleted.
    pub async fn note_deleted(&self, packages: &[PackageRow]) -> Result<(), DatastoreError> {
        let idents: Vec<&str> = packages.iter().map(|row| row.ident.as_str()).collect();
        let targets: Vec<&str> = packages.iter().map(|row| row.target.as_str()).collect();
        let sql = "INSERT INTO touched SELECT DISTINCT i, t, true FROM unnest($1::text[], $2::text[]) u(i, t) \
                   ON CONFLICT (ident, target) DO UPDATE SET deleted = true";
        let doing = "looking for deleted packages";
        self.session
            .execute(doing, sql, &[&idents, &targets])
            .await?;
        Ok(())
    }

    /// Returns the next noted packages after a name, and whether each was deleted.
    pub async fn noted_packages(
        &self,
        (ident, target): &PackageName,
        limit: i64,
    ) -> Result<Vec<(PackageName, bool)>, DatastoreError> {
        let sql = "SELECT ident, target, deleted FROM touched WHERE (ident, target) > ($1, $2) \
                   ORDER BY ident, target LIMIT $3";
        let doing = "reading the packages";
        let rows = self
            .session
            .rows(doing, sql, &[ident, target, &limit])
            .await?;
        let noted = |row: &Row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?));
        rows.iter().map(noted).collect()
    }

    pub async fn record_packages(
        &self,
        packages: &[DivergedPackage],
    ) -> Result<(), DatastoreError> {
        let idents: Vec<&str> = packages.iter().map(|p| p.ident.as_str()).collect();
        let targets: Vec<&str> = packages.iter().map(|p| p.target.as_str()).collect();
        let ours: Vec<&str> = packages.iter().map(|p| p.checksum.as_str()).collect();
        let theirs: Vec<Option<&str>> = packages
            .iter()
            .map(|p| p.their_checksum.as_deref())
            .collect();
        let classes: Vec<&str> = packages.iter().map(|p| p.class.into_str()).collect();
        let keys: Vec<&str> = packages.iter().map(|p| p.key.as_str()).collect();
        let sql = "INSERT INTO diverged_package (epoch, ident, target, checksum, their_checksum, class, key) \
                   SELECT $1, i, t, o, th, c, k FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], \
                     $6::text[], $7::text[]) u(i, t, o, th, c, k)";
        let values: [&(dyn ToSql + Sync); 7] = [
            &self.epoch,
            &idents,
            &targets,
            &ours,
            &theirs,
            &classes,
            &keys,
        ];
        let doing = "recording diverged packages";
        self.session.execute(doing, sql, &values).await?;
        Ok(())
    }

    /// Commits the record.
    pub async fn close(
        mut self,
        from: &str,
        found: &FoundDivergence,
    ) -> Result<(), DatastoreError> {
        self.flush().await?;
        let sql = "INSERT INTO divergence (epoch, exact, reason, from_lsn, to_lsn, transactions) \
                   VALUES ($1, $2, $3, $4, $5, $6)";
        self.session
            .execute(
                "recording the divergence",
                sql,
                &[
                    &self.epoch,
                    &found.exact,
                    &found.reason,
                    &from,
                    &found.to,
                    &found.transactions,
                ],
            )
            .await?;
        self.session.batch("ending the record", "COMMIT").await
    }
}

impl LocalCluster<'_> {
    /// Begins the record of a divergence, which replaces an older one of the same epoch.
    pub async fn new_divergence(self, epoch: i64) -> Result<DivergenceBook, DatastoreError> {
        DivergenceBook::open(self, epoch).await
    }

    /// Opens the existing record, so that more can be added to it.
    pub async fn amended_divergence(self, epoch: i64) -> Result<DivergenceBook, DatastoreError> {
        DivergenceBook::open_again(self, epoch).await
    }
}

impl StateDb {
    /// Returns the recorded divergence of the latest epoch.
    pub async fn divergence(&self) -> Result<Option<Divergence>, DatastoreError> {
        let sql = "SELECT epoch, exact, reason, from_lsn, to_lsn, transactions, \
                     (SELECT count(*) FROM diverged_row r WHERE r.epoch = d.epoch), \
                     (SELECT count(*) FROM diverged_package p WHERE p.epoch = d.epoch) \
                   FROM divergence d ORDER BY epoch DESC LIMIT 1";
        let rows = self
            .session
            .rows("reading the divergence", sql, &[])
            .await?;
        let divergence = |row: &Row| {
            Ok(Divergence {
                epoch: row.get(0)?,
                exact: row.get(1)?,
                reason: row.get(2)?,
                from: row.get(3)?,
                to: row.get(4)?,
                transactions: row.get(5)?,
                rows: row.get(6)?,
                packages: row.get(7)?,
            })
        };
        rows.first().map(divergence).transpose()
    }

    /// Counts the changed rows of each table.
    pub async fn diverged_tables(&self, epoch: i64) -> Result<Vec<TableChanges>, DatastoreError> {
        let sql = "SELECT table_name, count(*) FILTER (WHERE change = 'insert'), count(*) FILTER (WHERE change = 'update'), \
                     count(*) FILTER (WHERE change = 'delete'), count(*) FILTER (WHERE change = 'truncate') \
                   FROM diverged_row WHERE epoch = $1 GROUP BY 1 ORDER BY 1";
        let doing = "counting the diverged rows";
        let rows = self.session.rows(doing, sql, &[&epoch]).await?;
        let changes = |row: &Row| {
            Ok(TableChanges {
                table: row.get(0)?,
                inserted: row.get(1)?,
                updated: row.get(2)?,
                deleted: row.get(3)?,
                truncated: row.get(4)?,
            })
        };
        rows.iter().map(changes).collect()
    }

    /// Returns the changed packages, by name.
    pub async fn diverged_packages(
        &self,
        epoch: i64,
    ) -> Result<Vec<DivergedPackage>, DatastoreError> {
        let sql = "SELECT ident, target, checksum, class, key, their_checksum FROM diverged_package \
                   WHERE epoch = $1 ORDER BY ident, target";
        let doing = "reading the diverged packages";
        let rows = self.session.rows(doing, sql, &[&epoch]).await?;
        let package = |row: &Row| {
            Ok(DivergedPackage {
                ident: row.get(0)?,
                target: row.get(1)?,
                checksum: row.get(2)?,
                class: row.get(3)?,
                key: row.get(4)?,
                their_checksum: row.get(5)?,
            })
        };
        rows.iter().map(package).collect()
    }

    /// Counts all recorded rows, and the packages whose bytes are only on this cluster.
    pub async fn diverged_count(&self) -> Result<(i64, i64), DatastoreError> {
        let sql = "SELECT (SELECT count(*) FROM diverged_row), \
                     (SELECT count(*) FROM diverged_package WHERE class IN ('only_here', 'other_bytes'))";
        let row = self.session.row("reading the divergence", sql, &[]).await?;
        Ok((row.get(0)?, row.get(1)?))
    }
}
