//! Applies the primary's transactions in the order of their commits. One transaction of the spare
//! holds one or several of the primary's, and the recovery point.

use super::changes::{Change, Changes, Named};
use super::effects::{Settling, Verdict};
use super::error::Gap;
use super::gate::{Gate, Outcome, WantId, key_of};
use super::lookahead::{Ahead, Info, key, named};
use super::pgoutput::{Begin, Commit, Message, decode};
use super::spool::{Frame, Receiver};
use super::{Applied, Told};
use crate::cluster::CopiedPoint;
use crate::domain::Lsn;
use crate::killpoint;
use crate::replication::artifact::round::Swap;
use crate::replication::descent::Doubt;
use chrono::{DateTime, Utc};
use std::time::{Duration, Instant};
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
/// The lock blocks nobody. `end_former_writers` finds our session by it if our process hangs.
const BEGIN: &str = "BEGIN; LOCK TABLE warm_spare.recovery_point IN ROW SHARE MODE";
/// Maximum number of outstanding artifact requests for rows that the look-ahead did not scan.
const MAX_LATE_REQUESTS: usize = 512;
/// Interval between reports of the number of waiting transactions, while the gate waits.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Applier<'a> {
    pub changes: Changes,
    pub gate: Gate,
    pub ahead: Ahead,
    pub spool: Receiver,
    pub settling: Settling<'a>,
    pub told: &'a dyn Told,
    /// The copy from which following goes on.
    pub recorded: &'a CopiedPoint,
    /// The recovery point as it is stored.
    pub point: Point,
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

/// The position up to which the spare has applied the primary's transactions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub lsn: Lsn,
    pub commit_time: DateTime<Utc>,
    /// Position at which the commit record of the last applied transaction begins. The stream is
    /// requested from this position: the same commit at the same position proves that the primary's
    /// history is the one that the spare has followed. None: nothing was applied since the copy, or
    /// since the point was moved over log without changes for the spare.
    pub mark: Option<Lsn>,
}

impl Point {
    /// Returns the position from which the stream is requested.
    pub fn resume(&self) -> Lsn {
        self.mark.unwrap_or(self.lsn)
    }
}

/// The contents of the spare's open transaction.
#[derive(Default)]
struct Group {
    transactions: u64,
    bytes: usize,
    wants: Vec<WantId>,
    /// Requests for rows that the look-ahead did not scan.
    late: Vec<WantId>,
    outcomes: Vec<Outcome>,
    last: Option<Commit>,
}

impl Applier<'_> {
    /// Applies until every transaction before `until` is applied; without end while `until` is
    /// None. `advance` asks to move the recovery point over log without changes for the spare, so
    /// that the primary need not keep it.
    pub(super) async fn run(
        &mut self,
        until: &mut watch::Receiver<Option<Lsn>>,
        advance: &mut watch::Receiver<Lsn>,
    ) -> Result<Point, Gap> {
        let mut group = Group::default();
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
                None => self.commit(std::mem::take(&mut group)).await?,
                Some(Frame::Reached(lsn)) => {
                    if open {
                        self.commit(std::mem::take(&mut group)).await?;
                    }
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
        let stood = CopiedPoint {
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

    async fn transaction(&mut self, begin: &Begin, group: &mut Group) -> Result<(), Gap> {
        let info = self.ahead.known(begin.final_lsn).await;
        let mut looked_at = info.wants.len();
        let alone = self.careful || info.removes || info.is_large() || info.cut;
        if group.transactions > 0 && (alone || !self.passes(&info)) {
            self.commit(std::mem::take(group)).await?;
        }
        if info.complete {
            // This comes before a row is written: a transaction that waits for days must not be
            // open on the spare for days.
            self.ahead.take(begin.final_lsn);
            self.wait(&info.wants).await?;
            group.wants.extend(&info.wants);
        } else {
            looked_at = 0;
        }
        if group.transactions == 0 {
            self.changes
                .session()
                .batch("beginning to apply", BEGIN)
                .await?;
        }
        let commit = self.rows(&info, looked_at, group).await?;
        if !info.complete
            && let Some(later) = self.ahead.take(begin.final_lsn)
        {
            group.wants.extend(&later.wants);
        }
        group.transactions += 1;
        group.last = Some(commit);
        if alone || group.transactions >= MAX_TRANSACTIONS || group.bytes >= MAX_BYTES {
            self.commit(std::mem::take(group)).await?;
        }
        Ok(())
    }

    /// Returns whether all artifacts of the transaction are here already.
    fn passes(&self, info: &Info) -> bool {
        let settled = self.gate.settled(&info.wants);
        settled.is_some_and(|all| all.iter().all(|outcome| matches!(outcome, Outcome::Here)))
    }

    async fn wait(&self, wants: &[WantId]) -> Result<Vec<Outcome>, Gap> {
        if wants.is_empty() {
            return Ok(Vec::new());
        }
        let begun = Instant::now();
        killpoint::reach("gate.waiting");
        let told = self.told;
        let waiting = self.gate.wait(wants, |trouble| told.trouble(trouble));
        tokio::pin!(waiting);
        let outcomes = loop {
            if self.gate.settled(wants).is_none() {
                // This transaction, which is removed from the list already, and the transactions
                // behind it.
                told.waiting(self.ahead.waiting() + 1);
            }
            tokio::select! {
                outcomes = &mut waiting => break outcomes,
                () = tokio::time::sleep(PROGRESS_INTERVAL) => {}
            }
        };
        self.told.waited(begun.elapsed());
        none_failed(outcomes)
    }

    /// Takes the rows of one transaction, up to its commit.
    async fn rows(
        &mut self,
        info: &Info,
        looked_at: usize,
        group: &mut Group,
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
                            self.want(insert.relation, &insert.new, group).await?;
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
    async fn want(
        &self,
        relation: u32,
        row: &[super::pgoutput::Value],
        group: &mut Group,
    ) -> Result<(), Gap> {
        let target = self.changes.target(relation)?;
        let Some(columns) = target.package else {
            return Ok(());
        };
        let named = named(row, columns);
        let want = self.gate.want(&named, key(row, &target.keys), None);
        group.late.push(want);
        if group.late.len() >= MAX_LATE_REQUESTS {
            let outcomes = self.wait(&group.late).await?;
            // The gate remembers their keys until the commit.
            self.gate.shrink(&group.late);
            group.late.clear();
            let lacking = outcomes.into_iter().filter(|o| !matches!(o, Outcome::Here));
            group.outcomes.extend(lacking);
        }
        Ok(())
    }

    async fn commit(&mut self, mut group: Group) -> Result<(), Gap> {
        let Some(last) = group.last.take() else {
            return Ok(());
        };
        killpoint::reach("apply.before_flush");
        self.changes.flush().await?;
        let effects = std::mem::take(&mut self.changes.effects);
        group.wants.append(&mut group.late);
        for renamed in &effects.renamed {
            group.wants.push(self.gate.want(renamed, Vec::new(), None));
        }
        let mut outcomes = match self.gate.settled(&group.wants) {
            Some(outcomes) => none_failed(outcomes)?,
            None => self.wait(&group.wants).await?,
        };
        outcomes.retain(|outcome| !matches!(outcome, Outcome::Here));
        outcomes.append(&mut group.outcomes);
        let swaps: Vec<Swap> = outcomes.iter().filter_map(swap_of).collect();
        let removed = self.gone(&effects).await?;
        let here = match self.settling.lacks() {
            true => self.gate.keys_here(&group.wants),
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
        let point = Point {
            lsn: last.end,
            commit_time: last.time,
            mark: Some(last.lsn),
        };
        self.store(point).await?;
        if !swaps.is_empty() {
            self.settling.swapped(&swaps).await?;
        }
        self.gate.forget(&group.wants);
        self.gate.forget_shrunk();
        if self.ahead.is_empty() {
            self.gate.forget_deletions();
        }
        self.reach(last.end);
        self.told.applied(Applied {
            point,
            transactions: group.transactions,
            waiting: self.ahead.waiting(),
            lacking: self.settling.take_changed(),
        });
        Ok(())
    }
}

/// Returns an error if it could not be found out for a row whether its artifact is here: no such
/// row is admitted.
fn none_failed(outcomes: Vec<Outcome>) -> Result<Vec<Outcome>, Gap> {
    for outcome in &outcomes {
        if let Outcome::Failed(error) = outcome {
            return Err(Gap::Waited(error.clone()));
        }
    }
    Ok(outcomes)
}

fn swap_of(outcome: &Outcome) -> Option<Swap> {
    match outcome {
        Outcome::Staged(swap) => Some(swap.clone()),
        _ => None,
    }
}

impl From<super::pgoutput::DecodeError> for Gap {
    fn from(error: super::pgoutput::DecodeError) -> Self {
        Gap::Decoding(error.to_string())
    }
}

/// Returns the keys of package rows, as `unavailable` and the stores have them.
pub(super) fn keys(named: &[Named]) -> Vec<String> {
    named.iter().map(key_of).collect()
}
