//! The ticket of the spare's open transaction: it holds the requests of all its rows, from the
//! look-ahead to the commit.

use super::{Admission, Gate, RequestId};
use crate::killpoint;
use crate::package::PackageRow;
use crate::replication::stream::StreamObserver;
use crate::replication::stream::error::Gap;
use crate::replication::stream::lookahead::Ahead;
use std::time::{Duration, Instant};

/// Maximum number of outstanding requests for rows that the look-ahead did not scan.
const MAX_LATE_REQUESTS: usize = 512;
/// Interval between reports of the number of waiting transactions, while the gate waits.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Admits the spare's open transaction. A ticket that is dropped without [`Ticket::commit`] keeps
/// its keys, because the transaction may be committed or not: the gate is closed after it.
pub(in crate::replication::stream) struct Ticket<'a> {
    gate: Gate,
    waiters: Waiters<'a>,
    requests: Vec<RequestId>,
    /// Requests for rows that the look-ahead did not scan.
    late: Vec<RequestId>,
    /// The results of such requests that are removed already: of those whose artifact is not in its
    /// place.
    decided: Vec<Admission>,
}

/// The reports about a wait.
#[derive(Clone)]
pub(in crate::replication::stream) struct Waiters<'a> {
    pub observer: &'a dyn StreamObserver,
    pub ahead: Ahead,
}

impl Gate {
    /// Opens the ticket of a transaction.
    pub(in crate::replication::stream) fn ticket<'a>(&self, waiters: Waiters<'a>) -> Ticket<'a> {
        Ticket {
            gate: self.clone(),
            waiters,
            requests: Vec::new(),
            late: Vec::new(),
            decided: Vec::new(),
        }
    }

    /// Returns whether the artifacts of all these requests are here already.
    pub(in crate::replication::stream) fn is_open_for(&self, ids: &[RequestId]) -> bool {
        let settled = self.settled(ids);
        settled.is_some_and(|all| all.iter().all(|outcome| matches!(outcome, Admission::Here)))
    }
}

impl Ticket<'_> {
    /// Waits for requests of the look-ahead, and takes them over.
    pub(in crate::replication::stream) async fn admit(
        &mut self,
        ids: &[RequestId],
    ) -> Result<(), Gap> {
        self.wait(ids).await?;
        self.add(ids);
        Ok(())
    }

    /// Takes over requests of the look-ahead. The commit waits for them.
    pub(in crate::replication::stream) fn add(&mut self, ids: &[RequestId]) {
        self.requests.extend(ids);
    }

    /// Requests the artifact of a row that the look-ahead did not scan; `row` identifies the row.
    /// If many such requests are outstanding, they are waited for.
    pub(in crate::replication::stream) async fn request(
        &mut self,
        named: &PackageRow,
        row: Vec<u8>,
    ) -> Result<(), Gap> {
        self.late.push(self.gate.want(named, row, None));
        if self.late.len() < MAX_LATE_REQUESTS {
            return Ok(());
        }
        let outcomes = self.wait(&self.late).await?;
        // The gate remembers their keys until the commit.
        self.gate.shrink(&self.late);
        self.late.clear();
        let unavailable = outcomes.into_iter().filter(is_not_here);
        self.decided.extend(unavailable);
        Ok(())
    }

    /// Requests the artifact of a row that an update has renamed.
    pub(in crate::replication::stream) fn add_row(&mut self, renamed: &PackageRow) {
        self.late.push(self.gate.want(renamed, Vec::new(), None));
    }

    /// Returns whether all requests are known, and their artifacts are here.
    pub(in crate::replication::stream) fn is_plain(&self) -> bool {
        self.late.is_empty() && self.decided.is_empty() && self.gate.is_open_for(&self.requests)
    }

    /// Waits for all requests. Returns the results for rows whose artifact is not in its place.
    pub(in crate::replication::stream) async fn outcomes(&mut self) -> Result<Vec<Admission>, Gap> {
        self.requests.append(&mut self.late);
        let mut outcomes = match self.gate.settled(&self.requests) {
            Some(outcomes) => none_failed(outcomes)?,
            None => self.wait(&self.requests).await?,
        };
        outcomes.retain(is_not_here);
        outcomes.append(&mut self.decided);
        Ok(outcomes)
    }

    /// Returns the keys whose artifacts are here.
    pub(in crate::replication::stream) fn keys_here(&self) -> Vec<String> {
        self.gate.keys_here(&self.requests)
    }

    /// Removes the requests, because their transaction is committed.
    pub(in crate::replication::stream) fn commit(self) {
        self.gate.forget(&self.requests);
        self.gate.forget_shrunk();
        if self.waiters.ahead.is_empty() {
            // No transaction waits any more that could have such a row.
            self.gate.forget_deletions();
        }
    }

    async fn wait(&self, ids: &[RequestId]) -> Result<Vec<Admission>, Gap> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let begun = Instant::now();
        killpoint::reach("gate.waiting");
        let Waiters { observer, ahead } = &self.waiters;
        let waiting = self.gate.wait(ids, |trouble| observer.trouble(trouble));
        tokio::pin!(waiting);
        let outcomes = loop {
            if self.gate.settled(ids).is_none() {
                // This transaction, which is removed from the list already, and the transactions
                // behind it.
                observer.waiting(ahead.waiting() + 1);
            }
            tokio::select! {
                outcomes = &mut waiting => break outcomes,
                () = tokio::time::sleep(PROGRESS_INTERVAL) => {}
            }
        };
        observer.waited(begun.elapsed());
        none_failed(outcomes)
    }
}

fn is_not_here(outcome: &Admission) -> bool {
    !matches!(outcome, Admission::Here)
}

/// Returns an error if it could not be found out for a row whether its artifact is here: no such
/// row is admitted.
fn none_failed(outcomes: Vec<Admission>) -> Result<Vec<Admission>, Gap> {
    for outcome in &outcomes {
        if let Admission::Failed(error) = outcome {
            return Err(Gap::Waited(error.clone()));
        }
    }
    Ok(outcomes)
}
