//! Makes a generation: the database at one snapshot, then the artifacts that its rows name, then the
//! lists of them, then the manifest. Nothing counts before the manifest is there.
//!
//! The snapshot is held while the rows are read, and not while artifacts are copied. On a spare no
//! artifact is deleted in the meantime (`StateDb::keep_all_artifacts`), so every row of the snapshot
//! has its bytes until the end: under its key, or, if a package was uploaded again with other bytes,
//! among the retired ones.

mod artifacts;
mod shards;
mod snapshot;

use super::cache::Cache;
use super::catalog::{self, Names};
use super::error::damaged;
use super::format::{FORMAT, File, ListFile, Manifest, write};
use super::layout;
use super::place::{Place, Stored};
use super::writer::Turn;
use crate::cluster::{LocalCluster, StateDb};
use crate::config::{ArchivePlan, ArtifactsMode, Config};
use crate::domain::{ErrorCode, Role};
use crate::killpoint;
use crate::observe::{Phase, Progress};
use crate::replication::ReplicationError;
use chrono::{DateTime, Utc};
use shards::Listing;
use snapshot::Dumped;
use std::collections::HashSet;
use std::path::Path;

/// The way in which a generation is made.
#[derive(Debug, Clone, Default)]
pub struct Making {
    /// An operator says that this cluster writes into the place from now on.
    pub take_over: bool,
}

/// A generation that was made.
#[derive(Debug)]
pub struct Made {
    pub manifest: Manifest,
    /// False: nothing was committed since the generation before, whose dump is named again.
    pub new_dump: bool,
    /// Artifacts that the archive did not have before, and their bytes.
    pub new_artifacts: u64,
    pub new_bytes: u64,
    /// Number of files of unfinished generations that were removed.
    pub removed: usize,
}

/// Makes a generation of the local cluster in one place. `data`: the data directory of the service.
pub async fn create(
    config: &Config,
    plan: &ArchivePlan,
    data: Option<&Path>,
    making: &Making,
    progress: &Progress,
) -> Result<Made, ReplicationError> {
    let started = Utc::now();
    let step = progress.begin(Phase::Checks, 0);
    let place = Place::open(plan)?;
    let state = LocalCluster::of(config).existing_state().await?;
    let mut turn = Turn::take(config, state.as_ref(), &place).await?;
    turn.claim(config, &place, making.take_over).await?;
    place.clear_unfinished().await?;
    let names = catalog::names(&place).await?;
    let removed = remove_unfinished(&place, &names).await?;
    let before = catalog::newest(&place, &names).await?;
    if let Some(before) = &before {
        turn.identity.continues(place.name(), &before.lineage)?;
    }
    if let Some(state) = &state {
        state.keep_all_artifacts().await?;
    }
    drop(step);
    let work = Work {
        config,
        place: &place,
        state: state.as_ref(),
        turn: &turn,
        cache: Cache::of(data, &place),
        name: layout::new_generation(started),
        before,
        // Bytes of a killed process may be there already.
        resumes: removed > 0,
    };
    let made = Box::pin(work.make(started, progress)).await?;
    Ok(Made { removed, ..made })
}

/// Removes the files in folders of generations without a manifest, if no generation names them. This
/// process is the only writer, so nobody makes these generations any more.
async fn remove_unfinished(place: &Place, names: &Names) -> Result<usize, ReplicationError> {
    if names.unfinished.is_empty() {
        return Ok(0);
    }
    // A dump outlives its generation while a later one names it.
    let mut needed = HashSet::new();
    for name in &names.whole {
        match catalog::manifest(place, name).await {
            Ok(manifest) => needed.extend(manifest.files().map(|file| file.path.clone())),
            Err(error) if error.code() == ErrorCode::ArchiveUnreachable => return Err(error),
            Err(error) => {
                log::warn!("{error}; files of unfinished generations are left until it is mended");
                return Ok(0);
            }
        }
    }
    let unneeded = names
        .unfinished
        .iter()
        .filter(|path| !needed.contains(*path));
    let mut removed = 0;
    for path in unneeded {
        log::info!(
            "archive {}: {path} belongs to no generation, and is removed",
            place.name()
        );
        place.remove(path).await?;
        removed += 1;
    }
    Ok(removed)
}

struct Work<'a> {
    config: &'a Config,
    place: &'a Place,
    state: Option<&'a StateDb>,
    turn: &'a Turn,
    cache: Cache,
    name: String,
    /// The newest generation.
    before: Option<Manifest>,
    resumes: bool,
}

impl Work<'_> {
    async fn make(
        &self,
        started: DateTime<Utc>,
        progress: &Progress,
    ) -> Result<Made, ReplicationError> {
        let dumped = self.dump(progress).await?;
        killpoint::reach("archive.dumped");
        let copied = self.copy_artifacts(&dumped, progress).await?;
        killpoint::reach("archive.artifacts");
        let listing = self.write_lists(copied).await?;
        killpoint::reach("archive.lists");
        let (new_dump, new_artifacts, new_bytes) =
            (dumped.is_new, listing.new_artifacts, listing.new_bytes);
        let manifest = self.manifest(started, dumped, listing);
        self.may_finish().await?;
        self.publish(&manifest).await?;
        killpoint::reach("archive.published");
        self.look_again(&manifest).await?;
        let lists = manifest.lists.iter().map(|list| list.file.sha256.as_str());
        self.cache.keep_only(&lists.collect());
        Ok(Made {
            manifest,
            new_dump,
            new_artifacts,
            new_bytes,
            removed: 0,
        })
    }

    /// Checks that nothing has happened that would make the generation wrong.
    async fn may_finish(&self) -> Result<(), ReplicationError> {
        if let Some(state) = self.state {
            // If this session has ended, artifacts may have been deleted.
            state
                .session()
                .wait_until_idle("keeping the artifacts for the archive")
                .await?;
        }
        self.turn
            .still_ours(self.config, self.state, self.place)
            .await
    }

    fn manifest(&self, started: DateTime<Utc>, dumped: Dumped, listing: Listing) -> Manifest {
        let identity = &self.turn.identity;
        let replicated = self.config.artifacts.mode == ArtifactsMode::Replicate;
        let sum = |of: fn(&ListFile) -> u64| listing.lists.iter().map(of).sum();
        let mut absent = dumped.absent;
        absent.sort();
        Manifest {
            format: FORMAT,
            name: self.name.clone(),
            made_by: super::made_by(),
            started,
            finished: Utc::now(),
            time: dumped
                .point
                .as_ref()
                .map_or(dumped.clock, |point| point.commit_time),
            joint: replicated && identity.role == Some(Role::Spare) && dumped.point.is_some(),
            point: dumped.point,
            source: dumped.source,
            lineage: identity.lineage.clone(),
            dump: dumped.file,
            packages: dumped.packages,
            artifacts: sum(|list| list.artifacts),
            artifact_bytes: sum(|list| list.artifact_bytes),
            lists: listing.lists,
            absent,
            gone_meanwhile: listing.gone,
            builder_keys: dumped.builder_keys,
        }
    }

    /// Stores the manifest: from now on the generation exists.
    async fn publish(&self, manifest: &Manifest) -> Result<(), ReplicationError> {
        let (path, text) = (layout::manifest(&self.name), write(manifest));
        if self.place.put(&path, text.clone()).await? == Stored::Occupied
            && self.place.document(&path).await?.as_ref() != Some(&text)
        {
            let text = "another process has written it at the same time";
            return Err(damaged(self.place.name(), &path, text));
        }
        Ok(())
    }

    /// Looks once more for the files that this run wrote or took over from the generation before.
    async fn look_again(&self, manifest: &Manifest) -> Result<(), ReplicationError> {
        let known = self.before.iter().flat_map(Manifest::files);
        let known: HashSet<&File> = known.collect();
        let new = manifest.lists.iter().map(|list| &list.file);
        let new = new.filter(|file| !known.contains(file));
        for file in new.chain([&manifest.dump]) {
            let found = self.place.length(&file.path).await?;
            if found != Some(file.bytes) {
                self.place.remove(&layout::manifest(&self.name)).await?;
                let text = format!(
                    "expected {} bytes, found {found:?}; the generation was taken back",
                    file.bytes
                );
                return Err(damaged(self.place.name(), &file.path, &text));
            }
        }
        Ok(())
    }
}
