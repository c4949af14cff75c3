//! A primary's look at its peer, and the steps that are left there after a promotion.

use super::epoch::{Theirs, is_recorded};
use crate::cluster::preparation::Names;
use crate::cluster::{
    LocalSession, PeerFence, PeerSession, Promotion, State, fenced, peers_record,
};
use crate::config::{Config, Datastore};
use crate::domain::{ErrorCode, PromotionKind};
use crate::replication::{PassError, stream, two_servers};

/// The peer, and the report of its server.
#[derive(Debug, Clone)]
pub struct PeerSeen {
    pub theirs: Theirs,
    pub version: String,
    pub tls: bool,
}

/// Reads the state of the peer, and changes nothing. An address that was moved to this very cluster
/// is an error.
pub async fn look_at_peer(config: &Config) -> Result<PeerSeen, PassError> {
    let local = LocalSession::open_for_maintenance(&config.local.datastore).await?;
    let peer = PeerSession::open(&config.peer.datastore).await?;
    two_servers(config, &local, &peer).await?;
    let sql = concat!(
        "SELECT (SELECT system_identifier::text FROM pg_control_system()), current_setting('server_version'), \
           coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false), ",
        fenced!("current_database()")
    );
    let row = peer.row("asking what the peer is", sql, &[]).await?;
    Ok(PeerSeen {
        theirs: Theirs {
            system_id: row.get(0)?,
            fenced: row.get(3)?,
            record: peers_record(&config.peer.datastore).await?,
        },
        version: row.get(1)?,
        tls: row.get(2)?,
    })
}

/// Fences the old primary for good. After a switchover nothing of it is missing here, so our
/// objects there are removed. After a failover its slot holds the list of the lost changes, and
/// stays until the old primary comes back.
pub async fn settle(
    config: &Config,
    state: &State,
    promotion: &Promotion,
    seen: &PeerSeen,
) -> Result<(), PassError> {
    if !is_recorded(promotion, &seen.theirs) {
        return Err(another_server());
    }
    let id = state.cluster().await?.id;
    let peer = &config.peer.datastore;
    let fence = open_fence(peer, &promotion.system_id).await?;
    // The fence was completed before: sessions that exist now are read-only, and may stay.
    let was_complete = promotion.peer_fenced && fence.stands(promotion.epoch, &id).await?;
    if was_complete {
        fence.settle(promotion.epoch, &id).await?;
    } else {
        state.peer_was_open(promotion.epoch).await?;
        fence.raise(promotion.epoch, &id, true).await?;
    }
    state.peer_was_fenced(promotion.epoch, false).await?;
    if promotion.kind == PromotionKind::Switchover && was_complete {
        // An object with another name was made by hand, and is not removed.
        let own_names = Names::of_cluster(&id);
        if promotion.slot == own_names.slot {
            stream::drop_slot(peer, &promotion.slot).await?;
        }
        if promotion.publication == own_names.publication {
            fence.drop_publication(&promotion.publication).await?;
        }
    }
    Ok(state.peer_was_fenced(promotion.epoch, true).await?)
}

/// Opens the capability to fence that one server.
pub(super) async fn open_fence(peer: &Datastore, system_id: &str) -> Result<PeerFence, PassError> {
    let fence = PeerFence::open(peer, system_id).await?;
    fence.ok_or_else(another_server)
}

pub(super) fn another_server() -> PassError {
    PassError::Refused {
        rule: ErrorCode::AnotherServer,
        text: "the peer is not the server that was followed: only that server is ever fenced"
            .into(),
        next_step: "set peer.datastore to the old primary, or stop Builder there by hand".into(),
    }
}
