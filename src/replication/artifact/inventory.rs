//! Compares the artifacts that are wanted with those that are there, and finds the remaining work.
//! The sets may have any size: the local server compares them.
//!
//! The sets are temporary tables of the state's session, so that memory does not grow with the
//! number of packages.

use super::round::Swap;
use crate::cluster::{
    Artifact, BuilderDb, DatastoreError, Listed, Session, Store, StoreError, Stored, WriteSession,
    escape,
};
use crate::package::Checksum;
use bytes::BytesMut;
use std::collections::HashSet;
use std::str::FromStr;

const BATCH_BYTES: usize = 64 * 1024;

pub struct Inventory<'a> {
    session: &'a WriteSession,
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
    pub async fn new(session: &'a WriteSession) -> Result<Self, DatastoreError> {
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
        let mut rows = BuilderDb::of(database).all_packages().await?;
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
            match row.artifact() {
                Some((key, checksum)) => {
                    let (key, name) = (escape(&key), escape(&row.name()));
                    let line = format!("{key}\t{checksum}\t{name}\n");
                    batch.extend_from_slice(line.as_bytes());
                }
                None => loaded.unsound.push(row.name()),
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
    pub async fn load_present(&self, store: &Store) -> Result<(), InventoryError> {
        self.session
            .batch("emptying a working table", "TRUNCATE present")
            .await?;
        let mut failed: Option<DatastoreError> = None;
        let listing = store
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

    /// Takes those artifacts out of the plan that are admitted by their presence in the listing: of
    /// all rows, or of the rows that the visible database has, without the bytes (key and checksum)
    /// that are recorded as unavailable. They are recorded as unproven. Returns the size of the
    /// remaining plan.
    pub async fn admit_present(
        &self,
        of_all_rows: bool,
        unavailable: &HashSet<(String, String)>,
    ) -> Result<u64, DatastoreError> {
        let (keys, checksums): (Vec<&str>, Vec<&str>) = unavailable
            .iter()
            .map(|(key, checksum)| (key.as_str(), checksum.as_str()))
            .unzip();
        let doing = "admitting artifacts by their presence";
        self.session
            .execute(doing, ADMIT, &[&of_all_rows, &keys, &checksums])
            .await?;
        let sql = "SELECT count(*) FROM todo";
        let left = self.session.query_one(doing, sql, &[]).await?;
        Ok(left.get::<_, i64>(0) as u64)
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

    /// Returns one page of the artifacts that rows name, in the order of keys.
    pub async fn wanted_page(
        &self,
        after: &str,
        limit: i64,
    ) -> Result<Vec<(String, Checksum)>, DatastoreError> {
        let sql = "SELECT key, checksum FROM wanted WHERE key > $1 ORDER BY key LIMIT $2";
        let doing = "reading the list of artifacts to verify";
        let rows = self.session.query(doing, sql, &[&after, &limit]).await?;
        // Every checksum in this table was parsed before it was written.
        let parsed = rows
            .iter()
            .filter_map(|row| Some((row.get(0), Checksum::from_str(row.get(1)).ok()?)));
        Ok(parsed.collect())
    }

    /// Returns a few keys that are here and that the primary's rows still name.
    pub async fn some_known_keys(&self) -> Result<Vec<String>, DatastoreError> {
        let sql = "SELECT a.key FROM public.artifact a JOIN wanted w ON w.key = a.key AND w.checksum = a.checksum \
                   ORDER BY random() LIMIT 20";
        let doing = "choosing known artifacts";
        let rows = self.session.query(doing, sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
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
    /// hashed. An object that is there and recorded as unproven is none of them.
    pub async fn unproven(&self) -> Result<Vec<(String, &'static str)>, DatastoreError> {
        let sql = "SELECT w.key, CASE WHEN p.key IS NULL THEN 1 WHEN a.key IS NULL OR a.checksum <> w.checksum THEN 2 \
                     WHEN a.bytes <> p.bytes THEN 3 ELSE 4 END \
                   FROM wanted w LEFT JOIN present p ON p.key = w.key LEFT JOIN public.artifact a ON a.key = w.key \
                   WHERE p.key IS NULL OR (a.state = 'unproven' AND a.checksum = w.checksum) IS NOT TRUE \
                     AND (a.key IS NULL OR a.checksum <> w.checksum OR a.bytes <> p.bytes OR a.etag <> p.etag) \
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

const TABLES: &str = "
CREATE TEMP TABLE IF NOT EXISTS wanted (key text PRIMARY KEY, checksum text NOT NULL, package text NOT NULL);
CREATE TEMP TABLE IF NOT EXISTS visible (key text PRIMARY KEY, checksum text NOT NULL, package text NOT NULL);
CREATE TEMP TABLE IF NOT EXISTS present (key text PRIMARY KEY, etag text NOT NULL, bytes bigint NOT NULL);
TRUNCATE wanted, visible, present;
";

/// An object that was hashed, and was written again since, becomes unproven.
const ADMIT: &str = "
WITH admitted AS (
  DELETE FROM todo t WHERE t.etag IS NOT NULL AND ($1 OR t.visible = t.checksum)
    AND NOT EXISTS (SELECT FROM unnest($2::text[], $3::text[]) u (key, checksum)
                    WHERE u.key = t.key AND u.checksum = t.checksum)
  RETURNING t.key, t.checksum, t.bytes, t.etag)
INSERT INTO public.artifact AS a (key, checksum, bytes, etag, state, verified_at)
SELECT key, checksum, bytes, etag, 'unproven', now() FROM admitted
ON CONFLICT (key) DO UPDATE SET checksum = excluded.checksum, bytes = excluded.bytes, etag = excluded.etag,
  state = excluded.state, verified_at = excluded.verified_at
WHERE (a.checksum, a.bytes, a.etag, a.state) IS DISTINCT FROM (excluded.checksum, excluded.bytes, excluded.etag, excluded.state)
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
