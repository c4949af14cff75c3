//! Facts about the local side.

use crate::cluster::{
    BuilderDb, CIPHERTEXTS, ClusterRecord, Confirmation, Disk, Keeps, LocalCluster, MayApply,
    RecoveryPoint, Rights, SpareDb, StateDb, VerificationRecord, WriteSession, is_fenced,
    may_apply, prove_fence, prove_writable, rights,
};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::replication::{ReplicationError, disk};
use chrono::{DateTime, Utc};
use std::time::Duration;

/// Number of questions to the local bucket, because an operator waits for the answer.
const MAX_ATTEMPTS: usize = 2;

/// The facts in the local state database.
pub(super) struct Remembered {
    pub cluster: ClusterRecord,
    /// The point of the visible database.
    pub point: Option<RecoveryPoint>,
    pub confirmation: Option<Confirmation>,
    pub verification: Option<VerificationRecord>,
    /// Artifacts that are unavailable on the primary, with the reason; None: the visible database
    /// is not a copy that warm-spare made.
    pub missing: Option<Vec<(String, MissingReason)>>,
    /// True: the bucket is another one than before, and no pass has proved its artifacts yet.
    pub unproved: bool,
    /// Number of artifacts of a shared bucket that were not hashed yet.
    pub unproven: u64,
    /// The reason why the fence does not hold.
    pub open: Option<String>,
}

pub(super) async fn remember(config: &Config) -> Result<Option<Remembered>, ReplicationError> {
    let Some(state) = LocalCluster::of(config).existing_state().await? else {
        return Ok(None);
    };
    let cluster = state.cluster().await?;
    let copied = state.recovery_point().await?;
    let confirmation = state.confirmation().await?;
    let verification = state.last_verification().await?;
    let place = state.artifact_place().await?;
    let unproven = state.count_unproven().await?;
    let (visible, open) = tokio::try_join!(visible(config, copied), open_fence(config, &state))?;
    let (point, missing) = visible;
    Ok(Some(Remembered {
        cluster,
        point,
        confirmation,
        verification,
        missing,
        unproven,
        unproved: place.is_some_and(|(_, proved)| !proved),
        open,
    }))
}

/// Reads the point of the visible database, and its artifacts that are not there. None: nothing was
/// copied yet; the visible database does not exist, or was not copied here.
async fn visible(
    config: &Config,
    copied: Option<RecoveryPoint>,
) -> Result<(Option<RecoveryPoint>, Option<Vec<(String, MissingReason)>>), ReplicationError> {
    let Some(session) = LocalCluster::of(config).builder_if_there().await? else {
        return Ok((copied, None));
    };
    let spare = SpareDb::of(&session);
    if !spare.exists().await? {
        return Ok((copied, None));
    }
    let point = match copied {
        Some(copied) => Some(spare.point(copied).await?),
        None => None,
    };
    Ok((point, Some(spare.unavailable_reasons().await?)))
}

/// Returns the reason why the fence does not hold; None: it holds.
async fn open_fence(config: &Config, state: &StateDb) -> Result<Option<String>, ReplicationError> {
    let to = &config.local.datastore;
    if !is_fenced(state.session(), &to.database).await? {
        return Ok(Some(format!(
            "database {} is open to every client: its fence is down",
            to.database
        )));
    }
    let proven = prove_fence(state.session(), to, &to.database).await;
    Ok(proven.err().map(|error| error.to_string()))
}

/// The local server and the visible database.
pub(super) struct Server {
    pub major: u32,
    pub rights: Rights,
    pub may_apply: MayApply,
    pub bytes: u64,
    pub disk: Option<Disk>,
    /// Extensions of the visible database whose files are missing.
    pub missing_extensions: Vec<String>,
    /// The recovery point in the visible database; None: it is not a copy that warm-spare made.
    pub stands: Option<String>,
    pub clock: DateTime<Utc>,
    /// Time of the newest of Builder's ids, which are made of time.
    pub newest_id: Option<DateTime<Utc>>,
    /// Time of the newest id that is not in the future by the primary's clock, if there are ids of
    /// the future.
    pub newest_past_id: Option<DateTime<Utc>>,
    pub sealed: Result<Vec<Sealed>, ReplicationError>,
}

pub(super) async fn server(config: &Config) -> Result<Server, ReplicationError> {
    let to = &config.local.datastore;
    let session = LocalCluster::of(config).builder().await?;
    Ok(Server {
        major: session.major().await?,
        rights: rights(&session, &to.database).await?,
        may_apply: may_apply(&session).await?,
        bytes: session.database_facts().await?.bytes.unsigned_abs(),
        disk: disk(config, &session).await,
        missing_extensions: session.extensions_missing_on(&session).await?,
        stands: SpareDb::of(&session).lsn().await?,
        clock: session.clock().await?,
        newest_id: BuilderDb::of(&session).newest_id(None).await?,
        newest_past_id: None,
        sealed: sealed(&session).await,
    })
}

pub(super) async fn newest_past_id(
    config: &Config,
    until: DateTime<Utc>,
) -> Result<Option<DateTime<Utc>>, ReplicationError> {
    let session = LocalCluster::of(config).builder().await?;
    let builder = BuilderDb::of(&session);
    Ok(builder.newest_id(Some(until)).await?)
}

/// The rows of one kind that one revision of the builder keys has sealed.
pub(super) struct Sealed {
    /// The kind of the rows, as text.
    pub what: &'static str,
    /// The revision, as its table has it; empty: only the ciphertext names it.
    pub revision: String,
    pub rows: i64,
    /// The newest rows.
    pub newest: Vec<String>,
}

/// Reads the sealed rows. These tables grow with origins and people, not with packages.
pub(super) async fn sealed(session: &WriteSession) -> Result<Vec<Sealed>, ReplicationError> {
    let builder = BuilderDb::of(session);
    let mut found = Vec::new();
    for (what, table, column, revision) in CIPHERTEXTS {
        let groups = builder.sealed_rows(table, column, revision).await?;
        found.extend(groups.into_iter().map(|group| Sealed {
            what,
            revision: group.revision,
            rows: group.rows,
            newest: group.newest,
        }));
    }
    Ok(found)
}

/// Checks that the local bucket exists and can be written, and returns how it treats deleted
/// objects. None: it is the provider's, so nothing is written, and it can be read.
pub(super) async fn bucket(
    config: &Config,
    patience: Duration,
) -> Result<Option<Keeps>, ReplicationError> {
    let local = LocalCluster::of(config);
    let reading = local.reading_store()?.with_limits(patience, MAX_ATTEMPTS);
    reading.check_bucket().await?;
    match local.mark_store()? {
        Some(own) => {
            let own = own.with_limits(patience, MAX_ATTEMPTS);
            Ok(Some(prove_writable(&own).await?))
        }
        None => Ok(None),
    }
}
