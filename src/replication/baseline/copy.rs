//! Makes a full copy at one snapshot: schema, rows, indexes, and the artifacts that its rows name;
//! then the switch.
//!
//! Until the switch the visible database stays complete; after it the new one is. Only the
//! artifacts survive a crash in between.

use super::catch_up::BeginningSlot;
use super::checks::Facts;
use super::content_hash::ContentHash;
use super::continuation::Continuation;
use super::gate::{Gated, Work, record_unavailable};
use super::sequences::{self, Sequence};
use super::switch::{self, Arrival};
use super::{lock_watchdog, tables};
use crate::cluster::{CopiedPoint, LocalSession, PeerSession, Snapshot, StateError, set_fence};
use crate::domain::Side;
use crate::killpoint;
use crate::observe::Phase;
use crate::replication::artifact::inventory::UNSOUND;
use crate::replication::artifact::replacements;
use crate::replication::artifact::round::Round;
use crate::replication::baseline::incoming::Incoming;
use crate::replication::error::PassError;
use crate::replication::fuse::Shrinkage;
use crate::replication::names::beside;
use crate::replication::stream;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

/// A baseline: its tools, and the facts about the database that it will replace.
pub(crate) struct Baseline<'a> {
    pub work: &'a Work<'a>,
    pub facts: &'a Facts,
    pub visible_rows: u64,
    /// Bytes (key and checksum) that are recorded as unavailable in the visible database.
    pub known_unavailable: HashSet<(String, String)>,
    pub continuation: Continuation,
    /// True: our permanent slot exists, and is useful only for this copy.
    pub kept: AtomicBool,
    /// Directory for the part of the stream that does not fit into memory.
    pub spool: Arc<Path>,
}

/// The result of a finished baseline.
#[derive(Debug)]
pub struct Copied {
    pub point: CopiedPoint,
    pub rows: u64,
    pub tables: u64,
    pub artifacts: Round,
    pub generation: Option<String>,
    pub vanished: u64,
    pub dropped: Vec<String>,
}

impl Baseline<'_> {
    pub(crate) async fn run(&self, incoming: Incoming) -> Result<Copied, PassError> {
        let copied = Box::pin(self.fill_and_switch(&incoming)).await;
        if copied.is_err() {
            incoming.give_up(self.work).await;
            self.give_up_slot().await;
        }
        copied
    }

    async fn fill_and_switch(&self, incoming: &Incoming) -> Result<Copied, PassError> {
        let (name, owner) = (incoming.name.as_str(), incoming.owner.as_deref());
        let scratch = scratch()?;
        let archive = scratch.path().join("schema.dump");
        let peer = &self.work.config.peer.datastore;
        // This comes before anything on the primary is begun that would have to be undone.
        let clients = &self.facts.clients;
        clients.try_out(Side::Peer, peer, &peer.database).await?;
        let mut slot = self.begin_slot().await?;
        let copying = self.copy_rows(name, owner, &archive, slot.as_ref());
        let Rows {
            mut point,
            mut contents,
            files,
            sequences: values,
        } = Box::pin(lock_watchdog::guarded(peer, copying)).await?;
        if let Some(slot) = &mut slot {
            slot.let_snapshot_go().await?;
        }
        killpoint::reach("baseline.tables");

        self.work.progress.begin(Phase::Indexes, 0);
        let target = &self.work.config.local.datastore;
        let jobs = self.work.config.replication.jobs;
        self.facts
            .clients
            .restore(target, name, "post-data", &archive, jobs, owner)
            .await?;
        let inside = LocalSession::open(target, name).await?;
        sequences::set_in_copy(&inside, &values).await?;
        inside.long("collecting statistics", "ANALYZE").await?;

        let (rows, number) = (
            contents.values().map(ContentHash::rows).sum(),
            contents.len() as u64,
        );
        let (mut gated, mut shrinkage, unsound) = self.remaining_artifacts(&inside).await?;
        self.record_inside(&inside, &point, &gated.round, &unsound)
            .await?;
        if let Some(slot) = &mut slot {
            let caught = self.catch_up(slot, name, &mut point).await?;
            self.absorb(caught, &inside, &mut gated.round, &mut shrinkage)
                .await?;
            // These are hashes of the rows at the snapshot, and are useless now.
            contents.clear();
        }
        let approved = self.work.judge(shrinkage.clone(), &inside).await?;
        drop(inside);
        let filled = Filled {
            rows,
            tables: number,
            point,
            contents,
            files,
            round: gated.round,
            shrinkage,
            approved,
        };
        self.finish(incoming, filled).await
    }

    /// Copies from the exported snapshot to the last row. Only in this function are there
    /// transactions of ours on the primary.
    async fn copy_rows(
        &self,
        incoming: &str,
        owner: Option<&str>,
        archive: &Path,
        slot: Option<&BeginningSlot>,
    ) -> Result<Rows, PassError> {
        let (peer, local) = (
            &self.work.config.peer.datastore,
            &self.work.config.local.datastore,
        );
        self.work.progress.begin(Phase::Snapshot, 0);
        let holder = PeerSession::open(peer).await?;
        // The position is read before the snapshot: the snapshot may see later transactions, and
        // never fewer.
        let before = wal_position(&holder).await?;
        let snapshot = match slot {
            Some(slot) => {
                holder.adopt(slot.snapshot()).await?;
                slot.snapshot().clone()
            }
            None => holder.export_snapshot().await?,
        };
        killpoint::reach("baseline.snapshot");
        let mut point = self.point(&holder, before).await?;
        self.continuation.still_holds(&point)?;
        if let Some(slot) = slot {
            point.lsn = slot.from().to_string();
            point.slot = slot.name().to_string();
            point.schema = stream::fingerprint(&holder, slot.publication()).await?;
        }
        let names = sequences::sequence_names(&holder).await?;
        let tables = tables::tables(&holder).await?;

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
        // The sequences are read after the rows, in a transaction of their own: so they are never
        // behind the rows.
        let reader = PeerSession::open(peer).await?;
        let values = sequences::read_sequences(&reader, names).await?;
        point.sequences = sequences::digest(&values);
        log::debug!(
            "{} tables copied into {incoming} on {}:{}",
            tables.len(),
            local.host,
            local.port
        );
        Ok(Rows {
            point,
            contents,
            files: tables.iter().map(|t| (t.full_name(), t.file)).collect(),
            sequences: values,
        })
    }

    async fn dump_and_restore(
        &self,
        snapshot: &Snapshot,
        incoming: &str,
        owner: Option<&str>,
        archive: &Path,
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

    /// Returns the point of the snapshot, in the primary's own terms and by its clock.
    async fn point(&self, holder: &PeerSession, lsn: String) -> Result<CopiedPoint, PassError> {
        let sql = "SELECT now(), txid_current_snapshot()::text, pg_postmaster_start_time()::text";
        let row = holder
            .row("reading the snapshot's position", sql, &[])
            .await?;
        Ok(CopiedPoint {
            lsn,
            commit_time: row.get(0)?,
            system_id: self.facts.system_id.clone(),
            timeline: self.facts.timeline,
            transactions: row.get(1)?,
            server_started: row.get(2)?,
            sequences: String::new(),
            schema: String::new(),
            slot: String::new(),
            peer_cluster: self.facts.peer_cluster.clone(),
        })
    }

    /// Copies artifacts until every row of the incoming database has its artifact, or it is
    /// recorded that the primary does not have it.
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

    /// Writes, into our schema inside the incoming database, the records that must share the fate
    /// of its rows.
    async fn record_inside(
        &self,
        inside: &LocalSession,
        point: &CopiedPoint,
        round: &Round,
        unsound: &[String],
    ) -> Result<(), PassError> {
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
        record_unavailable(inside, round).await
    }

    async fn finish(&self, incoming: &Incoming, filled: Filled) -> Result<Copied, PassError> {
        let Work {
            config,
            state,
            courier,
            ..
        } = self.work;
        switch::apply(state.session(), &incoming.properties).await?;
        set_fence(state.session(), &incoming.name).await?;
        let staged = &filled.round.staged;
        let step = self
            .work
            .progress
            .begin(Phase::Replacements, staged.len() as u64);
        if !staged.is_empty() {
            let owner = (*state, self.work.lock);
            replacements::carry_out(staged, owner, courier, None, Some(&step)).await?;
        }
        // Recorded although the switch may not be committed: an artifact that a row still names is
        // not deleted.
        state.retire_vanished().await?;
        self.work.progress.begin(Phase::Switch, 0);
        let generation = self.facts.visible.then(|| {
            let visible = &config.local.datastore.database;
            let now = chrono::Utc::now().format("_%Y%m%dt%H%M%S%3fz");
            beside(visible, &now.to_string())
        });
        let vanished = filled.shrinkage.packages.len() as u64;
        let rows = filled.rows;
        let arrival = Arrival {
            incoming: &incoming.name,
            generation: generation.clone(),
            point: &filled.point,
            line: &self.facts.line,
            contents: &filled.contents,
            files: &filled.files,
            vanished_packages: &filled.shrinkage.packages,
            vanished_artifacts: &filled.shrinkage.artifacts,
            approved: filled.approved,
            unproven: self.continuation.unproven,
            event: format!(
                "{rows} rows at {} of {}",
                filled.point.lsn, filled.point.commit_time
            ),
        };
        let switched = switch::switch(config, state, self.work.lock, &arrival).await;
        let superseded = matches!(switched, Err(PassError::State(StateError::Superseded)));
        if switched.is_err() && !superseded && !staged.is_empty() {
            // The visible database is still the old one, so its bytes are restored at once rather
            // than at the next start. If the commit had succeeded with its answer lost, this
            // session would be gone too, and the restoring would fail.
            replacements::undo((state, self.work.lock), courier, None).await?;
        }
        switched?;
        Ok(Copied {
            dropped: self.tidy().await,
            rows: filled.rows,
            point: filled.point,
            tables: filled.tables,
            artifacts: filled.round,
            generation,
            vanished,
        })
    }

    /// Cleans up. The spare is at the new point; leftovers are logged, and removed by the next run.
    async fn tidy(&self) -> Vec<String> {
        let told = |error: &PassError| log::warn!("{error}; the copy itself is complete");
        let dropped = switch::prune(self.work.config, self.work.state).await;
        if let Err(error) = &dropped {
            told(error);
        }
        let owner = (self.work.state, self.work.lock);
        if let Err(error) = replacements::clear_all_staged(owner, self.work.courier).await {
            told(&error);
        }
        dropped.unwrap_or_default()
    }
}

async fn wal_position(session: &PeerSession) -> Result<String, PassError> {
    let sql = "SELECT pg_current_wal_lsn()::text";
    let row = session
        .row("asking for the end of its log", sql, &[])
        .await?;
    Ok(row.get(0)?)
}

/// The result of copying at the snapshot.
struct Rows {
    point: CopiedPoint,
    contents: BTreeMap<String, ContentHash>,
    /// The primary's file of each table.
    files: BTreeMap<String, i64>,
    sequences: Vec<Sequence>,
}

/// A database that is ready to become the visible one.
struct Filled {
    /// Number of rows copied from the snapshot.
    rows: u64,
    tables: u64,
    point: CopiedPoint,
    contents: BTreeMap<String, ContentHash>,
    files: BTreeMap<String, i64>,
    round: Round,
    shrinkage: Shrinkage,
    approved: bool,
}

pub(in crate::replication) fn scratch() -> Result<TempDir, PassError> {
    tempfile::Builder::new()
        .prefix("warm-spare-")
        .tempdir()
        .map_err(|source| PassError::Scratch {
            what: std::env::temp_dir().display().to_string(),
            source,
        })
}

pub(in crate::replication) const OUR_SCHEMA: &str = "
CREATE SCHEMA warm_spare;
CREATE TABLE warm_spare.recovery_point (
    lsn pg_lsn NOT NULL,
    commit_time timestamptz NOT NULL,
    system_id text NOT NULL,
    timeline int NOT NULL,
    token bigint NOT NULL,
    mark pg_lsn);
CREATE TABLE warm_spare.unavailable (
    key text PRIMARY KEY,
    checksum text NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT now());
";
