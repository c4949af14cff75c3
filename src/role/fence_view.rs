//! The fence of one cluster, for people: whether its database takes writes, and who set it.

use super::watch::look_at_peer;
use crate::cluster::{
    FenceRecord, LocalCluster, PeerCluster, as_client, exempt_role, is_fenced, lift_statement,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Role, Side};
use crate::replication::ReplicationError;

/// The fence of a cluster, and the role that its own record has.
#[derive(Debug, Clone)]
pub struct FenceView {
    pub side: Side,
    pub database: String,
    /// True: the database is read-only by its own setting.
    pub fenced: bool,
    /// True: a session of a plain client is read-only, whatever the reason. None: that is not asked at
    /// the peer.
    pub read_only: Option<bool>,
    /// A role with a setting of its own, which the fence does not hold.
    pub exempt: Option<String>,
    /// None: the cluster has no role on record.
    pub role: Option<Role>,
    pub epoch: Option<i64>,
    /// None: the fence is the one of a spare, or was set by hand.
    pub record: Option<FenceRecord>,
}

/// Looks at the fence of this cluster, or of its peer. It changes nothing.
pub async fn view_fence(config: &Config, side: Side) -> Result<FenceView, ReplicationError> {
    match side {
        Side::Local => here(config).await,
        Side::Peer => there(config).await,
    }
}

async fn here(config: &Config) -> Result<FenceView, ReplicationError> {
    let to = &config.local.datastore;
    let session = LocalCluster::of(config).maintenance().await?;
    // It also tells whether there is such a database.
    let client = as_client(to, &to.database).await?;
    let (role, epoch, record) = match LocalCluster::of(config).existing_state().await? {
        Some(state) => {
            let cluster = state.cluster().await?;
            (
                cluster.role,
                Some(cluster.epoch),
                state.fence_record().await?,
            )
        }
        None => (None, None, None),
    };
    Ok(FenceView {
        side: Side::Local,
        database: to.database.clone(),
        fenced: is_fenced(&session, &to.database).await?,
        read_only: Some(client.read_only),
        exempt: exempt_role(&session, &to.database).await?,
        role,
        epoch,
        record,
    })
}

async fn there(config: &Config) -> Result<FenceView, ReplicationError> {
    let seen = look_at_peer(config, &PeerCluster::of(config)).await?;
    let record = seen.theirs.record;
    Ok(FenceView {
        side: Side::Peer,
        database: config.peer.datastore.database.clone(),
        fenced: seen.theirs.fenced,
        read_only: None,
        exempt: None,
        role: record.as_ref().and_then(|record| record.role),
        epoch: record.as_ref().map(|record| record.epoch),
        record: record.and_then(|record| record.fence),
    })
}

/// Lifts the fence of this cluster, which nobody may need any more. Returns whether there was one.
pub async fn lift_fence(config: &Config) -> Result<bool, ReplicationError> {
    let database = &config.local.datastore.database;
    let session = LocalCluster::of(config).maintenance().await?;
    let fenced = is_fenced(&session, database).await?;
    match LocalCluster::of(config).existing_state().await? {
        Some(state) if !state.lift_unneeded_fence(database).await? => {
            return Err(is_needed(&here(config).await?));
        }
        None if fenced => {
            session
                .batch("lifting the fence", &lift_statement(database))
                .await?;
        }
        _ => {}
    }
    Ok(fenced)
}

fn is_needed(found: &FenceView) -> ReplicationError {
    let (text, next_step) = match (&found.record, found.role) {
        (Some(record), _) => (
            format!(
                "cluster {} has fenced this cluster under epoch {}: rows that are written here now are nowhere else",
                record.by_cluster, record.epoch
            ),
            "to come back as its spare: role = \"spare\" (docs/failback.md); if that cluster is lost: role = \"primary\" with force_epoch (docs/two-primaries.md)",
        ),
        (None, role) => (
            format!(
                "this cluster is on record as {}: warm-spare would set the fence again, and a spare that is written to is copied over",
                role.map_or("none", Into::into)
            ),
            "to take over: role = \"primary\", or `warm-spare promote` without the service; to remove warm-spare: first `warm-spare release --local`",
        ),
    };
    ReplicationError::Refused {
        rule: ErrorCode::StateIsNeeded,
        text,
        next_step: next_step.into(),
    }
}
