//! A failover while the primary is alive. The primary is fenced before another cluster is promoted.
//! If it cannot be fenced, the operator is asked, because clients could write to both clusters.

use super::Handover;
use crate::cluster::RecoveryPoint;
use crate::domain::{ErrorCode, Side};
use crate::replication::{Doubt, ReplicationError};

/// Maximum number of attempts. Each ends some sessions there, which may come back faster than our
/// own session begins.
const MAX_ATTEMPTS: u32 = 10;

impl Handover<'_> {
    /// Retries the call after making room, if the peer has no free connections.
    pub(super) async fn with_room<T>(
        &self,
        point: &RecoveryPoint,
        call: impl AsyncFn() -> Result<T, ReplicationError>,
    ) -> Result<T, ReplicationError> {
        for _ in 0..MAX_ATTEMPTS {
            match call().await {
                Err(error) if wants_room(&error) => {
                    log::warn!("{error}; ending now the sessions there that a fence would end");
                    self.peer.make_room(&point.system_id).await?;
                }
                other => return other,
            }
        }
        call().await
    }

    /// Asks the operator before a promotion over a primary that answers but is not fenced.
    pub(super) fn ask_about_living(
        &self,
        point: &RecoveryPoint,
        error: &ReplicationError,
    ) -> Result<(), ReplicationError> {
        let answers = error.shows_life_of_peer() || matches!(error, ReplicationError::Fence(_));
        if !answers {
            return Ok(());
        }
        let doubt = Doubt {
            rule: ErrorCode::PrimaryLives,
            text: format!(
                "not promoted: the primary is not known to be gone, and cannot be fenced: {error}. Clients could write to it and to this cluster"
            ),
            case: format!("{} {}", point.system_id, self.epoch),
        };
        doubt.ask(self.config).map(|_| ())
    }
}

fn wants_room(error: &ReplicationError) -> bool {
    error
        .datastore()
        .is_some_and(|error| error.side == Side::Peer && error.is_for_want_of_room())
}
