//! Are the rows of both sides the same? Asked while the primary goes on being written to, and without stopping anybody:
//! what differs in a first reading, and still does when the spare has come past that, is a difference.

use super::content::ContentHash;
use super::error::PassError;
use super::guard::guarded;
use super::pass::recovery_point;
use super::tables::{Table, tables};
use crate::cluster::{LocalSession, Lsn, PeerSession, Session};
use crate::config::Config;
use crate::observe::Step;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// How long the spare may take to come past what the primary had written when it was read.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than a following spare is behind when nothing is committed.
const REST: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(200);

/// What was compared, and what differs.
#[derive(Debug, Default, Clone)]
pub struct Compared {
    pub tables: u64,
    pub rows: u64,
    /// Tables with the number of rows that only one side has.
    pub differing: Vec<(String, u64)>,
}

/// Reads the rows of every table on both sides. The spare must be following, or the primary at rest.
pub async fn compare_both(config: &Config, step: Option<&Step>) -> Result<Compared, PassError> {
    let local =
        LocalSession::open(&config.local.datastore, &config.local.datastore.database).await?;
    let mut compared = Compared::default();
    for table in tables(&local).await? {
        let (ours, theirs) = read(config, &table, step, ContentHash::default, |hash, row| {
            hash.add(row);
        })
        .await?;
        compared.tables += 1;
        compared.rows += ours.rows();
        if ours == theirs {
            continue;
        }
        let first = difference(config, &table).await?;
        if first.is_empty() {
            continue;
        }
        come_past(config, &local).await?;
        let second = difference(config, &table).await?;
        let stays = first
            .iter()
            .filter(|(row, number)| {
                second
                    .get(*row)
                    .is_some_and(|n| n.signum() == number.signum())
            })
            .map(|(_, number)| number.unsigned_abs())
            .sum();
        if stays > 0 {
            compared.differing.push((table.full_name(), stays));
        }
    }
    // A table that only the primary has shows here alone.
    let peer = PeerSession::open(&config.peer.datastore).await?;
    let ours: HashSet<String> = tables(&local).await?.iter().map(Table::full_name).collect();
    for table in tables(&peer).await? {
        if !ours.contains(&table.full_name()) {
            compared.differing.push((table.full_name(), 0));
        }
    }
    Ok(compared)
}

type RowHash = [u8; 16];

/// Rows that one side has more often than the other: positive ones are the primary's.
async fn difference(config: &Config, table: &Table) -> Result<HashMap<RowHash, i64>, PassError> {
    let (ours, theirs) = read(
        config,
        table,
        None,
        HashMap::<RowHash, i64>::new,
        |rows, row| {
            let hash = blake2b_simd::Params::new().hash_length(16).hash(row);
            let hash: RowHash = hash.as_bytes().try_into().unwrap_or_default();
            *rows.entry(hash).or_default() += 1;
        },
    )
    .await?;
    let mut difference = theirs;
    for (row, number) in ours {
        *difference.entry(row).or_default() -= number;
    }
    difference.retain(|_, number| *number != 0);
    Ok(difference)
}

/// Reads the table on both sides at once.
async fn read<T>(
    config: &Config,
    table: &Table,
    step: Option<&Step>,
    empty: impl Fn() -> T,
    add: impl Fn(&mut T, &[u8]),
) -> Result<(T, T), PassError> {
    let local =
        LocalSession::open(&config.local.datastore, &config.local.datastore.database).await?;
    let ours = rows(&local, table, step, empty(), &add);
    // Its reading holds a lock like any other, so it gives way like any other.
    let theirs = Box::pin(guarded(&config.peer.datastore, async {
        let peer = PeerSession::open(&config.peer.datastore).await?;
        rows(&peer, table, None, empty(), &add).await
    }));
    tokio::try_join!(ours, theirs)
}

async fn rows<T>(
    session: &Session,
    table: &Table,
    step: Option<&Step>,
    mut into: T,
    add: &impl Fn(&mut T, &[u8]),
) -> Result<T, PassError> {
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

/// Waits until the spare stands past what the primary has written by now.
async fn come_past(config: &Config, local: &LocalSession) -> Result<(), PassError> {
    let peer = PeerSession::open(&config.peer.datastore).await?;
    let sql = "SELECT pg_current_wal_lsn()::text, txid_current_snapshot()::text";
    let doing = "asking how far it has written";
    let row = peer.row(doing, sql, &[]).await?;
    drop(peer);
    let before: String = row.get(1)?;
    let wanted: Lsn = row.get::<String>(0)?.parse().unwrap_or_default();
    let begun = Instant::now();
    loop {
        let stands: Option<Lsn> = recovery_point(local)
            .await?
            .and_then(|lsn| lsn.parse().ok());
        if stands.is_some_and(|lsn| lsn >= wanted) {
            return Ok(());
        }
        if begun.elapsed() > REST {
            let peer = PeerSession::open(&config.peer.datastore).await?;
            let now: String = peer.row(doing, sql, &[]).await?.get(1)?;
            // At rest its log may lie a little past what it holds for us; nothing was committed since.
            if now == before {
                return Ok(());
            }
        }
        if begun.elapsed() > PATIENCE {
            return Err(PassError::Unfit {
                check: "not_following",
                text: format!(
                    "the rows differ from the primary's, and the spare does not come past {wanted}, where the primary stands: whether they differ for that reason alone cannot be told"
                ),
                next_step: "let the service follow, or run `warm-spare sync`, and verify again"
                    .into(),
            });
        }
        tokio::time::sleep(PAUSE).await;
    }
}
