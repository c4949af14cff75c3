//! Compares the spare with the data that the primary sent at the recovery point. It reads the spare
//! only. It asks the peer only whether anything was committed since.

mod artifacts;
mod tables;

use crate::cluster::{LocalCluster, PeerCluster, RecoveryPoint, SpareDb, StateDb, WriteSession};
use crate::config::Config;
use crate::domain::{ErrorCode, MissingReason, Side};
use crate::observe::Progress;
use crate::replication::{Policy, ReplicationError};
use serde::Serialize;
use std::time::Duration;
use tokio::time::Instant;

pub(crate) use artifacts::{Compared as ComparedArtifacts, Reading};

/// A difference between the spare and the data that were sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// `database`, `table`, `artifact` or `signature`.
    pub kind: &'static str,
    pub name: String,
    pub text: String,
}

#[derive(Debug)]
pub struct Verification {
    pub point: RecoveryPoint,
    pub deep: bool,
    pub tables: u64,
    pub rows: u64,
    pub artifacts: u64,
    pub artifact_bytes: u64,
    pub signatures_good: u64,
    /// Number of signatures by keys that the database does not hold. They are neither good nor bad.
    pub signatures_unknown: u64,
    /// Artifacts that were recorded as missing or damaged on the primary when they were copied.
    /// They are known, and count as no difference.
    pub unavailable: Vec<(String, MissingReason)>,
    pub differences: Vec<Difference>,
    /// True: the primary has committed something since. None: the primary did not answer.
    pub newer: Option<bool>,
}

/// Maximum number of verifications that one run begins. A pass may switch the visible database
/// during a verification.
const MAX_ATTEMPTS: usize = 3;
/// Longest time that a full copy needs from ending the sessions to its record.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(5);

/// Verifies the spare. `deep` reads every artifact and checks its bytes and its signature;
/// otherwise only presence and length are checked.
pub async fn verify(
    config: &Config,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, ReplicationError> {
    if open(config).await?.1.is_followed() {
        return verify_through_copies(config, deep, progress).await;
    }
    for _ in 1..MAX_ATTEMPTS {
        let (state, before) = open(config).await?;
        let found = look(config, state, &before, deep, progress).await;
        let (_, after) = open(config).await?;
        if before.lsn == after.lsn && before.commit_time == after.commit_time {
            return found;
        }
        log::info!(
            "local: a pass made a newer recovery point during the verification; verifying that one"
        );
    }
    let (state, point) = open(config).await?;
    look(config, state, &point, deep, progress).await
}

/// Verifies a spare that follows the stream, and starts again after a full copy. A full copy ends
/// every session on the database that it replaces, also the sessions of a verification.
async fn verify_through_copies(
    config: &Config,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, ReplicationError> {
    for _ in 1..MAX_ATTEMPTS {
        let before = last_copy(config).await?.1.lsn;
        let failure = match verify_following(config, deep, progress).await {
            Err(failure) if is_passing_here(&failure) => failure,
            found => return found,
        };
        if !was_replaced(config, &before).await? {
            return Err(failure);
        }
        log::info!(
            "local: a full copy was made during the verification ({failure}); verifying the new database"
        );
    }
    verify_following(config, deep, progress).await
}

/// Returns whether a full copy was made since. A full copy ends the sessions shortly before it is
/// on record, so this waits for the record.
async fn was_replaced(config: &Config, before: &str) -> Result<bool, ReplicationError> {
    let deadline = Instant::now() + SWITCH_TIMEOUT;
    loop {
        match last_copy(config).await {
            Ok((_, after)) if after.lsn != before => return Ok(true),
            Err(error) if !is_passing_here(&error) => return Err(error),
            _ if Instant::now() >= deadline => return Ok(false),
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Verifies a spare to which the stream is applied at the same time. A difference counts only if it
/// is found twice.
async fn verify_following(
    config: &Config,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, ReplicationError> {
    let (state, point) = open(config).await?;
    let first = look(config, state, &point, deep, progress).await?;
    if first.differences.is_empty() {
        return Ok(first);
    }
    let (state, point) = open(config).await?;
    let mut second = look(config, state, &point, deep, progress).await?;
    second.differences.retain(|difference| {
        let same = |d: &Difference| (d.kind, &d.name) == (difference.kind, &difference.name);
        first.differences.iter().any(same)
    });
    Ok(second)
}

fn is_passing_here(error: &ReplicationError) -> bool {
    error.policy() == Policy::Retry && error.side() == Some(Side::Local)
}

async fn look(
    config: &Config,
    state: StateDb,
    point: &RecoveryPoint,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, ReplicationError> {
    let replacing = state.replacements().await?.len();
    if replacing > 0 {
        return Err(ReplicationError::Precondition {
            check: ErrorCode::Replacing,
            text: format!(
                "{replacing} artifacts are being replaced now, or a pass was interrupted while it replaced them"
            ),
            next_step:
                "wait until the running pass ends; if no pass runs, `warm-spare sync` restores them"
                    .into(),
        });
    }
    let database = &config.local.datastore.database;
    let session = LocalCluster::of(config).database(database).await?;
    let following = point.is_followed();
    let mut differences = recovery_point(&session, database, point).await?;
    if !differences.is_empty() {
        // The database is another one: comparing its tables would only hide that.
        return Ok(Verification {
            differences,
            ..nothing(point.clone(), deep)
        });
    }
    let tables = match following {
        true => tables::compare_both(config, &session, progress).await?,
        false => tables::compare(config, &session, state.content().await?, progress).await?,
    };
    if following {
        // Rows and the list of unavailable artifacts are read in one snapshot.
        session.begin_snapshot("beginning to verify").await?;
    }
    let unavailable = SpareDb::of(&session).unavailable_reasons().await?;
    let store = LocalCluster::of(config).reading_store()?;
    let artifacts = artifacts::compare(
        config,
        &state,
        &session,
        &store,
        &unavailable,
        deep,
        progress,
    )
    .await?;
    let same_rows = tables.differences.is_empty();
    differences.extend(tables.differences);
    differences.extend(artifacts.differences);
    // The rows were compared with the primary's own rows.
    let newer = match following {
        true => same_rows.then_some(false),
        false => newer(config, point).await,
    };
    Ok(Verification {
        newer,
        tables: tables.tables,
        rows: tables.rows,
        artifacts: artifacts.checked,
        artifact_bytes: artifacts.bytes,
        signatures_good: artifacts.signatures_good,
        signatures_unknown: artifacts.signatures_unknown,
        unavailable,
        differences,
        ..nothing(point.clone(), deep)
    })
}

fn nothing(point: RecoveryPoint, deep: bool) -> Verification {
    Verification {
        point,
        deep,
        tables: 0,
        rows: 0,
        artifacts: 0,
        artifact_bytes: 0,
        signatures_good: 0,
        signatures_unknown: 0,
        unavailable: Vec::new(),
        differences: Vec::new(),
        newer: None,
    }
}

async fn open(config: &Config) -> Result<(StateDb, RecoveryPoint), ReplicationError> {
    let (state, copied) = last_copy(config).await?;
    Ok((state, LocalCluster::of(config).point(copied).await?))
}

/// Returns the point of the last full copy. The stream may have applied changes after it.
async fn last_copy(config: &Config) -> Result<(StateDb, RecoveryPoint), ReplicationError> {
    let state = LocalCluster::of(config)
        .existing_state()
        .await?
        .ok_or_else(ReplicationError::nothing_copied)?;
    let copied = state
        .recovery_point()
        .await?
        .ok_or_else(ReplicationError::nothing_copied)?;
    Ok((state, copied))
}

async fn recovery_point(
    session: &WriteSession,
    database: &str,
    point: &RecoveryPoint,
) -> Result<Vec<Difference>, ReplicationError> {
    let found = SpareDb::of(session).lsn().await?;
    if point.is_of(found.as_ref()) {
        return Ok(Vec::new());
    }
    Ok(vec![Difference {
        kind: "database",
        name: database.to_string(),
        text: match found {
            Some(lsn) => format!(
                "is at {lsn}, but the recovery point on record is {}",
                point.lsn
            ),
            None => "is not the database that was copied here: it has no recovery point".into(),
        },
    }])
}

async fn newer(config: &Config, point: &RecoveryPoint) -> Option<bool> {
    let peer = PeerCluster::of(config).builder().await.ok()?;
    let state = peer.server_state("asking for newer changes").await.ok()?;
    let same = state.transactions == point.transactions && state.started == point.server_started;
    Some(!same)
}
