//! The old primary comes back as the spare. First it is fenced. Then the divergence is put on
//! record. Only then the objects that keep log for the peer are removed, and the role is changed.
//! The copy itself is an ordinary one.

use super::divergence::{self, OpenFence};
use super::step_journal::{OnStep, StepJournal};
use super::watch::look_at_peer;
use crate::cluster::preparation::Names;
use crate::cluster::{
    EPOCH_STEP_MAX, LocalCluster, Lock, PeerCluster, Promotion, Record, StateDb, raise_fence,
    system_id,
};
use crate::config::Config;
use crate::domain::{
    ErrorCode, EventKind, PromotionKind, Role, Side, Step, Transition, TransitionKind,
};
use crate::replication::{Doubt, ReplicationError, has_database};
use chrono::Utc;

/// Brings this cluster back. Each step may be repeated, so after a kill all steps run again. The
/// slot is the exception: it is not read again once it may be gone.
pub async fn come_back(
    config: &Config,
    state: &StateDb,
    lock: Lock,
    on_step: OnStep<'_>,
) -> Result<(), ReplicationError> {
    let before = state.transition().await?;
    let journal = Noted::of(before.as_ref());
    let own = state.own_record().await?;
    let server = system_id(state.session()).await?;
    let peer = newer_primary(config, &own, &server).await?;
    let promotion = promotion_of(&peer);
    let mut walk = StepJournal::new(
        state,
        lock,
        on_step,
        TransitionKind::Failback,
        (peer.epoch, ""),
    );
    let mut noted = match walk.was_at(before.as_ref(), Step::Peer) {
        true => journal,
        false => Noted::default(),
    };
    if noted.fenced_by.is_none() {
        // The number is read before the fence is set again. The absence of a fence is recorded too:
        // after a kill our own fence would be taken for an earlier one.
        let number = divergence::fence_number(config).await?;
        noted.fenced_by = Some(number.unwrap_or_else(|| NO_FENCE.into()));
    }
    walk.entry.asked = noted.text();
    if noted.listed.is_none() {
        walk.step(Step::Peer).await?;
    }
    // This runs however far an earlier try came: the fence may have been lifted since, and rows
    // written.
    fence_and_list(config, state, &mut walk, &peer, &mut noted).await?;
    walk.step(Step::Release).await?;
    release(config, state, &promotion, &peer.cluster_id).await?;
    walk.step(Step::Role).await?;
    // The line is recorded first: if the process is killed between the two calls, this is still an
    // old primary, and comes back once more.
    state.adopt_lineage(lock, &peer.lineage).await?;
    state.return_as_spare(lock, peer.epoch).await?;
    let text = format!("came back as the spare of epoch {}", peer.epoch);
    state
        .event(EventKind::Failback, &text, &config.change)
        .await?;
    Ok(state.close_journal(lock).await?)
}

/// Numbers of transactions of the local server that the journal keeps during a failback, beside its
/// step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Noted {
    /// Number of the transaction that set the fence.
    fenced_by: Option<String>,
    /// Number of the next transaction when the list was made.
    listed: Option<String>,
}

/// Value in place of the number if the database was not fenced when this cluster began to come
/// back.
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
    state: &StateDb,
    walk: &mut StepJournal<'_>,
    peer: &Record,
    noted: &mut Noted,
) -> Result<(), ReplicationError> {
    let promotion = promotion_of(peer);
    if noted.listed.is_none() {
        walk.step(Step::Fence).await?;
    }
    fence_here(config, state, peer.epoch, &peer.cluster_id).await?;
    let fence = state.fence_record().await?;
    let behind = OpenFence {
        lifted: fence.is_some_and(|fence| fence.lifted),
        fenced_by: noted.fenced_by.clone().filter(|number| number != NO_FENCE),
    };
    // The number is read before the list is made, so that nothing lies between both.
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

/// Returns the promotion of the peer's epoch. A peer that was made the primary by hand has none, or
/// an older one that says nothing about now.
fn promotion_of(peer: &Record) -> Promotion {
    let known = peer.promotion.clone();
    known
        .filter(|promotion| promotion.epoch == peer.epoch)
        .unwrap_or_else(|| {
            let peer_names = Names::of_cluster(&peer.cluster_id);
            Promotion {
                slot: peer_names.slot,
                publication: peer_names.publication,
                ..Promotion::new(peer.epoch, PromotionKind::ByHand, Utc::now())
            }
        })
}

/// Returns the record of the newer primary. A primary becomes the spare only of a newer primary.
async fn newer_primary(
    config: &Config,
    own: &Record,
    server: &str,
) -> Result<Record, ReplicationError> {
    let (epoch, role) = (own.epoch, own.role);
    let seen = look_at_peer(config, &PeerCluster::of(config)).await?;
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
        return Err(ReplicationError::Refused {
            rule: ErrorCode::EpochOutOfRange,
            text: format!(
                "the peer reports that it is the primary of epoch {}, more than {EPOCH_STEP_MAX} above the local epoch {epoch}: this is not believed",
                record.epoch
            ),
            next_step: "check table cluster of database warm_spare on the peer".into(),
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
    Err(ReplicationError::Refused {
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

/// Records and sets the fence, ends every older session, and proves the fence.
pub async fn fence_here(
    config: &Config,
    state: &StateDb,
    epoch: i64,
    by: &str,
) -> Result<(), ReplicationError> {
    let local = &config.local.datastore;
    let session = state.session();
    if !has_database(session, &local.database).await? {
        return Ok(());
    }
    state.record_fence(&local.database, epoch, by, true).await?;
    // This runs even if the fence is set: the process that set it may have been killed before it
    // ended older sessions.
    let waived = raise_fence(session, local, &local.database).await?;
    Ok(state
        .note_waived(Side::Local, &waived, &local.database)
        .await?)
}

/// Removes the objects that the new primary made here while it followed. Objects with another name
/// were made by hand, and are left.
async fn release(
    config: &Config,
    state: &StateDb,
    promotion: &Promotion,
    peer_id: &str,
) -> Result<(), ReplicationError> {
    let peer_names = Names::of_cluster(peer_id);
    let local = &config.local.datastore;
    if !has_database(state.session(), &local.database).await? {
        return Ok(());
    }
    let inside = LocalCluster::of(config).builder().await?;
    if promotion.slot == peer_names.slot {
        inside.drop_peers_slot(&promotion.slot).await?;
    }
    if promotion.publication == peer_names.publication {
        inside.drop_publication(&promotion.publication).await?;
    }
    Ok(())
}
