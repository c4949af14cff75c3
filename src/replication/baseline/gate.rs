//! The gate for full copies. A set of rows is admitted only when each has its artifact here, or it
//! is certain, after the grace, that the primary does not have it or has it damaged; and never more
//! of these than the fuse allows.

use crate::cluster::{LocalSession, Lock, State};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::observe::{Phase, Progress};
use crate::replication::artifact::courier::Courier;
use crate::replication::artifact::inventory::Inventory;
use crate::replication::artifact::round::{self, Round};
use crate::replication::error::PassError;
use crate::replication::fuse::{self, Shrinkage};
use std::collections::HashSet;

/// The tools and facts that every step of a run needs.
pub(crate) struct Work<'a> {
    pub config: &'a Config,
    pub state: &'a State,
    pub lock: Lock,
    pub courier: &'a Courier,
    pub inventory: &'a Inventory<'a>,
    pub progress: &'a Progress,
}

impl Work<'_> {
    /// Copies the missing artifacts of the inventory's wanted rows. `known` are the bytes (key and
    /// checksum) recorded as unavailable before: only for others is the grace waited, and only
    /// others count for the fuse.
    pub(crate) async fn gate(
        &self,
        known: &HashSet<(String, String)>,
        phase: Phase,
    ) -> Result<Gated, PassError> {
        let todo = self.inventory.plan(&[]).await?;
        let step = self.progress.begin(phase, todo);
        let copies = self.config.replication.copies;
        let mut round =
            round::round(self.inventory, self.state, self.courier, copies, &step).await?;
        self.believe_refusals(&round).await?;
        if !newly_unavailable(&round, known).is_empty() {
            // One grace for all: a running upload becomes complete, a running deletion does not
            // come back.
            tokio::time::sleep(self.config.replication.gate_grace).await;
            self.confirm_bucket(&round).await?;
            let settled: Vec<String> = round.staged.iter().map(|swap| swap.key.clone()).collect();
            self.inventory.plan(&settled).await?;
            let again =
                round::round(self.inventory, self.state, self.courier, copies, &step).await?;
            self.believe_refusals(&again).await?;
            round.missing.clear();
            round.damaged.clear();
            round.refused.clear();
            round.absorb(again);
        }
        let newly = newly_unavailable(&round, known);
        Ok(Gated { round, newly })
    }

    /// Checks refusals. A refusal is the object's own fault only if the store serves others;
    /// otherwise the run ends with it.
    pub(crate) async fn believe_refusals(&self, round: &Round) -> Result<(), PassError> {
        let Some(error) = round.refusals().next() else {
            return Ok(());
        };
        if round.copied > 0 {
            return Ok(());
        }
        for key in &self.some_known_keys().await? {
            match self.courier.peer.get(key).await {
                Ok(Some(_)) => return Ok(()),
                Ok(None) => {}
                Err(error) if error.may_be_of_the_object() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(error.clone().into())
    }

    /// Checks, before "no such key" is believed, that the bucket itself still answers, and that a
    /// known object is still in it. A bucket that has none of the artifacts is not the primary's,
    /// however few they are.
    pub(crate) async fn confirm_bucket(&self, round: &Round) -> Result<(), PassError> {
        let peer = &self.courier.peer;
        peer.check_bucket().await?;
        let unfit = |text: String| {
            PassError::Unfit {
            check: ErrorCode::MissingArtifacts,
            text,
            next_step: "check peer.s3.endpoint and peer.s3.bucket_name; if the primary really lost them, remove their rows there"
                .into(),
        }
        };
        let wanted = self.inventory.wanted().await?;
        if wanted > 0 && round.missing.len() as u64 >= wanted {
            return Err(unfit(format!(
                "the peer's bucket {} has none of the {wanted} artifacts that the rows name (for example {})",
                peer.bucket(),
                round.missing[0].key
            )));
        }
        let known = self.some_known_keys().await?;
        for key in &known {
            // One that is still served is enough: any single object may have been deleted since.
            if peer.head(key).await?.is_some() {
                return Ok(());
            }
        }
        let Some(key) = known.first() else {
            return Ok(());
        };
        Err(unfit(format!(
            "the peer's bucket {} does not have some artifacts, nor {} others that it served before (for example {key})",
            peer.bucket(),
            known.len()
        )))
    }

    /// Returns keys that are here and that the primary's rows still name.
    async fn some_known_keys(&self) -> Result<Vec<String>, PassError> {
        let sql = "SELECT a.key FROM public.artifact a JOIN wanted w ON w.key = a.key AND w.checksum = a.checksum \
                   ORDER BY random() LIMIT 20";
        let session = self.state.session();
        let rows = session.query("choosing known artifacts", sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Admits the change, or stops and asks. `inside` is a session on the database as the change
    /// leaves it.
    pub(crate) async fn judge(
        &self,
        change: Shrinkage,
        inside: &LocalSession,
    ) -> Result<bool, PassError> {
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
    session: &LocalSession,
    round: &Round,
) -> Result<(), PassError> {
    let sql = "INSERT INTO warm_spare.unavailable (key, checksum, reason) VALUES ($1, $2, $3) \
               ON CONFLICT (key) DO UPDATE SET reason = excluded.reason";
    for (item, reason) in round.unavailable() {
        let checksum = item.checksum.to_string();
        session
            .execute(
                "recording unavailable artifacts",
                sql,
                &[&item.key, &checksum, &reason],
            )
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
