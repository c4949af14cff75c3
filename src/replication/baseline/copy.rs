//! Makes a full copy at one snapshot: schema, rows, indexes, and the artifacts that its rows name;
//! then the switch.
//!
//! Until the switch the visible database stays complete; after it the new one is. Only the
//! artifacts survive a crash in between.

use super::catch_up::BeginningSlot;
use super::checks::Facts;
use super::content_hash::ContentHash;
use super::continuation::Continuation;
use super::gate::{Gated, SyncContext, record_unavailable};
use super::sequences;
use super::switch::{self, Arrival};
use super::{lock_watchdog, tables};
use crate::cluster::{
    LocalCluster, PeerCluster, ReadSession, RecoveryPoint, Sequence, Snapshot, SpareDb, StateError,
    StreamSource, WriteSession, set_fence,
};
use crate::domain::{MissingReason, Side};
use crate::killpoint;
use crate::observe::Phase;
use crate::replication::artifact::replacements;
use crate::replication::artifact::round::Round;
use crate::replication::baseline::incoming::Incoming;
use crate::replication::error::ReplicationError;
use crate::replication::fuse::Shrinkage;
use crate::replication::names::replaced_name;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

/// A baseline: its tools, and the facts about the database that it will replace.
pub(crate) struct Baseline<'a> {
    pub work: &'a SyncContext<'a>,
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
    pub point: RecoveryPoint,
    pub rows: u64,
    pub tables: u64,
    pub artifacts: Round,
    pub generation: Option<String>,
    pub vanished: u64,
    pub dropped: Vec<String>,
}

impl Baseline<'_> {
    pub(crate) async fn run(&self, incoming: Incoming) -> Result<Copied, ReplicationError> {
        let copied = Box::pin(self.fill_and_switch(&incoming)).await;
        if copied.is_err() {
            incoming.give_up(self.work).await;
            self.give_up_slot().await;
        }
        copied
    }

    async fn fill_and_switch(&self, incoming: &Incoming) -> Result<Copied, ReplicationError> {
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
        } = Box::pin(lock_watchdog::with_lock_watchdog(
            PeerCluster::of(self.work.config),
            copying,
        ))
        .await?;
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
        let inside = LocalCluster::of(self.work.config).database(name).await?;
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
    ) -> Result<Rows, ReplicationError> {
        let local = &self.work.config.local.datastore;
        self.work.progress.begin(Phase::Snapshot, 0);
        let holder = PeerCluster::of(self.work.config).builder().await?;
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
            point.stream = Some(StreamSource {
                slot: slot.name().to_string(),
                schema: holder.fingerprint(slot.publication()).await?,
            });
        }
        let names = holder.sequence_names().await?;
        let tables = holder.tables().await?;

        self.work.progress.begin(Phase::Schema, 0);
        self.dump_and_restore(&snapshot, incoming, owner, archive)
            .await?;

        let bytes: i64 = tables.iter().map(|t| t.bytes).sum();
        let step = self.work.progress.begin(Phase::Tables, bytes.max(0) as u64);
        let throttle = self.work.carrier.throttle();
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
            return Err(ReplicationError::Rewritten {
                tables: rewritten.join(", "),
            });
        }
        holder.end().await?;
        // The sequences are read after the rows, in a transaction of their own: so they are never
        // behind the rows.
        let reader = PeerCluster::of(self.work.config).builder().await?;
        let values = sequences::sequence_values(&reader, names).await?;
        point.sequences = Sequence::digest(&values);
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
    ) -> Result<(), ReplicationError> {
        let local = &self.work.config.local.datastore;
        let clients = &self.facts.clients;
        clients
            .dump_schema(&self.work.config.peer.datastore, snapshot.as_str(), archive)
            .await?;
        Ok(clients
            .restore(local, incoming, "pre-data", archive, 1, owner)
            .await?)
    }

    /// Returns the point of the snapshot, in the primary's own terms and by its clock.
    async fn point(
        &self,
        holder: &ReadSession,
        lsn: String,
    ) -> Result<RecoveryPoint, ReplicationError> {
        let doing = "reading the snapshot's position";
        let state = holder.server_state(doing).await?;
        Ok(RecoveryPoint {
            lsn,
            commit_time: state.time,
            system_id: self.facts.system_id.clone(),
            timeline: self.facts.timeline,
            transactions: state.transactions,
            server_started: state.started,
            sequences: String::new(),
            stream: None,
            peer_cluster: self.facts.peer_cluster.clone(),
        })
    }

    /// Copies artifacts until every row of the incoming database has its artifact, or it is
    /// recorded that the primary does not have it.
    async fn remaining_artifacts(
        &self,
        inside: &WriteSession,
    ) -> Result<(Gated, Shrinkage, Vec<String>), ReplicationError> {
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
        inside: &WriteSession,
        point: &RecoveryPoint,
        round: &Round,
        unsound: &[String],
    ) -> Result<(), ReplicationError> {
        let spare = SpareDb::of(inside);
        spare.record_point(point, self.work.lock.token).await?;
        for name in unsound {
            spare
                .record_unavailable(name, &"", MissingReason::Unsound)
                .await?;
        }
        record_unavailable(inside, round).await
    }

    async fn finish(
        &self,
        incoming: &Incoming,
        filled: Filled,
    ) -> Result<Copied, ReplicationError> {
        let SyncContext {
            config,
            state,
            carrier,
            ..
        } = self.work;
        state
            .session()
            .give_properties(&incoming.properties)
            .await?;
        set_fence(state.session(), &incoming.name).await?;
        let staged = &filled.round.staged;
        let step = self
            .work
            .progress
            .begin(Phase::Replacements, staged.len() as u64);
        let courier = carrier.courier();
        if let Some(courier) = courier.filter(|_| !staged.is_empty()) {
            let owner = (*state, self.work.lock);
            replacements::carry_out(staged, owner, courier, None, Some(&step)).await?;
        }
        // Recorded although the switch may not be committed: an artifact that a row still names is
        // not deleted.
        if courier.is_some() {
            state.retire_vanished().await?;
        }
        self.work.progress.begin(Phase::Switch, 0);
        let generation = self
            .facts
            .visible
            .then(|| replaced_name(&config.local.datastore.database));
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
        let superseded = matches!(
            switched,
            Err(ReplicationError::State(StateError::Superseded))
        );
        if let Some(courier) = courier
            && switched.is_err()
            && !superseded
            && !staged.is_empty()
        {
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
        let told = |error: &ReplicationError| log::warn!("{error}; the copy itself is complete");
        let dropped = switch::prune(self.work.config, self.work.state).await;
        if let Err(error) = &dropped {
            told(error);
        }
        let owner = (self.work.state, self.work.lock);
        if let Some(courier) = self.work.carrier.courier()
            && let Err(error) = replacements::clear_all_staged(owner, courier).await
        {
            told(&error);
        }
        dropped.unwrap_or_default()
    }
}

async fn wal_position(session: &ReadSession) -> Result<String, ReplicationError> {
    let state = session
        .server_state("asking for the end of its log")
        .await?;
    let wal = state.wal.ok_or_else(ReplicationError::standby)?;
    Ok(wal.to_string())
}

/// The result of copying at the snapshot.
struct Rows {
    point: RecoveryPoint,
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
    point: RecoveryPoint,
    contents: BTreeMap<String, ContentHash>,
    files: BTreeMap<String, i64>,
    round: Round,
    shrinkage: Shrinkage,
    approved: bool,
}

pub(crate) fn scratch() -> Result<TempDir, ReplicationError> {
    tempfile::Builder::new()
        .prefix("warm-spare-")
        .tempdir()
        .map_err(|source| ReplicationError::Scratch {
            what: std::env::temp_dir().display().to_string(),
            source,
        })
}
