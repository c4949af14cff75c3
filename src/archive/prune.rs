//! Removes generations that no rule keeps, and the files that no generation names any more.
//!
//! It works in two passes. The first one writes down the files of the removed generations, and
//! removes the manifests: these generations exist no more. The second one, after another generation
//! was made, removes those files that no manifest names then. So a file is never removed while a
//! generation is made that takes it over.

use super::cache::Cache;
use super::catalog::{self, Listed};
use super::error::refused;
use super::format::{Doomed, FORMAT, Manifest, Pin};
use super::keep::{Candidate, reasons};
use super::layout;
use super::place::{Place, Removed};
use super::proofs::Proofs;
use super::verify::is_good;
use super::writer::Turn;
use crate::cluster::LocalCluster;
use crate::config::{ArchivePlan, Config};
use crate::domain::ErrorCode;
use crate::killpoint;
use crate::replication::ReplicationError;
use chrono::{DateTime, Utc};
use std::collections::{BTreeSet, HashSet};
use std::path::Path;

/// Number of generations from which on a prune must not remove more than half of them.
const FEW: usize = 4;

/// The way in which a prune is done.
#[derive(Debug, Clone, Default)]
pub struct Pruning {
    pub dry_run: bool,
    /// An operator has seen that more than half of the generations go, or that the clock is far
    /// ahead of the newest generation.
    pub agreed: bool,
}

/// A generation with the reasons for which it stays. Without a reason it goes.
#[derive(Debug)]
pub struct Judged {
    pub listed: Listed,
    pub reasons: Vec<String>,
}

#[derive(Debug, Default)]
pub struct Pruned {
    pub generations: Vec<Judged>,
    /// Files that were removed: none of the generations that are left names them.
    pub removed_files: u64,
    pub removed_bytes: u64,
    /// Files that no generation names, and that go at a prune after the next generation.
    pub waiting_files: u64,
    /// Files that the place does not let go yet, because of an object lock.
    pub locked_files: u64,
    /// Generations whose manifests are locked. They exist until the lock ends.
    pub locked_generations: Vec<String>,
}

/// Returns all generations of a place with the reasons for which a prune would keep them.
pub async fn judge(
    plan: &ArchivePlan,
    data: Option<&Path>,
) -> Result<Vec<Judged>, ReplicationError> {
    let place = Place::open(plan)?;
    judge_in(plan, &place, data).await
}

async fn judge_in(
    plan: &ArchivePlan,
    place: &Place,
    data: Option<&Path>,
) -> Result<Vec<Judged>, ReplicationError> {
    let mut listed = catalog::all(place).await?;
    // A name tells when a generation was made, and not to which time it belongs.
    listed.sort_by_key(|one| std::cmp::Reverse((time_of(one), one.name.clone())));
    let proofs = Proofs::of(data, place);
    let cache = Cache::of(data, place);
    let mut candidates = Vec::new();
    let mut has_good = false;
    for one in &listed {
        let is_good = match &one.manifest {
            // The lists are read only until the newest good one is found.
            Ok(manifest) if !has_good => {
                let paths = paths_of(place, &cache, manifest).await;
                paths.is_ok_and(|paths| is_good(manifest, paths, &proofs))
            }
            _ => false,
        };
        has_good |= is_good;
        candidates.push(Candidate {
            time: time_of(one),
            pinned: one.pin.as_ref().map(|pin| pin.reason.clone()),
            is_good,
            is_unreadable: one.manifest.is_err(),
        });
    }
    let reasons = reasons(&plan.keep, &candidates);
    let judged = listed.into_iter().zip(reasons);
    Ok(judged
        .map(|(listed, reasons)| Judged { listed, reasons })
        .collect())
}

fn time_of(listed: &Listed) -> DateTime<Utc> {
    listed
        .manifest
        .as_ref()
        .map_or(DateTime::UNIX_EPOCH, |manifest| manifest.time)
}

/// Returns the paths of a generation's artifacts.
async fn paths_of(
    place: &Place,
    cache: &Cache,
    manifest: &Manifest,
) -> Result<Vec<String>, ReplicationError> {
    let mut paths = Vec::new();
    for list in &manifest.lists {
        let entries = cache.list(place, &list.file).await?;
        paths.extend(entries.into_iter().map(|entry| entry.path));
    }
    Ok(paths)
}

/// Prunes a place by its rules.
pub async fn prune(
    config: &Config,
    plan: &ArchivePlan,
    data: Option<&Path>,
    pruning: &Pruning,
) -> Result<Pruned, ReplicationError> {
    let place = Place::open(plan)?;
    if pruning.dry_run {
        let generations = judge_in(plan, &place, data).await?;
        return Ok(Pruned {
            generations,
            ..Pruned::default()
        });
    }
    let state = LocalCluster::of(config).existing_state().await?;
    let mut turn = Turn::take(config, state.as_ref(), &place).await?;
    turn.claim(config, &place, false).await?;
    let generations = judge_in(plan, &place, data).await?;
    if !pruning.agreed {
        few_enough(&place, &generations)?;
        clock_is_near(plan, &place, &generations)?;
    }
    let work = Work {
        place: &place,
        cache: Cache::of(data, &place),
        proofs: Proofs::of(data, &place),
    };
    work.prune(generations, &turn, config, state.as_ref()).await
}

struct Work<'a> {
    place: &'a Place,
    cache: Cache,
    proofs: Proofs,
}

impl Work<'_> {
    async fn prune(
        mut self,
        generations: Vec<Judged>,
        turn: &Turn,
        config: &Config,
        state: Option<&crate::cluster::StateDb>,
    ) -> Result<Pruned, ReplicationError> {
        let (left, going): (Vec<&Judged>, Vec<&Judged>) = generations
            .iter()
            .partition(|judged| !judged.reasons.is_empty());
        let needed = self.needed(&left).await?;
        // A generation whose manifest is locked still exists.
        let named: HashSet<String> = needed.union(&self.needed(&going).await?).cloned().collect();
        let found = self.place.tagged::<Doomed>(layout::DOOMED).await?;
        let (old, tag) = match found {
            Some((doomed, tag)) => (doomed, Some(tag)),
            None => (Doomed::default(), None),
        };
        let newest = generations.first().map(|judged| judged.listed.name.clone());
        let mut doomed: BTreeSet<String> = old.files.iter().cloned().collect();
        for judged in &going {
            doomed.extend(self.files_of(judged).await?);
        }
        doomed.retain(|path| !needed.contains(path));
        // A generation that was begun after the first pass has seen what is left.
        let second_pass = old.since.is_some_and(|since| {
            let manifests = left
                .iter()
                .filter_map(|judged| judged.listed.manifest.as_ref().ok());
            manifests
                .into_iter()
                .any(|manifest| manifest.started > since)
        });
        let mut pruned = Pruned::default();
        if second_pass {
            let due = old.files.iter().filter(|path| !named.contains(*path));
            for path in due {
                turn.still_ours(config, state, self.place).await?;
                self.remove(path, &mut pruned, &mut doomed).await?;
            }
        }
        pruned.waiting_files = doomed.len() as u64 - pruned.locked_files;
        let next = Doomed {
            format: FORMAT,
            since: match going.is_empty() && !second_pass {
                true => old.since,
                false => (!doomed.is_empty()).then(Utc::now),
            },
            newest: newest.unwrap_or_default(),
            files: doomed.into_iter().collect(),
        };
        if next != old
            && (tag.is_some() || !next.files.is_empty())
            && !self
                .place
                .overwrite(layout::DOOMED, &next, tag.as_ref())
                .await?
        {
            return Err(super::error::damaged(
                self.place.name(),
                layout::DOOMED,
                "another process has written it at the same time",
            ));
        }
        killpoint::reach("prune.marked");
        for judged in &going {
            turn.still_ours(config, state, self.place).await?;
            let manifest = layout::manifest(&judged.listed.name);
            match self.place.remove(&manifest).await? {
                Removed::Gone => drop(self.place.remove(&layout::pin(&judged.listed.name)).await?),
                Removed::Locked => pruned.locked_generations.push(judged.listed.name.clone()),
            }
            killpoint::reach("prune.manifest");
        }
        self.proofs.save(self.place)?;
        pruned.generations = generations;
        Ok(pruned)
    }

    /// Removes one file that no generation names.
    async fn remove(
        &mut self,
        path: &str,
        pruned: &mut Pruned,
        doomed: &mut BTreeSet<String>,
    ) -> Result<(), ReplicationError> {
        let bytes = self.place.length(path).await?;
        match self.place.remove(path).await? {
            Removed::Gone => {
                doomed.remove(path);
                self.proofs.forget(path);
                if let Some(bytes) = bytes {
                    pruned.removed_files += 1;
                    pruned.removed_bytes += bytes;
                }
            }
            Removed::Locked => pruned.locked_files += 1,
        }
        killpoint::reach("prune.file");
        Ok(())
    }

    /// Returns every file that these generations name. A generation that cannot be read may name any
    /// file, so it ends the prune.
    async fn needed(&self, left: &[&Judged]) -> Result<HashSet<String>, ReplicationError> {
        let mut needed = HashSet::new();
        for judged in left {
            needed.extend(self.files_of(judged).await?);
        }
        Ok(needed)
    }

    async fn files_of(&self, judged: &Judged) -> Result<Vec<String>, ReplicationError> {
        let manifest = match &judged.listed.manifest {
            Ok(manifest) => manifest,
            Err(error) => {
                return Err(refused(
                    ErrorCode::ArchiveDamaged,
                    format!(
                        "archive {}: the manifest of generation {} cannot be read, so nobody knows which files it needs, and nothing is removed: {error}",
                        self.place.name(),
                        judged.listed.name
                    ),
                    format!(
                        "bring that file back from another copy, or, if the generation is lost, remove {} by hand",
                        layout::manifest(&judged.listed.name)
                    ),
                ));
            }
        };
        let mut files = paths_of(self.place, &self.cache, manifest).await?;
        files.extend(manifest.files().map(|file| file.path.clone()));
        Ok(files)
    }
}

/// Refuses a prune that would remove more than half of the generations.
fn few_enough(place: &Place, generations: &[Judged]) -> Result<(), ReplicationError> {
    let all = generations.len();
    let going = generations
        .iter()
        .filter(|judged| judged.reasons.is_empty())
        .count();
    if all < FEW || going * 2 <= all {
        return Ok(());
    }
    Err(refused(
        ErrorCode::Fuse,
        format!(
            "this prune would remove {going} of {all} generations of archive {}, more than half",
            place.name()
        ),
        "look at `warm-spare archive prune --dry-run`; if that is what you want, run it with --agree".into(),
    ))
}

/// Refuses a prune if nothing was archived for more than two intervals of the schedule: the clock is
/// wrong, or the archive stands still.
fn clock_is_near(
    plan: &ArchivePlan,
    place: &Place,
    generations: &[Judged],
) -> Result<(), ReplicationError> {
    let manifests = generations
        .iter()
        .filter_map(|judged| judged.listed.manifest.as_ref().ok());
    let newest = manifests.map(|manifest| manifest.finished).max();
    let (Some(schedule), Some(newest)) = (&plan.schedule, newest) else {
        return Ok(());
    };
    let age = (Utc::now() - newest).to_std().unwrap_or_default();
    if age <= schedule.longest_pause() * 2 {
        return Ok(());
    }
    Err(refused(
        ErrorCode::Clocks,
        format!(
            "the newest generation of archive {} was made at {}, more than two intervals of its schedule before this machine's clock",
            place.name(),
            newest.format("%Y-%m-%d %H:%M:%S UTC")
        ),
        "find out why no generation is made, and check the clock; to prune all the same, run it with --agree".into(),
    ))
}

/// Pins a generation, so that no prune removes it, or takes the pin away.
pub async fn pin(
    plan: &ArchivePlan,
    name: &str,
    reason: Option<&str>,
) -> Result<(), ReplicationError> {
    let place = Place::open(plan)?;
    catalog::manifest(&place, name).await?;
    let path = layout::pin(name);
    let Some(reason) = reason else {
        return place.remove(&path).await.map(drop);
    };
    let pin = Pin {
        format: FORMAT,
        reason: reason.to_string(),
        since: Utc::now(),
    };
    let tag = place.tagged::<Pin>(&path).await?.map(|(_, tag)| tag);
    match place.overwrite(&path, &pin, tag.as_ref()).await? {
        true => Ok(()),
        false => Err(super::error::damaged(
            place.name(),
            &path,
            "another process pins it at the same time",
        )),
    }
}
