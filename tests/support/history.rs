//! Every state that the primary has ever had, so that any state of the spare can be looked up.
//!
//! Statements run freely on many connections; only COMMIT goes through one lock, together with
//! reading the database's content after it. So the list is exact: no commit is missing from it, and
//! no two count as one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Mutex, MutexGuard};
use tokio_postgres::Client;

use super::{Cluster, Result};

/// One table: its columns in words, and its rows as two numbers that do not depend on their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub columns: String,
    pub rows: i64,
    pub sum: String,
}

/// The content of a database without its sequences, because they move outside of transactions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Content {
    pub tables: BTreeMap<String, Table>,
}

impl Content {
    /// Returns the tables that differ.
    pub fn differing<'a>(&'a self, other: &'a Content) -> Vec<&'a str> {
        let names = self.tables.keys().chain(other.tables.keys());
        let mut names: Vec<&str> = names
            .filter(|name| self.tables.get(*name) != other.tables.get(*name))
            .map(String::as_str)
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Returns whether the rows are the same wherever the columns are, except for these tables:
    /// this is the state that a change of the schema leaves until it is noticed.
    pub fn agrees_where_columns_do(&self, other: &Content, but_for: &BTreeSet<&String>) -> bool {
        self.tables.iter().all(|(name, mine)| {
            let theirs = other.tables.get(name);
            but_for.contains(name)
                || theirs.is_none_or(|theirs| theirs.columns != mine.columns || theirs == mine)
        })
    }
}

const TABLES: &str = "
SELECT format('%I', c.relname),
       coalesce(string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' ORDER BY a.attnum), '')
FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
GROUP BY c.relname ORDER BY 1";

/// Returns the content as the open transaction on `client` sees it.
pub async fn content_inside(client: &Client) -> Result<Content> {
    let tables = client.query(TABLES, &[]).await?;
    let named: Vec<(String, String)> = tables.iter().map(|row| (row.get(0), row.get(1))).collect();
    let sums: Vec<String> = named
        .iter()
        .enumerate()
        .map(|(number, (table, _))| {
            format!(
                "SELECT {number}, count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM {table} t"
            )
        })
        .collect();
    let mut content = Content::default();
    if sums.is_empty() {
        return Ok(content);
    }
    for row in client.query(&sums.join(" UNION ALL "), &[]).await? {
        let (table, columns) = &named[row.get::<_, i32>(0) as usize];
        let table_content = Table {
            columns: columns.clone(),
            rows: row.get(1),
            sum: row.get(2),
        };
        content.tables.insert(table.clone(), table_content);
    }
    Ok(content)
}

/// Row texts that do not depend on the server's own settings.
const READING: &str = "
SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO'; SET LOCAL extra_float_digits = 3;
SET LOCAL bytea_output = 'hex'; SET LOCAL intervalstyle = 'postgres'";

/// Begins one snapshot for all following questions.
pub async fn begin_reading(client: &Client) -> Result<()> {
    let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {READING}");
    Ok(client.batch_execute(&begin).await?)
}

/// Returns the content of the database, at one snapshot.
pub async fn content(client: &Client) -> Result<Content> {
    begin_reading(client).await?;
    let content = content_inside(client).await?;
    client.batch_execute("COMMIT").await?;
    Ok(content)
}

/// The rows that one transaction adds to each table: their number, and the sum of their hashes.
type Addition = BTreeMap<String, (i64, i128)>;

/// Transactions that are committed at the same time. Their order is read from the server's log,
/// whatever their outcome is.
#[derive(Debug)]
struct SideBySide {
    /// Their commits are after this log position.
    from: i64,
    /// The additions, by the low half of the transaction's id, as the log names it.
    additions: BTreeMap<i64, Addition>,
    before: Arc<Content>,
    what: String,
}

impl Content {
    fn addition_to(&self, before: &Content) -> Result<Addition> {
        let mut added = Addition::new();
        for (name, table) in &self.tables {
            let old = before.tables.get(name).ok_or("a table came meanwhile")?;
            let sum = table.sum.parse::<i128>()? - old.sum.parse::<i128>()?;
            added.insert(name.clone(), (table.rows - old.rows, sum));
        }
        Ok(added)
    }

    fn with(&self, addition: &Addition) -> Result<Content> {
        let mut content = self.clone();
        for (name, (rows, sum)) in addition {
            let table = content.tables.get_mut(name).ok_or("a table is gone")?;
            table.rows += rows;
            table.sum = (table.sum.parse::<i128>()? + sum).to_string();
        }
        Ok(content)
    }
}

/// A state of the primary.
#[derive(Debug, Clone)]
pub struct Moment {
    /// Every rollback to an older copy begins another era: log positions of two eras cannot be
    /// compared.
    pub era: u32,
    /// A position after the commit that led here, and before the next one.
    pub lsn: i64,
    pub content: Arc<Content>,
    pub what: String,
    pub at: Instant,
    /// A table whose rows were all changed here in a way that no decoding shows.
    pub rewritten: Option<String>,
}

/// The list, and the one session that reads the primary for it.
pub struct Moments {
    pub list: Vec<Moment>,
    era: u32,
    reader: Option<Client>,
    /// True: the last COMMIT was not answered, or its outcome could not be read yet.
    pub unsettled: bool,
    side_by_side: Option<SideBySide>,
}

pub struct History {
    primary: Cluster,
    moments: Mutex<Moments>,
    /// Keys of objects that were ever removed from the primary's store.
    lacked: std::sync::Mutex<BTreeSet<String>>,
}

impl History {
    /// Begins with the primary's present content.
    pub async fn start(primary: &Cluster) -> Result<Arc<Self>> {
        let history = Self {
            primary: primary.clone(),
            moments: Mutex::new(Moments {
                list: Vec::new(),
                era: 0,
                reader: None,
                unsettled: false,
                side_by_side: None,
            }),
            lacked: std::sync::Mutex::default(),
        };
        let log_reader = "CREATE EXTENSION IF NOT EXISTS pg_walinspect";
        let client = primary.pg.conn("postgres").await?;
        client.batch_execute(log_reader).await?;
        history.note("the beginning").await?;
        Ok(Arc::new(history))
    }

    /// Notes a key; it must be called before the object is removed.
    pub fn note_lacking(&self, key: &str) {
        let mut lacked = self.lacked.lock().expect("the keys' lock");
        lacked.insert(key.to_string());
    }

    /// Returns whether the primary's store has been without it at some time.
    pub fn has_lacked(&self, key: &str) -> bool {
        self.lacked.lock().expect("the keys' lock").contains(key)
    }

    pub async fn lock(&self) -> MutexGuard<'_, Moments> {
        self.moments.lock().await
    }

    pub async fn states(&self) -> usize {
        self.moments.lock().await.list.len()
    }

    /// Commits the open transaction on `client`. An error: the outcome is not known, and is found
    /// out before the next commit.
    pub async fn commit(&self, client: &Client, what: &str) -> Result<()> {
        let mut moments = self.moments.lock().await;
        self.settle_locked(&mut moments).await?;
        let committed = client.batch_execute("COMMIT").await;
        // The outcome may be any; if the primary went away in the meantime, it is read when it is
        // back.
        let _ = self.note_locked(&mut moments, what).await;
        Ok(committed?)
    }

    /// Commits the open transactions of all of them at the same time. They change different rows.
    pub async fn commit_side_by_side(&self, clients: &[Client], what: &str) -> Result<()> {
        let mut moments = self.moments.lock().await;
        self.settle_locked(&mut moments).await?;
        let before = moments.list.last().expect("a beginning").content.clone();
        let mut additions = BTreeMap::new();
        for client in clients {
            client.batch_execute(READING).await?;
            let inside = content_inside(client).await?;
            let sql = "SELECT pg_current_xact_id()::text::int8 & x'ffffffff'::int8";
            let id = client.query_one(sql, &[]).await?.get(0);
            additions.insert(id, inside.addition_to(&before)?);
        }
        let sql = "SELECT (pg_current_wal_lsn() - '0/0'::pg_lsn)::int8";
        let from = clients[0].query_one(sql, &[]).await?.get(0);
        moments.side_by_side = Some(SideBySide {
            from,
            additions,
            before,
            what: what.into(),
        });
        let commits = clients.iter().map(|client| client.batch_execute("COMMIT"));
        let committed = futures_util::future::join_all(commits).await;
        let _ = self.note_locked(&mut moments, what).await;
        for commit in committed {
            commit?;
        }
        Ok(())
    }

    /// Notes the states in between, in the order of the log.
    async fn note_side_by_side(&self, moments: &mut Moments) -> Result<()> {
        let Some(together) = &moments.side_by_side else {
            return Ok(());
        };
        let sql = "SELECT xid::text::int8, (end_lsn - '0/0'::pg_lsn)::int8
                   FROM pg_get_wal_records_info('0/0'::pg_lsn + $1::int8::numeric, pg_current_wal_flush_lsn())
                   WHERE resource_manager = 'Transaction' AND record_type = 'COMMIT' ORDER BY end_lsn";
        let client = self.primary.pg.conn("postgres").await?;
        let commits = client.query(sql, &[&together.from]).await?;
        let mut content = (*together.before).clone();
        let mut states = Vec::new();
        for commit in &commits {
            if let Some(addition) = together.additions.get(&commit.get(0)) {
                content = content.with(addition)?;
                states.push(Moment {
                    era: moments.era,
                    lsn: commit.get(1),
                    content: Arc::new(content.clone()),
                    what: together.what.clone(),
                    at: Instant::now(),
                    rewritten: None,
                });
            }
        }
        moments.list.append(&mut states);
        moments.side_by_side = None;
        Ok(())
    }

    /// Notes a change that gave new values to all rows of this table, and left its columns.
    pub async fn note_rewritten(&self, what: &str, table: &str) -> Result<()> {
        let mut moments = self.moments.lock().await;
        self.note_locked(&mut moments, what).await?;
        let last = moments.list.last_mut().expect("just noted");
        last.rewritten = Some(table.into());
        Ok(())
    }

    /// Notes a change that was made while no other client made any.
    pub async fn note(&self, what: &str) -> Result<()> {
        let mut moments = self.moments.lock().await;
        self.note_locked(&mut moments, what).await
    }

    /// Begins a new era: the primary was set back to an older copy of itself.
    pub async fn begin_era(&self, what: &str) -> Result<()> {
        let mut moments = self.moments.lock().await;
        moments.era += 1;
        moments.unsettled = true;
        self.note_locked(&mut moments, what).await
    }

    /// Reads the outcome of a commit that was not answered.
    pub async fn settle(&self) -> Result<()> {
        let mut moments = self.moments.lock().await;
        self.settle_locked(&mut moments).await
    }

    /// Closes the session, so that no session of ours blocks a shutdown.
    pub async fn hang_up(&self) {
        self.moments.lock().await.reader = None;
    }

    async fn settle_locked(&self, moments: &mut Moments) -> Result<()> {
        if moments.unsettled {
            self.note_locked(moments, "found after a lost answer")
                .await?;
        }
        Ok(())
    }

    async fn note_locked(&self, moments: &mut Moments, what: &str) -> Result<()> {
        moments.unsettled = true;
        self.note_side_by_side(moments).await?;
        let reader = match moments.reader.take().filter(|reader| !reader.is_closed()) {
            Some(reader) => reader,
            None => self.primary.conn().await?,
        };
        begin_reading(&reader).await?;
        let content = content_inside(&reader).await?;
        let sql = "SELECT (pg_current_wal_lsn() - '0/0'::pg_lsn)::int8";
        let lsn = reader.query_one(sql, &[]).await?.get(0);
        reader.batch_execute("COMMIT").await?;
        moments.reader = Some(reader);
        let era = moments.era;
        let same = moments.list.last().filter(|last| last.era == era);
        let content = match same {
            Some(last) if *last.content == content => last.content.clone(),
            _ => Arc::new(content),
        };
        moments.list.push(Moment {
            era,
            lsn,
            content,
            what: what.into(),
            at: Instant::now(),
            rewritten: None,
        });
        moments.unsettled = false;
        Ok(())
    }
}
