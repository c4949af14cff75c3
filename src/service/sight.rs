//! Our own server, looked at every few seconds, also while another process works here: what load balancers are told rests on that alone, and
//! on nothing that was true a while ago.

use super::{Configs, Desk, next};
use crate::cluster::{self, as_client};
use crate::config::Config;
use crate::domain::Role;
use crate::observe::Seen;
use crate::replication::{PassError, is_ours};
use std::convert::Infallible;
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_secs(2);
/// After a look that failed: one may have met the moment in which another database becomes the visible one.
const AGAIN: Duration = Duration::from_millis(500);
/// For one look. A server that needs longer serves nobody.
const PATIENCE: Duration = Duration::from_secs(3);
/// So many failures in a row are no accident.
const FAILURES: u32 = 2;

pub async fn keep_looking(desk: &Desk, mut configs: Configs) -> Infallible {
    loop {
        let config = configs.borrow_and_update().clone();
        desk.update(|state| state.seen = None);
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
            never = look_on(desk, &config) => match never {},
            () = changed => {}
        }
    }
}

async fn look_on(desk: &Desk, config: &Config) -> Infallible {
    let mut database = None;
    let mut failures = 0;
    loop {
        match tokio::time::timeout(PATIENCE, look(config, &mut database)).await {
            Ok(Ok(seen)) => {
                failures = 0;
                desk.update(|state| state.seen = Some(seen));
            }
            failed => {
                database = None;
                failures += 1;
                if let Ok(Err(error)) = failed {
                    log::debug!("{error}");
                }
                if failures >= FAILURES {
                    desk.update(|state| state.seen = None);
                }
            }
        }
        tokio::time::sleep(if failures == 0 { LOOK } else { AGAIN }).await;
    }
}

/// Looked at once, by a duty that has changed something there or found it changed: what is told next is true by then.
pub async fn look_again(desk: &Desk, config: &Config) {
    match tokio::time::timeout(PATIENCE, Box::pin(look(config, &mut None))).await {
        Ok(Ok(seen)) => desk.update(|state| state.seen = Some(seen)),
        Ok(Err(error)) => log::debug!("{error}"),
        Err(_) => log::debug!("local: our own server did not answer in time"),
    }
}

async fn look(config: &Config, kept: &mut Option<cluster::State>) -> Result<Seen, PassError> {
    let at = Instant::now();
    let local = &config.local.datastore;
    if kept.is_none() {
        *kept = cluster::State::open_existing(local).await?;
    }
    let (role, fenced, point) = match kept {
        Some(state) => (
            state.cluster().await?.role,
            state.fence_record().await?.is_some(),
            state.copied_point().await?,
        ),
        None => (None, false, None),
    };
    let client = as_client(local, &local.database).await?;
    Ok(Seen {
        at,
        writable: role == Some(Role::Primary) && !fenced && !client.read_only,
        readable: role == Some(Role::Spare)
            && point.is_some_and(|point| is_ours(&point, client.stands.as_ref())),
    })
}
