//! Deletes artifacts of deleted packages after a while. Just before that, every database that could
//! become the visible one is asked whether a row names the key.

use super::round::RETIRED;
use crate::cluster::{
    BuilderDb, DatastoreError, DatastoreFault, Expected, LocalCluster, LocalStore, Lock,
    Retirement, StateDb, WriteSession,
};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::killpoint;
use crate::package::package_of_key;
use crate::replication::error::ReplicationError;

/// Maximum number of artifacts deleted in one round.
const MAX_DELETIONS: i64 = 500;

/// The result of one round.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Swept {
    pub deleted: u64,
    /// A row still names it, or names it again.
    pub kept: u64,
}

/// Deletes artifacts that no row has named for `replication.artifact_retention`. `claim` reserves a
/// key in the meantime; None: another task works on the key.
pub async fn sweep<C>(
    config: &Config,
    state: &StateDb,
    lock: Lock,
    store: &LocalStore,
    claim: impl Fn(&str) -> Option<C>,
) -> Result<Swept, ReplicationError> {
    let age = config.replication.artifact_retention;
    let mut swept = Swept::default();
    let due = state.retirements(age, MAX_DELETIONS).await?;
    if due.is_empty() {
        return Ok(swept);
    }
    // A session of its own: a round that is given up must not keep the lock.
    let deletion = LocalCluster::of(config).state().await?;
    if !deletion.begin_deletion().await? {
        log::debug!("local: a generation for the archive is being made; nothing is deleted now");
        return Ok(swept);
    }
    let databases = databases(config, state).await?;
    for gone in due {
        let Some(_claim) = claim(&gone.key) else {
            continue;
        };
        // The decision is about the present object, and not about one that is stored there later.
        let present = store.reading().head(&gone.key).await?;
        let names = named(&databases, &gone).await?;
        if !names.contains(&gone.checksum) {
            state.still_ours(lock).await?;
            // The old bytes may be here, if other bytes took their place.
            store.delete(&format!("{RETIRED}{}", gone.checksum)).await?;
        }
        if names.is_empty() {
            killpoint::reach("retention.before_delete");
            // This process may have hung, and its successor may know of rows that name the key
            // again.
            state.still_ours(lock).await?;
            if let Some(stored) = present
                && !store
                    .delete_as_found(&gone.key, &Expected::Etag(stored.etag))
                    .await?
            {
                swept.kept += 1;
                continue;
            }
            state.forget_artifact(&gone.key).await?;
            swept.deleted += 1;
        } else {
            swept.kept += 1;
            if names.contains(&gone.checksum) {
                // A generation names it. It is checked again after another retention time.
                state.retire(&[(gone.key.clone(), &gone.checksum)]).await?;
                continue;
            }
        }
        state.forget_retirement(&gone).await?;
    }
    Ok(swept)
}

/// Opens every database that could become the visible one and has packages. A database that a first
/// copy replaced belongs to somebody else, and may have none. A database that cannot be asked may
/// name any key: then nothing is deleted.
async fn databases(config: &Config, state: &StateDb) -> Result<Databases, ReplicationError> {
    let visible = LocalCluster::of(config).builder().await?;
    let mut databases = vec![(config.local.datastore.database.clone(), visible)];
    for generation in state.generations().await? {
        let asked = with_packages(LocalCluster::of(config), &generation.name).await;
        let asked = asked.map_err(|error| unasked(&generation.name, error))?;
        databases.extend(asked.map(|session| (generation.name, session)));
    }
    Ok(databases)
}

/// The databases, with their names.
type Databases = Vec<(String, WriteSession)>;

/// Opens a database. None: it has no table of packages, or does not exist any more.
async fn with_packages(
    local: LocalCluster<'_>,
    name: &str,
) -> Result<Option<WriteSession>, DatastoreError> {
    let session = match local.database(name).await {
        Ok(session) => session,
        Err(error) if error.fault == DatastoreFault::NoDatabase => return Ok(None),
        Err(error) => return Err(error),
    };
    let packages = BuilderDb::of(&session).has_packages().await?;
    Ok(packages.then_some(session))
}

fn unasked(database: &str, error: DatastoreError) -> ReplicationError {
    if error.is_transient() {
        return error.into();
    }
    ReplicationError::Precondition {
        check: ErrorCode::UnaskedGeneration,
        text: format!(
            "the kept database {database} cannot be asked which artifacts it names, so all of them are kept: {error}"
        ),
        next_step: format!(
            "make it readable again, or drop it: `warm-spare generations drop {database}`"
        ),
    }
}

/// Returns the checksums that rows name under the key.
async fn named(
    databases: &[(String, WriteSession)],
    gone: &Retirement,
) -> Result<Vec<String>, ReplicationError> {
    let Some((ident, target)) = package_of_key(&gone.key) else {
        return Ok(Vec::new());
    };
    let (ident, target) = (ident.to_string(), target.to_string());
    let mut checksums = Vec::new();
    for (name, session) in databases {
        let named = BuilderDb::of(session).checksums_of(&ident, &target).await;
        checksums.extend(named.map_err(|error| unasked(name, error))?);
    }
    Ok(checksums)
}
