//! The situation of a primary and its peer: which cluster is the primary, which steps are left on
//! the peer, and whether a spare could take over.

use super::{Primary, forces};
use crate::cluster::{
    ClusterRecord, EPOCH_STEP_MAX, LocalCluster, Promotion, Record, StateError, is_fenced,
    system_id,
};
use crate::config::{Config, WantedRole};
use crate::domain::{EventKind, HoldReason, PromotionKind, Role, Side};
use crate::observe::Standing;
use crate::replication::{ReplicationError, has_database};
use crate::role::{
    KNOCK_TIMEOUT, Ours, PeerFacts, PeerSeen, Stand, decide, fence_here, knock, settle,
};
use crate::service::failure_tracker::Pace;
use crate::service::sight;
use chrono::TimeDelta;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest step back of a clock that is slewed.
const CLOCK_SLACK: TimeDelta = TimeDelta::seconds(1);

impl Primary<'_> {
    /// Records the role of a cluster that was the primary all along, and does nothing else.
    pub(super) async fn declare(&mut self, config: &Arc<Config>) -> Result<(), ReplicationError> {
        let local = &config.local.datastore;
        let session = self.leadership.state.session();
        let there = has_database(session, &local.database).await?;
        if !there || is_fenced(session, &local.database).await? {
            let is = match there {
                true => "is read-only, like the database of a spare",
                false => "does not exist",
            };
            let detail = format!(
                "role is primary, and this cluster has no role on record, but its database {} {is}",
                local.database
            );
            let step = "check that role = \"primary\" is set on the primary only";
            self.conflict(&detail, step);
            return Ok(());
        }
        let seen = self.see_peer(config).await?;
        // The state of this cluster may be lost, or older than the time at which another cluster
        // replaced it.
        if let Some(seen) = &seen
            && let Stand::FenceSelf { epoch, by } = self.stand_of_none(&seen.theirs).await?
        {
            return self.give_way(config, epoch, &by).await;
        }
        let spare = seen
            .and_then(|seen| seen.theirs.record)
            .filter(|record| record.role == Some(Role::Spare));
        let mut epoch = 1;
        if let Some(record) = spare {
            if record.epoch > EPOCH_STEP_MAX {
                let detail = format!(
                    "the peer reports that it is a spare of epoch {}; no line of promotions is that long",
                    record.epoch
                );
                self.conflict(&detail, "check that peer.datastore names the spare");
                return Ok(());
            }
            epoch = record.epoch.max(1);
            // The peer may know facts about this cluster that are no longer on record here.
            let local_id = system_id(session).await?;
            if record.copied_from.as_deref() == Some(local_id.as_str()) {
                let lock = self.leadership.lock;
                self.leadership
                    .state
                    .adopt_lineage(lock, &record.lineage)
                    .await?;
            }
        }
        self.leadership
            .state
            .declare_primary(self.leadership.lock, epoch)
            .await?;
        let text = format!("declared the primary, of epoch {epoch}");
        log::info!("local: {text}");
        self.writer.note(EventKind::Role, &text);
        Ok(())
    }

    /// Judges a cluster without a role on record against its peer.
    async fn stand_of_none(&self, theirs: &PeerFacts) -> Result<Stand, ReplicationError> {
        let state = &self.leadership.state;
        let ours = Ours {
            record: &state.own_record().await?,
            system_id: &system_id(state.session()).await?,
            promotion: None,
        };
        Ok(decide(&ours, theirs))
    }

    /// Decides which of the two clusters is the primary, and acts on it.
    pub(super) async fn stand(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
    ) -> Result<(), ReplicationError> {
        let state = &self.leadership.state;
        let database = &config.local.datastore.database;
        let read_only = is_fenced(state.session(), database).await?;
        self.writer
            .update(|state| state.local.fenced = Some(read_only));
        if !read_only && !self.writer.read(|state| state.serves()) {
            sight::look_again(self.writer, config).await;
        }
        // A cluster that was made the primary by hand since has no promotion of its epoch.
        let promotion = state.promotion().await?;
        let promotion = promotion.filter(|promotion| promotion.epoch == cluster.epoch);
        if !self.writer.read(|state| state.cluster.peer_asked) && !accepts(config).await {
            self.peer_was_asked();
        }
        let Some(seen) = self.see_peer(config).await? else {
            self.peer_was_asked();
            return self.alone_in_the_dark(promotion.as_ref());
        };
        let system_id = system_id(state.session()).await?;
        let own = state.own_record().await?;
        let ours = Ours {
            record: &own,
            system_id: &system_id,
            promotion: promotion.as_ref(),
        };
        let stand = decide(&ours, &seen.theirs);
        if !matches!(stand, Stand::FenceSelf { .. } | Stand::TwoPrimaries(_)) {
            self.peer_was_asked();
        }
        if !matches!(stand, Stand::TwoPrimaries(_)) {
            self.writer
                .release(|hold| hold.reason == HoldReason::TwoPrimaries);
        }
        match (stand, promotion) {
            (Stand::FenceSelf { epoch, by }, _) => self.give_way(config, epoch, &by).await?,
            (Stand::TwoPrimaries(what), _) => self.two_primaries(config, cluster, &what).await?,
            (Stand::FencePeer, Some(promotion)) => {
                self.finish(config, &promotion, &seen).await?;
            }
            (Stand::PeerFenced, Some(promotion)) if !promotion.settled => {
                self.finish(config, &promotion, &seen).await?;
            }
            (Stand::PeerFenced, Some(promotion)) if !promotion.peer_fenced => {
                state.peer_was_fenced(promotion.epoch, true).await?;
            }
            (Stand::PeerFenced, _) => self.set_standing(fenced_and_idle()),
            (Stand::Followed, promotion) => {
                if let Some(promotion) = promotion.filter(|by| !(by.settled && by.peer_fenced)) {
                    state.peer_was_fenced(promotion.epoch, true).await?;
                }
                self.followed(config, &seen).await?;
            }
            (Stand::Alone(why), _) => self.set_standing(Standing::Alone(why)),
            (Stand::Stranger(_), _)
                if config.role == WantedRole::Primary
                    && forces(config, self.next_epoch(cluster)) =>
            {
                let epoch = self.next_epoch(cluster);
                self.take_back(config, cluster, epoch).await?;
            }
            (Stand::Stranger(what), _) => {
                self.set_standing(Standing::Alone(what.clone()));
                let step = "set peer.datastore to the other cluster of this pair; nothing was done on either side";
                self.conflict(&what, step);
            }
            (Stand::WentBack(_), _)
                if config.role == WantedRole::Primary
                    && forces(config, self.next_epoch(cluster)) =>
            {
                let epoch = self.next_epoch(cluster);
                self.take_back(config, cluster, epoch).await?;
            }
            (Stand::WentBack(what), _) => {
                self.set_standing(Standing::Alone(what.clone()));
                self.conflict(&what, &set_back_step(&own, &seen));
            }
            (Stand::PeerChanged(what), _) => {
                self.set_standing(Standing::PeerOpen(what.clone()));
                let step = "stop Builder there, and find out which server that is. If it is the old primary, drop database warm_spare there; this cluster then fences it";
                self.conflict(&what, step);
            }
            (Stand::FencePeer, None) => {
                self.set_standing(Standing::Alone(
                    "this cluster has never followed the peer".into(),
                ));
            }
        }
        Ok(())
    }

    pub(super) fn set_standing(&self, standing: Standing) {
        if self
            .writer
            .read(|state| state.handover.standing != standing)
        {
            self.writer
                .update(|state| state.handover.standing = standing);
        }
    }

    /// From now on clients may be sent here.
    fn peer_was_asked(&self) {
        if !self.writer.read(|state| state.cluster.peer_asked) {
            self.writer.update(|state| state.cluster.peer_asked = true);
        }
    }

    pub(super) fn alone_in_the_dark(
        &self,
        promotion: Option<&Promotion>,
    ) -> Result<(), ReplicationError> {
        let open = promotion.is_some_and(|promotion| {
            let known =
                !promotion.system_id.is_empty() || promotion.kind == PromotionKind::TakenBack;
            known && !promotion.peer_fenced
        });
        let why = "the peer does not answer".to_string();
        self.set_standing(match open {
            true => Standing::PeerOpen(why),
            false => Standing::Alone(why),
        });
        Ok(())
    }

    /// Shows whether the spare is recent. The confirmation has the time of the local datastore, so
    /// it is compared with that clock. The age of an unchanged confirmation is counted by a clock
    /// that nobody sets.
    pub(super) async fn followed(
        &mut self,
        config: &Config,
        seen: &PeerSeen,
    ) -> Result<(), ReplicationError> {
        let record = seen.theirs.record.as_ref();
        let Some(confirmed) = record.and_then(|record| record.confirmed) else {
            self.confirmed = None;
            let why = "the spare was never known to be complete";
            self.set_standing(Standing::Alone(why.into()));
            return Ok(());
        };
        let first_seen = match self.confirmed {
            Some((same, first_seen)) if same == confirmed => first_seen,
            _ => Instant::now(),
        };
        self.confirmed = Some((confirmed, first_seen));
        let now = self.leadership.state.session().clock().await?;
        self.set_standing(followed_since(
            now - confirmed,
            first_seen.elapsed(),
            config,
        ));
        Ok(())
    }

    /// Fences the old primary, and removes the objects there that are no longer needed.
    pub(super) async fn finish(
        &mut self,
        config: &Arc<Config>,
        promotion: &Promotion,
        seen: &PeerSeen,
    ) -> Result<(), ReplicationError> {
        let state = LocalCluster::of(config).state().await?;
        match settle(config, (&state, self.leadership.lock), promotion, seen).await {
            Ok(()) => {
                let text = format!("the old primary is fenced under epoch {}", promotion.epoch);
                log::info!("peer: {text}");
                self.writer.note(EventKind::Fence, &text);
                self.writer.update(|state| state.peer.fenced = Some(true));
                self.fencing.over(self.writer.now());
                self.set_standing(fenced_and_idle());
            }
            Err(error) if error.side() == Some(Side::Local) => return Err(error),
            // The old primary has the same or a higher epoch of another cluster on record.
            Err(error @ ReplicationError::State(StateError::Overtaken { .. })) => {
                let cluster = state.cluster().await?;
                self.two_primaries(config, &cluster, &error.to_string())
                    .await?;
            }
            Err(error) => {
                let text = error.to_string();
                let now = self.writer.now();
                self.fencing.failed(now, error.code(), &text, Pace::Passing);
                self.set_standing(Standing::PeerOpen(text));
            }
        }
        Ok(())
    }

    pub(super) async fn give_way(
        &mut self,
        config: &Config,
        epoch: i64,
        by: &str,
    ) -> Result<(), ReplicationError> {
        let text =
            format!("cluster {by} is the primary of the higher epoch {epoch}; this one gives way");
        log::warn!("local: {text}");
        self.writer.note(EventKind::Fence, &text);
        let state = LocalCluster::of(config).state().await?;
        self.writer.update(|state| state.cluster.fence_begun = true);
        fence_here(config, &state, epoch, by).await?;
        self.writer
            .update(|state| state.cluster.fence_begun = false);
        self.unproven = Some(0);
        let cluster = state.cluster().await?;
        self.show(&cluster, state.fence_record().await?.as_ref());
        Ok(())
    }

    pub(super) async fn two_primaries(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
        what: &str,
    ) -> Result<(), ReplicationError> {
        let epoch = self.next_epoch(cluster);
        if config.role == WantedRole::Primary && forces(config, epoch) {
            return self.take_back(config, cluster, epoch).await;
        }
        let step = format!(
            "decide which cluster must remain the primary, and set role = \"primary\" with force_epoch = {epoch} there; the other one fences itself"
        );
        self.set_standing(Standing::Alone(what.to_string()));
        self.writer
            .hold(HoldReason::TwoPrimaries, what, &step, false);
        Ok(())
    }
}

/// Returns the next steps for a cluster whose state was set back, with the epoch that both sides
/// need.
fn set_back_step(own: &Record, seen: &PeerSeen) -> String {
    let peer_epoch = seen.theirs.record.as_ref().map_or(0, |record| record.epoch);
    format!(
        "decide which rows to keep: usually the spare has the newer ones. To keep the spare's rows, set role = \"primary\" and force_epoch = {0} there; to keep the rows of this cluster, set role = \"primary\" and force_epoch = {0} here",
        peer_epoch.max(own.epoch).saturating_add(1)
    )
}

/// Returns the standing for a spare. `by_clock` is the age by the datastore's clock, which may have
/// been set since; `unchanged` is the time without a newer confirmation.
fn followed_since(by_clock: TimeDelta, unchanged: Duration, config: &Config) -> Standing {
    if by_clock < -CLOCK_SLACK {
        return Standing::Alone(format!(
            "the spare was last complete at a time in the future, {} ahead of the local datastore's clock: that clock was set back, or this is not the spare of this cluster",
            humantime::format_duration(Duration::from_secs(by_clock.num_seconds().unsigned_abs()))
        ));
    }
    let behind = by_clock.to_std().unwrap_or_default().max(unchanged);
    match behind <= config.replication.rpo {
        true => Standing::Followed,
        false => Standing::Alone(format!(
            "the spare was last complete {} ago, more than replication.rpo",
            humantime::format_duration(Duration::from_secs(behind.as_secs()))
        )),
    }
}

fn fenced_and_idle() -> Standing {
    Standing::Alone("the old primary is fenced, but does not follow yet".into())
}

/// Returns whether anybody accepts connections at the peer's address.
async fn accepts(config: &Config) -> bool {
    let to = &config.peer.datastore;
    let knocked = tokio::time::timeout(KNOCK_TIMEOUT, knock(&to.host, to.port)).await;
    matches!(knocked, Ok(Ok(())))
}
