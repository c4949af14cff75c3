//! Implements `release --local`: removes everything that we keep on the local side. Builder's data,
//! the replaced databases and the fence stay.

use crate::cluster::{
    DROP_SCHEMA, LocalCluster, LocalStore, STATE_DATABASE, SpareDb, StateDb, WriteSession,
    drop_statement, is_fenced, lift_statement, quote_ident, quote_literal, wake_triggers_as_in,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Role, TransitionKind};
use crate::replication::artifact::place::has_unproved_place;
use crate::replication::baseline::checks::has_database;
use crate::replication::baseline::incoming::incoming_name;
use crate::replication::baseline::interrupted::mend;
use crate::replication::error::ReplicationError;

/// Our objects that were found, and objects that are not ours to remove.
#[derive(Debug, Default)]
pub struct Traces {
    pub databases: Vec<String>,
    pub schema: bool,
    /// Statements that set triggers and rules back to their state on the primary.
    pub silenced: Vec<String>,
    pub objects: Vec<String>,
    /// Replaced databases: they stay.
    pub generations: Vec<String>,
    /// True: the visible database is fenced. The fence stays.
    pub fenced: bool,
}

impl Traces {
    pub fn is_empty(&self) -> bool {
        self.databases.is_empty() && !self.schema && self.objects.is_empty()
    }
}

/// Removes our objects, and returns them; with `only_ask` it only returns them. It does not ask the
/// peer.
pub async fn remove_traces(
    config: &Config,
    only_ask: bool,
    force: bool,
) -> Result<Traces, ReplicationError> {
    let local = LocalCluster::of(config).maintenance().await?;
    let store = LocalCluster::of(config).mark_store()?;
    let state = LocalCluster::of(config).existing_state().await?;
    if only_ask {
        return find(config, &local, store.as_ref(), state.as_ref()).await;
    }
    if let Some(state) = &state {
        let lock = state.lock(config.replication.direction).await?;
        nobody_else(&local, state).await?;
        let lost = what_would_be_lost(state).await?;
        if !lost.is_empty() && !force {
            return Err(needed_still(&lost));
        }
        for what in &lost {
            log::warn!("local: lost by release --local --force: {what}");
        }
        // This comes before the old bytes of an unfinished replacement are deleted.
        has_unproved_place(config, state, lock).await?;
        mend(config, lock).await?;
    }
    let found = find(config, &local, store.as_ref(), state.as_ref()).await?;
    if let Some(store) = &store {
        for key in &found.objects {
            store.delete(key).await?;
        }
    }
    if found.schema {
        let visible = &config.local.datastore.database;
        let inside = LocalCluster::of(config).database(visible).await?;
        wake_triggers_as_in(&inside, &inside).await?;
        SpareDb::of(&inside).drop_schema().await?;
    }
    local.drop_database(&incoming_name(config)).await?;
    // The lock is held until the end; a process that comes now finds nothing.
    drop(state);
    local.drop_database(STATE_DATABASE).await?;
    Ok(found)
}

/// Returns the facts that are kept only here, and would be missed.
async fn what_would_be_lost(state: &StateDb) -> Result<Vec<String>, ReplicationError> {
    let mut lost = Vec::new();
    let cluster = state.cluster().await?;
    let promotion = state.promotion().await?;
    let promotion = promotion.filter(|promotion| promotion.epoch == cluster.epoch);
    if cluster.role == Some(Role::Primary) && promotion.is_some_and(|promotion| !promotion.settled)
    {
        lost.push(format!(
            "the record that the old primary is to be fenced under epoch {}: no other process would do it",
            cluster.epoch
        ));
    }
    if let Some(entry) = state.transition().await? {
        lost.push(match entry.kind {
            TransitionKind::Failback => "the progress of this cluster's failback".to_string(),
            kind => format!(
                "a {kind} under way, at step {:?}: the primary may be fenced by it, and would stay so",
                entry.step_name()
            ),
        });
    }
    let (rows, packages) = state.diverged_count().await?;
    if rows > 0 {
        lost.push(format!(
            "the list of changes that this cluster had as a primary and its successor does not have ({rows} rows, {packages} packages whose files are only here: `warm-spare divergence --fetch`)"
        ));
    }
    Ok(lost)
}

fn needed_still(lost: &[String]) -> ReplicationError {
    ReplicationError::Refused {
        rule: ErrorCode::StateIsNeeded,
        text: format!(
            "the state to be removed is still needed: {}",
            lost.join("; ")
        ),
        next_step:
            "let a service finish it, or read the list; if all of it may be lost, add --force"
                .into(),
    }
}

/// Fails if another session waits for the lock, because it would make everything again.
async fn nobody_else(local: &WriteSession, state: &StateDb) -> Result<(), ReplicationError> {
    match state.other_session(local).await? {
        None => Ok(()),
        Some(process) => Err(ReplicationError::Refused {
            rule: ErrorCode::StandbyWaits,
            text: format!(
                "another session is in the local database {STATE_DATABASE} (server process {}): a warm-spare that waits for its turn, or a person",
                process
            ),
            next_step:
                "stop every warm-spare on this cluster, leave that database, and run it again"
                    .into(),
        }),
    }
}

async fn find(
    config: &Config,
    local: &WriteSession,
    store: Option<&LocalStore>,
    state: Option<&StateDb>,
) -> Result<Traces, ReplicationError> {
    let visible = &config.local.datastore.database;
    let mut found = Traces::default();
    if let Some(state) = state {
        let kept = state.generations().await?;
        found.generations = kept.into_iter().map(|g| g.name).collect();
    }
    for name in [incoming_name(config), STATE_DATABASE.to_string()] {
        if has_database(local, &name).await? {
            found.databases.push(name);
        }
    }
    if has_database(local, visible).await? {
        let inside = LocalCluster::of(config).database(visible).await?;
        found.schema = SpareDb::of(&inside).has_schema().await?;
        found.silenced = SpareDb::of(&inside).waking().await?;
        found.fenced = is_fenced(local, visible).await?;
    }
    if let Some(store) = store {
        store
            .reading()
            .list(&store.mark(""), async |page| {
                found.objects.extend(page.into_iter().map(|o| o.key));
                Ok(())
            })
            .await?;
    }
    Ok(found)
}

/// Returns the statement that lifts the fence by hand. The decision is the operator's, because the
/// fence protects Builder's data.
pub fn lift_the_fence(config: &Config) -> String {
    lift_statement(&config.local.datastore.database)
}

/// Returns a script for psql on the local server, connected to database `postgres`; objects are
/// removed by MinIO's client.
pub fn script(config: &Config, found: &Traces) -> String {
    let mut lines = vec!["\\set ON_ERROR_STOP on".to_string()];
    if found.schema {
        let visible = &config.local.datastore.database;
        lines.push(format!("\\connect {}", quote_ident(visible)));
        lines.extend(found.silenced.iter().map(|wake| format!("{wake};")));
        lines.push(format!("{DROP_SCHEMA};"));
        lines.push("\\connect postgres".into());
    }
    for name in &found.databases {
        lines.push(format!("{};", drop_statement(name)));
    }
    if !found.objects.is_empty() {
        lines.push(format!(
            "-- and {} objects: mc rm --recursive --force ALIAS/{}/{}",
            found.objects.len(),
            config.local.s3.bucket_name,
            config.artifacts.marks().unwrap_or_default()
        ));
    }
    for name in &found.generations {
        let literal = quote_literal(name);
        lines.push(format!("-- stays: database {literal}, a replaced one"));
    }
    lines.join("\n") + "\n"
}
