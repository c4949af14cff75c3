//! Facts about the peer.

use super::here::Remembered;
use crate::cluster::preparation::Names;
use crate::cluster::{
    LocalCluster, PeerCluster, PrimaryStatus, ReadSession, Record, Rights, exempt_role, rights,
};
use crate::config::Config;
use crate::observe::Clock;
use crate::replication::stream::query;
use crate::replication::{ReplicationError, decide, two_servers};
use chrono::{DateTime, TimeDelta, Utc};
use std::time::Duration;

/// Names of our objects on the peer to ask for.
pub(super) struct Asked {
    names: Names,
    /// True: a copy exists, and no slot continues from it, so the reason is asked for.
    snapshots: bool,
}

impl Asked {
    pub(super) fn of(config: &Config, remembered: Option<&Remembered>) -> Asked {
        let id = remembered.map_or("", |state| &state.cluster.id);
        let point = remembered.and_then(|state| state.point.as_ref());
        let mut names = Names::of(id, &config.replication);
        if let Some(stream) = point.and_then(|point| point.stream.as_ref()) {
            names.slot = stream.slot.clone();
        }
        Asked {
            snapshots: point.is_some_and(|point| !point.is_followed()),
            names,
        }
    }
}

pub(super) struct There {
    pub seen: PrimaryStatus,
    /// The peer's own record; None: it has no database warm_spare.
    pub record: Option<Record>,
    pub server: PeerServer,
}

/// Ids that are further ahead of the primary's own clock were made by a wrong clock.
pub(crate) const ID_SLACK: TimeDelta = TimeDelta::seconds(5);

impl There {
    /// Returns the primary's clock, as of now.
    pub(super) fn clock(&self) -> DateTime<Utc> {
        let ahead = (self.seen.clock_offset_seconds * 1e6) as i64;
        Utc::now() + TimeDelta::microseconds(ahead)
    }
}

pub(super) struct PeerServer {
    pub major: u32,
    pub rights: Rights,
    /// Error if the peer is the same server as the local one.
    pub two: Result<(), ReplicationError>,
    /// Extensions of the peer's database for which the local server has no files.
    pub missing_extensions: Vec<String>,
    /// The reason why the stream is not used, and the change that would make it possible.
    pub why_snapshots: Option<String>,
    /// The reason why a fence on the peer would not hold.
    pub unfenceable: Option<String>,
}

pub(super) async fn look(
    config: &Config,
    peer: &PeerCluster<'_>,
    asked: &Asked,
) -> Result<There, ReplicationError> {
    let clock = Clock::real();
    let record = async { Ok(peer.record().await?) };
    let (seen, record, server) = tokio::try_join!(
        Box::pin(query(peer, &asked.names, &clock)),
        record,
        Box::pin(server(config, peer, asked)),
    )?;
    Ok(There {
        seen,
        record,
        server,
    })
}

async fn server(
    config: &Config,
    peer: &PeerCluster<'_>,
    asked: &Asked,
) -> Result<PeerServer, ReplicationError> {
    let (local, peer) = tokio::try_join!(LocalCluster::of(config).maintenance(), peer.builder())?;
    let why_snapshots = match asked.snapshots {
        true => Some(match decide(config, &asked.names.id, &local, &peer).await {
            Ok(chosen) => chosen.reason,
            Err(error) => error.to_string(),
        }),
        false => None,
    };
    let database = &config.peer.datastore.database;
    let rights = rights(&peer, database).await?;
    Ok(PeerServer {
        major: peer.major().await?,
        unfenceable: unfenceable(&peer, &rights, database).await?,
        rights,
        two: two_servers(config, &local, &peer).await,
        missing_extensions: peer.extensions_missing_on(&local).await?,
        why_snapshots,
    })
}

/// Returns an obstacle that would make a fence there useless. It is better found now than behind
/// the fence.
async fn unfenceable(
    peer: &ReadSession,
    rights: &Rights,
    database: &str,
) -> Result<Option<String>, ReplicationError> {
    if let Some(role) = exempt_role(peer, database).await? {
        let text = format!("role {role} has a default_transaction_read_only of its own there");
        return Ok(Some(text));
    }
    let (prepared, superusers) = peer.unfenced_in(database).await?;
    if prepared > 0 {
        let text = format!("{prepared} prepared transactions are open there");
        return Ok(Some(text));
    }
    if superusers > 0 && !rights.superuser {
        let text = format!(
            "{superusers} sessions there belong to a superuser, and our user, which is not a superuser, may not end them"
        );
        return Ok(Some(text));
    }
    Ok(None)
}

/// Checks that the peer's bucket can be read, because a drain may have to copy artifacts.
pub(super) async fn bucket(config: &Config, patience: Duration) -> Result<(), ReplicationError> {
    let store = PeerCluster::of(config).store()?.with_limits(patience, 1);
    Ok(store.check_bucket().await?)
}
