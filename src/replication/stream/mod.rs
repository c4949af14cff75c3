//! Following: the primary's transactions, in commit order, from logical decoding to the spare's rows.
//!
//! `pump` reads the stream into the `spool`; `ahead` sees what comes and has the `gate` bring its artifacts; `apply` writes
//! rows, recovery point and what is lacking in one transaction; `follow` joins them for as long as it goes.

mod ahead;
mod apply;
mod changes;
mod error;
mod follow;
mod gate;
pub mod pgoutput;
mod pump;
mod question;
mod settle;
pub mod spool;
mod target;

use super::error::PassError;
use crate::cluster::Confirmation;
use std::sync::Arc;
use std::time::Duration;

pub use apply::Point;
pub use error::Gap;
pub use follow::{Follow, Followed, follow};
pub use question::{Seen, ask, schema};

/// What is ours on the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    pub slot: String,
    pub publication: String,
}

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
    fn seen(&self, _: &Seen) {}
    /// Complete as of then.
    fn confirmed(&self, _: Confirmation) {}
}

/// Hears nothing.
pub struct Unheard;

impl Told for Unheard {}
