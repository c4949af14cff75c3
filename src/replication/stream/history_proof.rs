//! Proves that the primary's history is the one that the spare has followed. Before that is proven,
//! nothing that comes from the primary changes anything here: no row, no sequence, no artifact, no
//! deletion.
//!
//! There are two ways. The *mark*: the last applied transaction is sent once more, at the same
//! position and time. Where there is no mark (nothing was applied since the copy, or since the
//! point was moved over log without changes), a *finished comparison*: the slot's changes are
//! applied in a transaction that is never committed, and in this transaction all rows equal the
//! primary's.

use super::changes::{Change, Changes};
use super::error::Gap;
use super::follow::{Follow, why};
use super::pgoutput::{Message, decode};
use super::primary_status;
use super::pump::Pump;
use super::spool::{Frame, Receiver, SpoolError, spool};
use crate::cluster::{
    ApplyPosition, LocalCluster, PeerCluster, PrimaryStatus, RecoveryPoint, Session,
};
use crate::domain::Lsn;
use crate::replication::descent::Doubt;
use crate::replication::error::ReplicationError;
use crate::replication::live_compare::{Ours, compare_all};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The proof that is needed before the stream is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// No proof: it is the same run of the same server, and its slot is where this spare has put
    /// it.
    None,
    Mark,
    Comparison,
}

impl Proof {
    /// Returns the proof that is needed. Err: the history cannot be proven.
    pub(super) fn wanted(
        seen: &PrimaryStatus,
        recorded: &RecoveryPoint,
        point: ApplyPosition,
        incoming: bool,
    ) -> Result<Proof, String> {
        let same_run = seen.server_started == recorded.server_started;
        if point.last_commit_lsn.is_some() {
            return Ok(Proof::Mark);
        }
        if incoming && !same_run {
            return Err("the primary's server was restarted while it was copied".into());
        }
        // A whole machine that was set back, with its memory, is of the same run. But its slot has
        // gone back too.
        let slot = seen.slot.as_ref();
        let stands = slot.is_some_and(|slot| slot.confirmed == Some(point.lsn));
        Ok(match same_run && (stands || incoming) {
            true => Proof::None,
            false => Proof::Comparison,
        })
    }
}

/// The spare with the slot's changes applied, in a transaction that is not committed.
struct Rehearsal {
    changes: Changes,
    spool: Receiver,
    /// Every change before this position was sent and is in the open transaction.
    reached: Lsn,
    /// The reason why it cannot go on.
    failed: Option<Gap>,
}

impl Ours for Rehearsal {
    fn session(&self) -> &Session {
        self.changes.session()
    }

    async fn come_past(&mut self, place: Lsn, at_most: Duration) -> Result<bool, ReplicationError> {
        match tokio::time::timeout(at_most, self.apply_to(place)).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(gap)) => {
                let text = gap.to_string();
                self.failed = Some(gap);
                Err(ReplicationError::NotMet { text })
            }
            Err(_) => Ok(false),
        }
    }

    fn patience(&self) -> Option<Duration> {
        None
    }

    fn has_all_of_a_resting_primary(&self) -> bool {
        true
    }
}

impl Rehearsal {
    /// Applies changes up to `place`. It may be dropped while it waits for more changes.
    async fn apply_to(&mut self, place: Lsn) -> Result<(), Gap> {
        while self.reached < place {
            match self.spool.recv().await? {
                Some(Frame::Reached(lsn)) => {
                    self.changes.flush().await?;
                    self.reached = self.reached.max(lsn);
                }
                Some(Frame::Data(bytes)) => {
                    let length = bytes.len();
                    self.take(decode(bytes)?, length).await?;
                }
                // The task that reads the stream reports why it ended.
                None => std::future::pending().await,
            }
        }
        Ok(())
    }

    async fn take(&mut self, message: Message, length: usize) -> Result<(), Gap> {
        match message {
            Message::Insert(insert) => {
                let change = Change::Insert(insert.new);
                self.changes.add(insert.relation, change, length).await
            }
            Message::Update(update) => {
                let (old, new) = (update.old, update.new);
                let change = Change::Update { old, new };
                self.changes.add(update.relation, change, length).await
            }
            Message::Delete(delete) => {
                let change = Change::Delete(delete.old);
                self.changes.add(delete.relation, change, length).await
            }
            Message::Truncate(truncate) => self.changes.truncate(&truncate).await,
            Message::Relation(relation) => self.changes.relation(&relation).await,
            Message::Type(named) => {
                self.changes.name_type(named.id, named.schema, named.name);
                Ok(())
            }
            Message::Commit(commit) => {
                self.changes.flush().await?;
                self.changes.effects = Default::default();
                self.reached = self.reached.max(commit.end);
                Ok(())
            }
            Message::Begin(_) | Message::Origin(_) | Message::Logical(_) => Ok(()),
        }
    }
}

impl Follow<'_> {
    /// Proves the history by comparison. It confirms nothing to the slot, and commits nothing here.
    pub(super) async fn compare_history(
        &self,
        seen: &PrimaryStatus,
        point: ApplyPosition,
    ) -> Result<(), Gap> {
        log::info!(
            "peer: no transaction proves that its history continues the spare's; the rows of both sides are compared before anything is applied"
        );
        // If this does not finish, a full copy has to compare by itself, even if the server is of
        // the same start.
        self.state.server_started(self.lock, "").await?;
        let session = LocalCluster::of(self.config)
            .applying(self.database)
            .await
            .map_err(ReplicationError::from)?;
        session.begin("beginning to compare").await?;
        let (sender, receiver) = spool(self.memory(), self.disk(), &self.spool);
        let (_nothing, durable) = watch::channel(Lsn(0));
        let pump = Pump {
            stream: self.stream(point).await?,
            spool: sender,
            lookahead: None,
            durable,
            received: point.start_lsn(),
        };
        let mut reading = JoinSet::new();
        reading.spawn(pump.run());
        let mut rehearsal = Rehearsal {
            changes: Changes::within_transaction(session),
            spool: receiver,
            reached: point.lsn,
            failed: None,
        };
        let compared = tokio::select! {
            compared = compare_all(self.config, &mut rehearsal, None) => compared.map_err(Gap::from),
            ended = reading.join_next() => Err(why(ended)),
            gap = self.keep_bounds() => Err(gap),
        };
        drop(reading);
        let compared = match (rehearsal.failed.take(), compared) {
            (None, Ok(compared)) => compared,
            // A change that the spare's rows refuse was made to other rows.
            (Some(gap @ (Gap::Row { .. } | Gap::Refused { .. })), _) => {
                let text = format!("{gap}: the primary was set back to an older copy");
                return Err(self.went_back(&point, text));
            }
            (_, Err(Gap::Spool(SpoolError::Full { limit }))) => {
                return Err(Gap::Broken(format!(
                    "the primary's history cannot be proven, because more than {limit} bytes of changes wait to be applied"
                )));
            }
            (Some(gap), _) | (None, Err(gap)) => return Err(gap),
        };
        let session = rehearsal.changes.session();
        session.roll_back("ending the comparison").await?;
        if let Some((table, rows)) = compared.differing.first() {
            let text = format!(
                "since the primary's server was restarted, {rows} rows of {table} are on one side only: it was set back to an older copy, or rows were changed by hand or rewritten in the meantime"
            );
            return Err(self.went_back(&point, text));
        }
        log::info!(
            "peer: the rows of both sides are the same ({} in {} tables)",
            compared.rows,
            compared.tables
        );
        self.note_start(seen).await
    }

    fn went_back(&self, point: &ApplyPosition, text: String) -> Gap {
        let here = RecoveryPoint {
            lsn: point.lsn.to_string(),
            ..self.recorded.clone()
        };
        Gap::WentBack(Doubt::set_back(&here, text))
    }

    /// Records that the history is proven for this run of the primary's server.
    pub(super) async fn note_start(&self, seen: &PrimaryStatus) -> Result<(), Gap> {
        if !self.incoming {
            self.state
                .server_started(self.lock, &seen.server_started)
                .await?;
            self.observer.compared(&seen.server_started);
        }
        Ok(())
    }

    /// Checks, while nothing is applied, that the slot holds no more log than it may.
    async fn keep_bounds(&self) -> Gap {
        loop {
            tokio::time::sleep(super::asking::QUESTION).await;
            match self.ask().await {
                Ok(seen) => {
                    if let Err(gap) = self.bounded(&seen) {
                        return gap;
                    }
                }
                Err(error) => log::debug!("{error}"),
            }
        }
    }

    /// Checks the log that the slot holds for us, and that the slot and the tables have not
    /// changed.
    pub(super) fn bounded(&self, seen: &PrimaryStatus) -> Result<(), Gap> {
        let database = &self.config.peer.datastore.database;
        primary_status::check_intact(seen, &self.recorded, database).map_err(|text| {
            match seen.schema == self.recorded.schema() {
                true => Gap::Broken(text),
                false => Gap::Schema(text),
            }
        })?;
        // A transaction that is left open keeps the server's log whatever we do. Dropping our slot
        // would not free the log, and a new slot could not be created.
        let held = seen.slot.as_ref().map_or(0, |slot| slot.unconfirmed_bytes);
        let limit = self.config.replication.wal_hold_limit;
        // A slot that was made by hand is not dropped by us.
        if held > limit && !self.names.slot_is_premade {
            return Err(Gap::Held { held, limit });
        }
        self.observer.seen(seen);
        Ok(())
    }

    /// Opens the stream from the spare's position.
    pub(super) async fn stream(
        &self,
        point: ApplyPosition,
    ) -> Result<crate::cluster::WalStream, ReplicationError> {
        let session = PeerCluster::of(self.config).replication().await?;
        let (slot, publication) = (&self.names.slot, &self.names.publication);
        Ok(session.start(slot, publication, point.start_lsn()).await?)
    }

    pub(super) fn memory(&self) -> usize {
        usize::try_from(self.config.replication.buffer / 4).unwrap_or(usize::MAX)
    }

    pub(super) fn disk(&self) -> u64 {
        self.config.replication.wal_hold_limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::stream::primary_status::tests::seen_at;
    use chrono::Utc;

    fn recorded(started: &str) -> RecoveryPoint {
        RecoveryPoint {
            server_started: started.into(),
            ..RecoveryPoint::sample()
        }
    }

    #[test]
    fn a_history_is_believed_by_its_mark_or_by_a_comparison() {
        let point = |mark| ApplyPosition {
            lsn: Lsn(0x100),
            commit_time: Utc::now(),
            last_commit_lsn: mark,
        };
        let wanted = |started: &str, confirmed, mark, incoming| {
            let seen = seen_at(started, Lsn(confirmed));
            Proof::wanted(&seen, &recorded("then"), point(mark), incoming)
        };
        let mark = Some(Lsn(0x90));
        assert_eq!(wanted("later", 0x80, mark, false), Ok(Proof::Mark));
        assert_eq!(wanted("then", 0x80, mark, false), Ok(Proof::Mark));
        assert_eq!(wanted("later", 0x100, None, false), Ok(Proof::Comparison));
        assert_eq!(wanted("then", 0x100, None, false), Ok(Proof::None));
        // The run is the same, and yet its slot has gone back.
        assert_eq!(wanted("then", 0x80, None, false), Ok(Proof::Comparison));
        assert_eq!(wanted("then", 0x80, None, true), Ok(Proof::None));
        assert!(wanted("later", 0x100, None, true).is_err());
    }
}
