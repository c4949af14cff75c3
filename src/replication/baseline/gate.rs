//! The gate for full copies. A set of rows is admitted only when each has its artifact here, or it
//! is certain, after the grace, that the primary does not have it or has it damaged; and never more
//! of these than the fuse allows.

use crate::cluster::{Lock, SpareDb, StateDb, WriteSession};
use crate::config::Config;
use crate::observe::{Phase, Progress, Step};
use crate::replication::artifact::carrier::Carrier;
use crate::replication::artifact::inventory::Inventory;
use crate::replication::artifact::missing;
use crate::replication::artifact::presence::Presence;
use crate::replication::artifact::round::{self, Round};
use crate::replication::error::ReplicationError;
use crate::replication::fuse::{self, Shrinkage};
use crate::replication::stream::FollowContext;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Interval between two looks for artifacts that the provider has not brought yet.
const ARRIVAL_PAUSE: Duration = Duration::from_secs(2);

/// The tools and facts that every step of a run needs.
pub(crate) struct SyncContext<'a> {
    pub config: &'a Config,
    pub state: &'a StateDb,
    pub lock: Lock,
    pub carrier: &'a Carrier,
    pub inventory: &'a Inventory<'a>,
    pub progress: &'a Progress,
    /// The rows whose artifacts are admitted by their presence.
    pub presence: Presence,
}

impl<'a> SyncContext<'a> {
    /// Returns the means to follow with. `spool` is the directory of the spool.
    pub(crate) fn to_follow(&self, spool: &Arc<Path>) -> FollowContext<'a> {
        FollowContext {
            config: self.config,
            state: self.state,
            lock: self.lock,
            carrier: self.carrier,
            spool: spool.clone(),
        }
    }

    /// Plans the remaining work, and returns its size. `settled` are the keys that it leaves out.
    /// Bytes that are recorded as unavailable are never admitted by their presence.
    pub(crate) async fn plan(
        &self,
        settled: &[String],
        unavailable: &HashSet<(String, String)>,
    ) -> Result<u64, ReplicationError> {
        let todo = self.inventory.plan(settled).await?;
        let of_all_rows = match self.presence {
            Presence::NoRow => return Ok(todo),
            Presence::VisibleRows => false,
            Presence::AllRows => true,
        };
        let admitted = self.inventory.admit_present(of_all_rows, unavailable);
        Ok(admitted.await?)
    }

    /// Copies the missing artifacts of the inventory's wanted rows. `known` are the bytes (key and
    /// checksum) recorded as unavailable before: only for others is the grace waited, and only
    /// others count for the fuse.
    pub(crate) async fn gate(
        &self,
        known: &HashSet<(String, String)>,
        phase: Phase,
    ) -> Result<Gated, ReplicationError> {
        let todo = self.plan(&[], known).await?;
        let step = self.progress.begin(phase, todo);
        let mut round = self.round(&step, &[]).await?;
        self.believe_refusals(&round).await?;
        if !newly_unavailable(&round, known).is_empty() {
            // One grace for all: a running upload becomes complete, a running deletion does not
            // come back.
            tokio::time::sleep(self.config.replication.gate_grace).await;
            self.confirm_bucket(&round).await?;
            let settled: Vec<String> = round.staged.iter().map(|swap| swap.key.clone()).collect();
            self.plan(&settled, known).await?;
            let again = self.round(&step, &settled).await?;
            self.believe_refusals(&again).await?;
            round.missing.clear();
            round.damaged.clear();
            round.not_replicated.clear();
            round.refused.clear();
            round.absorb(again);
        }
        let newly = newly_unavailable(&round, known);
        Ok(Gated { round, newly })
    }

    /// Runs rounds over the inventory's plan until the provider has brought every artifact that it
    /// is to bring. `settled` are the keys that the plan leaves out.
    pub(crate) async fn round(
        &self,
        step: &Step,
        settled: &[String],
    ) -> Result<Round, ReplicationError> {
        let copies = self.config.replication.copies;
        let (mut all, mut before) = (Round::default(), 0);
        loop {
            let mut round =
                round::round(self.inventory, self.state, self.carrier, copies, step).await?;
            let awaited = std::mem::take(&mut round.awaited);
            all.absorb(round);
            step.awaits(awaited.len(), awaited.first().map_or("", String::as_str));
            let Some(example) = awaited.first() else {
                return Ok(all);
            };
            if awaited.len() != before {
                before = awaited.len();
                log::info!(
                    "local: {before} artifacts are awaited from the provider of the bucket, for example {example}"
                );
            }
            tokio::time::sleep(ARRIVAL_PAUSE).await;
            let decided = all.unavailable().map(|(item, _)| item.key.clone());
            let decided: Vec<String> = decided.chain(settled.iter().cloned()).collect();
            self.inventory.plan(&decided).await?;
        }
    }

    /// Checks refusals. A refusal is the object's own fault only if the store serves others;
    /// otherwise the run ends with it.
    pub(crate) async fn believe_refusals(&self, round: &Round) -> Result<(), ReplicationError> {
        let Some(error) = round.refusals().next() else {
            return Ok(());
        };
        if round.copied > 0 {
            return Ok(());
        }
        let served = self.inventory.some_known_keys().await?;
        if missing::serves_others(self.carrier.peer(), &served).await? {
            return Ok(());
        }
        Err(error.clone().into())
    }

    /// Checks, before "no such key" is believed, that the bucket itself still answers, and that a
    /// known object is still in it. A bucket that has none of the artifacts is not the primary's,
    /// however few they are.
    pub(crate) async fn confirm_bucket(&self, round: &Round) -> Result<(), ReplicationError> {
        let peer = self.carrier.peer();
        peer.check_bucket().await?;
        let wanted = self.inventory.wanted().await?;
        if wanted > 0 && round.missing.len() as u64 >= wanted {
            return Err(missing::another_bucket(format!(
                "the peer's bucket {} has none of the {wanted} artifacts that the rows name (for example {})",
                peer.bucket(),
                round.missing[0].key
            )));
        }
        missing::serves_one(peer, &self.inventory.some_known_keys().await?).await
    }

    /// Admits the change, or stops and asks. `inside` is a session on the database as the change
    /// leaves it.
    pub(crate) async fn judge(
        &self,
        change: Shrinkage,
        inside: &WriteSession,
    ) -> Result<bool, ReplicationError> {
        // Changes that only this cluster has were recorded, and are expected to go.
        let cluster = self.state.cluster().await?;
        let approved = self.config.fuse.approves(&cluster.approved);
        if cluster.coming_back || approved {
            return Ok(true);
        }
        fuse::ask(self.config, self.state, change, inside).await
    }
}

/// The result of the gate for a set of rows.
pub(crate) struct Gated {
    pub round: Round,
    /// Keys that are admitted without their artifact for the first time.
    pub newly: Vec<String>,
}

/// Records, in the same database as the rows, which rows were admitted without their artifact.
pub(crate) async fn record_unavailable(
    session: &WriteSession,
    round: &Round,
) -> Result<(), ReplicationError> {
    for (item, reason) in round.unavailable() {
        SpareDb::of(session)
            .record_unavailable(&item.key, &item.checksum, reason)
            .await?;
    }
    Ok(())
}

fn newly_unavailable(round: &Round, known: &HashSet<(String, String)>) -> Vec<String> {
    let items = round.unavailable().map(|(item, _)| item);
    items
        .filter(|item| !known.contains(&(item.key.clone(), item.checksum.to_string())))
        .map(|item| item.key.clone())
        .collect()
}
