//! Runs beside the stream: asks the primary for its status every ten seconds, acts on the answer,
//! and compares tables.
//!
//! Decoding does not see everything: a rewrite of a table sends no changes. So a table that is
//! stored in a new file is compared before lag counts as known, and the tables are compared one
//! after the other all day long.

use super::error::Gap;
use super::follow::{Channels, Follow};
use crate::cluster::{
    ComparedTable, Confirmation, LocalCluster, PrimaryStatus, Sequence, Session, WriteSession,
};
use crate::domain::Lsn;

use crate::replication::error::ReplicationError;
use crate::replication::live_compare::{Compared, Ours, compare};
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::sync::watch;

pub(super) const QUESTION: Duration = Duration::from_secs(10);
/// Maximum bytes of log that an idle primary keeps for us. Beyond that the recovery point is moved
/// over them, and its proof is given up.
const IDLE_HOLD_BYTES: u64 = 64 << 20;
/// Maximum number of answers that wait until the spare has applied up to their position.
const MAX_PENDING_ANSWERS: usize = 360;
/// Interval between comparisons of one table after the other. The configured share of it is used
/// for comparing.
const ROUND_INTERVAL: Duration = Duration::from_secs(60);
const MIN_REST: Duration = Duration::from_secs(1);
/// Shortest and longest pause after a failed comparison; the pause doubles each time.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));
/// Minimum time between two copies for the same table: a table that differs again earlier does not
/// get another copy.
const REPAIR_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// The spare's rows, which the applier brings forward at the same time.
struct Applied {
    session: WriteSession,
    reached: watch::Receiver<Lsn>,
}

impl Ours for Applied {
    fn session(&self) -> &Session {
        &self.session
    }

    async fn come_past(&mut self, place: Lsn, at_most: Duration) -> Result<bool, ReplicationError> {
        let reached = self.reached.wait_for(|reached| *reached >= place);
        match tokio::time::timeout(at_most, reached).await {
            Ok(Ok(_)) => Ok(true),
            // The applier has ended, and ends this task with it.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => Ok(false),
        }
    }

    /// There is no limit: the gate may hold the stream for days, and nothing is read again in that
    /// time.
    fn patience(&self) -> Option<Duration> {
        None
    }

    fn has_all_of_a_resting_primary(&self) -> bool {
        false
    }
}

/// Tells once that the history is proven, whatever has woken the task that looks.
struct ProofNews {
    proven: watch::Receiver<bool>,
    /// The result of the last look, and of the look before it.
    looks: (bool, bool),
}

impl ProofNews {
    fn of(proven: watch::Receiver<bool>) -> ProofNews {
        ProofNews {
            proven,
            looks: (false, false),
        }
    }

    fn look(&mut self) -> bool {
        self.looks = (*self.proven.borrow_and_update(), self.looks.0);
        self.looks.0
    }

    fn is_news(&self) -> bool {
        self.looks == (true, false)
    }

    /// Waits for a change since the last look.
    async fn changed(&mut self) {
        if self.proven.changed().await.is_err() {
            // The applier has ended, and ends this task with it.
            std::future::pending().await
        }
    }
}

/// The reason for a comparison, and its result.
struct Done {
    rewritten: bool,
    /// The tables, with the files that they had before they were read.
    tables: Vec<(String, i64)>,
    took: Duration,
    found: Result<Compared, ReplicationError>,
}

/// The comparisons; one runs at a time.
struct Comparing<'a> {
    known: BTreeMap<String, ComparedTable>,
    under_way: Option<Pin<Box<dyn Future<Output = Done> + 'a>>>,
    /// Time at which the next comparison of one table after the other is due.
    due: Instant,
    /// No comparison starts before this time, because the last one failed.
    not_before: Instant,
    pause: Duration,
}

impl<'a> Follow<'a> {
    /// Asks for as long as the stream goes on. Returns the reason why it must not go on.
    pub(super) async fn keep_asking(&self, first: PrimaryStatus, channels: Channels<'_>) -> Gap {
        match self.asking(first, channels).await {
            Ok(never) => match never {},
            Err(gap) => gap,
        }
    }

    async fn asking(
        &self,
        first: PrimaryStatus,
        mut channels: Channels<'_>,
    ) -> Result<std::convert::Infallible, Gap> {
        let mut pending: VecDeque<(Lsn, Confirmation, String)> = VecDeque::new();
        let mut sequences = Vec::new();
        let started = first.server_started.clone();
        let mut noted = started == self.recorded.server_started;
        let mut comparing = Comparing {
            known: self.state.compared().await?,
            under_way: None,
            due: Instant::now() + MIN_REST,
            not_before: Instant::now(),
            pause: RETRY_AFTER.0,
        };
        let mut latest = first.clone();
        let mut next = Some(first);
        let mut proof = ProofNews::of(channels.proven);
        let mut timer = tokio::time::interval(QUESTION);
        timer.tick().await;
        loop {
            let proven = proof.look();
            if proof.is_news() && next.is_none() {
                // The last answer was not used before the proof.
                next = Some(latest.clone());
            }
            if let Some(seen) = next.take() {
                self.is_of_the_stream(&seen, &started)?;
                self.look(&seen, &mut sequences, proven).await?;
                // An idle primary must not keep log for us that has no changes for the spare.
                let held = seen.slot.as_ref().map_or(0, |slot| slot.unconfirmed_bytes);
                if held > IDLE_HOLD_BYTES {
                    let _ = channels.advance.send(seen.wal);
                }
                if proven && !noted {
                    self.note_start(&seen).await?;
                    noted = true;
                }
                comparing.adopt(&seen, self).await?;
                let whole = self.incoming || comparing.rewritten(&seen).is_empty();
                if proven && whole {
                    channels.until.send_replace(self.until);
                    if pending.len() == MAX_PENDING_ANSWERS {
                        pending.pop_front();
                    }
                    let confirmation = Confirmation {
                        time: seen.time,
                        clock_offset_seconds: seen.clock_offset_seconds,
                    };
                    pending.push_back((seen.wal, confirmation, seen.transactions.clone()));
                }
                latest = seen;
            }
            let reached = *channels.applied.borrow_and_update();
            let mut confirmed = None;
            while pending.front().is_some_and(|(lsn, ..)| *lsn <= reached) {
                confirmed = pending.pop_front();
            }
            if let Some((_, confirmation, transactions)) = confirmed {
                if !self.incoming {
                    self.state.transactions(self.lock, &transactions).await?;
                }
                self.observer.confirmed(confirmation);
            }
            if proven && !self.incoming {
                comparing.begin(self, &latest, &channels.applied);
            }
            let wake = comparing.wake();
            tokio::select! {
                _ = timer.tick() => match self.ask().await {
                    Ok(seen) => next = Some(seen),
                    // The stream itself may go on; the lag grows, because nothing is confirmed.
                    Err(error) => log::debug!("{error}"),
                },
                changed = channels.applied.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
                () = proof.changed(), if !proven => {}
                done = comparing.done(), if comparing.under_way.is_some() => {
                    if self.judge(done, &mut comparing).await? {
                        // Positions that waited for this comparison may be confirmed now.
                        next = Some(self.ask().await.unwrap_or_else(|_| latest.clone()));
                    }
                },
                () = tokio::time::sleep_until(wake.into()), if comparing.under_way.is_none() => {}
            }
        }
    }

    /// Checks that the answer is from the server of the stream. The question has its own
    /// connection, and an address may lead to another server in between.
    pub(super) fn is_of_the_stream(&self, seen: &PrimaryStatus, started: &str) -> Result<(), Gap> {
        let same = seen.server_started == started
            && seen.system_id == self.recorded.system_id
            && seen.timeline == self.recorded.timeline;
        if same {
            return Ok(());
        }
        Err(Gap::Failed(ReplicationError::NotMet {
            text: format!(
                "the peer's address now leads to another server than the stream's, or that server was restarted: it is {} on timeline {}, started {}",
                seen.system_id, seen.timeline, seen.server_started
            ),
        }))
    }

    async fn look(
        &self,
        seen: &PrimaryStatus,
        sequences: &mut Vec<Sequence>,
        proven: bool,
    ) -> Result<(), Gap> {
        self.bounded(seen)?;
        if proven && *sequences != seen.sequences {
            let local = LocalCluster::of(self.config)
                .database(self.database)
                .await
                .map_err(ReplicationError::from)?;
            // A process that was paused and lost the lock in the meantime finds it out here, before
            // it sets a sequence.
            self.state.still_ours(self.lock).await?;
            let token = self.lock.token;
            local
                .set_sequences_as_holder(&seen.sequences, token)
                .await?;
            sequences.clone_from(&seen.sequences);
        }
        Ok(())
    }

    /// Records the result of a comparison. True: a rewritten table is known to be equal.
    async fn judge(&self, done: Done, comparing: &mut Comparing<'_>) -> Result<bool, Gap> {
        comparing.rest(self.config.verify.rolling, done.took);
        let compared = match done.found {
            Ok(compared) => compared,
            Err(error) => {
                log::debug!("the comparison failed and is tried again later: {error}");
                comparing.not_before = Instant::now() + comparing.pause;
                comparing.pause = (comparing.pause * 2).min(RETRY_AFTER.1);
                return Ok(false);
            }
        };
        comparing.pause = RETRY_AFTER.0;
        if let Some((table, rows)) = compared.differing.first() {
            let (table, rows) = (table.clone(), *rows);
            if done.rewritten || self.is_worth_a_copy(&table) {
                return Err(Gap::Content { table, rows });
            }
            log::warn!(
                "{rows} rows of {table} are on one side only, again after a copy was made for it; run `warm-spare verify` for details"
            );
        }
        self.state.record_compared(&done.tables).await?;
        comparing.known = self.state.compared().await?;
        self.observer.compared_tables(comparing.oldest());
        Ok(done.rewritten)
    }

    /// Returns whether a copy may remove the difference. A difference is repaired by one copy; if
    /// it stays, more copies do not remove it.
    fn is_worth_a_copy(&self, table: &str) -> bool {
        let mut differed = self.differed.lock().expect("no holder panics");
        let lately = differed
            .get(table)
            .is_some_and(|when| when.elapsed() < REPAIR_INTERVAL);
        differed.insert(table.to_string(), Instant::now());
        !lately
    }

    /// Compares the tables with these names: at least the first one, and as many as fit into
    /// `time`.
    async fn compare_tables(
        &self,
        wanted: Vec<(String, i64)>,
        reached: watch::Receiver<Lsn>,
        time: Option<Duration>,
    ) -> (Vec<(String, i64)>, Result<Compared, ReplicationError>) {
        let (begun, mut done, mut compared) = (Instant::now(), Vec::new(), Compared::default());
        let comparing = async {
            let mut ours = Applied {
                session: LocalCluster::of(self.config)
                    .database(self.database)
                    .await?,
                reached,
            };
            let tables = ours.session.tables().await?;
            for (name, file) in wanted {
                let table = tables.iter().find(|table| table.full_name() == name);
                if let Some(table) = table {
                    compare(self.config, &mut ours, table, None, &mut compared).await?;
                }
                done.push((name, file));
                if !compared.differing.is_empty() || time.is_some_and(|t| begun.elapsed() >= t) {
                    break;
                }
            }
            Ok(())
        };
        let ended: Result<(), ReplicationError> = comparing.await;
        (done, ended.map(|()| compared))
    }
}

impl<'a> Comparing<'a> {
    /// Takes unknown tables as they are. They are unknown if an older program made the copy.
    async fn adopt(&mut self, seen: &PrimaryStatus, follow: &Follow<'_>) -> Result<(), Gap> {
        if follow.incoming {
            return Ok(());
        }
        let unknown = seen
            .files
            .iter()
            .filter(|(table, _)| !self.known.contains_key(*table));
        let unknown: Vec<(String, i64)> = unknown
            .map(|(table, file)| (table.clone(), *file))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        follow.state.record_compared(&unknown).await?;
        self.known = follow.state.compared().await?;
        Ok(())
    }

    /// Returns the tables that are stored in another file than when they were last known to be
    /// equal.
    fn rewritten(&self, seen: &PrimaryStatus) -> Vec<(String, i64)> {
        let moved = |(table, file): &(&String, &i64)| {
            let known = self.known.get(*table);
            known.is_some_and(|known| known.file != **file)
        };
        let moved = seen.files.iter().filter(moved);
        moved.map(|(table, file)| (table.clone(), *file)).collect()
    }

    fn oldest(&self) -> Option<chrono::DateTime<chrono::Utc>> {
        self.known.values().map(|known| known.time).min()
    }

    /// Begins the comparison that is due, if none is running.
    fn begin<'b: 'a>(
        &mut self,
        follow: &'a Follow<'b>,
        seen: &PrimaryStatus,
        applied: &watch::Receiver<Lsn>,
    ) {
        let now = Instant::now();
        if self.under_way.is_some() || self.not_before > now {
            return;
        }
        let rewritten = self.rewritten(seen);
        let percent = follow.config.verify.rolling;
        let (wanted, time, is_rewritten) = if !rewritten.is_empty() {
            (rewritten, None, true)
        } else if percent > 0 && self.due <= now {
            let mut all: Vec<_> = seen.files.iter().collect();
            all.sort_by_key(|(table, _)| self.known.get(*table).map(|known| known.time));
            let all = all.into_iter().map(|(table, file)| (table.clone(), *file));
            (all.collect(), Some(ROUND_INTERVAL * percent / 100), false)
        } else {
            return;
        };
        let applied = applied.clone();
        self.under_way = Some(Box::pin(async move {
            let begun = Instant::now();
            let (tables, found) = follow.compare_tables(wanted, applied, time).await;
            Done {
                rewritten: is_rewritten,
                tables,
                took: begun.elapsed(),
                found,
            }
        }));
    }

    /// Returns the time at which to check again for a due comparison.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let later = [self.not_before, self.due].into_iter().filter(|t| *t > now);
        later.min().unwrap_or(now + ROUND_INTERVAL)
    }

    /// Waits for the end of the running comparison; for ever, if none is running.
    async fn done(&mut self) -> Done {
        let Some(under_way) = &mut self.under_way else {
            return std::future::pending().await;
        };
        let done = under_way.await;
        self.under_way = None;
        done
    }

    /// Sets the time of the next comparison, so that all comparisons keep their share of the time.
    fn rest(&mut self, percent: u32, took: Duration) {
        let rest = match percent {
            0 => ROUND_INTERVAL,
            percent => (took * (100 - percent.min(100)) / percent)
                .max(ROUND_INTERVAL * (100 - percent.min(100)) / 100),
        };
        self.due = Instant::now() + rest.max(MIN_REST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_news_once_whatever_has_woken_the_task() {
        let (sender, receiver) = watch::channel(false);
        let mut proof = ProofNews::of(receiver);
        assert!(!proof.look() && !proof.is_news());
        // Another branch of the task's wait ends first, and the task looks again.
        sender.send_replace(true);
        assert!(proof.look() && proof.is_news());
        assert!(proof.look() && !proof.is_news());
    }

    #[test]
    fn a_proof_from_before_the_first_look_is_news() {
        let (_sender, receiver) = watch::channel(true);
        let mut proof = ProofNews::of(receiver);
        assert!(proof.look() && proof.is_news());
    }
}
