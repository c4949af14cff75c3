//! Following: the primary's transactions, in commit order, from logical decoding to the spare's rows.
//!
//! `pump` reads the stream into the `spool`; `ahead` sees what comes and has the `gate` bring its artifacts; `apply` writes
//! rows, recovery point and what is lacking in one transaction; `follow` joins them for as long as it goes.

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

/// What nobody reads must hold nothing. The slot need not be there.
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
        // Its reader has just gone, and the server is about to notice. Or its line was lost, and the server will not.
        if attempt == DROP_TRIES / 5 {
            session.end_reader(slot).await?;
        }
        tokio::time::sleep(DROP_PAUSE).await;
    }
    Err(PassError::Unfit {
        check: ErrorCode::SlotActive,
        text: format!("slot {slot} on the primary is being read by another session"),
        next_step: "stop whoever reads it".into(),
    })
}

/// The same on our own server, for a slot by which the peer followed. `session` is one on the slot's database.
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

/// A transaction of ours that was committed.
#[derive(Debug, Clone, Copy)]
pub struct Applied {
    pub point: Point,
    /// Transactions of the primary in it; 0: the recovery point alone moved.
    pub transactions: u64,
    /// Transactions that are here whole and wait.
    pub waiting: u64,
    /// The list of what the primary lacks may have changed.
    pub lacking: bool,
}

/// Hears what following does. Called often: it must be quick.
pub trait Told: Send + Sync {
    /// The stream has begun.
    fn following(&self) {}
    fn applied(&self, _: Applied) {}
    /// The gate holds so many transactions.
    fn waiting(&self, _: u64) {}
    fn waited(&self, _: Duration) {}
    /// A fault that keeps the gate waiting, and its end.
    fn trouble(&self, _: Option<&Arc<PassError>>) {}
    fn copied(&self, _bytes: u64) {}
    /// So many artifacts that the primary lacked are here now.
    fn brought(&self, _: usize) {}
    fn seen(&self, _: &Seen) {}
    /// The rows are the primary's also since its server was started then.
    fn compared(&self, _server_started: &str) {}
    /// Each table was compared since then, one after the other.
    fn compared_tables(&self, _oldest: Option<DateTime<Utc>>) {}
    /// Complete as of then.
    fn confirmed(&self, _: Confirmation) {}
}

/// Hears nothing.
pub struct Unheard;

impl Told for Unheard {}
