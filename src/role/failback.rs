//! The old primary comes back as the spare: fenced first, then what it has and its peer lacks is put on record, and only
//! then is what would hold log for the peer removed, and the role changed. The copy itself is an ordinary one.

use super::divergence;
use super::steps::{Told, Walk};
use super::watch::look_at_peer;
use crate::cluster::preparation::Names;
use crate::cluster::{
    EPOCH_STEP_MAX, LocalSession, Lock, Promotion, Record, State, quote_ident, raise_fence,
    system_id,
};
use crate::config::Config;
use crate::replication::{Doubt, PassError, has_database, stream};
use chrono::Utc;

/// Each step may be done again, so after a kill all of it is; but what was read from a slot is not read again once the
/// slot may be gone.
pub async fn come_back(
    config: &Config,
    state: &State,
    lock: Lock,
    told: Told<'_>,
) -> Result<(), PassError> {
    let before = state.transition().await?;
    let own = state.own_record().await?;
    let server = system_id(state.session()).await?;
    let peer = newer_primary(config, &own, &server).await?;
    let promotion = promotion_of(&peer);
    let mut walk = Walk::new(state, lock, told, "failback", (peer.epoch, ""));
    let recorded = walk.was_at(before.as_ref(), "release");
    if !recorded {
        walk.step("peer").await?;
        walk.step("fence").await?;
        fence_here(config, state, peer.epoch, &peer.cluster_id).await?;
        walk.step("divergence").await?;
        let fence = state.fence_record().await?;
        let lifted = fence.is_some_and(|fence| fence.lifted);
        let found = divergence::record(config, state, &promotion, lifted).await?;
        let text = format!(
            "{} transactions of this cluster are not on the new primary ({} rows, {} packages): `warm-spare divergence`",
            found.transactions, found.rows, found.packages
        );
        let nothing = found.exact && found.transactions == 0 && found.rows == 0;
        match nothing {
            true => log::info!("local: {text}"),
            false => log::warn!("local: {text}"),
        }
        state.event("divergence", &text, &config.change).await?;
    }
    walk.step("release").await?;
    release(config, state, &promotion, &peer.cluster_id).await?;
    walk.step("role").await?;
    state.return_as_spare(lock, peer.epoch).await?;
    state.adopt_lineage(&peer.lineage).await?;
    let text = format!("came back as the spare of epoch {}", peer.epoch);
    state.event("failback", &text, &config.change).await?;
    Ok(state.close_journal(lock).await?)
}

/// That of the peer's epoch. Whoever was made the primary by hand has none, or one of before, which tells nothing of now.
fn promotion_of(peer: &Record) -> Promotion {
    let known = peer.promotion.clone();
    known
        .filter(|promotion| promotion.epoch == peer.epoch)
        .unwrap_or_else(|| {
            let ours = Names::of_cluster(&peer.cluster_id);
            Promotion {
                id: String::new(),
                epoch: peer.epoch,
                kind: "by_hand".into(),
                time: Utc::now(),
                lsn: String::new(),
                commit_time: None,
                system_id: String::new(),
                timeline: 0,
                peer_cluster: String::new(),
                slot: ours.slot,
                publication: ours.publication,
                peer_fenced: false,
                settled: false,
            }
        })
}

/// A primary becomes a spare only of a newer one.
async fn newer_primary(config: &Config, own: &Record, server: &str) -> Result<Record, PassError> {
    let (epoch, role) = (own.epoch, own.role.as_deref());
    let seen = look_at_peer(config).await?;
    let record = seen.theirs.record.unwrap_or_default();
    let primary = record.role.as_deref() == Some("primary");
    if primary && !own.is_kin(server, &record, &seen.theirs.system_id) {
        let stranger = Doubt {
            rule: "stranger",
            text: format!(
                "the peer is the primary of epoch {} of another line (cluster {}, system id {}); this is cluster {}, system id {server}: neither has followed the other, and they share no promotion",
                record.epoch, record.cluster_id, seen.theirs.system_id, own.cluster_id
            ),
            case: format!(
                "{} {server} {} {}",
                own.cluster_id, record.cluster_id, seen.theirs.system_id
            ),
        };
        stranger.ask(config)?;
    }
    if primary && record.epoch > epoch.max(1).saturating_add(EPOCH_STEP_MAX) {
        return Err(PassError::Refused {
            rule: "epoch_out_of_range",
            text: format!(
                "the peer says that it is the primary of epoch {}, more than {EPOCH_STEP_MAX} above ours ({epoch}): it is not believed",
                record.epoch
            ),
            next_step: "look into table cluster of database warm_spare on the peer".into(),
        });
    }
    let newer = record.role.as_deref() == Some("primary") && record.epoch > epoch;
    if newer && !seen.theirs.fenced {
        return Ok(record);
    }
    let is = match record.role.as_deref() {
        Some(role) => format!("{role} of epoch {}", record.epoch),
        None => "nothing on record".into(),
    };
    Err(PassError::Refused {
        rule: "no_newer_primary",
        text: format!(
            "this cluster is {} of epoch {epoch}, and the peer is {is}{}: a primary becomes the spare only of a newer primary",
            role.unwrap_or("nothing on record"),
            if seen.theirs.fenced {
                ", read-only"
            } else {
                ""
            },
        ),
        next_step: "promote the peer first (role = \"primary\" there), or set role = \"keep\" here"
            .into(),
    })
}

/// The setting and its record, every older session ended, and the proof.
pub async fn fence_here(
    config: &Config,
    state: &State,
    epoch: i64,
    by: &str,
) -> Result<(), PassError> {
    let local = &config.local.datastore;
    let session = state.session();
    if !has_database(session, &local.database).await? {
        return Ok(());
    }
    state.record_fence(&local.database, epoch, by, true).await?;
    // Also where it stands: whoever set it may have been killed before older sessions were ended.
    Ok(raise_fence(session, local, &local.database).await?)
}

/// What the new primary had made here while it followed. Of another name: made by hand, and left.
async fn release(
    config: &Config,
    state: &State,
    promotion: &Promotion,
    peer_id: &str,
) -> Result<(), PassError> {
    let ours = Names::of_cluster(peer_id);
    let local = &config.local.datastore;
    if !has_database(state.session(), &local.database).await? {
        return Ok(());
    }
    let inside = LocalSession::open(local, &local.database).await?;
    if promotion.slot == ours.slot {
        stream::drop_slot_here(&inside, &promotion.slot).await?;
    }
    if promotion.publication == ours.publication {
        let sql = format!(
            "DROP PUBLICATION IF EXISTS {}",
            quote_ident(&promotion.publication)
        );
        inside
            .batch("dropping the peer's publication", &sql)
            .await?;
    }
    Ok(())
}
