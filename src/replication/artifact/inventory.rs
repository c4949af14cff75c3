//! Compares the artifacts that are wanted with those that are there, and finds the remaining work.
//! The sets may have any size: the local server compares them.
//!
//! The sets are temporary tables of the state's session, so that memory does not grow with the
//! number of packages.

use super::round::Swap;
use crate::cluster::{
    Artifact, DatastoreError, Listed, LocalSession, LocalStore, Session, StoreError, Stored,
};
use crate::package::{Checksum, Ident, Target, object_key};
use bytes::BytesMut;
use std::collections::HashSet;
use std::str::FromStr;

/// Query whose rows name artifacts.
const ROWS: &str = "COPY (SELECT ident, target, checksum FROM public.origin_packages) TO STDOUT";
const BATCH_BYTES: usize = 64 * 1024;

/// Reason for a row without an artifact: the row names no possible one. It is recorded by its
/// package instead of a key.
pub const UNSOUND: &str = "unsound";
/// The primary's store serves other objects and refuses this one.
pub const UNREADABLE: &str = "unreadable";
/// The primary's store, or the local one, can hold no object under such a key.
pub const UNSTORABLE: &str = "unstorable";

/// Returns the reason why an artifact that a store refused is not here.
pub(crate) fn reason_of(error: &StoreError) -> &'static str {
    match error.is_of_the_key() {
        true => UNSTORABLE,
        false => UNREADABLE,
    }
}

pub struct Inventory<'a> {
    session: &'a LocalSession,
}

/// An artifact that is not known to be here and right.
#[derive(Debug, Clone)]
pub struct Todo {
    pub key: String,
    pub checksum: Checksum,
    /// The present object under the key, if there is one.
    pub present: Option<Stored>,
    /// The checksum of exactly those bytes, if they were hashed here before.
    pub known: Option<Checksum>,
    /// The checksum in the visible database's row for this key.
    pub visible: Option<Checksum>,
}

/// Number of rows of a set, and its rows without a possible artifact.
#[derive(Debug, Default, Clone)]
pub struct Loaded {
    pub rows: u64,
    /// Rows that name no possible artifact, because their ident, target or checksum is not valid.
    pub unsound: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl<'a> Inventory<'a> {
    pub async fn new(session: &'a LocalSession) -> Result<Self, DatastoreError> {
        session.batch("making working tables", TABLES).await?;
        Ok(Inventory { session })
    }

    /// Loads the rows of that session's database, the primary's or a local one.
    pub async fn load_wanted_from(&self, database: &Session) -> Result<Loaded, DatastoreError> {
        self.load("wanted", database).await
    }

    pub async fn load_visible(&self, database: &Session) -> Result<Loaded, DatastoreError> {
        self.load("visible", database).await
    }

    async fn load(&self, table: &str, database: &Session) -> Result<Loaded, DatastoreError> {
        let mut rows = database.copy_out("reading the package rows", ROWS).await?;
        self.session
            .batch("emptying a working table", &format!("TRUNCATE {table}"))
            .await?;
        let doing = "filling a working table";
        let mut sink = self
            .session
            .copy_in(
                doing,
                &format!("COPY {table} (key, checksum, package) FROM STDIN"),
            )
            .await?;
        let mut loaded = Loaded::default();
        let mut batch = BytesMut::with_capacity(BATCH_BYTES);
        while let Some(row) = rows.next().await? {
            loaded.rows += 1;
            match key_and_checksum(&row) {
                Ok((key, checksum, package)) => {
                    batch.extend_from_slice(
                        format!("{}\t{checksum}\t{}\n", escape(&key), escape(&package)).as_bytes(),
                    );
                }
                Err(name) => loaded.unsound.push(name),
            }
            if batch.len() >= BATCH_BYTES {
                sink.send(batch.split().freeze()).await?;
            }
        }
        sink.send(batch.freeze()).await?;
        sink.finish().await?;
        self.session
            .batch("counting a working table", &format!("ANALYZE {table}"))
            .await?;
        Ok(loaded)
    }

    /// Loads the objects of the local bucket from its own listing, completely or with an error.
    pub async fn load_present(&self, store: &LocalStore) -> Result<(), InventoryError> {
        self.session
            .batch("emptying a working table", "TRUNCATE present")
            .await?;
        let mut failed: Option<DatastoreError> = None;
        let listing = store
            .reading()
            .list("", async |page: Vec<Listed>| {
                if failed.is_none() {
                    failed = self.add_present(&page).await.err();
                }
                Ok(())
            })
            .await;
        if let Some(error) = failed {
            return Err(error.into());
        }
        listing?;
        self.session
            .batch("counting a working table", "ANALYZE present")
            .await?;
        Ok(())
    }

    async fn add_present(&self, page: &[Listed]) -> Result<(), DatastoreError> {
        let keys: Vec<&str> = page.iter().map(|l| l.key.as_str()).collect();
        let etags: Vec<&str> = page.iter().map(|l| l.stored.etag.as_str()).collect();
        let bytes: Vec<i64> = page.iter().map(|l| l.stored.bytes as i64).collect();
        let sql = "INSERT INTO present (key, etag, bytes) \
                   SELECT k, e, b FROM unnest($1::text[], $2::text[], $3::int8[]) u(k, e, b) \
                   ON CONFLICT (key) DO UPDATE SET etag = excluded.etag, bytes = excluded.bytes";
        self.session
            .execute("filling a working table", sql, &[&keys, &etags, &bytes])
            .await?;
        Ok(())
    }

    /// Notes objects that this run stored or found right.
    pub async fn note_present(&self, artifacts: &[Artifact]) -> Result<(), DatastoreError> {
        let page: Vec<Listed> = artifacts
            .iter()
            .map(|a| Listed {
                key: a.key.clone(),
                stored: Stored {
                    bytes: a.bytes,
                    etag: a.etag.clone(),
                },
            })
            .collect();
        self.add_present(&page).await
    }

    /// Plans the remaining work and returns its size. Keys that wait in the journal to be replaced
    /// are left out, and so are keys that are known to be unavailable, unless `retry` asks for them
    /// again.
    pub async fn plan(&self, settled: &[String]) -> Result<u64, DatastoreError> {
        self.session
            .batch("emptying a working table", "DROP TABLE IF EXISTS todo")
            .await?;
        self.session
            .execute("planning the remaining work", PLAN, &[])
            .await?;
        if !settled.is_empty() {
            let sql = "DELETE FROM todo WHERE key = ANY ($1)";
            self.session
                .execute("leaving out decided keys", sql, &[&settled])
                .await?;
        }
        let row = self
            .session
            .query_one(
                "counting the remaining work",
                "SELECT count(*) FROM todo",
                &[],
            )
            .await?;
        Ok(row.get::<_, i64>(0) as u64)
    }

    /// Returns one page of the plan, in the order of keys; `after` is the last key of the page
    /// before.
    pub async fn page(&self, after: &str, limit: i64) -> Result<Vec<Todo>, DatastoreError> {
        let sql = "SELECT key, checksum, etag, bytes, known, visible FROM todo WHERE key > $1 ORDER BY key LIMIT $2";
        let rows = self
            .session
            .query("reading the remaining work", sql, &[&after, &limit])
            .await?;
        let parse = |text: Option<String>| text.and_then(|t| Checksum::from_str(&t).ok());
        Ok(rows
            .iter()
            .filter_map(|row| {
                let etag: Option<String> = row.get(2);
                let bytes: Option<i64> = row.get(3);
                Some(Todo {
                    key: row.get(0),
                    checksum: parse(row.get(1))?,
                    present: etag.zip(bytes).map(|(etag, bytes)| Stored {
                        bytes: bytes as u64,
                        etag,
                    }),
                    known: parse(row.get(4)),
                    visible: parse(row.get(5)),
                })
            })
            .collect())
    }

    /// Returns the number of artifacts that rows name.
    pub async fn wanted(&self) -> Result<u64, DatastoreError> {
        let row = self
            .session
            .query_one("counting packages", "SELECT count(*) FROM wanted", &[])
            .await?;
        Ok(row.get::<_, i64>(0) as u64)
    }

    /// Returns the keys of those swaps whose new bytes a row names.
    pub async fn named(&self, swaps: &[Swap]) -> Result<HashSet<String>, DatastoreError> {
        let keys: Vec<&str> = swaps.iter().map(|swap| swap.key.as_str()).collect();
        let new: Vec<String> = swaps.iter().map(|swap| swap.new.to_string()).collect();
        let sql = "SELECT w.key FROM wanted w JOIN unnest($1::text[], $2::text[]) u(k, c) ON w.key = u.k AND w.checksum = u.c";
        let rows = self
            .session
            .query("looking for waiting replacements", sql, &[&keys, &new])
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Returns the packages (ident and target) of visible rows that are not among the wanted rows.
    pub async fn vanishing(&self) -> Result<Vec<String>, DatastoreError> {
        let sql = "SELECT package FROM visible v WHERE NOT EXISTS (SELECT 1 FROM wanted w WHERE w.key = v.key) ORDER BY 1";
        let rows = self.session.query("comparing packages", sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Returns wanted keys whose object is absent, or has another length or ETag than when it was
    /// hashed.
    pub async fn unproven(&self) -> Result<Vec<(String, &'static str)>, DatastoreError> {
        let sql = "SELECT w.key, CASE WHEN p.key IS NULL THEN 1 WHEN a.key IS NULL OR a.checksum <> w.checksum THEN 2 \
                     WHEN a.bytes <> p.bytes THEN 3 ELSE 4 END \
                   FROM wanted w LEFT JOIN present p ON p.key = w.key LEFT JOIN public.artifact a ON a.key = w.key \
                   WHERE p.key IS NULL OR a.key IS NULL OR a.checksum <> w.checksum OR a.bytes <> p.bytes OR a.etag <> p.etag \
                   ORDER BY 1";
        let rows = self.session.query("comparing artifacts", sql, &[]).await?;
        Ok(rows
            .iter()
            .map(|row| {
                let why = match row.get::<_, i32>(1) {
                    1 => "is not in the local bucket",
                    2 => "was never checked here against the row's checksum",
                    3 => "has another length than when it was checked",
                    _ => "was written again since it was checked",
                };
                (row.get(0), why)
            })
            .collect())
    }
}

/// Parses a row of [`ROWS`]: its object key, its checksum, and its package's name for people. Err:
/// the row's name.
fn key_and_checksum(row: &[u8]) -> Result<(String, Checksum, String), String> {
    let line = String::from_utf8_lossy(row);
    let mut fields = line.trim_end_matches('\n').split('\t').map(unescape);
    let mut next = || fields.next().unwrap_or_default();
    let (ident, target, checksum) = (next(), next(), next());
    let name = format!("{ident} {target}");
    match (
        Ident::from_str(&ident),
        Target::from_str(&target),
        Checksum::from_str(&checksum),
    ) {
        (Ok(ident), Ok(target), Ok(checksum)) => Ok((object_key(&ident, &target), checksum, name)),
        _ => Err(name),
    }
}

/// Decodes COPY's text form. Only escapes that the server writes are known.
pub(in crate::replication) fn unescape(field: &str) -> String {
    let mut text = String::with_capacity(field.len());
    let mut chars = field.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => text.push('\n'),
                Some('t') => text.push('\t'),
                Some('r') => text.push('\r'),
                Some('b') => text.push('\u{8}'),
                Some('f') => text.push('\u{c}'),
                Some('v') => text.push('\u{b}'),
                Some(other) => text.push(other),
                None => {}
            },
            c => text.push(c),
        }
    }
    text
}

/// Encodes into COPY's text form.
fn escape(field: &str) -> String {
    field
        .replace('\\', "\\\\")
        .replace('\t', "\\t")
        .replace('\n', "\\n")
        .replace('\r', "\\r")
}

const TABLES: &str = "
CREATE TEMP TABLE IF NOT EXISTS wanted (key text PRIMARY KEY, checksum text NOT NULL, package text NOT NULL);
CREATE TEMP TABLE IF NOT EXISTS visible (key text PRIMARY KEY, checksum text NOT NULL, package text NOT NULL);
CREATE TEMP TABLE IF NOT EXISTS present (key text PRIMARY KEY, etag text NOT NULL, bytes bigint NOT NULL);
TRUNCATE wanted, visible, present;
";

const PLAN: &str = "
CREATE TEMP TABLE todo AS
SELECT w.key, w.checksum, p.etag, p.bytes,
       CASE WHEN a.etag = p.etag AND a.bytes = p.bytes THEN a.checksum END AS known,
       v.checksum AS visible
FROM wanted w
LEFT JOIN present p ON p.key = w.key
LEFT JOIN public.artifact a ON a.key = w.key AND a.state = 'good'
LEFT JOIN visible v ON v.key = w.key
WHERE NOT coalesce(a.checksum = w.checksum AND a.etag = p.etag AND a.bytes = p.bytes, false)
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_characters_survive_the_copy_form() {
        for odd in ["a\tb", "a\\b", "line\nbreak", "plain"] {
            assert_eq!(unescape(&escape(odd)), odd);
        }
    }

    #[test]
    fn a_row_names_its_artifact_and_a_broken_one_names_itself() {
        let sum = "0".repeat(64);
        let row = format!("core/redis/4.0.14+b~1/20200421191514\tx86_64-linux\t{sum}\n");
        let (key, checksum, package) = key_and_checksum(row.as_bytes()).expect("a sound row");
        assert_eq!(
            key,
            "core/redis/4.0.14+b~1/20200421191514/x86_64/linux/core-redis-4.0.14+b~1-20200421191514-x86_64-linux.hart"
        );
        assert_eq!(checksum.to_string(), sum);
        assert_eq!(package, "core/redis/4.0.14+b~1/20200421191514 x86_64-linux");
        assert_eq!(
            key_and_checksum(b"core/redis\tx86_64-linux\tnone\n"),
            Err("core/redis x86_64-linux".into())
        );
    }
}
