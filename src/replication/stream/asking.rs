//! Beside the stream: the question every ten seconds, what follows from its answer, and comparisons of tables.
//!
//! Decoding does not see everything: a rewrite of a table sends nothing of it. So a table whose file is another one is
//! compared before lag counts as known, and one table after the other is compared all day long.

use super::super::error::PassError;
use super::error::Gap;
use super::follow::{Channels, Follow};
use super::primary_status::Seen;
use crate::cluster::{ComparedTable, Confirmation, LocalSession, Session};
use crate::domain::Lsn;
use crate::replication::baseline::sequences::{Sequence, set_as_holder};
use crate::replication::baseline::tables;
use crate::replication::live_compare::{Compared, Ours, compare};
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::sync::watch;

pub const QUESTION: Duration = Duration::from_secs(10);
/// An idle primary may hold so much for us before the recovery point is moved over it, and its proof given up.
const IDLE_HOLD: u64 = 64 << 20;
/// Answers that wait for the spare to come so far.
const MOST_PENDING: usize = 360;
/// Comparisons of one table after the other: so often, for their share of that time.
const ROUND: Duration = Duration::from_secs(60);
const LEAST_REST: Duration = Duration::from_secs(1);
/// After a comparison that failed; doubled each time.
const AGAIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));
/// A table that differs again so soon after a copy was made for it does not get another one.
const REPAIRED: Duration = Duration::from_secs(24 * 3600);

/// Our rows, which the applier beside brings forward.
struct Applied {
    session: LocalSession,
    reached: watch::Receiver<Lsn>,
}

impl Ours for Applied {
    fn session(&self) -> &Session {
        &self.session
    }

    async fn come_past(&mut self, place: Lsn, at_most: Duration) -> Result<bool, PassError> {
        let reached = self.reached.wait_for(|reached| *reached >= place);
        match tokio::time::timeout(at_most, reached).await {
            Ok(Ok(_)) => Ok(true),
            // The applier is gone, and takes us with it.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => Ok(false),
        }
    }

    /// The gate may hold the stream for days, and nothing is read again meanwhile.
    fn patience(&self) -> Option<Duration> {
        None
    }

    fn has_all_of_a_resting_primary(&self) -> bool {
        false
    }
}

/// What a comparison was made for, and what it found.
struct Done {
    rewritten: bool,
    /// The tables, with the files that they had before they were read.
    tables: Vec<(String, i64)>,
    took: Duration,
    found: Result<Compared, PassError>,
}

/// Comparisons, one at a time.
struct Comparing<'a> {
    known: BTreeMap<String, ComparedTable>,
    under_way: Option<Pin<Box<dyn Future<Output = Done> + 'a>>>,
    /// When the next of one table after the other is due.
    due: Instant,
    /// Nothing before it: the last one failed.
    not_before: Instant,
    pause: Duration,
}

impl<'a> Follow<'a> {
    /// Asks for as long as the stream goes; returns why it must not go on.
    pub(super) async fn keep_asking(&self, first: Seen, channels: Channels<'_>) -> Gap {
        match self.asking(first, channels).await {
            Ok(never) => match never {},
            Err(gap) => gap,
        }
    }

    async fn asking(
        &self,
        first: Seen,
        mut channels: Channels<'_>,
    ) -> Result<std::convert::Infallible, Gap> {
        let mut pending: VecDeque<(Lsn, Confirmation, String)> = VecDeque::new();
        let mut sequences = Vec::new();
        let started = first.server_started.clone();
        let mut noted = started == self.recorded.server_started;
        let mut comparing = Comparing {
            known: self.state.compared().await?,
            under_way: None,
            due: Instant::now() + LEAST_REST,
            not_before: Instant::now(),
            pause: AGAIN.0,
        };
        let mut latest = first.clone();
        let mut next = Some(first);
        let mut timer = tokio::time::interval(QUESTION);
        timer.tick().await;
        loop {
            let proven = *channels.proven.borrow_and_update();
            if let Some(seen) = next.take() {
                self.is_of_the_stream(&seen, &started)?;
                self.look(&seen, &mut sequences, proven).await?;
                // An idle primary must not keep for us what holds nothing of ours.
                let held = seen.slot.as_ref().map_or(0, |slot| slot.unconfirmed_bytes);
                if held > IDLE_HOLD {
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
                    if pending.len() == MOST_PENDING {
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
                self.told.confirmed(confirmation);
            }
            if proven && !self.incoming {
                comparing.begin(self, &latest, &channels.applied);
            }
            let wake = comparing.wake();
            tokio::select! {
                _ = timer.tick() => match self.ask().await {
                    Ok(seen) => next = Some(seen),
                    // The stream itself may well go on; what is not confirmed makes the lag grow.
                    Err(error) => log::debug!("{error}"),
                },
                changed = channels.applied.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
                changed = channels.proven.changed(), if !proven => if changed.is_err() {
                    std::future::pending::<()>().await;
                } else {
                    next = Some(latest.clone());
                },
                done = comparing.done(), if comparing.under_way.is_some() => {
                    if self.judge(done, &mut comparing).await? {
                        // What was held back by it may be confirmed now.
                        next = Some(self.ask().await.unwrap_or_else(|_| latest.clone()));
                    }
                },
                () = tokio::time::sleep_until(wake.into()), if comparing.under_way.is_none() => {}
            }
        }
    }

    /// The question has a connection of its own: an address may lead to another server meanwhile.
    pub(super) fn is_of_the_stream(&self, seen: &Seen, started: &str) -> Result<(), Gap> {
        let same = seen.server_started == started
            && seen.system_id == self.recorded.system_id
            && seen.timeline == self.recorded.timeline;
        if same {
            return Ok(());
        }
        Err(Gap::Failed(PassError::NotMet {
            text: format!(
                "the peer's address leads to another server, or to another start of it ({} on timeline {}, started {}), than the stream comes from",
                seen.system_id, seen.timeline, seen.server_started
            ),
        }))
    }

    async fn look(
        &self,
        seen: &Seen,
        sequences: &mut Vec<Sequence>,
        proven: bool,
    ) -> Result<(), Gap> {
        self.bounded(seen)?;
        if proven && *sequences != seen.sequences {
            let local = LocalSession::open(&self.config.local.datastore, self.database)
                .await
                .map_err(PassError::from)?;
            // A holder that was paused, and lost the lock meanwhile, finds that out before it sets anything.
            self.state.still_ours(self.lock).await?;
            set_as_holder(&local, &seen.sequences, self.lock.token).await?;
            sequences.clone_from(&seen.sequences);
        }
        Ok(())
    }

    /// Remembers what a comparison found. True: a rewritten table is known to be equal.
    async fn judge(&self, done: Done, comparing: &mut Comparing<'_>) -> Result<bool, Gap> {
        comparing.rest(self.config.verify.rolling, done.took);
        let compared = match done.found {
            Ok(compared) => compared,
            Err(error) => {
                log::debug!("a comparison is tried again later: {error}");
                comparing.not_before = Instant::now() + comparing.pause;
                comparing.pause = (comparing.pause * 2).min(AGAIN.1);
                return Ok(false);
            }
        };
        comparing.pause = AGAIN.0;
        if let Some((table, rows)) = compared.differing.first() {
            let (table, rows) = (table.clone(), *rows);
            if done.rewritten || self.is_worth_a_copy(&table) {
                return Err(Gap::Content { table, rows });
            }
            log::warn!(
                "{rows} rows of {table} are on one side only, again after a copy was made for it; `warm-spare verify` tells more"
            );
        }
        self.state.record_compared(&done.tables).await?;
        comparing.known = self.state.compared().await?;
        self.told.compared_tables(comparing.oldest());
        Ok(done.rewritten)
    }

    /// A difference is copied away once; what stays then is not made good by more of the same.
    fn is_worth_a_copy(&self, table: &str) -> bool {
        let mut differed = self.differed.lock().expect("no holder panics");
        let lately = differed
            .get(table)
            .is_some_and(|when| when.elapsed() < REPAIRED);
        differed.insert(table.to_string(), Instant::now());
        !lately
    }

    /// Compares tables of these names, the first at least, and as many as may be in the time.
    async fn compare_tables(
        &self,
        wanted: Vec<(String, i64)>,
        reached: watch::Receiver<Lsn>,
        time: Option<Duration>,
    ) -> (Vec<(String, i64)>, Result<Compared, PassError>) {
        let (begun, mut done, mut compared) = (Instant::now(), Vec::new(), Compared::default());
        let comparing = async {
            let local = &self.config.local.datastore;
            let mut ours = Applied {
                session: LocalSession::open(local, self.database).await?,
                reached,
            };
            let tables = tables::tables(&ours.session).await?;
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
        let ended: Result<(), PassError> = comparing.await;
        (done, ended.map(|()| compared))
    }
}

impl<'a> Comparing<'a> {
    /// Tables that nobody knows anything of, for an older program made the copy: they are taken as they are.
    async fn adopt(&mut self, seen: &Seen, follow: &Follow<'_>) -> Result<(), Gap> {
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

    /// Tables whose rows lie in another file than when they were last known to be equal.
    fn rewritten(&self, seen: &Seen) -> Vec<(String, i64)> {
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

    /// Begins what is due, if nothing is under way.
    fn begin<'b: 'a>(
        &mut self,
        follow: &'a Follow<'b>,
        seen: &Seen,
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
            (all.collect(), Some(ROUND * percent / 100), false)
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

    /// When to look again what is due.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let later = [self.not_before, self.due].into_iter().filter(|t| *t > now);
        later.min().unwrap_or(now + ROUND)
    }

    /// Never, if nothing is under way.
    async fn done(&mut self) -> Done {
        let Some(under_way) = &mut self.under_way else {
            return std::future::pending().await;
        };
        let done = under_way.await;
        self.under_way = None;
        done
    }

    /// After a comparison, so that all of them keep their share of the time.
    fn rest(&mut self, percent: u32, took: Duration) {
        let rest = match percent {
            0 => ROUND,
            percent => (took * (100 - percent.min(100)) / percent)
                .max(ROUND * (100 - percent.min(100)) / 100),
        };
        self.due = Instant::now() + rest.max(LEAST_REST);
    }
}
