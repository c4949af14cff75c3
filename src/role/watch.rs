//! A primary's look at its peer, and the steps that are left there after a promotion.

use super::epoch::{PeerFacts, is_recorded};
use crate::cluster::preparation::Names;
use crate::cluster::{LocalCluster, Lock, PeerCluster, PeerFence, Promotion, StateDb};
use crate::config::Config;
use crate::domain::{ErrorCode, PromotionKind, Side};
use crate::replication::{ReplicationError, stream, two_servers};

/// The peer, and the report of its server.
#[derive(Debug, Clone)]
pub struct PeerSeen {
    pub theirs: PeerFacts,
    pub version: String,
    pub tls: bool,
}

/// Reads the state of the peer, and changes nothing. An address that was moved to this very cluster
/// is an error.
pub async fn look_at_peer(
    config: &Config,
    peer: &PeerCluster<'_>,
) -> Result<PeerSeen, ReplicationError> {
    let local = LocalCluster::of(config).maintenance().await?;
    let session = peer.builder().await?;
    two_servers(config, &local, &session).await?;
    let state = session.server_state("asking what the peer is").await?;
    Ok(PeerSeen {
        theirs: PeerFacts {
            system_id: state.system_id,
            fenced: state.fenced,
            record: peer.record().await?,
        },
        version: state.server.version,
        tls: state.server.tls,
    })
}

/// Fences the old primary for good. After a switchover nothing of it is missing here, so our
/// objects there are removed. After a failover its slot holds the list of the lost changes, and
/// stays until the old primary comes back.
pub async fn settle(
    config: &Config,
    (state, lock): (&StateDb, Lock),
    promotion: &Promotion,
    seen: &PeerSeen,
) -> Result<(), ReplicationError> {
    if !is_recorded(promotion, &seen.theirs) {
        return Err(another_server());
    }
    let id = state.cluster().await?.id;
    let peer = PeerCluster::of(config);
    let fence = open_fence(&peer, &promotion.system_id).await?;
    // The fence was completed before: sessions that exist now are read-only, and may stay.
    let was_complete = promotion.peer_fenced && fence.stands(promotion.epoch, &id).await?;
    if was_complete {
        fence.settle(promotion.epoch, &id).await?;
    } else {
        state.peer_was_open(promotion.epoch).await?;
        let waived = fence.raise(promotion.epoch, &id, true).await?;
        let database = &config.peer.datastore.database;
        state.note_waived(Side::Peer, &waived, database).await?;
    }
    state.peer_was_fenced(promotion.epoch, false).await?;
    if promotion.kind == PromotionKind::Switchover && was_complete {
        // An object with another name was made by hand, and is not removed.
        let own_names = Names::of_cluster(&id);
        stream::drop_our_slot(&peer, (state, lock), &id, &promotion.slot).await?;
        if promotion.publication == own_names.publication {
            fence.drop_publication(&promotion.publication).await?;
        }
    }
    Ok(state.peer_was_fenced(promotion.epoch, true).await?)
}

/// Opens the capability to fence that one server.
pub(super) async fn open_fence(
    peer: &PeerCluster<'_>,
    system_id: &str,
) -> Result<PeerFence, ReplicationError> {
    let fence = peer.fence(system_id).await?;
    fence.ok_or_else(another_server)
}

pub(super) fn another_server() -> ReplicationError {
    ReplicationError::Refused {
        rule: ErrorCode::AnotherServer,
        text: "the peer is not the server that was followed: only that server is ever fenced"
            .into(),
        next_step: "set peer.datastore to the old primary, or stop Builder there by hand".into(),
    }
}
