//! A full copy at one snapshot: schema, rows, indexes, the artifacts that its rows name; then the switch.
//!
//! Until the switch the visible database stands whole; after it the new one does. What survives a crash in between is
//! the artifacts.

use super::artifacts::{self, Round, Unavailable};
use super::checks::Facts;
use super::content::ContentHash;
use super::courier::Courier;
use super::error::PassError;
use super::fuse::{self, Shrinkage, Verdict};
use super::inventory::Inventory;
use super::inventory::UNSOUND;
use super::switch::{self, Arrival, Properties};
use super::{guard, replacements, tables};
use crate::cluster::{
    CopiedPoint, LocalSession, Lock, PeerSession, Snapshot, State, StateError, quote_ident,
    set_fence,
};
use crate::config::Config;
use crate::observe::{Phase, Progress};
use std::collections::BTreeMap;
use tempfile::TempDir;

/// All that the steps of one baseline share.
pub struct Baseline<'a> {
    pub config: &'a Config,
    pub facts: &'a Facts,
    pub state: &'a State,
    pub lock: Lock,
    pub courier: &'a Courier,
    pub inventory: &'a Inventory<'a>,
    pub progress: &'a Progress,
    /// Rows that the visible database has, and artifacts of them recorded as unavailable before.
    pub visible_rows: u64,
    pub known_unavailable: Vec<String>,
}

/// What a finished baseline did.
#[derive(Debug)]
pub struct Copied {
    pub point: CopiedPoint,
    pub contents: BTreeMap<String, ContentHash>,
    pub artifacts: Round,
    pub generation: Option<String>,
    pub vanished: u64,
    pub dropped: Vec<String>,
}

impl Baseline<'_> {
    pub async fn run(&self) -> Result<Copied, PassError> {
        let incoming = format!("{}_incoming", self.config.local.datastore.database);
        // Of a pass that was killed; nobody has ever seen it.
        switch::drop_database(self.state.session(), &incoming).await?;
        let copied = self.fill_and_switch(&incoming).await;
        if copied.is_err() {
            // Best effort: the next pass drops it anyway, but its disk space is wanted now.
            let _ = switch::drop_database(self.state.session(), &incoming).await;
        }
        copied
    }

    async fn fill_and_switch(&self, incoming: &str) -> Result<Copied, PassError> {
        let visible = &self.config.local.datastore.database;
        let properties = switch::properties(self.state.session(), visible, incoming).await?;
        let owner = properties
            .owner
            .clone()
            .filter(|name| *name != self.config.local.datastore.user);
        self.create(incoming, owner.as_deref()).await?;
        let scratch = scratch()?;
        let archive = scratch.path().join("schema.dump");
        let copying = self.copy_rows(incoming, owner.as_deref(), &archive);
        let (point, contents, sequences) =
            guard::guarded(&self.config.peer.datastore, copying).await?;

        self.progress.begin(Phase::Indexes, 0);
        let target = &self.config.local.datastore;
        let jobs = self.config.replication.jobs;
        self.facts
            .clients
            .restore(
                target,
                incoming,
                "post-data",
                &archive,
                jobs,
                owner.as_deref(),
            )
            .await?;
        let inside = LocalSession::open(target, incoming).await?;
        for statement in &sequences {
            inside.batch("setting a sequence", statement).await?;
        }
        inside.long("collecting statistics", "ANALYZE").await?;

        let (round, shrinkage, unsound) = self.remaining_artifacts(&inside).await?;
        self.record_inside(&inside, &point, &round, &unsound)
            .await?;
        drop(inside);
        self.judge(&shrinkage).await?;
        self.finish(incoming, &properties, point, contents, round, shrinkage)
            .await
    }

    async fn create(&self, incoming: &str, owner: Option<&str>) -> Result<(), PassError> {
        let owner = owner
            .map(|name| format!(" OWNER {}", quote_ident(name)))
            .unwrap_or_default();
        let sql = format!(
            "CREATE DATABASE {} TEMPLATE template0 {}{owner}",
            quote_ident(incoming),
            self.facts.locale
        );
        Ok(self
            .state
            .session()
            .long("creating the incoming database", &sql)
            .await?)
    }

    /// From the exported snapshot to the last row. Only in here are there transactions of ours on the primary.
    async fn copy_rows(
        &self,
        incoming: &str,
        owner: Option<&str>,
        archive: &std::path::Path,
    ) -> Result<(CopiedPoint, BTreeMap<String, ContentHash>, Vec<String>), PassError> {
        let (peer, local) = (&self.config.peer.datastore, &self.config.local.datastore);
        self.progress.begin(Phase::Snapshot, 0);
        let holder = PeerSession::open(peer).await?;
        let snapshot = holder.export_snapshot().await?;
        let mut point = self.point(&holder).await?;
        let tables = tables::peer_tables(&holder).await?;

        self.progress.begin(Phase::Schema, 0);
        self.dump_and_restore(&snapshot, incoming, owner, archive)
            .await?;

        let bytes: i64 = tables.iter().map(|t| t.bytes).sum();
        let step = self.progress.begin(Phase::Tables, bytes.max(0) as u64);
        let throttle = &self.courier.throttle;
        let contents = tables::copy_all(
            self.config,
            &snapshot,
            &tables,
            incoming,
            self.facts.lz4,
            throttle,
            &step,
        )
        .await?;
        let rewritten = tables::rewritten(&holder, &tables).await?;
        if !rewritten.is_empty() {
            return Err(PassError::Rewritten {
                tables: rewritten.join(", "),
            });
        }
        holder.end().await?;
        // Read after the rows, in a transaction of their own: never behind them.
        let reader = PeerSession::open(peer).await?;
        let sequences = tables::sequence_values(&reader).await?;
        point.sequences = digest(&sequences);
        log::debug!(
            "{} tables copied into {incoming} on {}:{}",
            tables.len(),
            local.host,
            local.port
        );
        Ok((point, contents, sequences))
    }

    async fn dump_and_restore(
        &self,
        snapshot: &Snapshot,
        incoming: &str,
        owner: Option<&str>,
        archive: &std::path::Path,
    ) -> Result<(), PassError> {
        let (peer, local) = (&self.config.peer.datastore, &self.config.local.datastore);
        let clients = &self.facts.clients;
        clients
            .dump_schema(peer, snapshot.as_str(), archive)
            .await?;
        Ok(clients
            .restore(local, incoming, "pre-data", archive, 1, owner)
            .await?)
    }

    /// What the snapshot stands for, in the primary's own terms and clock.
    async fn point(&self, holder: &PeerSession) -> Result<CopiedPoint, PassError> {
        let sql = "SELECT pg_current_wal_lsn()::text, now(), txid_current_snapshot()::text";
        let row = holder
            .query_one("reading the snapshot's position", sql, &[])
            .await?;
        Ok(CopiedPoint {
            lsn: row.get(0),
            commit_time: row.get(1),
            system_id: self.facts.system_id.clone(),
            timeline: self.facts.timeline,
            transactions: row.get(2),
            server_started: self.facts.server_started.clone(),
            sequences: String::new(),
        })
    }

    /// Until every row of the incoming database has its artifact, or has it recorded that the primary lacks it.
    async fn remaining_artifacts(
        &self,
        inside: &LocalSession,
    ) -> Result<(Round, Shrinkage, Vec<String>), PassError> {
        let loaded = self.inventory.load_wanted_from(inside).await?;
        let todo = self.inventory.plan(&[]).await?;
        let step = self.progress.begin(Phase::RemainingArtifacts, todo);
        let copies = self.config.replication.copies;
        let mut round =
            artifacts::round(self.inventory, self.state, self.courier, copies, &step).await?;
        let first_time = self.newly_unavailable(&round);
        if !first_time.is_empty() {
            // One grace for all: an upload under way is seen whole, a delete under way will not come back.
            tokio::time::sleep(self.config.replication.gate_grace).await;
            artifacts::confirm_bucket(self.courier, self.some_fetched_key().await?.as_deref())
                .await?;
            let settled: Vec<String> = round.staged.iter().map(|swap| swap.key.clone()).collect();
            self.inventory.plan(&settled).await?;
            let again =
                artifacts::round(self.inventory, self.state, self.courier, copies, &step).await?;
            round.missing.clear();
            round.damaged.clear();
            round.absorb(again);
        }
        let shrinkage = Shrinkage {
            packages: self.inventory.vanishing().await?,
            packages_before: self.visible_rows,
            artifacts: self.newly_unavailable(&round),
            artifacts_before: self.inventory.wanted().await?,
            ..self.vanished_lately().await?
        };
        for name in &loaded.unsound {
            log::warn!(
                "peer: package {name} names no possible artifact (ident, target or checksum); its row is copied as it is"
            );
        }
        Ok((round, shrinkage, loaded.unsound))
    }

    fn newly_unavailable(&self, round: &Round) -> Vec<String> {
        let new = |item: &&Unavailable| !self.known_unavailable.contains(&item.key);
        let items = round.missing.iter().chain(&round.damaged);
        items.filter(new).map(|item| item.key.clone()).collect()
    }

    /// A key that the primary has served before: if even that is gone, it is the bucket that is wrong.
    async fn some_fetched_key(&self) -> Result<Option<String>, PassError> {
        let sql = "SELECT a.key FROM public.artifact a JOIN wanted w ON w.key = a.key AND w.checksum = a.checksum \
                   ORDER BY a.verified_at DESC LIMIT 1";
        let rows = self
            .state
            .session()
            .query("choosing a known artifact", sql, &[])
            .await?;
        Ok(rows.first().map(|row| row.get(0)))
    }

    async fn vanished_lately(&self) -> Result<Shrinkage, PassError> {
        let sql = "SELECT coalesce(sum(packages), 0)::int8, coalesce(sum(artifacts), 0)::int8 FROM vanished \
                   WHERE time > now() - make_interval(secs => $1)";
        let window = self.config.fuse.window.as_secs_f64();
        let row = self
            .state
            .session()
            .query_one("reading what vanished lately", sql, &[&window])
            .await?;
        Ok(Shrinkage {
            earlier_packages: row.get::<_, i64>(0) as u64,
            earlier_artifacts: row.get::<_, i64>(1) as u64,
            ..Shrinkage::default()
        })
    }

    async fn judge(&self, shrinkage: &Shrinkage) -> Result<(), PassError> {
        match fuse::judge(&self.config.fuse, shrinkage) {
            Verdict::Holds => Ok(()),
            Verdict::Approved { id } => {
                let text = format!("change {id} was let through by fuse.approve");
                log::warn!("fuse: {text}");
                Ok(self
                    .state
                    .event("fuse_approved", &text, &self.config.change)
                    .await?)
            }
            Verdict::Blown { id, text } => {
                self.state.event("fuse", &text, &self.config.change).await?;
                Err(PassError::Refused {
                    rule: "fuse",
                    text,
                    next_step: format!(
                        "if this is right, let exactly this change through with fuse.approve = \"{id}\""
                    ),
                })
            }
        }
    }

    /// Our schema inside the incoming database: what must stand and fall with the rows.
    async fn record_inside(
        &self,
        inside: &LocalSession,
        point: &CopiedPoint,
        round: &Round,
        unsound: &[String],
    ) -> Result<(), PassError> {
        inside.batch("making our schema", OUR_SCHEMA).await?;
        let sql = "INSERT INTO warm_spare.recovery_point (lsn, commit_time, system_id, timeline, token) \
                   VALUES ($1::text::pg_lsn, $2, $3, $4, $5)";
        inside
            .execute(
                "recording the recovery point",
                sql,
                &[
                    &point.lsn,
                    &point.commit_time,
                    &point.system_id,
                    &point.timeline,
                    &self.lock.token,
                ],
            )
            .await?;
        let sql = "INSERT INTO warm_spare.unavailable (key, checksum, reason) VALUES ($1, $2, $3)";
        for name in unsound {
            inside
                .execute(
                    "recording a row that names no artifact",
                    sql,
                    &[name, &"", &UNSOUND],
                )
                .await?;
        }
        for (item, reason) in round.unavailable() {
            let checksum = item.checksum.to_string();
            inside
                .execute(
                    "recording what the primary lacks",
                    sql,
                    &[&item.key, &checksum, &reason],
                )
                .await?;
        }
        Ok(())
    }

    async fn finish(
        &self,
        incoming: &str,
        properties: &Properties,
        point: CopiedPoint,
        contents: BTreeMap<String, ContentHash>,
        round: Round,
        shrinkage: Shrinkage,
    ) -> Result<Copied, PassError> {
        let session = self.state.session();
        switch::apply(session, properties).await?;
        set_fence(session, incoming).await?;
        let step = self
            .progress
            .begin(Phase::Replacements, round.staged.len() as u64);
        if !round.staged.is_empty() {
            replacements::carry_out(&round.staged, self.state, self.courier, &step).await?;
        }
        self.progress.begin(Phase::Switch, 0);
        let generation = self.facts.visible.then(|| {
            let visible = &self.config.local.datastore.database;
            format!(
                "{visible}_{}",
                chrono::Utc::now().format("%Y%m%dt%H%M%S%3fz")
            )
        });
        let rows = contents.values().map(ContentHash::rows).sum::<u64>();
        let arrival = Arrival {
            incoming,
            generation: generation.clone(),
            point: &point,
            contents: &contents,
            vanished_packages: shrinkage.packages.len() as u64,
            vanished_artifacts: shrinkage.artifacts.len() as u64,
            event: format!("{rows} rows at {} of {}", point.lsn, point.commit_time),
        };
        let switched = switch::switch(self.config, self.state, self.lock, &arrival).await;
        let superseded = matches!(switched, Err(PassError::State(StateError::Superseded)));
        if switched.is_err() && !superseded && !round.staged.is_empty() {
            // The visible database is still the old one: its bytes go back at once rather than at the next start.
            // Had the commit gone through with its answer lost, this session would be gone too, and with it the undoing.
            replacements::undo(self.state, self.courier).await?;
        }
        switched?;
        let dropped = switch::prune(self.config, self.state).await?;
        replacements::clear_staged(self.courier).await?;
        Ok(Copied {
            point,
            contents,
            artifacts: round,
            generation,
            vanished: shrinkage.packages.len() as u64,
            dropped,
        })
    }
}

/// One number for all sequences: whether they moved is all that is asked of it.
pub fn digest(statements: &[String]) -> String {
    let joined = statements.join("\n");
    blake2b_simd::Params::new()
        .hash_length(16)
        .hash(joined.as_bytes())
        .to_hex()
        .to_string()
}

fn scratch() -> Result<TempDir, PassError> {
    tempfile::Builder::new()
        .prefix("warm-spare-")
        .tempdir()
        .map_err(|source| PassError::Scratch {
            what: std::env::temp_dir().display().to_string(),
            source,
        })
}

const OUR_SCHEMA: &str = "
CREATE SCHEMA warm_spare;
CREATE TABLE warm_spare.recovery_point (
    lsn pg_lsn NOT NULL,
    commit_time timestamptz NOT NULL,
    system_id text NOT NULL,
    timeline int NOT NULL,
    token bigint NOT NULL);
CREATE TABLE warm_spare.unavailable (
    key text PRIMARY KEY,
    checksum text NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT now());
";
