//! The record that is being made: one transaction on the state database, in a session of its own.
//! If the process stops in the middle, the old record stays.

use super::Found;
use crate::cluster::{LocalSession, STATE_DATABASE};
use crate::config::Config;
use crate::replication::PassError;

/// Maximum number of rows in one statement, and of their bytes.
const MAX_ROWS: usize = 500;
const MAX_BYTES: usize = 1 << 20;

const TABLES: &str = "
CREATE TEMP TABLE touched (ident text, target text, deleted boolean NOT NULL, PRIMARY KEY (ident, target)) ON COMMIT DROP;
CREATE TEMP TABLE ours (at text NOT NULL, hash text NOT NULL, id int8, late boolean NOT NULL) ON COMMIT DROP;
CREATE TEMP TABLE theirs (hash text NOT NULL, id int8) ON COMMIT DROP;";

/// A change of a row, or of a whole table. Rows are JSON.
pub(super) struct Change {
    pub table: String,
    pub kind: &'static str,
    pub old: Option<String>,
    pub new: Option<String>,
}

impl Change {
    fn bytes(&self) -> usize {
        let row = |row: &Option<String>| row.as_ref().map_or(0, String::len);
        self.table.len() + row(&self.old) + row(&self.new)
    }
}

pub(super) struct Book {
    session: LocalSession,
    pub epoch: i64,
    added: usize,
    waiting: Vec<Change>,
    bytes: usize,
}

impl Book {
    pub(super) async fn open(config: &Config, epoch: i64) -> Result<Book, PassError> {
        let book = Book::open_again(config, epoch).await?;
        for table in ["divergence", "diverged_row", "diverged_package"] {
            let sql = format!("DELETE FROM {table} WHERE epoch = $1");
            book.session
                .execute("replacing the old record", &sql, &[&epoch])
                .await?;
        }
        Ok(book)
    }

    /// Opens the existing record, so that more can be added to it.
    pub(super) async fn open_again(config: &Config, epoch: i64) -> Result<Book, PassError> {
        let session = LocalSession::open(&config.local.datastore, STATE_DATABASE).await?;
        // With two processes at once, the second replaces the result of the first.
        let begin = "BEGIN; LOCK TABLE divergence IN SHARE ROW EXCLUSIVE MODE";
        session.batch("beginning the record", begin).await?;
        session.batch("making working tables", TABLES).await?;
        Ok(Book {
            session,
            epoch,
            added: 0,
            waiting: Vec::new(),
            bytes: 0,
        })
    }

    /// Returns the number of rows added since the record was opened.
    pub(super) fn added(&self) -> usize {
        self.added
    }

    /// Deletes the recorded judgement of packages, so that it can be made again over all rows.
    pub(super) async fn forget_packages(&self) -> Result<(), PassError> {
        let sql = "DELETE FROM diverged_package WHERE epoch = $1";
        self.session
            .execute("replacing the old record", sql, &[&self.epoch])
            .await?;
        Ok(())
    }

    /// Closes an amended record, which is no longer exact.
    pub(super) async fn close_again(mut self, why: &str) -> Result<(), PassError> {
        self.flush().await?;
        let sql = "UPDATE divergence SET exact = false, reason = reason || $2 WHERE epoch = $1";
        self.session
            .execute("amending the divergence", sql, &[&self.epoch, &why])
            .await?;
        Ok(self.session.batch("ending the record", "COMMIT").await?)
    }

    /// Returns the session of the transaction, for working tables.
    pub(super) fn session(&self) -> &LocalSession {
        &self.session
    }

    pub(super) async fn add(&mut self, change: Change) -> Result<(), PassError> {
        self.bytes += change.bytes();
        self.added += 1;
        self.waiting.push(change);
        if self.waiting.len() >= MAX_ROWS || self.bytes >= MAX_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    /// Writes the waiting rows.
    pub(super) async fn flush(&mut self) -> Result<(), PassError> {
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

    /// Commits the record.
    pub(super) async fn close(mut self, from: &str, found: &Found) -> Result<(), PassError> {
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
        Ok(self.session.batch("ending the record", "COMMIT").await?)
    }
}
