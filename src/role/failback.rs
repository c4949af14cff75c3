//! The old primary comes back as the spare: fenced first, then what it has and its peer lacks is put on record, and only
//! then is what would hold log for the peer removed, and the role changed. The copy itself is an ordinary one.

use super::divergence::{self, Behind};
use super::steps::{Told, Walk};
use super::watch::look_at_peer;
use crate::cluster::preparation::Names;
use crate::cluster::{
    EPOCH_STEP_MAX, LocalSession, Lock, Promotion, Record, State, quote_ident, raise_fence,
    system_id,
};
use crate::config::Config;
use crate::domain::{ErrorCode, EventKind, PromotionKind, Role, Step, Transition, TransitionKind};
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
    let journal = Noted::of(before.as_ref());
    let own = state.own_record().await?;
    let server = system_id(state.session()).await?;
    let peer = newer_primary(config, &own, &server).await?;
    let promotion = promotion_of(&peer);
    let mut walk = Walk::new(
        state,
        lock,
        told,
        TransitionKind::Failback,
        (peer.epoch, ""),
    );
    let mut noted = match walk.was_at(before.as_ref(), Step::Peer) {
        true => journal,
        false => Noted::default(),
    };
    if noted.fenced_by.is_none() {
        // Before we set it again. That there is none is kept too: after a kill our own would be taken for it.
        let number = divergence::fence_number(config).await?;
        noted.fenced_by = Some(number.unwrap_or_else(|| NO_FENCE.into()));
    }
    walk.entry.asked = noted.text();
    if noted.listed.is_none() {
        walk.step(Step::Peer).await?;
    }
    // However far an earlier try came: the fence may have been lifted since, and rows written.
    fence_and_list(config, state, &mut walk, &peer, &mut noted).await?;
    walk.step(Step::Release).await?;
    release(config, state, &promotion, &peer.cluster_id).await?;
    walk.step(Step::Role).await?;
    // The line first: killed between the two, this is an old primary still, and comes back once more.
    state.adopt_lineage(lock, &peer.lineage).await?;
    state.return_as_spare(lock, peer.epoch).await?;
    let text = format!("came back as the spare of epoch {}", peer.epoch);
    state
        .event(EventKind::Failback, &text, &config.change)
        .await?;
    Ok(state.close_journal(lock).await?)
}

/// The journal keeps these of a failback, beside its step: numbers of transactions of the local server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Noted {
    /// Of the one that set the fence.
    fenced_by: Option<String>,
    /// The next one when the list was made.
    listed: Option<String>,
}

/// In place of the number, where the database was not fenced when this cluster began to come back.
const NO_FENCE: &str = "none";

impl Noted {
    fn of(entry: Option<&Transition>) -> Noted {
        let asked = entry.map_or("", |entry| entry.asked.as_str());
        let find = |name: &str| {
            let mut words = asked.split_whitespace();
            words.find_map(|word| Some(word.strip_prefix(name)?.to_string()))
        };
        Noted {
            fenced_by: find("fenced_by="),
            listed: find("listed="),
        }
    }

    fn text(&self) -> String {
        let noted = [("fenced_by", &self.fenced_by), ("listed", &self.listed)];
        let noted = noted.iter().filter_map(|(name, number)| {
            let number = number.as_ref()?;
            Some(format!("{name}={number}"))
        });
        noted.collect::<Vec<_>>().join(" ")
    }
}

async fn fence_and_list(
    config: &Config,
    state: &State,
    walk: &mut Walk<'_>,
    peer: &Record,
    noted: &mut Noted,
) -> Result<(), PassError> {
    let promotion = promotion_of(peer);
    if noted.listed.is_none() {
        walk.step(Step::Fence).await?;
    }
    fence_here(config, state, peer.epoch, &peer.cluster_id).await?;
    let fence = state.fence_record().await?;
    let behind = Behind {
        lifted: fence.is_some_and(|fence| fence.lifted),
        fenced_by: noted.fenced_by.clone().filter(|number| number != NO_FENCE),
    };
    // Read before, so that nothing lies between the list and the number.
    let next = divergence::next_number(config).await?;
    let found = match &noted.listed {
        None => {
            walk.step(Step::Divergence).await?;
            divergence::record_behind(config, state, &promotion, &behind).await?
        }
        Some(listed) => {
            let since = (&behind, listed.as_str());
            divergence::record_again(config, state, &promotion, since).await?
        }
    };
    let known = noted.listed.replace(next);
    walk.entry.asked = noted.text();
    if known.is_none() || !found.exact {
        let text = format!(
            "{} transactions of this cluster are not on the new primary ({} rows, {} packages): `warm-spare divergence`",
            found.transactions, found.rows, found.packages
        );
        let nothing = found.exact && found.transactions == 0 && found.rows == 0;
        match nothing {
            true => log::info!("local: {text}"),
            false => log::warn!("local: {text}"),
        }
        state
            .event(EventKind::Divergence, &text, &config.change)
            .await?;
    }
    Ok(())
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
                kind: PromotionKind::ByHand,
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
    let (epoch, role) = (own.epoch, own.role);
    let seen = look_at_peer(config).await?;
    let record = seen.theirs.record.unwrap_or_default();
    let primary = record.role == Some(Role::Primary);
    if primary && !own.is_kin(server, &record, &seen.theirs.system_id) {
        let stranger = Doubt {
            rule: ErrorCode::Stranger,
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
            rule: ErrorCode::EpochOutOfRange,
            text: format!(
                "the peer says that it is the primary of epoch {}, more than {EPOCH_STEP_MAX} above ours ({epoch}): it is not believed",
                record.epoch
            ),
            next_step: "look into table cluster of database warm_spare on the peer".into(),
        });
    }
    let newer = record.role == Some(Role::Primary) && record.epoch > epoch;
    if newer && !seen.theirs.fenced {
        return Ok(record);
    }
    let is = match record.role {
        Some(role) => format!("{role} of epoch {}", record.epoch),
        None => "nothing on record".into(),
    };
    Err(PassError::Refused {
        rule: ErrorCode::NoNewerPrimary,
        text: format!(
            "this cluster is {} of epoch {epoch}, and the peer is {is}{}: a primary becomes the spare only of a newer primary",
            role.map_or("nothing on record", Into::into),
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
