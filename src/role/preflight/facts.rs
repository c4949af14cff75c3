//! All that the checks judge, gathered once.

use super::Purpose;
use super::here::{self, Remembered, Server};
use super::supervisor;
use super::there::{self, Asked, There};
use crate::cluster::{
    ClientPrograms, CopiedPoint, DatastoreError, DatastoreFault, ProgramError, Side, find_clients,
};
use crate::config::{Config, Datastore};
use crate::replication::PassError;
use chrono::{DateTime, Utc};
use std::pin::Pin;
use std::time::Duration;

/// For our own side, which is near.
const LOCAL_PATIENCE: Duration = Duration::from_secs(10);

pub struct Facts<'a> {
    pub config: &'a Config,
    pub purpose: Purpose,
    pub now: DateTime<Utc>,
    /// None: there is no state of ours, so nothing was ever copied.
    pub remembered: Result<Option<Remembered>, PassError>,
    pub server: Result<Server, PassError>,
    pub bucket: Result<(), PassError>,
    pub there: Result<There, PassError>,
    pub peer_bucket: Result<(), PassError>,
    pub clients: Option<Result<ClientPrograms, ProgramError>>,
    pub supervisor: String,
}

impl<'a> Facts<'a> {
    pub async fn gather(config: &'a Config, purpose: Purpose, patience: Duration) -> Facts<'a> {
        let local = &config.local.datastore;
        let datastores = async {
            let remembering = Box::pin(here::remember(config));
            let remembered = within(LOCAL_PATIENCE, Side::Local, local, remembering).await;
            let asked = Asked::of(config, remembered.as_ref().ok().and_then(Option::as_ref));
            let (server, there) = tokio::join!(
                within(
                    LOCAL_PATIENCE,
                    Side::Local,
                    local,
                    Box::pin(here::server(config))
                ),
                within(
                    patience,
                    Side::Peer,
                    &config.peer.datastore,
                    Box::pin(there::look(config, &asked))
                ),
            );
            (remembered, server, there)
        };
        let ((remembered, server, there), bucket, peer_bucket, supervisor) = tokio::join!(
            Box::pin(datastores),
            here::bucket(config, LOCAL_PATIENCE),
            there::bucket(config, patience),
            supervisor::look(),
        );
        let clients = match &server {
            Ok(server) => {
                let primary = there
                    .as_ref()
                    .map_or(server.major, |there| there.server.major);
                Some(find_clients(primary.min(server.major), server.major.max(primary)).await)
            }
            Err(_) => None,
        };
        Facts {
            config,
            purpose,
            now: Utc::now(),
            remembered,
            server,
            bucket,
            there,
            peer_bucket,
            clients,
            supervisor,
        }
    }

    pub fn point(&self) -> Option<&CopiedPoint> {
        let remembered = self.remembered.as_ref().ok()?.as_ref()?;
        remembered.point.as_ref()
    }

    /// Whether single transactions are followed.
    pub fn streams(&self) -> bool {
        self.point().is_some_and(|point| !point.slot.is_empty())
    }

    pub fn is_planned(&self) -> bool {
        self.purpose == Purpose::Planned
    }
}

/// Whoever does not answer in time counts as one who does not answer.
async fn within<T>(
    limit: Duration,
    side: Side,
    to: &Datastore,
    asking: Pin<Box<impl Future<Output = Result<T, PassError>>>>,
) -> Result<T, PassError> {
    match tokio::time::timeout(limit, asking).await {
        Ok(answer) => answer,
        Err(_) => Err(PassError::Datastore(DatastoreError {
            side,
            address: format!("{}:{}", to.host, to.port),
            doing: "asking whether a promotion would work".into(),
            fault: DatastoreFault::Unreachable,
            text: format!("no answer within {}", humantime::format_duration(limit)),
            sql_state: None,
        })),
    }
}
