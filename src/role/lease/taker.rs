//! The part of a cluster that is being promoted: asks in the lease, waits for the answer, and takes
//! the lease. Nothing is promoted before the store has confirmed that the lease is ours.

use super::boot_time;
use super::decide::{Stranger, belongs};
use super::holder::{own, terms};
use crate::cluster::{
    FoundObject, LeaseStore, LocalCluster, Record, SeenLease, StateDb, WroteLease,
};
use crate::config::Config;
use crate::domain::{Asker, ErrorCode, Isolated, Lease, LeaseLine, LeaseState, Role};
use crate::killpoint;
use crate::replication::ReplicationError;
use chrono::Utc;
use std::time::Duration;

/// Interval between two looks for the holder's answer.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Number of writes that others may overtake before the takeover is given up.
const TRIES: usize = 20;

/// Value of `takeover.force_lease` where no lease was ever seen.
const NEVER_SEEN: &str = "none";

/// Takes the lease for one epoch.
pub struct LeaseTaker<'a> {
    pub config: &'a Config,
    pub state: &'a StateDb,
    pub epoch: i64,
    /// Id of the promotion that takes the epoch.
    pub promotion: &'a str,
    /// The old primary's cluster id, if it is known.
    pub peer_cluster: &'a str,
}

/// The proof, beside the lease, that the holder takes no live traffic any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// There is none: the holder is asked.
    Nothing,
    /// The holder was fenced and drained through its datastore, `takeover.fence_command` has
    /// succeeded, or the shared file system is attached here alone.
    Fenced,
}

impl Proof {
    pub fn of(is_fenced: bool) -> Proof {
        match is_fenced {
            true => Proof::Fenced,
            false => Proof::Nothing,
        }
    }
}

/// The way in which the lease was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// The holder takes no live traffic: it says so, or there was another proof. The position of
    /// its log, if it told one.
    Proved(String),
    /// The holder promised to fence itself by now, and did not confirm it.
    ByPromise,
    /// An operator consented by `takeover.force_lease`.
    Forced,
}

impl Taken {
    /// Returns the way as text, for the history.
    pub fn text(&self) -> &'static str {
        match self {
            Taken::Proved(_) => "its holder is fenced",
            Taken::ByPromise => "by the promise of its holder, not confirmed",
            Taken::Forced => "overridden by takeover.force_lease",
        }
    }
}

/// The next act on the lease that was read.
enum Next {
    Take(Taken),
    Ask,
    Wait,
}

impl LeaseTaker<'_> {
    /// Takes the lease. The journal already says that a takeover has begun.
    pub async fn take(&self, proof: Proof) -> Result<Taken, ReplicationError> {
        let store = self.store()?;
        let record = self.state.own_record().await?;
        // Start of the wait, and the nonce that was seen then.
        let mut waits: Option<(Duration, String)> = None;
        // An acting primary that nobody has fenced needs no proof about itself.
        let is_acting =
            record.role == Some(Role::Primary) && self.state.fence_record().await?.is_none();
        self.state.touches_lease(true).await?;
        for _ in 0..TRIES {
            let (lease, at) = match store.read().await {
                Ok(SeenLease::Found(lease, at)) => (*lease, at),
                Ok(SeenLease::Absent) => {
                    let why = format!("there is no lease ({})", store.address());
                    return self.unreadable(&store, &record, None, &why).await;
                }
                Ok(SeenLease::Garbage(why, at)) => {
                    let why = format!("{} is no lease: {why}", store.address());
                    return self.unreadable(&store, &record, Some(at), &why).await;
                }
                Err(error) => return self.store_is_away(&error.to_string()).await,
            };
            let seen = self.state.lease_record().await?;
            if let Err(stranger) = belongs(&own(&record, seen.as_ref()), &lease)
                && !self.is_of_our_peer(&stranger, &lease)
            {
                self.consent(&lease, &stranger.to_string())?;
                return self.override_it(&store, &record, &lease, &at).await;
            }
            self.state.saw_lease(&lease).await?;
            let next = loop {
                match self.next(&record, &lease, (proof, is_acting), waits.as_ref())? {
                    Next::Wait
                        if waits
                            .as_ref()
                            .is_none_or(|(_, nonce)| *nonce != lease.nonce) =>
                    {
                        waits = Some((boot_time(), lease.nonce.clone()));
                    }
                    next => break next,
                }
            };
            match next {
                Next::Wait => {
                    tokio::time::sleep(LOOK_INTERVAL).await;
                    let answered = self.wait_for_answer(&store, &lease, waits.as_ref()).await;
                    if let Err(error) = answered {
                        return self.store_is_away(&error.to_string()).await;
                    }
                }
                Next::Ask => {
                    let mut asks = lease.next(LeaseStore::nonce(), Utc::now());
                    asks.state = LeaseState::Asked;
                    asks.asked_by = Some(self.asker(&record));
                    asks.reason = String::new();
                    let wrote = store.write(&asks, Some(&at)).await?;
                    if matches!(wrote, WroteLease::Written(_)) {
                        self.state.saw_lease(&asks).await?;
                        waits = Some((boot_time(), asks.nonce.clone()));
                    }
                    killpoint::reach("lease.asked");
                }
                Next::Take(taken) => {
                    let held = self.held(&lease, &record);
                    if let WroteLease::Written(_) = store.write(&held, Some(&at)).await? {
                        self.state.wrote_lease(&held).await?;
                        killpoint::reach("lease.taken");
                        return Ok(taken);
                    }
                }
            }
        }
        Err(unanswered(
            "the lease is written by others all the time".into(),
            "find out who writes the lease".into(),
        ))
    }

    /// Decides about a lease that belongs to this pair of clusters.
    fn next(
        &self,
        record: &Record,
        lease: &Lease,
        (proof, is_acting): (Proof, bool),
        waits: Option<&(Duration, String)>,
    ) -> Result<Next, ReplicationError> {
        let (us, line) = (record.cluster_id.as_str(), &lease.line);
        if line.holder == us && line.epoch == self.epoch {
            // It was taken before, by a process that was killed.
            return Ok(Next::Take(Taken::Proved(lease.last_lsn.clone())));
        }
        if self.config.takeover.force_lease == lease.nonce {
            return Ok(Next::Take(Taken::Forced));
        }
        if line.epoch >= self.epoch {
            return Err(ReplicationError::Refused {
                rule: ErrorCode::NewerPrimary,
                text: format!(
                    "cluster {} holds the lease under epoch {}, and this promotion would take epoch {}",
                    line.holder, line.epoch, self.epoch
                ),
                next_step:
                    "set role = \"spare\" here; or find out which cluster is to be the primary"
                        .into(),
            });
        }
        if proof == Proof::Fenced || lease.state == LeaseState::Free {
            return Ok(Next::Take(Taken::Proved(lease.last_lsn.clone())));
        }
        if line.holder == us && is_acting {
            return Ok(Next::Take(Taken::Proved(String::new())));
        }
        if line.holder == us {
            // Another cluster was promoted without the lease, and has not claimed it yet; or it
            // asked this one to fence itself, and is gone.
            return Err(unanswered(
                format!(
                    "the lease still names this cluster under its epoch {}, and another cluster has fenced it since",
                    line.epoch
                ),
                format!(
                    "let the other cluster take the lease, or call its takeover off there; or, if nobody writes there, set takeover.force_lease = \"{}\"",
                    lease.nonce
                ),
            ));
        }
        let asks = lease.is_asked_by(us, self.epoch);
        match lease.state {
            LeaseState::Fenced if asks => Ok(Next::Take(Taken::Proved(lease.last_lsn.clone()))),
            LeaseState::Held if asks => Err(self.held_by_another(lease)),
            LeaseState::Asked if asks => self.unanswered_yet(lease, waits),
            // Another cluster asks for it, or nobody does.
            _ => Ok(Next::Ask),
        }
    }

    /// Decides about a question of ours that is not answered.
    fn unanswered_yet(
        &self,
        lease: &Lease,
        waits: Option<&(Duration, String)>,
    ) -> Result<Next, ReplicationError> {
        let Some((since, _)) = waits.filter(|(_, nonce)| *nonce == lease.nonce) else {
            return Ok(Next::Wait);
        };
        if boot_time().saturating_sub(*since) < lease.promise_kept_after() {
            return Ok(Next::Wait);
        }
        match lease.isolated {
            Isolated::Fence => Ok(Next::Take(Taken::ByPromise)),
            Isolated::GoOn => Err(unanswered(
                format!(
                    "cluster {} holds the lease and has not answered for {}; it promised nothing for this case, so it may still take uploads",
                    lease.line.holder,
                    humantime::format_duration(lease.promise_kept_after())
                ),
                format!(
                    "stop Builder and warm-spare at the other site, or find out that the site is lost; then set takeover.force_lease = \"{}\"",
                    lease.nonce
                ),
            )),
        }
    }

    /// Waits until the lease is another one, or the holder's time is over.
    async fn wait_for_answer(
        &self,
        store: &LeaseStore,
        lease: &Lease,
        waits: Option<&(Duration, String)>,
    ) -> Result<(), ReplicationError> {
        let since = waits.map_or_else(boot_time, |(since, _)| *since);
        let until = since + lease.promise_kept_after();
        // A store that does not answer once may answer later within this time.
        let mut last = Ok(());
        while boot_time() < until {
            match store.read().await {
                Ok(SeenLease::Found(now, _)) if now.nonce == lease.nonce => last = Ok(()),
                Ok(_) => return Ok(()),
                Err(error) => last = Err(error.into()),
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        last
    }

    /// Gives the lease back to the old holder, or withdraws the question, because the takeover was
    /// undone.
    pub async fn give_back(&self) -> Result<(), ReplicationError> {
        let seen = self.state.lease_record().await?;
        if !seen.is_some_and(|seen| seen.touched) {
            return Ok(());
        }
        self.give_back_what_is_ours().await?;
        Ok(self.state.touches_lease(false).await?)
    }

    async fn give_back_what_is_ours(&self) -> Result<(), ReplicationError> {
        let store = self.store()?;
        let record = self.state.own_record().await?;
        let us = record.cluster_id.as_str();
        for _ in 0..TRIES {
            let SeenLease::Found(lease, at) = store.read().await? else {
                // Nothing of ours is in it.
                return Ok(());
            };
            let back = if lease.line.holder == us && lease.line.epoch == self.epoch {
                match lease.former.clone() {
                    Some(former) => former,
                    None => return Ok(()),
                }
            } else if lease.line.holder != us && lease.is_asked_by(us, self.epoch) {
                lease.line.clone()
            } else {
                return Ok(());
            };
            let held = lease.given_back(back, LeaseStore::nonce(), Utc::now());
            if let WroteLease::Written(_) = store.write(&held, Some(&at)).await? {
                self.state.saw_lease(&held).await?;
                return Ok(());
            }
        }
        Err(unanswered(
            "the lease could not be given back: others write it all the time".into(),
            "find out who writes the lease".into(),
        ))
    }

    fn store(&self) -> Result<LeaseStore, ReplicationError> {
        LocalCluster::of(self.config)
            .lease_store()?
            .ok_or_else(|| unanswered("there is no lease in this mode".into(), String::new()))
    }

    fn asker(&self, record: &Record) -> Asker {
        Asker {
            cluster: record.cluster_id.clone(),
            epoch: self.epoch,
        }
    }

    fn line(&self, record: &Record) -> LeaseLine {
        let parent = record.lineage.head();
        LeaseLine {
            holder: record.cluster_id.clone(),
            site: self.config.site.clone(),
            epoch: self.epoch,
            promotion: self.promotion.to_string(),
            parent: parent.map(|head| head.id.clone()).unwrap_or_default(),
        }
    }

    fn held(&self, lease: &Lease, record: &Record) -> Lease {
        lease
            .next(LeaseStore::nonce(), Utc::now())
            .held_by(self.line(record), terms(self.config))
    }

    /// Returns whether the holder is the primary that this cluster has followed. A spare may not
    /// know the promotions of its primary yet.
    fn is_of_our_peer(&self, stranger: &Stranger, lease: &Lease) -> bool {
        *stranger == Stranger::OtherLine
            && !self.peer_cluster.is_empty()
            && lease.line.holder == self.peer_cluster
    }

    fn held_by_another(&self, lease: &Lease) -> ReplicationError {
        let why = match lease.reason.as_str() {
            "" => String::new(),
            reason => format!(" and answers: {reason}"),
        };
        ReplicationError::Refused {
            rule: ErrorCode::LeaseHeld,
            text: format!(
                "not promoted: cluster {} ({}) renews the lease{why}",
                lease.line.holder, lease.line.site
            ),
            next_step: format!(
                "mend the fence at that site; or, if nobody writes there, set takeover.force_lease = \"{}\"",
                lease.nonce
            ),
        }
    }

    /// Returns the refusal for a lease that is not believed, unless an operator consents.
    fn consent(&self, lease: &Lease, why: &str) -> Result<(), ReplicationError> {
        match self.config.takeover.force_lease == lease.nonce {
            true => Ok(()),
            false => Err(unanswered(
                why.to_string(),
                format!(
                    "find out what happened to the store; to take this lease anyway, set takeover.force_lease = \"{}\"",
                    lease.nonce
                ),
            )),
        }
    }

    async fn override_it(
        &self,
        store: &LeaseStore,
        record: &Record,
        lease: &Lease,
        at: &FoundObject,
    ) -> Result<Taken, ReplicationError> {
        let held = self.held(lease, record);
        self.write_forced(store, &held, Some(at)).await
    }

    /// Decides about a lease that is absent or no lease: only a consent to the last lease that was
    /// seen goes on.
    async fn unreadable(
        &self,
        store: &LeaseStore,
        record: &Record,
        at: Option<FoundObject>,
        why: &str,
    ) -> Result<Taken, ReplicationError> {
        let (series, number) = self.consented(why).await?;
        let mut first = Lease::first(
            self.line(record),
            terms(self.config),
            LeaseStore::nonce(),
            Utc::now(),
        );
        first.series = series;
        first.number = number.saturating_add(1);
        self.write_forced(store, &first, at.as_ref()).await
    }

    async fn write_forced(
        &self,
        store: &LeaseStore,
        held: &Lease,
        at: Option<&FoundObject>,
    ) -> Result<Taken, ReplicationError> {
        match store.write(held, at).await? {
            WroteLease::Written(_) => {
                self.state.wrote_lease(held).await?;
                Ok(Taken::Forced)
            }
            WroteLease::Lost => Err(unanswered(
                "another cluster has just written the lease".into(),
                "look at the lease in the status again".into(),
            )),
        }
    }

    async fn store_is_away(&self, why: &str) -> Result<Taken, ReplicationError> {
        self.consented(why).await?;
        log::warn!("the lease was not written: {why}; it is claimed as soon as its store answers");
        Ok(Taken::Forced)
    }

    /// Returns series and number of the last lease that was seen, if an operator consented to
    /// override it.
    async fn consented(&self, why: &str) -> Result<(String, u64), ReplicationError> {
        let Some(seen) = self.state.lease_record().await? else {
            if self.config.takeover.force_lease == NEVER_SEEN {
                return Ok((LeaseStore::nonce(), 0));
            }
            return Err(ReplicationError::Refused {
                rule: ErrorCode::NoLease,
                text: format!("not promoted: {why}, and this cluster has never seen a lease"),
                next_step: format!(
                    "load warm-spare at the primary with artifacts.mode = \"shared\" and role = \"primary\"; or, if nobody writes there, set takeover.force_lease = \"{NEVER_SEEN}\""
                ),
            });
        };
        match self.config.takeover.force_lease == seen.nonce {
            true => Ok((seen.series, seen.number)),
            false => Err(unanswered(
                why.to_string(),
                format!(
                    "make the store of the lease answer; or, if nobody writes at the other site, set takeover.force_lease = \"{}\"",
                    seen.nonce
                ),
            )),
        }
    }
}

fn unanswered(text: String, next_step: String) -> ReplicationError {
    ReplicationError::Refused {
        rule: ErrorCode::LeaseUnanswered,
        text: format!("not promoted: {text}"),
        next_step,
    }
}
