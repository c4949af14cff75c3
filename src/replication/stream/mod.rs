//! Follows the primary: its transactions, in commit order, from logical decoding to the spare's
//! rows.
//!
//! `pump` reads the stream into the `spool`. `lookahead` sees each message as it arrives and has
//! the `gate` bring its artifacts. `apply` writes the rows, the recovery point and the list of
//! unavailable artifacts in one transaction. `follow` joins these parts for as long as the stream
//! goes on.

mod apply;
mod asking;
mod changes;
mod effects;
mod error;
mod fingerprint;
mod follow;
mod gate;
mod lookahead;
pub mod pgoutput;
mod primary_status;
mod proof;
mod pump;
mod runs;
pub mod spool;
mod target;

use super::error::PassError;
use crate::cluster::{Confirmation, LocalSession, WalSession, quote_literal};
use crate::config::Datastore;
use crate::domain::ErrorCode;
use chrono::{DateTime, Utc};
use std::sync::Arc;
use std::time::Duration;

pub use apply::Point;
pub use error::Gap;
pub use fingerprint::fingerprint;
pub use follow::{Differed, Follow, Followed, follow};
pub use primary_status::{Seen, ask, stands};

/// Drops our slot on the primary, because a slot that nobody reads must not hold log. The slot need
/// not exist.
pub async fn drop_slot(peer: &Datastore, slot: &str) -> Result<(), PassError> {
    let mut session = WalSession::open(peer).await?;
    let name = quote_literal(slot);
    let there = format!("FROM pg_replication_slots WHERE slot_name = {name}");
    for attempt in 0..DROP_TRIES {
        let doing = "dropping our slot";
        let sql = format!("SELECT pg_drop_replication_slot(slot_name) {there} AND NOT active");
        session.query(doing, &sql).await?;
        let sql = format!("SELECT 1 {there}");
        if session.query(doing, &sql).await?.is_empty() {
            return Ok(());
        }
        // Either the reader has just ended and the server will notice it soon, or the reader's
        // connection was lost and the server will not notice it.
        if attempt == DROP_TRIES / 5 {
            session.end_reader(slot).await?;
        }
        tokio::time::sleep(DROP_PAUSE).await;
    }
    Err(PassError::Unfit {
        check: ErrorCode::SlotActive,
        text: format!("slot {slot} on the primary is being read by another session"),
        next_step: "stop the session that reads it".into(),
    })
}

/// Drops a slot on the local server by which the peer followed. `session` is a session on the
/// slot's database.
pub async fn drop_slot_here(session: &LocalSession, slot: &str) -> Result<(), PassError> {
    let doing = "dropping the peer's slot";
    let sql = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots \
               WHERE slot_name = $1 AND active_pid IS NOT NULL";
    session.query(doing, sql, &[&slot]).await?;
    let sql =
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1";
    session.query(doing, sql, &[&slot]).await?;
    Ok(())
}

const DROP_TRIES: u32 = 50;
const DROP_PAUSE: Duration = Duration::from_millis(100);

/// A committed transaction on the spare.
#[derive(Debug, Clone, Copy)]
pub struct Applied {
    pub point: Point,
    /// Number of the primary's transactions in it; 0: only the recovery point moved.
    pub transactions: u64,
    /// Number of transactions that have arrived completely and wait.
    pub waiting: u64,
    /// True: the list of unavailable artifacts may have changed.
    pub lacking: bool,
}

/// Receives the events of following. It is called often, so it must be quick.
pub trait Told: Send + Sync {
    /// The stream has begun.
    fn following(&self) {}
    fn applied(&self, _: Applied) {}
    /// Reports how many transactions the gate holds.
    fn waiting(&self, _: u64) {}
    fn waited(&self, _: Duration) {}
    /// Reports a fault that keeps the gate waiting, or the end of it (None).
    fn trouble(&self, _: Option<&Arc<PassError>>) {}
    fn copied(&self, _bytes: u64) {}
    /// Reports how many artifacts that the primary did not have have now been copied.
    fn brought(&self, _: usize) {}
    fn seen(&self, _: &Seen) {}
    /// Reports that the rows also equal the primary's since its server was started at this time.
    fn compared(&self, _server_started: &str) {}
    /// Reports the oldest time at which a table was compared; the tables are compared one after the
    /// other.
    fn compared_tables(&self, _oldest: Option<DateTime<Utc>>) {}
    /// Reports the time as of which the spare is complete.
    fn confirmed(&self, _: Confirmation) {}
}

/// Ignores all events.
pub struct Unheard;

impl Told for Unheard {}
