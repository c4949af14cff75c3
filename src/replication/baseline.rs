//! A full copy at one snapshot: schema, rows, indexes, the artifacts that its rows name; then the switch.
//!
//! Until the switch the visible database stands whole; after it the new one does. What survives a crash in between is
//! the artifacts.

use super::artifacts::Round;
use super::checks::Facts;
use super::content::ContentHash;
use super::error::PassError;
use super::fuse::Shrinkage;
use super::gate::{Gated, Work};
use super::inventory::UNSOUND;
use super::switch::{self, Arrival, Properties};
use super::{guard, replacements, tables};
use crate::cluster::{
    CopiedPoint, LocalSession, PeerSession, Snapshot, StateError, quote_ident, set_fence,
};
use crate::observe::Phase;
use std::collections::{BTreeMap, HashSet};
use tempfile::TempDir;

/// One baseline: what it works with, and what it knows of the database that it is to replace.
pub struct Baseline<'a> {
    pub work: &'a Work<'a>,
    pub facts: &'a Facts,
    pub visible_rows: u64,
    /// Keys that are recorded as unavailable in it.
    pub known_unavailable: HashSet<String>,
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
        let incoming = incoming_name(self.work.config);
        let copied = self.fill_and_switch(&incoming).await;
        if copied.is_err() {
            // Best effort: the next pass drops it anyway, but its disk space is wanted now.
            let _ = switch::drop_database(self.work.state.session(), &incoming).await;
        }
        copied
    }

    async fn fill_and_switch(&self, incoming: &str) -> Result<Copied, PassError> {
        let visible = &self.work.config.local.datastore.database;
        let properties = switch::properties(self.work.state.session(), visible, incoming).await?;
        let owner = properties
            .owner
            .clone()
            .filter(|name| *name != self.work.config.local.datastore.user);
        self.create(incoming, owner.as_deref()).await?;
        let scratch = scratch()?;
        let archive = scratch.path().join("schema.dump");
        let copying = self.copy_rows(incoming, owner.as_deref(), &archive);
        let (point, contents, sequences) =
            guard::guarded(&self.work.config.peer.datastore, copying).await?;

        self.work.progress.begin(Phase::Indexes, 0);
        let target = &self.work.config.local.datastore;
        let jobs = self.work.config.replication.jobs;
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

        let (gated, shrinkage, unsound) = self.remaining_artifacts(&inside).await?;
        let round = gated.round;
        self.record_inside(&inside, &point, &round, &unsound)
            .await?;
        drop(inside);
        self.work.judge(shrinkage.clone()).await?;
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
            .work
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
        let (peer, local) = (
            &self.work.config.peer.datastore,
            &self.work.config.local.datastore,
        );
        self.work.progress.begin(Phase::Snapshot, 0);
        let holder = PeerSession::open(peer).await?;
        let snapshot = holder.export_snapshot().await?;
        let mut point = self.point(&holder).await?;
        let tables = tables::peer_tables(&holder).await?;

        self.work.progress.begin(Phase::Schema, 0);
        self.dump_and_restore(&snapshot, incoming, owner, archive)
            .await?;

        let bytes: i64 = tables.iter().map(|t| t.bytes).sum();
        let step = self.work.progress.begin(Phase::Tables, bytes.max(0) as u64);
        let throttle = &self.work.courier.throttle;
        let contents = tables::copy_all(
            self.work.config,
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
        let (peer, local) = (
            &self.work.config.peer.datastore,
            &self.work.config.local.datastore,
        );
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
    ) -> Result<(Gated, Shrinkage, Vec<String>), PassError> {
        let inventory = self.work.inventory;
        let loaded = inventory.load_wanted_from(inside).await?;
        let gated = self
            .work
            .gate(&self.known_unavailable, Phase::RemainingArtifacts)
            .await?;
        let shrinkage = Shrinkage {
            packages: inventory.vanishing().await?,
            packages_before: self.visible_rows,
            artifacts: gated.newly.clone(),
            artifacts_before: inventory.wanted().await?,
            ..Shrinkage::default()
        };
        for name in &loaded.unsound {
            log::warn!(
                "peer: package {name} names no possible artifact (ident, target or checksum); its row is copied as it is"
            );
        }
        Ok((gated, shrinkage, loaded.unsound))
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
                    &self.work.lock.token,
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
        let session = self.work.state.session();
        switch::apply(session, properties).await?;
        set_fence(session, incoming).await?;
        let step = self
            .work
            .progress
            .begin(Phase::Replacements, round.staged.len() as u64);
        if !round.staged.is_empty() {
            replacements::carry_out(&round.staged, self.work.state, self.work.courier, &step)
                .await?;
        }
        self.work.progress.begin(Phase::Switch, 0);
        let generation = self.facts.visible.then(|| {
            let visible = &self.work.config.local.datastore.database;
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
        let switched =
            switch::switch(self.work.config, self.work.state, self.work.lock, &arrival).await;
        let superseded = matches!(switched, Err(PassError::State(StateError::Superseded)));
        if switched.is_err() && !superseded && !round.staged.is_empty() {
            // The visible database is still the old one: its bytes go back at once rather than at the next start.
            // Had the commit gone through with its answer lost, this session would be gone too, and with it the undoing.
            replacements::undo(self.work.state, self.work.courier).await?;
        }
        switched?;
        let dropped = switch::prune(self.work.config, self.work.state).await?;
        replacements::clear_staged(self.work.courier).await?;
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

/// What is being filled; nobody but us ever sees it under this name.
pub fn incoming_name(config: &crate::config::Config) -> String {
    format!("{}_incoming", config.local.datastore.database)
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
