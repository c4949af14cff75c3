//! Replication slots and publications of ours, on either side.

use super::server_state::{ServerState, server_state};
use super::session::{ReadSession, Session, WriteSession, quote_ident, quote_literal};
use super::timeline::timeline;
use super::walsender::WalSession;
use crate::cluster::fence::setting::fenced;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::preparation::COPIED_TABLES;
use crate::domain::Lsn;

/// The facts about a server on which a slot and its publication depend.
#[derive(Debug, Clone)]
pub struct PublishedSlot {
    pub state: ServerState,
    pub slot: Option<LocalSlot>,
    /// True: the publication exists.
    pub published: bool,
    /// A table of Builder's that is not in the publication.
    pub unpublished: Option<String>,
}

/// A slot on the local server, by which the peer follows or followed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalSlot {
    pub plugin: Option<String>,
    /// True: the slot belongs to the session's database.
    pub ours: bool,
    pub lost: bool,
    pub confirmed: Option<Lsn>,
    pub active: bool,
}

/// The further columns, after those of [`ServerState`].
const QUESTION: &str = concat!(
    "SELECT ",
    server_state!(),
    ",
       EXISTS (SELECT 1 FROM pg_publication WHERE pubname = $2),
       s.slot_name IS NOT NULL, s.plugin::text, coalesce(s.database = current_database(), false),
       coalesce(to_jsonb(s) ->> 'wal_status' = 'lost', false), s.confirmed_flush_lsn::text, coalesce(s.active, false)
FROM (SELECT 1) one LEFT JOIN pg_replication_slots s ON s.slot_name = $1"
);

const UNPUBLISHED: &str = "
SELECT min(c.oid::regclass::text) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE NOT EXISTS (SELECT 1 FROM pg_publication_tables t
    WHERE t.pubname = $1 AND t.schemaname = n.nspname AND t.tablename = c.relname) AND ";

impl WriteSession {
    /// Reads a slot and its publication.
    pub async fn published_slot(
        &self,
        slot: &str,
        publication: &str,
    ) -> Result<PublishedSlot, DatastoreError> {
        let doing = "looking at the slot";
        let row = self.row(doing, QUESTION, &[&slot, &publication]).await?;
        const FIRST: usize = ServerState::COLUMNS;
        let slot = match row.get(FIRST + 1)? {
            false => None,
            true => Some(LocalSlot {
                plugin: row.get(FIRST + 2)?,
                ours: row.get(FIRST + 3)?,
                lost: row.get(FIRST + 4)?,
                confirmed: row
                    .get::<Option<String>>(FIRST + 5)?
                    .and_then(|lsn| lsn.parse().ok()),
                active: row.get(FIRST + 6)?,
            }),
        };
        let sql = format!("{UNPUBLISHED}{COPIED_TABLES}");
        let doing = "looking for tables that are not published";
        let unpublished = self.row(doing, &sql, &[&publication]).await?.get(0)?;
        Ok(PublishedSlot {
            state: ServerState::of(&row)?,
            slot,
            published: row.get(FIRST)?,
            unpublished,
        })
    }

    /// Asks the server to end the session that reads a slot, if there is one.
    pub async fn end_slot_reader(&self, slot: &str) -> Result<(), DatastoreError> {
        let sql = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1";
        self.rows("ending the slot's reader", sql, &[&slot]).await?;
        Ok(())
    }

    /// Drops a slot by which the peer followed, and ends its reader. The session is on the slot's
    /// database. The slot need not exist.
    pub async fn drop_peers_slot(&self, slot: &str) -> Result<(), DatastoreError> {
        let doing = "dropping the peer's slot";
        let sql = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots \
                   WHERE slot_name = $1 AND active_pid IS NOT NULL";
        self.rows(doing, sql, &[&slot]).await?;
        let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1";
        self.rows(doing, sql, &[&slot]).await?;
        Ok(())
    }

    /// Drops a publication by which the peer followed. It need not exist.
    pub async fn drop_publication(&self, publication: &str) -> Result<(), DatastoreError> {
        let sql = format!("DROP PUBLICATION IF EXISTS {}", quote_ident(publication));
        self.batch("dropping the peer's publication", &sql).await
    }

    /// Writes a message into the log, in a transaction of its own that is flushed at once.
    pub async fn emit_message(&self, prefix: &str, text: &str) -> Result<(), DatastoreError> {
        let sql = "SELECT pg_logical_emit_message(true, $1::text, $2::text)::text";
        let doing = "writing a message into the log";
        self.row(doing, sql, &[&prefix, &text]).await?;
        Ok(())
    }
}

impl Session {
    /// Returns the number of the next transaction, as far as rows show it.
    pub async fn next_transaction(&self) -> Result<String, DatastoreError> {
        let sql = "SELECT (txid_snapshot_xmax(txid_current_snapshot()) % 4294967296)::text";
        self.row("reading the next transaction", sql, &[])
            .await?
            .get(0)
    }
}

impl ReadSession {
    /// Describes the transaction that a new slot waits for: the oldest one that writes. A user
    /// without the right to see the transactions of others is told which right is missing. None:
    /// there is no such transaction.
    pub async fn oldest_writer(&self) -> Result<Option<String>, DatastoreError> {
        let doing = "looking for the transaction that a slot waits for";
        for sql in [OLDEST_WRITER, MAY_NOT_SEE_WRITERS] {
            if let Some(row) = self.rows(doing, sql, &[]).await?.first() {
                return row.get(0);
            }
        }
        Ok(None)
    }
}

const OLDEST_WRITER: &str = "SELECT text FROM (SELECT xact_start, format('it waits for a transaction of %s (process %s, application %L, since %s)', \
         usename, pid, application_name, \
         coalesce(xact_start::text, format('a time that user %s may not see: GRANT pg_read_all_stats TO %s', \
           current_user, quote_ident(current_user)))) FROM pg_stat_activity \
       WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() \
       UNION ALL SELECT prepared, format('it waits for prepared transaction %L of %s in database %s, prepared %s', \
         gid, owner, database, prepared) FROM pg_prepared_xacts) waits (since, text) \
     ORDER BY since LIMIT 1";

const MAY_NOT_SEE_WRITERS: &str = "SELECT format('the transaction that it waits for cannot be seen by user %s: GRANT pg_read_all_stats TO %s on the primary', \
       current_user, quote_ident(current_user)) \
     WHERE NOT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')";

impl WalSession {
    /// Ends the sessions that hold a temporary slot whose name begins like this.
    pub async fn end_temporary_slots(&mut self, prefix: &str) -> Result<(), DatastoreError> {
        let sql = format!(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots \
             WHERE temporary AND active_pid IS NOT NULL AND starts_with(slot_name, {})",
            quote_literal(prefix)
        );
        self.query("ending a former copy's session", &sql).await?;
        Ok(())
    }

    /// Drops a slot that nobody reads. Returns whether it is gone.
    pub async fn drop_idle_slot(&mut self, slot: &str) -> Result<bool, DatastoreError> {
        let doing = "dropping our slot";
        let there = format!(
            "FROM pg_replication_slots WHERE slot_name = {}",
            quote_literal(slot)
        );
        let sql = format!("SELECT pg_drop_replication_slot(slot_name) {there} AND NOT active");
        self.query(doing, &sql).await?;
        let sql = format!("SELECT 1 {there}");
        Ok(self.query(doing, &sql).await?.is_empty())
    }

    /// Makes a permanent slot of a temporary one, in the place of an earlier one of that name.
    pub async fn keep_slot(&mut self, temporary: &str, slot: &str) -> Result<(), DatastoreError> {
        self.drop_former_slot(slot).await?;
        let (temporary, slot) = (quote_literal(temporary), quote_literal(slot));
        let sql = format!("SELECT pg_copy_logical_replication_slot({temporary}, {slot}, false)");
        self.query("copying the slot", &sql).await?;
        Ok(())
    }

    pub(super) async fn drop_former_slot(&mut self, slot: &str) -> Result<(), DatastoreError> {
        let sql = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {}",
            quote_literal(slot)
        );
        self.query("dropping our former slot", &sql).await?;
        Ok(())
    }

    /// Releases the snapshot of a new slot. The server would keep it until the next command.
    pub async fn release_snapshot(&mut self) -> Result<(), DatastoreError> {
        self.query("letting the snapshot go", "SELECT 1").await?;
        Ok(())
    }
}
