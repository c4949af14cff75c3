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
mod follow;
mod gate;
mod history_proof;
mod lookahead;
pub mod pgoutput;
mod primary_status;
mod pump;
mod runs;
mod slot;
pub mod spool;
mod target;

use super::error::ReplicationError;
use crate::cluster::{ApplyPosition, Confirmation, PrimaryStatus};
use chrono::{DateTime, Utc};
use std::sync::Arc;
use std::time::Duration;

pub use error::Gap;
pub use follow::{Differed, Follow, FollowContext, Followed, follow};
pub use primary_status::{check_intact, query};
pub use slot::drop_our_slot;

/// A committed transaction on the spare.
#[derive(Debug, Clone, Copy)]
pub struct Applied {
    pub point: ApplyPosition,
    /// Number of the primary's transactions in it; 0: only the recovery point moved.
    pub transactions: u64,
    /// Number of transactions that have arrived completely and wait.
    pub waiting: u64,
    /// True: the list of unavailable artifacts may have changed.
    pub unavailable_changed: bool,
}

/// Receives the events of following. It is called often, so it must be quick.
pub trait StreamObserver: Send + Sync {
    /// The stream has begun.
    fn following(&self) {}
    fn applied(&self, _: Applied) {}
    /// Reports how many transactions the gate holds.
    fn waiting(&self, _: u64) {}
    fn waited(&self, _: Duration) {}
    /// Reports a fault that keeps the gate waiting, or the end of it (None).
    fn trouble(&self, _: Option<&Arc<ReplicationError>>) {}
    fn copied(&self, _bytes: u64) {}
    /// Reports an artifact that the provider of the bucket has not brought yet.
    fn awaits(&self, _key: &str) {}
    fn awaits_no_more(&self, _key: &str) {}
    /// Reports how long an artifact was awaited that is here now; zero: it was here before its row.
    fn arrived(&self, _: Duration) {}
    /// Reports how many artifacts that the primary did not have have now been copied.
    fn brought(&self, _: usize) {}
    fn seen(&self, _: &PrimaryStatus) {}
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

impl StreamObserver for Unheard {}
