//! Proves generations: each file is there, has its length, and has the bytes that the manifest or a
//! list names.

use super::cache::Cache;
use super::catalog::{self, Listed};
use super::format::{Entry, File, Manifest, read_list};
use super::layout;
use super::place::Place;
use super::proofs::Proofs;
use crate::cluster::Throttle;
use crate::config::ArchivePlan;
use crate::observe::{Phase, Progress, Step};
use crate::package::{Checksum, Hasher};
use crate::replication::ReplicationError;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use tokio::task::JoinSet;

/// Number of artifacts that are read at once.
const READINGS: usize = 8;
/// Number of artifacts after which the proofs are written to the disk.
const SAVE_AFTER: usize = 1000;

/// The extent of a verification.
#[derive(Debug, Clone, PartialEq)]
pub struct Extent {
    /// The generation; None: all of them.
    pub name: Option<String>,
    /// Percentage of the artifacts that is read, those first that were not read for the longest
    /// time. Of the others presence and length are checked.
    pub percent: f64,
    /// Maximum number of bytes read in a second; None: no limit.
    pub rate: Option<u64>,
}

/// A file that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    pub path: String,
    pub text: String,
    /// The generations that need the file.
    pub generations: Vec<String>,
}

/// The result of a verification.
#[derive(Debug, Default, PartialEq)]
pub struct Verified {
    pub generations: u64,
    /// Dumps, lists and artifacts that were read whole.
    pub read: u64,
    pub bytes: u64,
    /// Artifacts of which only presence and length were checked.
    pub looked_at: u64,
    pub faults: Vec<Fault>,
    /// Time of the oldest proof of a file that a generation names. None: one was never read.
    pub oldest_proof: Option<DateTime<Utc>>,
}

impl Verified {
    pub fn ok(&self) -> bool {
        self.faults.is_empty()
    }
}

/// Verifies generations of a place.
pub async fn verify(
    plan: &ArchivePlan,
    data: Option<&Path>,
    extent: &Extent,
    progress: &Progress,
) -> Result<Verified, ReplicationError> {
    let place = Place::open(plan)?;
    let listed = match &extent.name {
        Some(name) => vec![Listed {
            name: name.clone(),
            manifest: Ok(catalog::manifest(&place, name).await?),
            pin: None,
        }],
        None => catalog::all(&place).await?,
    };
    let mut work = Work {
        place: &place,
        throttle: Throttle::new(extent.rate),
        proofs: Proofs::of(data, &place),
        result: Verified::default(),
        faults: BTreeMap::new(),
    };
    let mut files: BTreeMap<String, (File, Vec<String>)> = BTreeMap::new();
    let mut lists: BTreeSet<String> = BTreeSet::new();
    for one in &listed {
        let manifest = match &one.manifest {
            Ok(manifest) => manifest,
            Err(error) => {
                let path = layout::manifest(&one.name);
                work.fault(&path, error.to_string(), std::slice::from_ref(&one.name));
                continue;
            }
        };
        work.result.generations += 1;
        for file in manifest.files() {
            let of = files
                .entry(file.path.clone())
                .or_insert_with(|| (file.clone(), Vec::new()));
            of.1.push(one.name.clone());
        }
        lists.extend(manifest.lists.iter().map(|list| list.file.path.clone()));
    }
    let artifacts = work.files(files, &lists, progress).await?;
    work.artifacts(artifacts, extent.percent, progress).await?;
    if extent.name.is_none() {
        work.proofs.note_end();
    }
    work.proofs.save(&place)?;
    let Work {
        mut result, faults, ..
    } = work;
    result.faults = faults.into_values().collect();
    Ok(result)
}

struct Work<'a> {
    place: &'a Place,
    throttle: Throttle,
    proofs: Proofs,
    result: Verified,
    faults: BTreeMap<String, Fault>,
}

/// The artifacts of all verified generations, by path.
type Artifacts = HashMap<String, (Entry, Vec<String>)>;

impl Work<'_> {
    fn fault(&mut self, path: &str, text: String, generations: &[String]) {
        self.proofs.forget(path);
        let fault = self
            .faults
            .entry(path.to_string())
            .or_insert_with(|| Fault {
                path: path.to_string(),
                text,
                generations: Vec::new(),
            });
        fault.generations.extend(generations.iter().cloned());
        fault.generations.sort();
        fault.generations.dedup();
    }

    fn proved(&mut self, path: &str, bytes: u64) {
        let now = Utc::now();
        self.proofs.note(path, now);
        self.result.read += 1;
        self.result.bytes += bytes;
    }

    /// Reads dumps and lists. Returns the artifacts that the lists name.
    async fn files(
        &mut self,
        files: BTreeMap<String, (File, Vec<String>)>,
        lists: &BTreeSet<String>,
        progress: &Progress,
    ) -> Result<Artifacts, ReplicationError> {
        let step = progress.begin(Phase::Files, files.len() as u64);
        let mut artifacts = Artifacts::new();
        for (path, (file, generations)) in files {
            let is_list = lists.contains(&path);
            let (found, text) = self.read(&path, is_list).await?;
            match found {
                None => self.fault(&path, "it is not there".into(), &generations),
                Some(found) if found == file => {
                    self.proved(&path, file.bytes);
                    self.oldest(&path);
                    if is_list {
                        let entries = read_list(self.place.name(), &path, &text)?;
                        for entry in entries {
                            let of = artifacts
                                .entry(entry.path.clone())
                                .or_insert_with(|| (entry, Vec::new()));
                            of.1.extend(generations.iter().cloned());
                        }
                    }
                }
                Some(found) => {
                    let text = format!(
                        "expected {} bytes with SHA-256 {}, found {} bytes with {}",
                        file.bytes, file.sha256, found.bytes, found.sha256
                    );
                    self.fault(&path, text, &generations);
                }
            }
            step.add(1);
        }
        Ok(artifacts)
    }

    /// Reads a file and its sum. Only the text of a list is kept.
    async fn read(
        &self,
        path: &str,
        keep: bool,
    ) -> Result<(Option<File>, Bytes), ReplicationError> {
        if keep {
            let text = self.place.document(path).await?;
            let file = text.as_ref().map(|text| File {
                path: path.to_string(),
                bytes: text.len() as u64,
                sha256: super::format::sha256(text),
            });
            self.throttle
                .take(text.as_ref().map_or(0, Bytes::len))
                .await;
            return Ok((file, text.unwrap_or_default()));
        }
        Ok((self.place.sum(path).await?, Bytes::new()))
    }

    fn oldest(&mut self, path: &str) {
        // Never read is older than every proof.
        let Some(time) = self.proofs.time_of(path) else {
            return;
        };
        let oldest = &mut self.result.oldest_proof;
        *oldest = Some(oldest.map_or(time, |oldest| oldest.min(time)));
    }

    /// Reads a part of the artifacts, those first that were not read for the longest time, and looks
    /// at the others.
    async fn artifacts(
        &mut self,
        artifacts: Artifacts,
        percent: f64,
        progress: &Progress,
    ) -> Result<(), ReplicationError> {
        let mut all: Vec<(Entry, Vec<String>)> = artifacts.into_values().collect();
        all.sort_by_cached_key(|(entry, _)| (self.proofs.time_of(&entry.path), entry.path.clone()));
        let reading = (all.len() as f64 * percent / 100.0).ceil() as usize;
        let others = all.split_off(reading.min(all.len()));
        self.read_artifacts(all.clone(), progress).await?;
        self.look_at(&others).await?;
        let paths = all.iter().chain(&others).map(|(entry, _)| &entry.path);
        let mut never = false;
        for path in paths {
            never |= self.proofs.time_of(path).is_none();
            self.oldest(path);
        }
        if never {
            self.result.oldest_proof = None;
        }
        Ok(())
    }

    async fn read_artifacts(
        &mut self,
        wanted: Vec<(Entry, Vec<String>)>,
        progress: &Progress,
    ) -> Result<(), ReplicationError> {
        let step: Step = progress.begin(Phase::Artifacts, wanted.len() as u64);
        let mut wanted = wanted.into_iter();
        let mut busy = JoinSet::new();
        for number in 1.. {
            while busy.len() < READINGS
                && let Some((entry, generations)) = wanted.next()
            {
                let (place, throttle) = (self.place.clone(), self.throttle.clone());
                busy.spawn(async move {
                    let found = hash(&place, &entry.path, &throttle).await;
                    (entry, generations, found)
                });
            }
            let Some(done) = busy.join_next().await else {
                break;
            };
            let (entry, generations, found) = done.expect("no reading panics or is cancelled");
            match found? {
                None => self.fault(&entry.path, "it is not there".into(), &generations),
                Some((bytes, checksum))
                    if bytes == entry.bytes && checksum.to_string() == entry.checksum =>
                {
                    self.proved(&entry.path, bytes);
                }
                Some((bytes, checksum)) => {
                    let text = format!(
                        "expected {} bytes with checksum {}, found {bytes} bytes with {checksum}",
                        entry.bytes, entry.checksum
                    );
                    self.fault(&entry.path, text, &generations);
                }
            }
            step.add(1);
            if number % SAVE_AFTER == 0 {
                self.proofs.save(self.place)?;
            }
        }
        Ok(())
    }

    /// Checks presence and length by a listing.
    async fn look_at(
        &mut self,
        artifacts: &[(Entry, Vec<String>)],
    ) -> Result<(), ReplicationError> {
        if artifacts.is_empty() {
            return Ok(());
        }
        let mut there: HashMap<String, u64> = HashMap::new();
        for folder in [layout::ARTIFACTS, layout::REPLACED] {
            let found = self.place.list(folder).await?;
            there.extend(found.into_iter().map(|found| (found.path, found.bytes)));
        }
        for (entry, generations) in artifacts {
            self.result.looked_at += 1;
            match there.get(&entry.path) {
                Some(bytes) if *bytes == entry.bytes => {}
                Some(bytes) => {
                    let text = format!("expected {} bytes, found {bytes} bytes", entry.bytes);
                    self.fault(&entry.path, text, generations);
                }
                None => self.fault(&entry.path, "it is not there".into(), generations),
            }
        }
        Ok(())
    }
}

/// Reads an artifact. None: it is not there.
async fn hash(
    place: &Place,
    path: &str,
    throttle: &Throttle,
) -> Result<Option<(u64, Checksum)>, ReplicationError> {
    let Some(mut reading) = place.read(path).await? else {
        return Ok(None);
    };
    let mut hasher = Hasher::new();
    let mut bytes = 0;
    while let Some(chunk) = reading.next().await? {
        throttle.take(chunk.len()).await;
        hasher.update(&chunk);
        bytes += chunk.len() as u64;
    }
    Ok(Some((bytes, hasher.finalize())))
}

/// Returns whether every file of a generation was read and found right after it was made. The lists are
/// read only as far as the first artifact that was not.
pub(super) async fn is_good(
    place: &Place,
    cache: &Cache,
    manifest: &Manifest,
    proofs: &Proofs,
) -> bool {
    let since = |path: &str| {
        let time = proofs.time_of(path);
        time.is_some_and(|time| time.timestamp() >= manifest.finished.timestamp())
    };
    if !manifest.files().all(|file| since(&file.path)) {
        return false;
    }
    for list in &manifest.lists {
        let entries = cache.list(place, &list.file).await;
        if !entries.is_ok_and(|entries| entries.iter().all(|entry| since(&entry.path))) {
            return false;
        }
    }
    true
}
