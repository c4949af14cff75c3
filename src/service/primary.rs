//! What is done on a cluster that is no spare: a primary looks at its peer and keeps its old one fenced; an old primary
//! keeps its own fence, and comes back when it is told to.

use super::complaint::{Complaint, Pace};
use super::guard::{End, keep_seeing};
use super::tenure::Tenure;
use super::{Configs, Desk, next};
use crate::cluster::{
    ClusterRecord, FenceError, FenceRecord, Promotion, Side, State, end_sessions, enforce_fence,
    is_fenced, prove_fence,
};
use crate::config::{Config, Role};
use crate::observe::{HoldReason, Standing, Work};
use crate::replication::{PassError, has_database, system_id};
use crate::role::{Ours, PeerSeen, Stand, come_back, decide, fence_here, look_at_peer, settle};
use chrono::Utc;
use std::sync::Arc;
use std::time::Duration;

/// For the peer to answer all that it is asked.
const PATIENCE: Duration = Duration::from_secs(15);
/// The proof of our own fence takes a connection of its own.
const LOOKS_PER_PROOF: u32 = 12;

pub struct Primary<'a> {
    desk: &'a Desk,
    tenure: &'a Tenure,
    configs: Configs,
    /// Of what the peer is asked.
    complaint: Complaint,
    /// Looks since our own fence was last proven; None: not in this process.
    unproven: Option<u32>,
}

impl<'a> Primary<'a> {
    pub fn new(desk: &'a Desk, tenure: &'a Tenure, configs: Configs) -> Self {
        Primary {
            desk,
            tenure,
            configs,
            complaint: Complaint::new("peer: answers"),
            unproven: None,
        }
    }

    pub async fn perform(self) -> End {
        let (desk, config) = (self.desk, self.tenure.config.clone());
        tokio::select! {
            end = Box::pin(self.keep_looking()) => end,
            never = keep_seeing(desk, &config) => match never {},
        }
    }

    async fn keep_looking(mut self) -> End {
        if let Err(error) = self.take_up().await {
            return End::Failed(error);
        }
        loop {
            let config = self.config();
            match Box::pin(self.look(&config)).await {
                Ok(None) => {}
                Ok(Some(end)) => return end,
                Err(error) => return End::Failed(error),
            }
            tokio::select! {
                () = tokio::time::sleep(config.takeover.fence_retry) => {}
                () = next(&mut self.configs) => {}
            }
        }
    }

    fn config(&mut self) -> Arc<Config> {
        let current = self.configs.borrow_and_update().clone();
        current.unwrap_or_else(|| self.tenure.config.clone())
    }

    /// A promotion is on record, whose last steps a killed process did not come to.
    async fn take_up(&mut self) -> Result<(), PassError> {
        let state = &self.tenure.state;
        let open = state.transition().await?;
        if open.is_some_and(|entry| entry.kind != "failback")
            && state.cluster().await?.role.as_deref() == Some("primary")
        {
            let database = &self.tenure.config.local.datastore.database;
            end_sessions(state.session(), database).await?;
            state.close_journal().await?;
        }
        Ok(())
    }

    async fn look(&mut self, config: &Arc<Config>) -> Result<Option<End>, PassError> {
        let state = &self.tenure.state;
        state.still_ours(self.tenure.lock).await?;
        self.desk.see_datastore(Side::Local, None);
        self.desk.settle_events(state).await;
        let cluster = state.cluster().await?;
        let fence = state.fence_record().await?;
        self.show(&cluster, fence.as_ref());
        if cluster.role.as_deref() == Some("spare") {
            return Ok(Some(End::RoleChanged));
        }
        if config.role == Role::Spare {
            if self.come_back(config).await? {
                return Ok(Some(End::RoleChanged));
            }
        } else {
            self.desk
                .release(|hold| hold.reason == HoldReason::Conflict);
        }
        match (fence, cluster.role.as_deref()) {
            (Some(fence), _) => self.stay_fenced(config, &cluster, &fence).await?,
            (None, Some(_)) => self.stand(config, &cluster).await?,
            (None, None) if config.role == Role::Primary => self.declare(config).await?,
            // The peer says that it was the primary; as long as the peer cannot be asked, nothing is done.
            (None, None) => {}
        }
        Ok(None)
    }

    fn show(&self, cluster: &ClusterRecord, fence: Option<&FenceRecord>) {
        self.desk.update(|state| {
            state.role = cluster.role.clone();
            state.epoch = Some(cluster.epoch);
            state.role_since = Some(cluster.since);
            state.point = None;
            state.fenced_by = fence.map(|fence| (fence.epoch, fence.by_cluster.clone()));
            state.work = match fence {
                Some(_) => Work::Fenced,
                None if cluster.role.is_some() => Work::Primary,
                None => Work::Starting,
            };
            // Of one that is fenced the last proof counts.
            state.local.fenced = match (fence, state.local.fenced) {
                (Some(_), Some(false)) => Some(false),
                (fence, _) => Some(fence.is_some()),
            };
        });
    }

    /// Whether it is a spare now. What stands against it is shown, and the cluster goes on as what it is.
    async fn come_back(&mut self, config: &Arc<Config>) -> Result<bool, PassError> {
        let tenure = self.tenure;
        let desk = self.desk;
        let state = State::open(&config.local.datastore).await?;
        let told = |shown| desk.update(|state| state.transition = Some(shown));
        let came = come_back(config, &state, tenure.lock, &told).await;
        desk.update(|state| state.transition = None);
        match came {
            Ok(()) => {
                desk.release(|hold| hold.reason != HoldReason::Config);
                Ok(true)
            }
            // Our own server, or another process at work.
            Err(error @ PassError::State(_)) => Err(error),
            Err(error) => {
                let pace = desk.hold_for(&error);
                let now = desk.now();
                self.complaint
                    .failed(now, error.code(), &error.to_string(), pace);
                Ok(false)
            }
        }
    }

    /// The fence is a condition: looked at every time, and proven now and then. While the cluster that set it may withdraw
    /// it, nobody's session is ended: that one brings over what was written last.
    async fn stay_fenced(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
        fence: &FenceRecord,
    ) -> Result<(), PassError> {
        self.see_peer(config).await?;
        if config.role == Role::Primary {
            let epoch = self.next_epoch(cluster);
            if forces(config, epoch) {
                return self.take_back(config, cluster, epoch).await;
            }
            self.say_what_takes_it_back(fence, epoch);
        } else {
            self.desk
                .release(|hold| hold.reason == HoldReason::ForceNeeded);
        }
        let local = &config.local.datastore;
        let session = self.tenure.state.session();
        if !has_database(session, &local.database).await? {
            return Ok(());
        }
        let stood = is_fenced(session, &local.database).await?;
        if !stood {
            self.tenure.state.fence_if_recorded(&local.database).await?;
            if !is_fenced(session, &local.database).await? {
                return Ok(());
            }
        }
        let proven = match self.unproven {
            Some(looks) if stood && looks < LOOKS_PER_PROOF => {
                self.unproven = Some(looks + 1);
                return Ok(());
            }
            // Whoever set it may have been killed before older sessions were ended.
            None if fence.settled => enforce_fence(session, local, &local.database).await,
            Some(_) if !stood => enforce_fence(session, local, &local.database).await,
            _ => prove_fence(session, local, &local.database).await,
        };
        self.desk
            .update(|state| state.local.fenced = Some(proven.is_ok()));
        match proven {
            Ok(()) => self.unproven = Some(0),
            Err(FenceError::Datastore(error)) if error.is_transient() => log::debug!("{error}"),
            Err(error) => {
                let now = self.desk.now();
                self.complaint
                    .failed(now, "fence", &error.to_string(), Pace::Operator);
            }
        }
        Ok(())
    }

    fn next_epoch(&self, cluster: &ClusterRecord) -> i64 {
        let known = self.desk.read(|state| state.next_epoch());
        known.unwrap_or(cluster.epoch + 1)
    }

    fn say_what_takes_it_back(&self, fence: &FenceRecord, epoch: i64) {
        let detail = format!(
            "role is primary, and cluster {} took the place of this one under epoch {}",
            fence.by_cluster, fence.epoch
        );
        let step = format!(
            "set role = \"spare\" to come back as the spare (docs/failback.md); or, to take it back from that cluster, force_epoch = {epoch} (docs/failover.md)"
        );
        self.desk
            .hold(HoldReason::ForceNeeded, &detail, &step, false);
    }

    /// By force, a fenced primary, or one of two, is the primary of the next epoch.
    async fn take_back(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
        epoch: i64,
    ) -> Result<(), PassError> {
        let local = &config.local.datastore;
        let state = State::open(local).await?;
        let by = Promotion {
            epoch,
            kind: "taken_back".into(),
            time: self.desk.now(),
            lsn: String::new(),
            commit_time: None,
            system_id: String::new(),
            timeline: 0,
            peer_cluster: String::new(),
            slot: String::new(),
            publication: String::new(),
            peer_fenced: false,
            settled: true,
        };
        let from = cluster.role.as_deref();
        state
            .promote(self.tenure.lock, &local.database, &by, from)
            .await?;
        end_sessions(state.session(), &local.database).await?;
        let text =
            format!("taken back by force_epoch: this cluster is the primary of epoch {epoch}");
        log::warn!("local: {text}");
        state.event("promotion", &text, &config.change).await?;
        self.unproven = None;
        self.desk.release(|hold| hold.reason != HoldReason::Config);
        Ok(())
    }

    /// It was the primary all along: put on record, and nothing else.
    async fn declare(&mut self, config: &Arc<Config>) -> Result<(), PassError> {
        let local = &config.local.datastore;
        let session = self.tenure.state.session();
        let there = has_database(session, &local.database).await?;
        if !there || is_fenced(session, &local.database).await? {
            let is = match there {
                true => "is read-only, as a spare's is",
                false => "is not there",
            };
            let detail = format!(
                "role is primary, and this cluster has no role on record; but its database {} {is}",
                local.database
            );
            let step = "check that role = \"primary\" stands on the primary only";
            self.desk.hold(HoldReason::Conflict, &detail, step, false);
            return Ok(());
        }
        let seen = self.see_peer(config).await?;
        let theirs = seen.and_then(|seen| seen.theirs.record);
        let epoch = theirs.map_or(1, |record| match record.role.as_deref() {
            Some("spare") => record.epoch.max(1),
            _ => 1,
        });
        self.tenure
            .state
            .declare_primary(self.tenure.lock, epoch)
            .await?;
        let text = format!("declared the primary, of epoch {epoch}");
        log::info!("local: {text}");
        self.desk.note("role", &text);
        Ok(())
    }

    /// Who of both is the primary, and what follows from that.
    async fn stand(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
    ) -> Result<(), PassError> {
        let state = &self.tenure.state;
        let promotion = state.promotion().await?;
        let Some(seen) = self.see_peer(config).await? else {
            return self.alone_in_the_dark(promotion.as_ref());
        };
        let system_id = system_id(state.session()).await?;
        let ours = Ours {
            epoch: cluster.epoch,
            system_id: &system_id,
            promotion: promotion.as_ref(),
        };
        let stand = decide(&ours, &seen.theirs);
        if !matches!(stand, Stand::TwoPrimaries(_)) {
            self.desk
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
            (Stand::PeerFenced, _) => self.set_standing(fenced_and_idle()),
            (Stand::Followed, promotion) => {
                if let Some(promotion) = promotion.filter(|promotion| !promotion.settled) {
                    state.peer_was_fenced(promotion.epoch, true).await?;
                }
                self.followed(config, &seen);
            }
            (Stand::Alone(why), _) => self.set_standing(Standing::Alone(why)),
            (Stand::FencePeer, None) => {
                self.set_standing(Standing::Alone("the peer was never followed here".into()));
            }
        }
        Ok(())
    }

    /// What the peer says; None: it cannot be asked.
    async fn see_peer(&mut self, config: &Config) -> Result<Option<PeerSeen>, PassError> {
        let looked = tokio::time::timeout(PATIENCE, look_at_peer(config)).await;
        let error = match looked {
            Ok(Ok(seen)) => {
                self.complaint.over(self.desk.now());
                self.desk.see_datastore(Side::Peer, None);
                self.desk
                    .release(|hold| hold.passing || hold.reason == HoldReason::SameServer);
                let record = seen.theirs.record.as_ref();
                self.desk.update(|state| {
                    state.peer.version = Some(seen.version.clone());
                    state.peer.tls = Some(seen.tls);
                    state.peer.fenced = Some(seen.theirs.fenced);
                    state.peer_role = record.and_then(|record| record.role.clone());
                    state.peer_epoch = record.map(|record| record.epoch);
                });
                return Ok(Some(seen));
            }
            Ok(Err(error)) if error.side() == Some(Side::Local) => return Err(error),
            Ok(Err(error)) => error,
            Err(_) => PassError::Unfit {
                check: "peer_unreachable",
                text: format!("the peer does not answer within {} s", PATIENCE.as_secs()),
                next_step: "check that the peer's server runs".into(),
            },
        };
        let now = self.desk.now();
        let text = error.to_string();
        self.complaint
            .failed(now, error.code(), &text, Pace::Passing);
        if error.code() == HoldReason::SameServer.as_str() {
            let step = error.next_step();
            self.desk.hold(HoldReason::SameServer, &text, &step, false);
        } else {
            self.desk.see_datastore(Side::Peer, Some(text));
        }
        Ok(None)
    }

    fn set_standing(&self, standing: Standing) {
        if self.desk.read(|state| state.standing != standing) {
            self.desk.update(|state| state.standing = standing);
        }
    }

    fn alone_in_the_dark(&self, promotion: Option<&Promotion>) -> Result<(), PassError> {
        let open = promotion
            .is_some_and(|promotion| !promotion.peer_fenced && !promotion.system_id.is_empty());
        let why = "the peer cannot be asked".to_string();
        self.set_standing(match open {
            true => Standing::PeerOpen(why),
            false => Standing::Alone(why),
        });
        Ok(())
    }

    /// A spare is worth what its last confirmation is.
    fn followed(&self, config: &Config, seen: &PeerSeen) {
        let confirmed = seen
            .theirs
            .record
            .as_ref()
            .and_then(|record| record.confirmed);
        let behind = confirmed.map(|time| (Utc::now() - time).to_std().unwrap_or_default());
        self.set_standing(match behind {
            Some(behind) if behind <= config.replication.rpo => Standing::Followed,
            Some(behind) => Standing::Alone(format!(
                "the spare was last complete {} ago, more than replication.rpo",
                humantime::format_duration(Duration::from_secs(behind.as_secs()))
            )),
            None => Standing::Alone("the spare was never known to be complete".into()),
        });
    }

    /// Fences the old primary, and removes there what is not needed any more.
    async fn finish(
        &mut self,
        config: &Arc<Config>,
        promotion: &Promotion,
        seen: &PeerSeen,
    ) -> Result<(), PassError> {
        let state = State::open(&config.local.datastore).await?;
        match settle(config, &state, promotion, seen).await {
            Ok(()) => {
                let text = format!("the old primary is fenced under epoch {}", promotion.epoch);
                log::info!("peer: {text}");
                self.desk.note("fence", &text);
                self.desk.update(|state| state.peer.fenced = Some(true));
                self.set_standing(fenced_and_idle());
            }
            Err(error) if error.side() == Some(Side::Local) => return Err(error),
            Err(error) => {
                let text = error.to_string();
                let now = self.desk.now();
                self.complaint
                    .failed(now, error.code(), &text, Pace::Passing);
                self.set_standing(Standing::PeerOpen(text));
            }
        }
        Ok(())
    }

    async fn give_way(&mut self, config: &Config, epoch: i64, by: &str) -> Result<(), PassError> {
        let text =
            format!("cluster {by} is the primary of the higher epoch {epoch}; this one gives way");
        log::warn!("local: {text}");
        self.desk.note("fence", &text);
        let state = State::open(&config.local.datastore).await?;
        fence_here(config, &state, epoch, by).await?;
        self.unproven = Some(0);
        let cluster = state.cluster().await?;
        self.show(&cluster, state.fence_record().await?.as_ref());
        Ok(())
    }

    async fn two_primaries(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
        what: &str,
    ) -> Result<(), PassError> {
        let epoch = self.next_epoch(cluster);
        if config.role == Role::Primary && forces(config, epoch) {
            return self.take_back(config, cluster, epoch).await;
        }
        let step = format!(
            "decide which one is to remain, and set role = \"primary\" with force_epoch = {epoch} there: the other one fences itself"
        );
        self.set_standing(Standing::Alone(what.to_string()));
        self.desk.hold(HoldReason::TwoPrimaries, what, &step, false);
        Ok(())
    }
}

fn fenced_and_idle() -> Standing {
    Standing::Alone("the old primary is fenced, and does not follow yet".into())
}

fn forces(config: &Config, epoch: i64) -> bool {
    i64::try_from(config.force_epoch) == Ok(epoch)
}
