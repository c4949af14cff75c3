//! A failover over a primary that lives. It is fenced before anybody is promoted over it; where that cannot be done, the
//! operator is asked, for both could be written to.

use super::Handover;
use crate::cluster::{CopiedPoint, make_room};
use crate::domain::{ErrorCode, Side};
use crate::replication::{Doubt, PassError};

/// Each ends some sessions that others hold there; they may come back faster than ours begin.
const TRIES: u32 = 10;

impl Handover<'_> {
    /// Tries again with room made for it, when the peer is out of connections.
    pub(super) async fn with_room<T>(
        &self,
        point: &CopiedPoint,
        call: impl AsyncFn() -> Result<T, PassError>,
    ) -> Result<T, PassError> {
        for _ in 0..TRIES {
            match call().await {
                Err(error) if wants_room(&error) => {
                    log::warn!("{error}; sessions there that a fence would end are ended now");
                    make_room(&self.config.peer.datastore, &point.system_id).await?;
                }
                other => return other,
            }
        }
        call().await
    }

    /// Nobody is promoted over a primary that answers and is not fenced, unless the operator consents to just that.
    pub(super) fn ask_about_living(
        &self,
        point: &CopiedPoint,
        error: &PassError,
    ) -> Result<(), PassError> {
        let answers = error.shows_life_of_peer() || matches!(error, PassError::Fence(_));
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

fn wants_room(error: &PassError) -> bool {
    error
        .datastore()
        .is_some_and(|error| error.side == Side::Peer && error.is_for_want_of_room())
}
