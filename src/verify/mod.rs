//! Compares what the spare has with what the primary sent at the recovery point. It reads the spare only; of the peer it
//! asks no more than whether it has committed anything since.

mod artifacts;
mod tables;

use crate::cluster::{CopiedPoint, LocalSession, LocalStore, PeerSession, State};
use crate::config::Config;
use crate::domain::{ErrorCode, Side};
use crate::observe::Progress;
use crate::replication::{self, PassError, Policy, unavailable};
use serde::Serialize;
use std::time::Duration;
use tokio::time::Instant;

pub(crate) use artifacts::{Compared as ComparedArtifacts, Reading};

/// One thing that is not as it was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// `database`, `table`, `artifact` or `signature`.
    pub kind: &'static str,
    pub name: String,
    pub text: String,
}

#[derive(Debug)]
pub struct Verification {
    pub point: CopiedPoint,
    pub deep: bool,
    pub tables: u64,
    pub rows: u64,
    pub artifacts: u64,
    pub artifact_bytes: u64,
    pub signatures_good: u64,
    /// Signed with keys that the database does not hold: neither right nor wrong.
    pub signatures_unknown: u64,
    /// Recorded as missing or damaged on the primary when they were copied: known, and no difference.
    pub unavailable: Vec<(String, String)>,
    pub differences: Vec<Difference>,
    /// Whether the primary has committed anything since; None: it could not be asked.
    pub newer: Option<bool>,
}

/// A pass may make another database the visible one meanwhile; so often it is begun again.
const BEGINNINGS: usize = 3;
/// How long a copy may take from the sessions that it ends to its record.
const SWITCH: Duration = Duration::from_secs(5);

/// `deep` reads every artifact and checks its bytes and its signature; else presence and length.
pub async fn verify(
    config: &Config,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, PassError> {
    if !open(config).await?.1.slot.is_empty() {
        return verify_through_copies(config, deep, progress).await;
    }
    for _ in 1..BEGINNINGS {
        let (state, before) = open(config).await?;
        let found = look(config, state, &before, deep, progress).await;
        let (_, after) = open(config).await?;
        if before.lsn == after.lsn && before.commit_time == after.commit_time {
            return found;
        }
        log::info!(
            "local: a pass has brought a newer recovery point meanwhile; verifying that one"
        );
    }
    let (state, point) = open(config).await?;
    look(config, state, &point, deep, progress).await
}

/// A full copy ends every session on the database that it replaces, those of a verification too.
async fn verify_through_copies(
    config: &Config,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, PassError> {
    for _ in 1..BEGINNINGS {
        let before = last_copy(config).await?.1.lsn;
        let failure = match verify_following(config, deep, progress).await {
            Err(failure) if is_passing_here(&failure) => failure,
            found => return found,
        };
        if !was_replaced(config, &before).await? {
            return Err(failure);
        }
        log::info!("local: a full copy was made meanwhile ({failure}); verifying what it brought");
    }
    verify_following(config, deep, progress).await
}

/// Has a copy come since? It ends the sessions shortly before it is on record.
async fn was_replaced(config: &Config, before: &str) -> Result<bool, PassError> {
    let deadline = Instant::now() + SWITCH;
    loop {
        match last_copy(config).await {
            Ok((_, after)) if after.lsn != before => return Ok(true),
            Err(error) if !is_passing_here(&error) => return Err(error),
            _ if Instant::now() >= deadline => return Ok(false),
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// A spare that is being followed into goes on while it is verified: an artifact that differs must do so twice.
async fn verify_following(
    config: &Config,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, PassError> {
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

fn is_passing_here(error: &PassError) -> bool {
    error.policy() == Policy::Retry && error.side() == Some(Side::Local)
}

async fn look(
    config: &Config,
    state: State,
    point: &CopiedPoint,
    deep: bool,
    progress: &Progress,
) -> Result<Verification, PassError> {
    let replacing = state.replacements().await?.len();
    if replacing > 0 {
        return Err(PassError::Unfit {
            check: ErrorCode::Replacing,
            text: format!(
                "{replacing} artifacts are just being replaced, or a pass was interrupted while it did"
            ),
            next_step:
                "wait for the pass under way; if there is none, `warm-spare sync` puts them back"
                    .into(),
        });
    }
    let database = &config.local.datastore.database;
    let session = LocalSession::open(&config.local.datastore, database).await?;
    let following = !point.slot.is_empty();
    let mut differences = recovery_point(&session, database, point).await?;
    if !differences.is_empty() {
        // Another database altogether: comparing its tables would only bury that.
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
        // The rows and what they lack, as they stood at one instant.
        let begin = "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY";
        session.batch("beginning to verify", begin).await?;
    }
    let unavailable = unavailable(&session).await?;
    let store = LocalStore::open(&config.local.s3)?;
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
    // Those that were compared are the primary's own.
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

fn nothing(point: CopiedPoint, deep: bool) -> Verification {
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

async fn open(config: &Config) -> Result<(State, CopiedPoint), PassError> {
    let (state, copied) = last_copy(config).await?;
    Ok((state, replication::stands_at(config, copied).await?))
}

/// Where the last copy was made, however far the stream has brought it since.
async fn last_copy(config: &Config) -> Result<(State, CopiedPoint), PassError> {
    let state = State::open_existing(&config.local.datastore)
        .await?
        .ok_or_else(PassError::nothing_copied)?;
    let copied = state
        .copied_point()
        .await?
        .ok_or_else(PassError::nothing_copied)?;
    Ok((state, copied))
}

async fn recovery_point(
    session: &LocalSession,
    database: &str,
    point: &CopiedPoint,
) -> Result<Vec<Difference>, PassError> {
    let found = replication::recovery_point(session).await?;
    if replication::is_ours(point, found.as_ref()) {
        return Ok(Vec::new());
    }
    Ok(vec![Difference {
        kind: "database",
        name: database.to_string(),
        text: match found {
            Some(lsn) => format!("stands at {lsn}, and {} is remembered", point.lsn),
            None => "is not the one that was copied here: it has no recovery point".into(),
        },
    }])
}

async fn newer(config: &Config, point: &CopiedPoint) -> Option<bool> {
    let peer = PeerSession::open(&config.peer.datastore).await.ok()?;
    let sql = "SELECT txid_current_snapshot()::text, pg_postmaster_start_time()::text";
    let row = peer.row("asking for newer changes", sql, &[]).await.ok()?;
    let same = row.get::<String>(0).ok()? == point.transactions
        && row.get::<String>(1).ok()? == point.server_started;
    Some(!same)
}
