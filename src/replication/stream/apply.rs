//! Applies the primary's transactions in the order of their commits. One transaction of the spare
//! holds one or several of the primary's, and the recovery point.

use super::changes::{Change, Changes};
use super::effects::{TransactionEffects, Verdict};
use super::error::Gap;
use super::gate::{Admission, Gate, Ticket, Waiters, key_of};
use super::lookahead::{Ahead, TxSummary, key, named};
use super::pgoutput::{Begin, Commit, Message, decode};
use super::spool::{Frame, Receiver};
use super::{Applied, StreamObserver};
use crate::cluster::{ApplyPosition, RecoveryPoint};
use crate::domain::Lsn;
use crate::killpoint;
use crate::package::PackageRow;
use crate::replication::artifact::round::Swap;
use crate::replication::descent::Doubt;
use std::time::Duration;
use tokio::sync::watch;

mod position;

/// Maximum number of the primary's transactions in one transaction of the spare, and of their
/// bytes.
const MAX_TRANSACTIONS: u64 = 1000;
const MAX_BYTES: usize = 8 << 20;
/// Number of transactions in a group from which on the spare is catching up. It then waits up to
/// `LINGER` for more transactions before it commits.
const CATCH_UP_TRANSACTIONS: u64 = 20;
const LINGER: Duration = Duration::from_millis(3);

pub(super) struct Applier<'a> {
    pub changes: Changes,
    pub gate: Gate,
    pub ahead: Ahead,
    pub spool: Receiver,
    pub settling: TransactionEffects<'a>,
    pub observer: &'a dyn StreamObserver,
    /// The copy from which following goes on.
    pub recorded: &'a RecoveryPoint,
    /// The recovery point as it is stored.
    pub point: ApplyPosition,
    /// The position before which the primary may discard its log.
    pub durable: watch::Sender<Lsn>,
    /// Every transaction before this position was sent and is applied.
    pub reached: watch::Sender<Lsn>,
    /// True: every transaction of the primary is applied by itself.
    pub careful: bool,
    pub token: i64,
    /// The commit position of the last applied transaction. The stream must begin with this
    /// transaction. None: it has done so already.
    pub unproven: Option<Lsn>,
    /// Becomes true when the stream has begun with that transaction.
    pub proven: watch::Sender<bool>,
}

/// The contents of the spare's open transaction.
struct Group<'a> {
    transactions: u64,
    bytes: usize,
    ticket: Ticket<'a>,
    last: Option<Commit>,
    /// Every transaction before this position was sent.
    reached: Lsn,
}

impl<'a> Applier<'a> {
    fn new_group(&self) -> Group<'a> {
        let (observer, ahead) = (self.observer, self.ahead.clone());
        Group {
            transactions: 0,
            bytes: 0,
            ticket: self.gate.ticket(Waiters { observer, ahead }),
            last: None,
            reached: Lsn(0),
        }
    }

    /// Applies until every transaction before `until` is applied; without end while `until` is
    /// None. `advance` asks to move the recovery point over log without changes for the spare, so
    /// that the primary need not keep it.
    pub(super) async fn run(
        &mut self,
        until: &mut watch::Receiver<Option<Lsn>>,
        advance: &mut watch::Receiver<Lsn>,
    ) -> Result<ApplyPosition, Gap> {
        let mut group = self.new_group();
        loop {
            let open = group.transactions > 0;
            let ends = until
                .borrow_and_update()
                .is_some_and(|end| self.at() >= end);
            if !open && ends && self.unproven.is_none() {
                return Ok(self.point);
            }
            let frame = match open {
                true => match self.spool.try_recv()? {
                    None if group.transactions >= CATCH_UP_TRANSACTIONS => self.linger().await,
                    frame => frame,
                },
                false => tokio::select! {
                    frame = self.spool.recv() => match frame? {
                        Some(frame) => Some(frame),
                        // The task that reads the stream reports why it ended.
                        None => std::future::pending().await,
                    },
                    _ = until.changed() => continue,
                    _ = advance.changed() => {
                        advance.borrow_and_update();
                        self.advance().await?;
                        continue;
                    }
                },
            };
            match frame {
                None => self.commit(&mut group).await?,
                // A server that has sent everything says so after each transaction. More of them may
                // have arrived since.
                Some(Frame::Reached(lsn)) if open => group.reached = lsn,
                Some(Frame::Reached(lsn)) => {
                    if self.unproven.is_some() && lsn >= self.point.lsn {
                        return Err(self.another_history());
                    }
                    self.reach(lsn);
                }
                Some(Frame::Data(bytes)) => match decode(bytes)? {
                    Message::Begin(begin) => match self.unproven.take() {
                        Some(mark) => self.prove(mark, &begin).await?,
                        None => self.transaction(&begin, &mut group).await?,
                    },
                    // A message that is not transactional; nothing here waits for it.
                    Message::Logical(_) => {}
                    other => {
                        return Err(Gap::Decoding(format!(
                            "outside of a transaction: {other:?}"
                        )));
                    }
                },
            }
        }
    }

    /// Waits a moment for another frame. An end of the stream is reported again after the open
    /// transaction is committed.
    async fn linger(&mut self) -> Option<Frame> {
        match tokio::time::timeout(LINGER, self.spool.recv()).await {
            Ok(Ok(frame)) => frame,
            _ => None,
        }
    }

    fn at(&self) -> Lsn {
        self.point.lsn.max(*self.reached.borrow())
    }

    fn reach(&self, lsn: Lsn) {
        self.reached.send_if_modified(|reached| {
            let further = lsn > *reached;
            *reached = lsn.max(*reached);
            further
        });
    }

    fn another_history(&self) -> Gap {
        let text = format!(
            "the primary has no longer the transaction of {}, the last one that the spare has applied: it was set back to an older copy, and written to since",
            self.point.commit_time.format("%Y-%m-%d %H:%M:%S%.6f UTC")
        );
        let stood = RecoveryPoint {
            lsn: self.point.lsn.to_string(),
            ..self.recorded.clone()
        };
        Gap::WentBack(Doubt::set_back(&stood, text))
    }

    /// Reads the last applied transaction again as a proof, and does not apply it again.
    async fn prove(&mut self, mark: Lsn, begin: &Begin) -> Result<(), Gap> {
        if begin.final_lsn != mark || begin.time != self.point.commit_time {
            return Err(self.another_history());
        }
        loop {
            let bytes = match self.spool.recv().await? {
                Some(Frame::Data(bytes)) => bytes,
                Some(Frame::Reached(_)) => continue,
                None => std::future::pending().await,
            };
            match decode(bytes)? {
                Message::Commit(commit) if commit.end == self.point.lsn => break,
                Message::Commit(_) => return Err(self.another_history()),
                Message::Relation(relation) => self.changes.relation(&relation).await?,
                Message::Type(named) => {
                    self.changes.name_type(named.id, named.schema, named.name);
                }
                _ => {}
            }
        }
        self.proven.send_replace(true);
        self.reach(self.point.lsn);
        Ok(())
    }

    async fn transaction(&mut self, begin: &Begin, group: &mut Group<'a>) -> Result<(), Gap> {
        let info = self.ahead.known(begin.final_lsn).await;
        let mut looked_at = info.wants.len();
        let alone = self.careful || info.deletes_packages || info.is_large() || info.truncated;
        if group.transactions > 0 && (alone || !self.gate.is_open_for(&info.wants)) {
            self.commit(group).await?;
        }
        if info.complete {
            // This comes before a row is written: a transaction that waits for days must not be
            // open on the spare for days.
            self.ahead.take(begin.final_lsn);
            group.ticket.admit(&info.wants).await?;
        } else {
            looked_at = 0;
        }
        let commit = self.rows(&info, looked_at, group).await?;
        if !info.complete
            && let Some(later) = self.ahead.take(begin.final_lsn)
        {
            group.ticket.add(&later.wants);
        }
        group.transactions += 1;
        group.last = Some(commit);
        if alone || group.transactions >= MAX_TRANSACTIONS || group.bytes >= MAX_BYTES {
            self.commit(group).await?;
        }
        Ok(())
    }

    /// Takes the rows of one transaction, up to its commit.
    async fn rows(
        &mut self,
        info: &TxSummary,
        looked_at: usize,
        group: &mut Group<'a>,
    ) -> Result<Commit, Gap> {
        let mut packages = 0;
        loop {
            let bytes = match self.spool.recv().await? {
                Some(Frame::Data(bytes)) => bytes,
                // In the middle of a transaction a position has no new information.
                Some(Frame::Reached(_)) => continue,
                None => std::future::pending().await,
            };
            let length = bytes.len();
            group.bytes += length;
            match decode(bytes)? {
                Message::Commit(commit) => return Ok(commit),
                Message::Insert(insert) => {
                    if self.changes.target(insert.relation)?.package.is_some() {
                        // Every row that has arrived by now was scanned, or will never be.
                        let looked_at = looked_at.max(match info.complete {
                            true => 0,
                            false => self.ahead.looked_at(info.final_lsn),
                        });
                        if packages >= looked_at {
                            self.request(insert.relation, &insert.new, group).await?;
                        }
                        packages += 1;
                    }
                    let change = Change::Insert(insert.new);
                    self.changes.add(insert.relation, change, length).await?;
                }
                Message::Update(update) => {
                    let change = Change::Update {
                        old: update.old,
                        new: update.new,
                    };
                    self.changes.add(update.relation, change, length).await?;
                }
                Message::Delete(delete) => {
                    let change = Change::Delete(delete.old);
                    self.changes.add(delete.relation, change, length).await?;
                }
                Message::Truncate(truncate) => self.changes.truncate(&truncate).await?,
                Message::Relation(relation) => self.changes.relation(&relation).await?,
                Message::Type(named) => {
                    self.changes.name_type(named.id, named.schema, named.name);
                }
                // The origin of a transaction that came to the primary by replication does not
                // matter here.
                Message::Origin(_) | Message::Logical(_) => {}
                Message::Begin(_) => {
                    return Err(Gap::Decoding("a transaction within a transaction".into()));
                }
            }
        }
    }

    /// Requests the artifact of a package row that the look-ahead did not scan.
    async fn request(
        &self,
        relation: u32,
        row: &[super::pgoutput::Value],
        group: &mut Group<'a>,
    ) -> Result<(), Gap> {
        let target = self.changes.target(relation)?;
        let Some(columns) = target.package else {
            return Ok(());
        };
        let named = named(row, columns);
        let row = key(row, &target.keys);
        group.ticket.request(&named, row).await
    }

    /// Commits the group, and begins another one.
    async fn commit(&mut self, group: &mut Group<'a>) -> Result<(), Gap> {
        let mut group = std::mem::replace(group, self.new_group());
        let Some(last) = group.last.take() else {
            return Ok(());
        };
        let point = ApplyPosition {
            lsn: last.end,
            commit_time: last.time,
            last_commit_lsn: Some(last.lsn),
        };
        // The rows and the recovery point are sent together if nothing is to be judged in between.
        let plain = group.ticket.is_plain() && !self.changes.may_remove_packages();
        killpoint::reach("apply.before_flush");
        match plain {
            true => self.flush_and_advance(&point).await?,
            false => self.changes.flush().await?,
        }
        let effects = std::mem::take(&mut self.changes.effects);
        for renamed in &effects.renamed {
            group.ticket.add_row(renamed);
        }
        let outcomes = group.ticket.outcomes().await?;
        let swaps: Vec<Swap> = outcomes.iter().filter_map(swap_of).collect();
        let removed = self.gone(&effects).await?;
        self.settling.look_beside(self.changes.session()).await?;
        let here = match self.settling.has_unavailable() {
            true => group.ticket.keys_here(),
            false => Vec::new(),
        };
        let verdict = Verdict {
            removed: &removed,
            here: &here,
            outcomes: &outcomes,
            inserted: effects.inserted,
            deleted: effects.removed.len() as u64,
            end: last.end,
            several: group.transactions > 1,
        };
        self.settling.judge(self.changes.session(), verdict).await?;
        if let Err(error) = self.settling.swap(&swaps, last.end).await {
            self.settling.unswap(self.point.lsn).await?;
            return Err(error.into());
        }
        if !plain {
            self.flush_and_advance(&point).await?;
        }
        self.commit_at(point).await?;
        if !swaps.is_empty() {
            self.settling.swapped(&swaps).await?;
        }
        group.ticket.commit();
        self.reach(last.end.max(group.reached));
        self.observer.applied(Applied {
            point,
            transactions: group.transactions,
            waiting: self.ahead.waiting(),
            unavailable_changed: self.settling.take_changed(),
        });
        Ok(())
    }
}

fn swap_of(outcome: &Admission) -> Option<Swap> {
    match outcome {
        Admission::Staged(swap) => Some(swap.clone()),
        _ => None,
    }
}

impl From<super::pgoutput::DecodeError> for Gap {
    fn from(error: super::pgoutput::DecodeError) -> Self {
        Gap::Decoding(error.to_string())
    }
}

/// Returns the keys of package rows, as `unavailable` and the stores have them.
pub(super) fn keys(named: &[PackageRow]) -> Vec<String> {
    named.iter().map(key_of).collect()
}
