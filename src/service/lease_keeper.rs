//! Keeps the lease of a shared bucket: renews it on a primary, looks at it on a spare.

use super::leadership::Leadership;
use super::{Configs, StatusWriter};
use crate::cluster::{LocalCluster, StateDb};
use crate::config::{ArtifactsMode, Config};
use crate::domain::{EventKind, LeaseState, Role};
use crate::observe::{LeaseFacts, span};
use crate::replication::ReplicationError;
use crate::role::{Holder, Tended, accepts_connections};
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Interval between two looks at a fence of a former mode.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Time limit for Builder's API on this node to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) async fn keep_lease(
    writer: &StatusWriter,
    leadership: &Leadership,
    configs: Configs,
) -> Infallible {
    let mut holder = Holder::default();
    let (mut session, mut renewals) = (None, Renewals::default());
    loop {
        let config = leadership.in_force(&configs);
        if config.artifacts.mode != ArtifactsMode::Shared {
            // The promise of a former mode may still stand. Another mode begins a new leadership.
            let lifted = async {
                let state = LocalCluster::of(&config).state().await?;
                Holder::lift_own_fence(&config, &state).await
            };
            let stays = lifted.await.unwrap_or_else(|error| Some(error.to_string()));
            writer.update(|state| state.lease.trouble.clone_from(&stays));
            if stays.is_some() {
                tokio::time::sleep(RETRY_AFTER).await;
                continue;
            }
            std::future::pending::<()>().await;
        }
        let tended = Box::pin(tend(&mut holder, &config, &mut session)).await;
        match tended {
            Ok(mut tended) => {
                renewals.see(&mut tended);
                show(writer, &config, tended).await;
            }
            Err(error) => {
                session = None;
                let text = error.to_string();
                if writer.read(|state| state.lease.trouble.as_ref() != Some(&text)) {
                    log::warn!("the lease: {text}");
                }
                writer.update(|state| state.lease.trouble = Some(text));
            }
        }
        tokio::time::sleep(holder.pause(&config)).await;
    }
}

/// The last change of a lease that another cluster holds, by a clock that nobody sets.
#[derive(Default)]
struct Renewals(Option<(String, Instant)>);

impl Renewals {
    /// Reports a lease that its holder renews no more.
    fn see(&mut self, tended: &mut Tended) {
        let Some(lease) = tended.lease.as_ref().filter(|_| tended.permitted.is_none()) else {
            self.0 = None;
            return;
        };
        let since = match &self.0 {
            Some((nonce, since)) if *nonce == lease.nonce => *since,
            _ => Instant::now(),
        };
        self.0 = Some((lease.nonce.clone(), since));
        let unchanged = since.elapsed();
        if lease.state == LeaseState::Held && unchanged > lease.terms().ttl * 2 {
            tended.trouble.get_or_insert(format!(
                "its holder, cluster {} ({}), has not renewed the lease for {}",
                lease.line.holder,
                lease.line.site,
                span(unchanged.as_secs_f64())
            ));
        }
    }
}

/// Looks at the lease with a session of its own, which a fence needs for its transactions.
async fn tend(
    holder: &mut Holder,
    config: &Config,
    session: &mut Option<StateDb>,
) -> Result<Tended, ReplicationError> {
    let state = match session.take() {
        Some(state) => state,
        None => LocalCluster::of(config).state().await?,
    };
    let tended = holder.tend(config, &state).await?;
    *session = Some(state).filter(|_| !tended.is_cut);
    Ok(tended)
}

async fn show(writer: &StatusWriter, config: &Config, tended: Tended) {
    for text in &tended.acts {
        writer.note(EventKind::Fence, text);
    }
    let before = writer.read(|state| state.lease.trouble.clone());
    match (&before, &tended.trouble) {
        (None, Some(now)) => log::warn!("the lease: {now}"),
        (Some(_), None) => log::info!("the lease: read and believed again"),
        _ => {}
    }
    let is_spare = writer.read(|state| state.cluster.role == Some(Role::Spare));
    let builder_api = match config.builder_api.filter(|_| is_spare) {
        Some(address) if accepts_connections(address, CONNECT_TIMEOUT).await => {
            Some(address.to_string())
        }
        _ => None,
    };
    writer.update(|state| {
        state.lease = LeaseFacts {
            lease: tended.lease,
            trouble: tended.trouble,
            permitted: tended.permitted,
            builder_api,
        };
    });
}
