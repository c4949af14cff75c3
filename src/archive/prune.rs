//! Removes generations that no rule keeps, and the files that no generation names any more.
//!
//! It works in two passes. The first one writes down the files of the removed generations, and
//! removes the manifests: these generations exist no more. The second one, after another generation
//! was made, removes those files that no manifest names then. So a file is never removed while a
//! generation is made that takes it over.

use super::cache::Cache;
use super::catalog::{self, Listed};
use super::error::refused;
use super::format::{Doomed, FORMAT, ListFile, Manifest, Pin, ShardedPaths};
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
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

/// Number of generations from which on a prune must not remove more than half of them.
const FEW: usize = 4;

/// Number of removals after which this process looks whether it still may write.
const CHECK_AFTER: usize = 64;
/// Name under which dumps and lists are kept among the paths by shard.
const NO_SHARD: &str = "";

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
            // Nothing is read any more when the newest good one is found.
            Ok(manifest) if !has_good => is_good(place, &cache, manifest, &proofs).await,
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
        let found = self.place.tagged::<Doomed>(layout::DOOMED).await?;
        let (old, tag) = match found {
            Some((doomed, tag)) => (doomed, Some(tag)),
            None => (Doomed::default(), None),
        };
        let newest = generations.first().map(|judged| judged.listed.name.clone());
        let (left_manifests, going_manifests) = (self.manifests(&left)?, self.manifests(&going)?);
        let mut doomed = old.files.clone();
        self.add_files(&mut doomed, &going_manifests, &left_manifests)
            .await?;
        let shards: BTreeSet<&str> = doomed.keys().map(String::as_str).collect();
        let needed = self.named(&left_manifests, &shards).await?;
        // A generation whose manifest is locked still exists.
        let mut named = self.named(&going_manifests, &shards).await?;
        named.extend(needed.iter().cloned());
        for paths in doomed.values_mut() {
            paths.retain(|path| !needed.contains(path));
        }
        // A generation that was begun after the first pass has seen what is left.
        let second_pass = old.since.is_some_and(|since| {
            left_manifests
                .iter()
                .any(|manifest| manifest.started > since)
        });
        let mut pruned = Pruned::default();
        if second_pass {
            let due = old.files.iter().flat_map(|(shard, paths)| {
                let due = paths.iter().filter(|path| !named.contains(*path));
                due.map(move |path| (shard, path))
            });
            for (number, (shard, path)) in due.enumerate() {
                if number % CHECK_AFTER == 0 {
                    turn.still_ours(config, state, self.place).await?;
                }
                if self.remove(path, &mut pruned).await? {
                    doomed.entry(shard.clone()).or_default().remove(path);
                }
            }
        }
        doomed.retain(|_, paths| !paths.is_empty());
        let waiting: usize = doomed.values().map(BTreeSet::len).sum();
        pruned.waiting_files = waiting as u64 - pruned.locked_files;
        let next = Doomed {
            format: FORMAT,
            since: match going.is_empty() && !second_pass {
                true => old.since,
                false => (!doomed.is_empty()).then(Utc::now),
            },
            newest: newest.unwrap_or_default(),
            files: doomed,
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

    /// Removes one file that no generation names. Returns whether it is gone.
    async fn remove(&mut self, path: &str, pruned: &mut Pruned) -> Result<bool, ReplicationError> {
        let bytes = self.place.length(path).await?;
        let removed = self.place.remove(path).await?;
        match removed {
            Removed::Gone => {
                self.proofs.forget(path);
                if let Some(bytes) = bytes {
                    pruned.removed_files += 1;
                    pruned.removed_bytes += bytes;
                }
            }
            Removed::Locked => pruned.locked_files += 1,
        }
        killpoint::reach("prune.file");
        Ok(removed == Removed::Gone)
    }

    /// Adds the files of generations that go, except lists that a generation that stays names too, and
    /// the artifacts in them.
    async fn add_files(
        &self,
        doomed: &mut ShardedPaths,
        going: &[&Manifest],
        left: &[&Manifest],
    ) -> Result<(), ReplicationError> {
        let left = left.iter().flat_map(|manifest| manifest.files());
        let left: HashSet<&str> = left.map(|file| file.path.as_str()).collect();
        let mut add = |shard: &str, path: &str| {
            let paths = doomed.entry(shard.to_string()).or_default();
            paths.insert(path.to_string());
        };
        for manifest in going {
            for file in manifest.files() {
                add(NO_SHARD, &file.path);
            }
            let lists = manifest.lists.iter();
            for list in lists.filter(|list| !left.contains(list.file.path.as_str())) {
                for entry in self.cache.list(self.place, &list.file).await? {
                    add(&list.shard, &entry.path);
                }
            }
        }
        Ok(())
    }

    /// Returns every dump and list that these generations name, and every artifact of these shards.
    async fn named(
        &self,
        manifests: &[&Manifest],
        shards: &BTreeSet<&str>,
    ) -> Result<HashSet<String>, ReplicationError> {
        let mut named = HashSet::new();
        for manifest in manifests {
            named.extend(manifest.files().map(|file| file.path.clone()));
        }
        let lists = manifests.iter().flat_map(|manifest| &manifest.lists);
        let lists = lists.filter(|list| shards.contains(list.shard.as_str()));
        let lists: BTreeMap<&str, &ListFile> =
            lists.map(|list| (list.file.path.as_str(), list)).collect();
        for list in lists.into_values() {
            let entries = self.cache.list(self.place, &list.file).await?;
            named.extend(entries.into_iter().map(|entry| entry.path));
        }
        Ok(named)
    }

    /// Returns the manifests. A generation that cannot be read may name any file, so it ends the
    /// prune.
    fn manifests<'a>(&self, judged: &[&'a Judged]) -> Result<Vec<&'a Manifest>, ReplicationError> {
        let manifest = |judged: &&'a Judged| {
            judged.listed.manifest.as_ref().map_err(|error| {
                refused(
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
                )
            })
        };
        judged.iter().map(manifest).collect()
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
