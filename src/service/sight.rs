//! Looks at the local server every few seconds, and when a load balancer asks, also while another
//! process works here. The answers to load balancers depend only on this look, and on nothing that
//! was true some time ago.

use super::{Configs, StatusWriter, next};
use crate::cluster;
use crate::cluster::{LocalCluster, as_client};
use crate::config::Config;
use crate::domain::Role;
use crate::observe::Seen;
use crate::replication::ReplicationError;
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Interval between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Minimum interval, however often it is asked for: a look opens a session.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// Interval after a failed look. The look may have met the moment in which the visible database is
/// switched.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Time limit of a look. A server that needs longer serves no client.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
/// Number of consecutive failures after which the server counts as gone.
const MAX_FAILURES: u32 = 2;

pub(super) async fn keep_looking(writer: &StatusWriter, mut configs: Configs) -> Infallible {
    loop {
        let config = configs.borrow_and_update().clone();
        writer.update(|state| state.seen = None);
        let Some(config) = config else {
            next(&mut configs).await;
            continue;
        };
        let changed = async {
            loop {
                next(&mut configs).await;
                let new = configs.borrow_and_update().clone();
                if new.is_none_or(|new| new.local.datastore != config.local.datastore) {
                    break;
                }
            }
        };
        tokio::select! {
            never = look_on(writer, &config) => match never {},
            () = changed => {}
        }
    }
}

async fn look_on(writer: &StatusWriter, config: &Config) -> Infallible {
    let mut database = None;
    let mut failures = 0;
    loop {
        match tokio::time::timeout(LOOK_TIMEOUT, look(config, &mut database)).await {
            Ok(Ok(seen)) => {
                failures = 0;
                writer.update(|state| state.seen = Some(seen));
            }
            failed => {
                database = None;
                failures += 1;
                if let Ok(Err(error)) = failed {
                    log::debug!("{error}");
                }
                if failures >= MAX_FAILURES {
                    writer.update(|state| state.seen = None);
                }
            }
        }
        if failures > 0 {
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
        // Late or asked for: both mean a look now.
        let asked = writer.look.notified();
        let _ = tokio::time::timeout(LOOK_INTERVAL - LOOK_PAUSE, asked).await;
    }
}

/// Looks at once. A duty that has changed something there, or found a change, calls this, so that
/// the next answer is right.
pub(super) async fn look_again(writer: &StatusWriter, config: &Config) {
    match tokio::time::timeout(LOOK_TIMEOUT, Box::pin(look(config, &mut None))).await {
        Ok(Ok(seen)) => writer.update(|state| state.seen = Some(seen)),
        Ok(Err(error)) => log::debug!("{error}"),
        Err(_) => log::debug!("local: the datastore did not answer in time"),
    }
}

async fn look(
    config: &Config,
    kept: &mut Option<cluster::StateDb>,
) -> Result<Seen, ReplicationError> {
    let at = Instant::now();
    let local = &config.local.datastore;
    if kept.is_none() {
        *kept = LocalCluster::of(config).existing_state().await?;
    }
    let (role, fenced, point) = match kept {
        Some(state) => (
            state.cluster().await?.role,
            state.fence_record().await?.is_some(),
            state.recovery_point().await?,
        ),
        None => (None, false, None),
    };
    let client = as_client(local, &local.database).await?;
    Ok(Seen {
        at,
        writable: role == Some(Role::Primary) && !fenced && !client.read_only,
        readable: role == Some(Role::Spare)
            && point.is_some_and(|point| point.is_of(client.stands.as_ref())),
    })
}
