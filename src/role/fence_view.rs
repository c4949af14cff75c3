//! The fence of one cluster, for people: whether its database takes writes, and who set it.

use super::watch::look_at_peer;
use crate::cluster::{
    FenceRecord, LocalCluster, PeerCluster, WriteSession, is_fenced, lift_statement,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Role, Side};
use crate::replication::ReplicationError;

/// The fence of a cluster, and the role that its own record has.
#[derive(Debug, Clone)]
pub struct FenceView {
    pub side: Side,
    pub database: String,
    /// True: the database is read-only by default.
    pub fenced: bool,
    /// None: the cluster has no role on record.
    pub role: Option<Role>,
    pub epoch: Option<i64>,
    /// None: the fence is the one of a spare, or was set by hand.
    pub record: Option<FenceRecord>,
}

/// Looks at the fence of this cluster, or of its peer. It changes nothing.
pub async fn view_fence(config: &Config, side: Side) -> Result<FenceView, ReplicationError> {
    match side {
        Side::Local => here(config, &LocalCluster::of(config).maintenance().await?).await,
        Side::Peer => there(config).await,
    }
}

async fn here(config: &Config, session: &WriteSession) -> Result<FenceView, ReplicationError> {
    let database = config.local.datastore.database.clone();
    let fenced = is_fenced(session, &database).await?;
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
        database,
        fenced,
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
        role: record.as_ref().and_then(|record| record.role),
        epoch: record.as_ref().map(|record| record.epoch),
        record: record.and_then(|record| record.fence),
    })
}

/// Lifts the fence of this cluster, on which no role may be on record any more. Returns whether there
/// was one.
pub async fn lift_fence(config: &Config) -> Result<bool, ReplicationError> {
    let session = LocalCluster::of(config).maintenance().await?;
    let found = here(config, &session).await?;
    if let Some(role) = found.role {
        return Err(ReplicationError::Refused {
            rule: ErrorCode::StateIsNeeded,
            text: format!(
                "this cluster is on record as {role}: warm-spare would set the fence again, and a spare that is written to is copied over"
            ),
            next_step: "to take over: role = \"primary\", or `warm-spare promote` without the service; to remove warm-spare: first `warm-spare release --local`".into(),
        });
    }
    if found.fenced {
        session
            .batch("lifting the fence", &lift_statement(&found.database))
            .await?;
    }
    Ok(found.fenced)
}
