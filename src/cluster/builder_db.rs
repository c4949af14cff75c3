//! Builder's own tables, on either side: everything that we ask about packages and keys.
//!
//! Rows of packages are read as texts, because Builder's database need not hold valid ones.

use super::postgres::copy_text::unescape;
use super::postgres::datastore_error::DatastoreError;
use super::postgres::rows::Row;
use super::postgres::session::{CopyRows, Session};
use crate::package::{PackageRow, first_id_of, time_of_id};
use bytes::Bytes;
use chrono::{DateTime, Utc};

/// Builder's table of packages, with its schema.
pub const PACKAGES: &str = "public.origin_packages";

const COLUMNS: &str =
    "coalesce(ident::text, ''), coalesce(target::text, ''), coalesce(checksum::text, '')";

/// Chooses ten rows at each end, ten spread over the time that the ids tell, and ten from about
/// eight pages of the table: a row of a large upload has next to no share of the time. Rows with a
/// NULL are left out.
const SAMPLE: &str = "WITH bounds AS (SELECT min(id) AS least, max(id) AS most FROM public.origin_packages), chosen AS ( \
       (SELECT id FROM public.origin_packages ORDER BY id DESC LIMIT 10) UNION \
       (SELECT id FROM public.origin_packages ORDER BY id LIMIT 10) UNION \
       (SELECT found.id FROM bounds, generate_series(1, 10) n, \
          LATERAL (SELECT n, least + (random() * (most - least))::int8 AS place) random_one, \
          LATERAL (SELECT id FROM public.origin_packages WHERE id >= place ORDER BY id LIMIT 1) found) UNION \
       (SELECT id FROM public.origin_packages TABLESAMPLE SYSTEM (least(100, 800.0 * current_setting('block_size')::int8 \
          / greatest(1, pg_relation_size('public.origin_packages')))) ORDER BY random() LIMIT 10)) \
     SELECT ident::text, target::text, checksum::text FROM public.origin_packages \
     WHERE id IN (SELECT id FROM chosen) AND ident IS NOT NULL AND target IS NOT NULL AND checksum IS NOT NULL";

/// Number of first characters by which ciphertexts of different revisions differ: in both forms
/// they include format and sender. One base64 digit more would make groups of one row each.
const HEAD_CHARS: u32 = 37;
/// Number of the newest rows that are read, because a spoilt row says nothing about the key.
const NEWEST_ROWS: u32 = 3;

/// For each table whose ids Builder's own function makes, a query for its newest one.
const ID_TABLES: &str = "SELECT format('(SELECT max(id) FROM %I.%I WHERE id < $1)', n.nspname, c.relname) \
     FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
     JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0] \
     JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum \
     WHERE i.indisprimary AND i.indnkeyatts = 1 AND c.relkind = 'r' AND a.attname = 'id' \
       AND a.atttypid = 'int8'::regtype AND pg_get_expr(d.adbin, d.adrelid) LIKE '%next_id_v1(%'";

/// The columns with ciphertexts of the builder keys: the name for people, table, column, and the
/// column that names the revision, if there is one.
pub const CIPHERTEXTS: [(&str, &str, &str, &str); 4] = [
    (
        "an origin's secret key",
        "origin_secret_keys",
        "body",
        "encryption_key_rev",
    ),
    ("an access token", "account_tokens", "token", ""),
    ("an integration", "origin_integrations", "body", ""),
    (
        "a project's integration",
        "origin_project_integrations",
        "body",
        "",
    ),
];

/// Rows that one revision of a builder key has sealed.
#[derive(Debug, Clone)]
pub struct SealedRows {
    pub revision: String,
    pub rows: i64,
    /// The newest ciphertexts.
    pub newest: Vec<String>,
}

/// Builder's tables, through a session on the database that they are in.
#[derive(Clone, Copy)]
pub struct BuilderDb<'a>(&'a Session);

impl<'a> BuilderDb<'a> {
    /// Uses the tables of a database. Where it need not be Builder's, `has_packages` comes first.
    pub fn of(session: &'a Session) -> Self {
        BuilderDb(session)
    }

    /// Returns whether this database has a table of packages.
    pub async fn has_packages(self) -> Result<bool, DatastoreError> {
        let sql = "SELECT to_regclass('public.origin_packages') IS NOT NULL";
        let doing = "looking for Builder's tables";
        self.0.row(doing, sql, &[]).await?.get(0)
    }

    /// Returns whether the table of packages has the columns that identify an artifact.
    pub async fn has_package_columns(self) -> Result<bool, DatastoreError> {
        let sql = "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('public.origin_packages') \
                   AND attname IN ('ident', 'target', 'checksum') AND NOT attisdropped";
        let doing = "looking for Builder's tables";
        Ok(self.0.row(doing, sql, &[]).await?.get::<i64>(0)? == 3)
    }

    pub async fn count_packages(self) -> Result<u64, DatastoreError> {
        let sql = "SELECT count(*) FROM public.origin_packages";
        let row = self.0.row("counting packages", sql, &[]).await?;
        Ok(row.get::<i64>(0)?.unsigned_abs())
    }

    /// Returns the checksums of the rows of a package; there should be at most one row. A row
    /// without a checksum is left out.
    pub async fn checksums_of(
        self,
        ident: &str,
        target: &str,
    ) -> Result<Vec<String>, DatastoreError> {
        let sql = "SELECT checksum::text FROM public.origin_packages \
                   WHERE ident = $1 AND target = $2 AND checksum IS NOT NULL";
        let doing = "looking for rows that name an artifact";
        let rows = self.0.rows_for(doing, sql, &[ident, target]).await?;
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Returns those rows whose packages have one of these names. The idents and the targets are
    /// two lists of the same length.
    pub async fn packages_named(
        self,
        idents: &[&str],
        targets: &[&str],
    ) -> Result<Vec<PackageRow>, DatastoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM public.origin_packages \
             WHERE (ident, target) IN (SELECT * FROM unnest($1::text[], $2::text[]))"
        );
        self.packages(&sql, &[&idents, &targets]).await
    }

    /// Returns the rows with these ids.
    pub async fn packages_with_ids(self, ids: &[i64]) -> Result<Vec<PackageRow>, DatastoreError> {
        let sql = format!("SELECT {COLUMNS} FROM public.origin_packages WHERE id = ANY ($1)");
        self.packages(&sql, &[&ids]).await
    }

    /// Returns a sample of the rows: the newest, the oldest, and some at random. Its cost does not
    /// grow with the table.
    pub async fn sample_packages(self) -> Result<Vec<PackageRow>, DatastoreError> {
        self.packages(SAMPLE, &[]).await
    }

    /// Returns a few rows, of any part of the table. Its cost does not grow with the table.
    pub async fn some_packages(self) -> Result<Vec<PackageRow>, DatastoreError> {
        let columns = format!("SELECT {COLUMNS} FROM public.origin_packages");
        let some = format!("{columns} TABLESAMPLE SYSTEM (10) LIMIT 20");
        let found = self.packages(&some, &[]).await?;
        if !found.is_empty() {
            return Ok(found);
        }
        let latest = format!("{columns} ORDER BY id DESC LIMIT 20");
        self.packages(&latest, &[]).await
    }

    /// Returns the rows with the highest ids, the newest first.
    pub async fn newest_packages(self, number: i64) -> Result<Vec<PackageRow>, DatastoreError> {
        let sql = format!("SELECT {COLUMNS} FROM public.origin_packages ORDER BY id DESC LIMIT $1");
        self.packages(&sql, &[&number]).await
    }

    /// Returns rows that were changed since that time, by the primary's clock, the newest first.
    pub async fn packages_changed_since(
        self,
        time: DateTime<Utc>,
        number: i64,
    ) -> Result<Vec<PackageRow>, DatastoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM public.origin_packages WHERE updated_at >= $1 ORDER BY id DESC LIMIT $2"
        );
        self.packages(&sql, &[&time, &number]).await
    }

    /// Draws that number of rows by chance, from the whole table.
    pub async fn draw_packages(self, number: i64) -> Result<Vec<PackageRow>, DatastoreError> {
        let sql =
            format!("SELECT {COLUMNS} FROM public.origin_packages ORDER BY random() LIMIT $1");
        self.packages(&sql, &[&number]).await
    }

    /// Returns the next rows after an id, in the order of the ids, and the id of the last one.
    /// None: there is no further row.
    pub async fn packages_after(
        self,
        id: i64,
        number: i64,
    ) -> Result<Option<(Vec<PackageRow>, i64)>, DatastoreError> {
        let sql = format!(
            "SELECT {COLUMNS}, id FROM public.origin_packages WHERE id > $1 ORDER BY id LIMIT $2"
        );
        let doing = "reading package rows";
        let rows = self.0.rows(doing, &sql, &[&id, &number]).await?;
        let Some(last) = rows.last() else {
            return Ok(None);
        };
        let packages: Result<_, _> = rows.iter().map(package).collect();
        Ok(Some((packages?, last.get(3)?)))
    }

    /// Reads all rows, one after the other.
    pub async fn all_packages(self) -> Result<AllPackages<'a>, DatastoreError> {
        let sql = "COPY (SELECT ident, target, checksum FROM public.origin_packages) TO STDOUT";
        let rows = self.0.copy_out("reading the package rows", sql).await?;
        Ok(AllPackages(rows))
    }

    /// Reads all rows in the order of their shards. A shard is the first two digits of the MD5 of
    /// `IDENT/TARGET`.
    pub async fn packages_by_shard(self) -> Result<ShardedPackages<'a>, DatastoreError> {
        let sql = "COPY (SELECT left(md5(coalesce(ident, '') || '/' || coalesce(target, '')), 2) AS shard, \
                     ident, target, checksum FROM public.origin_packages ORDER BY shard) TO STDOUT";
        let rows = self.0.copy_out("reading the package rows", sql).await?;
        Ok(ShardedPackages(rows))
    }

    /// Returns the time of the newest of Builder's ids. It reads primary keys, so that no table is
    /// scanned. Ids made after `until` are left out: a clock was wrong then.
    pub async fn newest_id(
        self,
        until: Option<DateTime<Utc>>,
    ) -> Result<Option<DateTime<Utc>>, DatastoreError> {
        let doing = "reading the newest id";
        let tables = self.0.rows(doing, ID_TABLES, &[]).await?;
        let newest: Result<Vec<String>, _> = tables.iter().map(|row| row.get(0)).collect();
        let newest = newest?;
        if newest.is_empty() {
            return Ok(None);
        }
        let sql = format!("SELECT greatest({})", newest.join(", "));
        let bound = until.map_or(i64::MAX, first_id_of);
        let id: Option<i64> = self.0.row(doing, &sql, &[&bound]).await?.get(0)?;
        Ok(id.and_then(time_of_id))
    }

    /// Returns the origins' public keys: each key's full name and text.
    pub async fn public_keys(self) -> Result<Vec<(String, String)>, DatastoreError> {
        let sql = "SELECT full_name::text, body::text FROM public.origin_public_keys";
        let doing = "reading the origins' public keys";
        let rows = self.0.rows(doing, sql, &[]).await?;
        rows.iter()
            .map(|row| Ok((row.get(0)?, row.get(1)?)))
            .collect()
    }

    /// Returns the rows of a table that a builder key has sealed, in groups of one key revision and
    /// one format. `revision` is a column of the table; empty: the ciphertext itself names it.
    /// Nothing is found where the table or the column does not exist.
    pub async fn sealed_rows(
        self,
        table: &str,
        column: &str,
        revision: &str,
    ) -> Result<Vec<SealedRows>, DatastoreError> {
        let doing = "reading what the builder keys have sealed";
        let there = "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.' || $1) \
                       AND attname = $2 AND NOT attisdropped)";
        if !self.0.row(doing, there, &[&table, &column]).await?.get(0)? {
            return Ok(Vec::new());
        }
        let revision = match revision {
            "" => "''",
            named => &format!("coalesce({named}::text, '')"),
        };
        let sql = format!(
            "SELECT revision, count(*), (array_agg(sealed ORDER BY id DESC))[1:{NEWEST_ROWS}] FROM ( \
               SELECT id, {revision} AS revision, {column}::text AS sealed FROM public.{table} WHERE {column} <> '') t \
             GROUP BY revision, left(sealed, {HEAD_CHARS})"
        );
        let rows = self.0.rows(doing, &sql, &[]).await?;
        let group = |row: &Row| {
            Ok(SealedRows {
                revision: row.get(0)?,
                rows: row.get(1)?,
                newest: row.get(2)?,
            })
        };
        rows.iter().map(group).collect()
    }

    async fn packages(
        self,
        sql: &str,
        params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<PackageRow>, DatastoreError> {
        let rows = self.0.rows("reading package rows", sql, params).await?;
        rows.iter().map(package).collect()
    }
}

fn package(row: &Row) -> Result<PackageRow, DatastoreError> {
    Ok(PackageRow {
        ident: row.get(0)?,
        target: row.get(1)?,
        checksum: row.get(2)?,
    })
}

/// All rows of packages, as the server sends them.
pub struct AllPackages<'a>(CopyRows<'a>);

impl AllPackages<'_> {
    pub async fn next(&mut self) -> Result<Option<PackageRow>, DatastoreError> {
        Ok(self.0.next().await?.map(copied_package))
    }
}

/// All rows of packages with their shards, as the server sends them.
pub struct ShardedPackages<'a>(CopyRows<'a>);

impl ShardedPackages<'_> {
    pub async fn next(&mut self) -> Result<Option<(String, PackageRow)>, DatastoreError> {
        let Some(line) = self.0.next().await? else {
            return Ok(None);
        };
        // A shard is two digits, and a tab follows.
        let shard = String::from_utf8_lossy(&line[..line.len().min(2)]).into_owned();
        Ok(Some((
            shard,
            copied_package(line.slice(line.len().min(3)..)),
        )))
    }
}

/// Parses a line of COPY.
fn copied_package(line: Bytes) -> PackageRow {
    let line = String::from_utf8_lossy(&line);
    let mut fields = line.trim_end_matches('\n').split('\t').map(unescape);
    let mut next = || fields.next().unwrap_or_default();
    PackageRow {
        ident: next(),
        target: next(),
        checksum: next(),
    }
}
