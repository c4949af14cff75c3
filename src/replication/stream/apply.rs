//! Applies transactions in the order of their commits: one of ours for one or several of the primary's, the recovery
//! point in the same transaction.

use super::super::descent::Doubt;
use super::changes::{Change, Changes, Effects, Named};
use super::effects::{Settling, Verdict};
use super::error::Gap;
use super::gate::{Gate, Outcome, WantId, key_of};
use super::lookahead::{Ahead, Info, key, named};
use super::pgoutput::{Begin, Commit, Message, decode};
use super::spool::{Frame, Receiver};
use super::{Applied, Told};
use crate::cluster::{CopiedPoint, StateError};
use crate::domain::Lsn;
use crate::killpoint;
use crate::replication::artifact::round::Swap;
use chrono::{DateTime, Utc};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Transactions of the primary in one of ours, and their bytes.
const MOST_TOGETHER: u64 = 1000;
const MOST_BYTES: usize = 8 << 20;
/// With so many in it, a group is of a spare that catches up, and waits a moment for what is on its way.
const CATCHING_UP: u64 = 20;
const LINGER: Duration = Duration::from_millis(3);
/// The lock stops nobody. By it `end_former_writers` finds us, should we fall asleep.
const BEGIN: &str = "BEGIN; LOCK TABLE warm_spare.recovery_point IN ROW SHARE MODE";
/// Rows that nobody looked at ahead of time are waited for so many at once.
const LATE_AT_ONCE: usize = 512;
/// While the gate waits, how much waits is told so often.
const TELL: Duration = Duration::from_secs(1);

pub struct Applier<'a> {
    pub changes: Changes,
    pub gate: Gate,
    pub ahead: Ahead,
    pub spool: Receiver,
    pub settling: Settling<'a>,
    pub told: &'a dyn Told,
    /// The copy that it goes on from.
    pub recorded: &'a CopiedPoint,
    /// The recovery point as it is stored.
    pub point: Point,
    /// What the primary may forget.
    pub durable: watch::Sender<Lsn>,
    /// Everything before it was sent and is applied.
    pub reached: watch::Sender<Lsn>,
    /// Every transaction by itself.
    pub careful: bool,
    pub token: i64,
    /// The transaction that the stream must begin with, for it is the last one that is here.
    pub unproven: Option<Lsn>,
    /// Told when it has.
    pub proven: watch::Sender<bool>,
}

/// Where the spare stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub lsn: Lsn,
    pub commit_time: DateTime<Utc>,
    /// Where the commit of the last transaction begins. The stream is asked for from there: the same commit at the same
    /// place proves that the primary's history is the one that was followed. None: nothing was applied since the copy,
    /// or since the point was moved over what held nothing.
    pub mark: Option<Lsn>,
}

impl Point {
    /// Where the stream begins again.
    pub fn resume(&self) -> Lsn {
        self.mark.unwrap_or(self.lsn)
    }
}

/// What the open transaction of ours holds.
#[derive(Default)]
struct Group {
    transactions: u64,
    bytes: usize,
    wants: Vec<WantId>,
    /// Of rows that nobody looked at ahead of time.
    late: Vec<WantId>,
    outcomes: Vec<Outcome>,
    last: Option<Commit>,
}

impl Applier<'_> {
    /// Applies until everything before `until` is applied; for ever, while that is none. `advance` asks for the recovery
    /// point to be moved over what holds nothing of ours, so that the primary need not keep it.
    pub async fn run(
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
                    None if group.transactions >= CATCHING_UP => self.linger().await,
                    frame => frame,
                },
                false => tokio::select! {
                    frame = self.spool.recv() => match frame? {
                        Some(frame) => Some(frame),
                        // Whoever reads the stream says why it ended.
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
                    // One that is not transactional; nobody waits for one here.
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

    /// An end of the stream is heard of again, when what is open is committed.
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
            "the primary has no longer the transaction of {} that the spare stands at: it was set back to an older copy, and written to since",
            self.point.commit_time.format("%Y-%m-%d %H:%M:%S%.6f UTC")
        );
        let stood = CopiedPoint {
            lsn: self.point.lsn.to_string(),
            ..self.recorded.clone()
        };
        Gap::WentBack(Doubt::set_back(&stood, text))
    }

    /// The last transaction that is here comes once more, and is not applied once more.
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
            // Before a row is written: a transaction that waits for days must not be open here for days.
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
        if alone || group.transactions >= MOST_TOGETHER || group.bytes >= MOST_BYTES {
            self.commit(std::mem::take(group)).await?;
        }
        Ok(())
    }

    /// Its artifacts are here already.
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
                // This one, which is taken from the list already, and those behind it.
                told.waiting(self.ahead.waiting() + 1);
            }
            tokio::select! {
                outcomes = &mut waiting => break outcomes,
                () = tokio::time::sleep(TELL) => {}
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
                // In the middle of a transaction it says nothing new.
                Some(Frame::Reached(_)) => continue,
                None => std::future::pending().await,
            };
            let length = bytes.len();
            group.bytes += length;
            match decode(bytes)? {
                Message::Commit(commit) => return Ok(commit),
                Message::Insert(insert) => {
                    if self.changes.target(insert.relation)?.package.is_some() {
                        // What has arrived by now was looked at, or never will be.
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
                // Where it came from before does not matter here.
                Message::Origin(_) | Message::Logical(_) => {}
                Message::Begin(_) => {
                    return Err(Gap::Decoding("a transaction within a transaction".into()));
                }
            }
        }
    }

    /// A package row that nobody looked at ahead of time.
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
        if group.late.len() >= LATE_AT_ONCE {
            let outcomes = self.wait(&group.late).await?;
            // Their keys stay named until the commit.
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

    /// Packages that are not there any more, under whatever checksum. Of those that were taken away and put there in the
    /// same transaction, only the table knows which came last.
    async fn gone(&self, effects: &Effects) -> Result<Vec<Named>, Gap> {
        if effects.removed.is_empty() {
            return Ok(Vec::new());
        }
        let package = |named: &Named| (named.ident.clone(), named.target.clone());
        let removed: (Vec<String>, Vec<String>) = effects.removed.iter().map(package).unzip();
        let sql = "SELECT DISTINCT ident, target FROM public.origin_packages \
                   WHERE (ident, target) IN (SELECT * FROM unnest($1::text[], $2::text[]))";
        let doing = "looking which packages are there again";
        let session = self.changes.session();
        let rows = session.query(doing, sql, &[&removed.0, &removed.1]).await?;
        let mut there: HashSet<_> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let mut gone = effects.removed.clone();
        gone.retain(|named| there.insert(package(named)));
        Ok(gone)
    }

    /// With what is in the open transaction. Somebody else's point, or another holder's token, stops it.
    async fn store(&mut self, point: Point) -> Result<(), Gap> {
        let sql = "UPDATE warm_spare.recovery_point SET lsn = $1::text::pg_lsn, commit_time = $2, \
                     mark = $5::text::pg_lsn WHERE lsn = $3::text::pg_lsn AND token = $4";
        let (new, old) = (point.lsn.to_string(), self.point.lsn.to_string());
        let mark = point.mark.map(|mark| mark.to_string());
        let session = self.changes.session();
        let stored = session
            .execute(
                "storing the recovery point",
                sql,
                &[&new, &point.commit_time, &old, &self.token, &mark],
            )
            .await?;
        if stored != 1 {
            return Err(StateError::Superseded.into());
        }
        killpoint::reach("apply.before_commit");
        session
            .batch("committing what was applied", "COMMIT")
            .await?;
        killpoint::reach("apply.after_commit");
        self.point = point;
        let _ = self.durable.send(point.resume());
        Ok(())
    }

    /// Over what was read and holds nothing for us.
    async fn advance(&mut self) -> Result<(), Gap> {
        let reached = self.at();
        if reached <= self.point.lsn || self.unproven.is_some() {
            return Ok(());
        }
        self.changes
            .session()
            .batch("beginning to apply", BEGIN)
            .await?;
        killpoint::reach("confirm.before_commit");
        let point = Point {
            lsn: reached,
            commit_time: self.point.commit_time,
            mark: None,
        };
        self.store(point).await?;
        self.told.applied(Applied {
            point,
            transactions: 0,
            waiting: self.ahead.waiting(),
            lacking: false,
        });
        Ok(())
    }
}

/// No row passes because it could not be found out whether its artifact is here.
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

/// For `unavailable` and the stores.
pub fn keys(named: &[Named]) -> Vec<String> {
    named.iter().map(key_of).collect()
}
