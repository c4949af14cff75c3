//! The facts that the checks judge. They are gathered once.

use super::here::{self, Remembered, Sealed, Server};
use super::there::{self, Asked, ID_SLACK, There};
use super::{Purpose, external, node, shared, supervisor};
use crate::cluster::{
    ClientPrograms, DatastoreError, DatastoreFault, InstalledClients, Keeps, Node, PeerCluster,
    ProgramError, RecoveryPoint,
};
use crate::config::{Config, Datastore};
use crate::domain::{ErrorCode, Sampled, Side};
use crate::replication::{ReplicationError, not_in_time, sample};
use chrono::{DateTime, Utc};
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

/// Time limit for the local side, which is near.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Facts<'a> {
    pub config: &'a Config,
    pub purpose: Purpose,
    pub now: DateTime<Utc>,
    /// None: the local server has no database warm_spare, so nothing was ever copied.
    pub remembered: Result<Option<Remembered>, ReplicationError>,
    pub server: Result<Server, ReplicationError>,
    pub bucket: Result<Option<Keeps>, ReplicationError>,
    /// Some artifacts that local rows name, searched in the local bucket; None: the visible
    /// database is not a copy that warm-spare made.
    pub sampled: Result<Option<Sampled>, ReplicationError>,
    pub there: Result<There, ReplicationError>,
    pub peer_bucket: Result<(), ReplicationError>,
    /// The lease of a shared bucket. None: there is none.
    pub lease: Option<Result<(), ReplicationError>>,
    /// True: a rule of the provider copies the local bucket. None: the provider is not asked.
    pub rule: Option<Result<bool, ReplicationError>>,
    /// The address at which Builder's API answers beside a shared bucket.
    pub builder_api: Option<SocketAddr>,
    pub clients: Option<Result<ClientPrograms, ProgramError>>,
    pub supervisor: String,
    /// The nodes that wait at the spare's site, if this process is at the other one.
    pub standbys: Vec<Node>,
}

/// The answers of the two datastores.
struct Datastores {
    remembered: Result<Option<Remembered>, ReplicationError>,
    server: Result<Server, ReplicationError>,
    there: Result<There, ReplicationError>,
    clients: Option<Result<ClientPrograms, ProgramError>>,
}

/// Asks both datastores. The questions to the peer depend on the local record; all others are asked
/// at once.
async fn datastores(config: &Config, cluster: &PeerCluster<'_>, patience: Duration) -> Datastores {
    let (local, peer) = (&config.local.datastore, &config.peer.datastore);
    let remembering = Box::pin(here::remember(config));
    let remembered = within(LOCAL_TIMEOUT, Side::Local, local, remembering).await;
    let asked = Asked::of(config, remembered.as_ref().ok().and_then(Option::as_ref));
    let (server, there, installed) = tokio::join!(
        within(
            LOCAL_TIMEOUT,
            Side::Local,
            local,
            Box::pin(here::server(config))
        ),
        within(
            patience,
            Side::Peer,
            peer,
            Box::pin(there::look(config, cluster, &asked))
        ),
        InstalledClients::look(),
    );
    let server = match (server, &there) {
        (Ok(server), Ok(there)) => {
            let looking = Box::pin(without_ids_to_come(config, server, there));
            within(LOCAL_TIMEOUT, Side::Local, local, looking).await
        }
        (server, _) => server,
    };
    let clients = server.as_ref().ok().map(|local_server| {
        let there = there.as_ref();
        let peer_major = there.map_or(local_server.major, |there| there.server.major);
        // Data go from the older server to the newer one, whichever side that is.
        installed.fitting(
            peer_major.min(local_server.major),
            local_server.major.max(peer_major),
        )
    });
    Datastores {
        remembered,
        server,
        there,
        clients,
    }
}

/// Adds the newest id that is not in the future. A row that was made while a clock was years ahead
/// would otherwise have the newest id for ever.
async fn without_ids_to_come(
    config: &Config,
    server: Server,
    there: &There,
) -> Result<Server, ReplicationError> {
    let until = there.clock() + ID_SLACK;
    if server.newest_id.is_none_or(|newest| newest < until) {
        return Ok(server);
    }
    Ok(Server {
        newest_past_id: here::newest_past_id(config, until).await?,
        ..server
    })
}

impl<'a> Facts<'a> {
    pub(super) async fn gather(
        config: &'a Config,
        peer: &PeerCluster<'_>,
        purpose: Purpose,
        patience: Duration,
    ) -> Facts<'a> {
        let (
            datastores,
            bucket,
            sampled,
            peer_bucket,
            lease,
            rule,
            builder_api,
            supervisor,
            standbys,
        ) = tokio::join!(
            Box::pin(datastores(config, peer, patience)),
            here::bucket(config, LOCAL_TIMEOUT),
            Box::pin(sampled(config)),
            there::bucket(config, patience),
            lease(config),
            external::look_at_rule(config, LOCAL_TIMEOUT),
            shared::answering_api(config),
            supervisor::look(),
            tokio::time::timeout(LOCAL_TIMEOUT, node::standbys(config)),
        );
        Facts {
            config,
            purpose,
            now: Utc::now(),
            remembered: datastores.remembered,
            server: datastores.server,
            there: datastores.there,
            clients: datastores.clients,
            bucket,
            sampled,
            peer_bucket,
            lease,
            rule,
            builder_api,
            supervisor,
            standbys: standbys.unwrap_or_default(),
        }
    }

    /// Returns the rows of this cluster that Builder's keys have sealed.
    pub(super) fn sealed(&self) -> Result<&[Sealed], &ReplicationError> {
        let server = self.server.as_ref()?;
        server.sealed.as_deref()
    }

    pub(super) fn point(&self) -> Option<&RecoveryPoint> {
        let remembered = self.remembered.as_ref().ok()?.as_ref()?;
        remembered.point.as_ref()
    }

    /// Returns whether the stream is followed.
    pub(super) fn streams(&self) -> bool {
        self.point().is_some_and(|point| point.is_followed())
    }

    pub(super) fn is_planned(&self) -> bool {
        self.purpose == Purpose::Planned
    }
}

async fn lease(config: &Config) -> Option<Result<(), ReplicationError>> {
    match tokio::time::timeout(LOCAL_TIMEOUT, Box::pin(shared::look_at_lease(config))).await {
        Ok(found) => found,
        Err(_) => Some(Err(ReplicationError::Precondition {
            check: ErrorCode::LeaseUnanswered,
            text: format!(
                "the lease was not read within {}",
                humantime::format_duration(LOCAL_TIMEOUT)
            ),
            next_step: "check that the shared bucket answers at both addresses".into(),
        })),
    }
}

async fn sampled(config: &Config) -> Result<Option<Sampled>, ReplicationError> {
    match tokio::time::timeout(LOCAL_TIMEOUT, sample(config, LOCAL_TIMEOUT)).await {
        Ok(found) => found,
        Err(_) => Err(not_in_time(config, LOCAL_TIMEOUT)),
    }
}

/// Applies a time limit. A side that does not answer in time counts as one that does not answer.
async fn within<T>(
    limit: Duration,
    side: Side,
    to: &Datastore,
    asking: Pin<Box<impl Future<Output = Result<T, ReplicationError>>>>,
) -> Result<T, ReplicationError> {
    match tokio::time::timeout(limit, asking).await {
        Ok(answer) => answer,
        Err(_) => Err(ReplicationError::Datastore(DatastoreError {
            side,
            address: format!("{}:{}", to.host, to.port),
            doing: "asking whether a promotion would work".into(),
            fault: DatastoreFault::Unreachable,
            text: format!("no answer within {}", humantime::format_duration(limit)),
            sql_state: None,
        })),
    }
}
