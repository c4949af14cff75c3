//! Makes the incoming database the visible one: both renames and all of our records about it in one
//! transaction.

use super::content_hash::ContentHash;
use crate::cluster::{
    LocalCluster, Lock, NewCopy, RecoveryPoint, StateDb, TableContent, end_sessions,
};
use crate::config::Config;
use crate::killpoint;
use crate::replication::descent::PrimaryLine;
use crate::replication::error::ReplicationError;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Maximum number of tries to rename. The server itself waits 5 s for sessions to end, each time.
const MAX_TRIES: usize = 12;

/// The facts about the new visible database.
pub(crate) struct Arrival<'a> {
    pub incoming: &'a str,
    /// Name under which the replaced database is kept; None: there is none.
    pub generation: Option<String>,
    pub point: &'a RecoveryPoint,
    /// The primary of the new database.
    pub line: &'a PrimaryLine,
    pub contents: &'a BTreeMap<String, ContentHash>,
    /// The primary's file of each table at the snapshot.
    pub files: &'a BTreeMap<String, i64>,
    pub vanished_packages: &'a [String],
    pub vanished_artifacts: &'a [String],
    /// An operator has seen and approved this change, and with it the earlier ones: the fuse starts
    /// counting again.
    pub approved: bool,
    /// Nothing has proven that the primary's history continues the replaced database's.
    pub unproven: bool,
    pub event: String,
}

/// Renames, while a second session ends all sessions that block it: the rename itself keeps new
/// ones out.
pub(crate) async fn switch(
    config: &Config,
    state: &StateDb,
    lock: Lock,
    arrival: &Arrival<'_>,
) -> Result<(), ReplicationError> {
    let visible = &config.local.datastore.database;
    let terminator = LocalCluster::of(config).state_session().await?;
    let (mut tries, begun) = (0, Instant::now());
    loop {
        tries += 1;
        let terminating = async {
            loop {
                for database in [visible.as_str(), arrival.incoming] {
                    if let Err(error) = end_sessions(&terminator, database).await {
                        return ReplicationError::from(error);
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let renamed = tokio::select! {
            renamed = rename(config, state, lock, arrival) => renamed,
            error = terminating => Err(error),
        };
        // The second session's running statement would also end a session that is opened from now
        // on.
        let _ = terminator
            .wait_until_idle("waiting for the session terminator")
            .await;
        let Err(error) = renamed else { return Ok(()) };
        let _ = state.session().roll_back("giving the rename up").await;
        match &error {
            // A session could not be ended in time; the next try ends it earlier.
            ReplicationError::Datastore(e) if e.is_in_use() && tries < MAX_TRIES => {}
            ReplicationError::Datastore(e) if e.is_in_use() => {
                let databases = [visible.as_str(), arrival.incoming];
                return Err(ReplicationError::Unswitched {
                    seconds: begun.elapsed().as_secs(),
                    who: terminator.sessions_in(&databases).await?,
                });
            }
            _ => return Err(error),
        }
    }
}

async fn rename(
    config: &Config,
    state: &StateDb,
    lock: Lock,
    arrival: &Arrival<'_>,
) -> Result<(), ReplicationError> {
    let session = state.session();
    let visible = &config.local.datastore.database;
    state.begin_as_holder(lock, "beginning the rename").await?;
    if let Some(generation) = &arrival.generation {
        let doing = "renaming the replaced database";
        session.rename_database(doing, visible, generation).await?;
        state
            .record_generation(generation, arrival.unproven)
            .await?;
    }
    let doing = "renaming the incoming database";
    session
        .rename_database(doing, arrival.incoming, visible)
        .await?;
    let contents: Vec<TableContent> = arrival.contents.iter().map(table_content).collect();
    let copy = NewCopy {
        point: arrival.point,
        epoch: arrival.line.epoch,
        epoch_approved: arrival.line.approved.is_some(),
        lineage: &arrival.line.lineage,
        contents: &contents,
        files: arrival.files,
        vanished_packages: arrival.vanished_packages,
        vanished_artifacts: arrival.vanished_artifacts,
        approved: arrival.approved,
        event: &arrival.event,
        change: &config.change,
    };
    state.record_copy(&copy).await?;
    killpoint::reach("switch.before_commit");
    session.commit("committing the rename").await?;
    killpoint::reach("switch.after_commit");
    Ok(())
}

fn table_content((table, content): (&String, &ContentHash)) -> TableContent {
    TableContent {
        table: table.clone(),
        rows: content.rows() as i64,
        hash: content.to_string(),
    }
}

/// Drops replaced databases beyond the number to be kept; pinned ones stay.
pub(crate) async fn prune(
    config: &Config,
    state: &StateDb,
) -> Result<Vec<String>, ReplicationError> {
    let keep = config.replication.artifact_retention.as_secs_f64();
    state.unpin_expired(keep).await?;
    let generations = state.generations().await?;
    let surplus: Vec<String> = generations
        .into_iter()
        .filter(|generation| !generation.pinned)
        .skip(config.replication.keep_generations)
        .map(|generation| generation.name)
        .collect();
    for name in &surplus {
        drop_generation(state, name).await?;
    }
    Ok(surplus)
}

/// Drops a replaced database, and its record.
pub(crate) async fn drop_generation(state: &StateDb, name: &str) -> Result<(), ReplicationError> {
    state.session().drop_database(name).await?;
    Ok(state.forget_generation(name).await?)
}
