//! Compares the rows of both sides while the primary is being written to, and without blocking
//! anybody. Rows that differ in a first reading, and still differ after the spare has applied
//! everything up to that reading, are a difference.

use super::baseline::lock_watchdog::with_lock_watchdog;
use super::change_probe::told_of_standby;
use super::error::ReplicationError;
use crate::cluster::{LocalCluster, PeerCluster, Session, SpareDb, Table, WriteSession};
use crate::config::Config;
use crate::domain::{ErrorCode, Lsn};
use crate::observe::Step;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Maximum time until the spare has applied everything that the primary had written when it was
/// read.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(60);
/// Time after which a following spare has applied everything if nothing is committed.
const IDLE_AFTER: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Number of parts of a table. Rows are first compared by part, so that single rows are remembered
/// only for parts that differ.
const PARTS: usize = 4096;
/// Maximum number of single rows that are remembered at once, of both sides together: about 100 MB.
/// Parts with more rows are read in several rounds.
const MAX_ROWS: u64 = 1_000_000;

/// The result of a comparison.
#[derive(Debug, Default, Clone)]
pub struct Compared {
    pub tables: u64,
    pub rows: u64,
    /// Tables with the number of rows that only one side has.
    pub differing: Vec<(String, u64)>,
}

/// The spare's rows, and the way in which they catch up with the primary.
pub(super) trait Ours {
    fn session(&self) -> &Session;

    /// Waits until they hold everything that the primary had written up to that position, for this
    /// time at most. False: not yet.
    async fn come_past(&mut self, place: Lsn, at_most: Duration) -> Result<bool, ReplicationError>;

    /// Returns the time after which nothing can be decided if they do not catch up; None: without
    /// limit.
    fn patience(&self) -> Option<Duration>;

    /// Returns whether they hold everything that the primary had committed if it has committed
    /// nothing for a while.
    fn has_all_of_a_resting_primary(&self) -> bool;
}

/// The database that Builder sees, into which another process applies the changes.
struct Visible(WriteSession);

impl Ours for Visible {
    fn session(&self) -> &Session {
        &self.0
    }

    async fn come_past(&mut self, place: Lsn, at_most: Duration) -> Result<bool, ReplicationError> {
        let begun = Instant::now();
        loop {
            let stands = SpareDb::of(&self.0).lsn().await?;
            let stands: Option<Lsn> = stands.and_then(|lsn| lsn.parse().ok());
            if stands.is_some_and(|lsn| lsn >= place) {
                return Ok(true);
            }
            if begun.elapsed() > at_most {
                return Ok(false);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn patience(&self) -> Option<Duration> {
        Some(CATCH_UP_TIMEOUT)
    }

    /// The end of the primary's log may be a little past its last change for us.
    fn has_all_of_a_resting_primary(&self) -> bool {
        true
    }
}

/// Compares the rows of every table on both sides. The spare must be following, or the primary must
/// be at rest.
pub async fn compare_both(
    config: &Config,
    step: Option<&Step>,
) -> Result<Compared, ReplicationError> {
    let session = LocalCluster::of(config).builder().await?;
    session.carry_bytes().await?;
    match compare_all(config, &mut Visible(session), step).await {
        Err(error) => Err(told_of_standby(config, error).await),
        compared => compared,
    }
}

/// Compares every local table, and finds tables that only the primary has.
pub(super) async fn compare_all(
    config: &Config,
    ours: &mut impl Ours,
    step: Option<&Step>,
) -> Result<Compared, ReplicationError> {
    let mut compared = Compared::default();
    for table in ours.session().tables().await? {
        compare(config, ours, &table, step, &mut compared).await?;
    }
    // A table that only the primary has is found only here.
    let peer = PeerCluster::of(config).builder().await?;
    let known = ours.session().tables().await?;
    let known: HashSet<String> = known.iter().map(Table::full_name).collect();
    for table in peer.tables().await? {
        if !known.contains(&table.full_name()) {
            compared.differing.push((table.full_name(), 0));
        }
    }
    Ok(compared)
}

/// Compares one table.
pub(super) async fn compare(
    config: &Config,
    ours: &mut impl Ours,
    table: &Table,
    step: Option<&Step>,
    compared: &mut Compared,
) -> Result<(), ReplicationError> {
    let (here, there) = read(config, ours, table, step, Parts::default, Parts::add).await?;
    compared.tables += 1;
    compared.rows += here.rows;
    let mut differing = 0;
    for parts in here.rounds(&there, MAX_ROWS) {
        differing += lasting(config, ours, table, &parts).await?;
    }
    if differing > 0 {
        compared.differing.push((table.full_name(), differing));
    }
    Ok(())
}

/// Returns the number of rows of these parts that differ, and still do after the spare has applied
/// everything up to the first reading.
async fn lasting(
    config: &Config,
    ours: &mut impl Ours,
    table: &Table,
    parts: &HashSet<usize>,
) -> Result<u64, ReplicationError> {
    let first = difference(config, ours, table, parts).await?;
    if first.is_empty() {
        return Ok(0);
    }
    come_past(config, ours).await?;
    let second = difference(config, ours, table, parts).await?;
    let lasting = first.iter().filter(|(row, number)| {
        let later = second.get(*row);
        later.is_some_and(|n| n.signum() == number.signum())
    });
    Ok(lasting.map(|(_, number)| number.unsigned_abs()).sum())
}

type RowHash = [u8; 16];

fn hash(row: &[u8]) -> RowHash {
    let hash = blake2b_simd::Params::new().hash_length(16).hash(row);
    hash.as_bytes().try_into().unwrap_or_default()
}

fn part(hash: &RowHash) -> usize {
    usize::from(u16::from_be_bytes([hash[0], hash[1]])) % PARTS
}

/// A table's rows, in no order: for each part the sum of their hashes, and their number.
struct Parts {
    sums: Vec<(u128, u64)>,
    rows: u64,
}

impl Default for Parts {
    fn default() -> Self {
        Parts {
            sums: vec![(0, 0); PARTS],
            rows: 0,
        }
    }
}

impl Parts {
    fn add(&mut self, row: &[u8]) {
        let hash = hash(row);
        let (sum, rows) = &mut self.sums[part(&hash)];
        *sum = sum.wrapping_add(u128::from_be_bytes(hash));
        *rows += 1;
        self.rows += 1;
    }

    /// Returns the differing parts in sets. A set has at most this number of rows on both sides
    /// together, or is one part.
    fn rounds(&self, other: &Parts, rows_at_most: u64) -> Vec<HashSet<usize>> {
        let mut rounds: Vec<HashSet<usize>> = Vec::new();
        let mut room = 0;
        for (part, (here, there)) in self.sums.iter().zip(&other.sums).enumerate() {
            if here == there {
                continue;
            }
            let rows = here.1 + there.1;
            match rounds.last_mut() {
                Some(round) if rows <= room => {
                    round.insert(part);
                    room -= rows;
                }
                _ => {
                    rounds.push(HashSet::from([part]));
                    room = rows_at_most.saturating_sub(rows);
                }
            }
        }
        rounds
    }
}

/// Returns the rows of these parts that one side has more often than the other: a positive number
/// is the primary's.
async fn difference(
    config: &Config,
    ours: &impl Ours,
    table: &Table,
    parts: &HashSet<usize>,
) -> Result<HashMap<RowHash, i64>, ReplicationError> {
    let count = |rows: &mut HashMap<RowHash, i64>, row: &[u8]| {
        let hash = hash(row);
        if parts.contains(&part(&hash)) {
            *rows.entry(hash).or_default() += 1;
        }
    };
    let (here, there) = read(config, ours, table, None, HashMap::new, count).await?;
    let mut difference = there;
    for (row, number) in here {
        *difference.entry(row).or_default() -= number;
    }
    difference.retain(|_, number| *number != 0);
    Ok(difference)
}

/// Reads the table on both sides at once.
async fn read<T>(
    config: &Config,
    ours: &impl Ours,
    table: &Table,
    step: Option<&Step>,
    empty: impl Fn() -> T,
    add: impl Fn(&mut T, &[u8]),
) -> Result<(T, T), ReplicationError> {
    let here = rows(ours.session(), table, step, empty(), &add);
    // Reading holds a lock on the primary like any other read, so it gives way like any other.
    let there = Box::pin(with_lock_watchdog(PeerCluster::of(config), async {
        let peer = PeerCluster::of(config).builder().await?;
        peer.carry_bytes().await?;
        rows(&peer, table, None, empty(), &add).await
    }));
    tokio::try_join!(here, there)
}

async fn rows<T>(
    session: &Session,
    table: &Table,
    step: Option<&Step>,
    mut into: T,
    add: &impl Fn(&mut T, &[u8]),
) -> Result<T, ReplicationError> {
    let doing = format!("reading table {}", table.full_name());
    let mut rows = session.copy_out(&doing, &table.copy_out()).await?;
    while let Some(row) = rows.next().await? {
        add(&mut into, &row);
        if let Some(step) = step {
            step.add(row.len() as u64);
        }
    }
    Ok(into)
}

/// Waits until the spare has applied everything that the primary has written by now.
async fn come_past(config: &Config, ours: &mut impl Ours) -> Result<(), ReplicationError> {
    let (wanted, before) = written(config).await?;
    let begun = Instant::now();
    loop {
        if ours.come_past(wanted, IDLE_AFTER).await? {
            return Ok(());
        }
        if ours.has_all_of_a_resting_primary() && written(config).await?.1 == before {
            return Ok(());
        }
        if ours
            .patience()
            .is_some_and(|patience| begun.elapsed() > patience)
        {
            return Err(ReplicationError::Precondition {
                check: ErrorCode::NotFollowing,
                text: format!(
                    "rows differ, but the spare has not applied up to {wanted}, the primary's position, so the difference may only be replication lag"
                ),
                next_step: "let the service follow, or run `warm-spare sync`, and verify again"
                    .into(),
            });
        }
    }
}

/// Returns the end of the primary's log, and its transactions.
async fn written(config: &Config) -> Result<(Lsn, String), ReplicationError> {
    let peer = PeerCluster::of(config).builder().await?;
    let state = peer.server_state("asking for the end of its log").await?;
    let wal = state.wal.ok_or_else(ReplicationError::standby)?;
    Ok((wal, state.transactions))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(rows: std::ops::Range<u32>) -> Parts {
        let mut parts = Parts::default();
        rows.for_each(|row| parts.add(&row.to_be_bytes()));
        parts
    }

    #[test]
    fn parts_that_differ_are_read_in_rounds_of_bounded_size() {
        let (all, none) = (parts(0..100_000), Parts::default());
        assert!(all.rounds(&parts(0..100_000), 10).is_empty());
        assert_eq!(
            all.rounds(&parts(0..99_999), 10).len(),
            1,
            "one row, one part"
        );
        assert_eq!(all.rounds(&none, u64::MAX).len(), 1);

        let rounds = all.rounds(&none, 10_000);
        assert!((10..=11).contains(&rounds.len()), "{}", rounds.len());
        let mut seen = HashSet::new();
        for round in rounds {
            let rows: u64 = round.iter().map(|part| all.sums[*part].1).sum();
            assert!(rows <= 10_000, "{rows}");
            assert!(round.iter().all(|part| seen.insert(*part)), "read twice");
        }
        let unseen = (0..PARTS).filter(|part| !seen.contains(part));
        assert_eq!(unseen.map(|part| all.sums[part].1).sum::<u64>(), 0);

        // A part with more rows than that is a round by itself.
        assert_eq!(all.rounds(&none, 1).len(), seen.len());
    }

    #[test]
    fn a_row_that_stands_twice_is_told_from_one() {
        let mut twice = parts(0..10);
        twice.add(&3_u32.to_be_bytes());
        assert_eq!(twice.rounds(&parts(0..10), 10).len(), 1);
    }
}
