//! Restores a generation into the local cluster.
//!
//! First the artifacts: each is put into the bucket if it is not there, and proved if it is; none is
//! deleted or replaced. Then the rows, into a database under another name, fenced. The last step
//! gives the database its name. After a kill the same command starts again, and finds what is there.

mod rows;

use super::cache::Cache;
use super::catalog;
use super::error::{no_generation, refused};
use super::format::{Absent, Entry, Manifest};
use super::place::{Place, Stored};
use crate::cluster::{
    BuilderDb, BuilderKeys, ByteBudget, LocalCluster, Throttle, WriteSession, set_fence,
};
use crate::config::{ArchivePlan, Config};
use crate::domain::ErrorCode;
use crate::killpoint;
use crate::observe::{Phase, Progress};
use crate::package::{Checksum, Hasher};
use crate::replication::ReplicationError;
use chrono::{DateTime, Utc};
use std::path::Path;
use tokio::task::JoinSet;

/// Bytes of memory that one copy may hold.
const COPY_BYTES: u64 = 16 << 20;
/// Number of the lock that keeps two restores of one cluster apart: "rest" in ASCII.
const LOCK: i64 = 0x7265_7374;
/// Prefix of databases into which rows are restored.
const UNFINISHED: &str = "warm_spare_restore_";

/// The generation that is restored.
#[derive(Debug, Clone, PartialEq)]
pub enum Chosen {
    Name(String),
    /// The newest one that is not after this time.
    NotAfter(DateTime<Utc>),
}

/// The target of a restore.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// Builder's own database and bucket, of a cluster that has no packages and no role.
    FreshCluster,
    /// A new database beside Builder's. Artifacts are left alone.
    Beside(String),
}

/// An artifact that could not be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unrestored {
    pub key: String,
    pub text: String,
}

#[derive(Debug)]
pub struct Restored {
    pub manifest: Manifest,
    pub database: String,
    /// Name under which the database is kept that was there before. None: there was none.
    pub replaced: Option<String>,
    /// Artifacts that were put into the bucket, and those that were there and are right.
    pub put: u64,
    pub proved: u64,
    pub unrestored: Vec<Unrestored>,
    /// Builder keys that the rows need and this node does not have.
    pub missing_keys: Vec<String>,
}

impl Restored {
    /// Returns whether everything is here that the generation's rows need.
    pub fn ok(&self) -> bool {
        self.unrestored.is_empty()
            && self.missing_keys.is_empty()
            && self.manifest.gone_meanwhile.is_empty()
    }

    /// Returns the artifacts that rows name and the generation did not have.
    pub fn not_in_generation(&self) -> impl Iterator<Item = &Absent> {
        self.manifest
            .absent
            .iter()
            .chain(&self.manifest.gone_meanwhile)
    }
}

/// Finds the generation to restore.
pub async fn choose(plan: &ArchivePlan, chosen: &Chosen) -> Result<Manifest, ReplicationError> {
    let place = Place::open(plan)?;
    let until = match chosen {
        Chosen::Name(name) => return catalog::manifest(&place, name).await,
        Chosen::NotAfter(time) => time,
    };
    let all = catalog::all(&place).await?;
    let readable = all.into_iter().filter_map(|listed| listed.manifest.ok());
    let fitting = readable.filter(|manifest| manifest.time <= *until);
    fitting.max_by_key(|manifest| manifest.time).ok_or_else(|| {
        no_generation(
            place.name(),
            &format!("of {} or before", until.to_rfc3339()),
        )
    })
}

/// Restores a generation.
pub async fn restore(
    config: &Config,
    plan: &ArchivePlan,
    data: Option<&Path>,
    chosen: &Chosen,
    target: &Target,
    progress: &Progress,
) -> Result<Restored, ReplicationError> {
    let manifest = choose(plan, chosen).await?;
    let place = Place::open(plan)?;
    let local = LocalCluster::of(config);
    let session = local.maintenance().await?;
    if !session.lock_archive(LOCK).await? {
        return Err(refused(
            ErrorCode::Locked,
            "another restore is at work on this cluster".into(),
            "let it finish, or stop it: one works at a time".into(),
        ));
    }
    for name in session.databases_named(UNFINISHED).await? {
        log::info!("local: database {name} of an unfinished restore is dropped");
        session.drop_database(&name).await?;
    }
    let work = Work {
        config,
        place: &place,
        session: &session,
        manifest: &manifest,
    };
    let (visible, is_beside) = match target {
        Target::FreshCluster => {
            work.must_be_fresh().await?;
            (config.local.datastore.database.clone(), false)
        }
        Target::Beside(name) => {
            work.must_be_new(name).await?;
            (name.clone(), true)
        }
    };
    let mut restored = Restored {
        database: visible.clone(),
        replaced: None,
        put: 0,
        proved: 0,
        unrestored: Vec::new(),
        missing_keys: missing_keys(config, &manifest),
        manifest: manifest.clone(),
    };
    if !is_beside {
        let entries = work.entries(&Cache::of(data, &place)).await?;
        work.put_artifacts(entries, &mut restored, progress).await?;
    }
    let name = format!("{UNFINISHED}{}", std::process::id());
    work.restore_rows(&name, progress).await?;
    killpoint::reach("restore.rows");
    if !is_beside {
        set_fence(&session, &name).await?;
    }
    restored.replaced = work.give_name(&name, &visible).await?;
    killpoint::reach("restore.done");
    Ok(restored)
}

/// Returns the names of the builder keys that the rows need and this node does not have.
fn missing_keys(config: &Config, manifest: &Manifest) -> Vec<String> {
    let here = config.builder_keys_dir.as_deref().map(BuilderKeys::read);
    let here = here
        .and_then(Result::ok)
        .map_or_else(Vec::new, |keys| keys.revisions());
    let needed = manifest.builder_keys.iter();
    needed
        .filter(|name| {
            !here
                .iter()
                .any(|revision| **name == format!("bldr-{revision}"))
        })
        .cloned()
        .collect()
}

struct Work<'a> {
    config: &'a Config,
    place: &'a Place,
    /// On no particular database of the local server.
    session: &'a WriteSession,
    manifest: &'a Manifest,
}

impl Work<'_> {
    /// Refuses a cluster that has packages or a role.
    async fn must_be_fresh(&self) -> Result<(), ReplicationError> {
        let local = LocalCluster::of(self.config);
        let beside = "give another database with --database NAME, or restore into a cluster without packages";
        if let Some(state) = local.existing_state().await?
            && let Some(role) = state.cluster().await?.role
        {
            return Err(refused(
                ErrorCode::Role,
                format!("this cluster is on record as {role}: a generation would replace its data"),
                beside.into(),
            ));
        }
        let Some(builder) = local.builder_if_there().await? else {
            return Ok(());
        };
        if !BuilderDb::of(&builder).has_packages().await? {
            return Ok(());
        }
        match BuilderDb::of(&builder).count_packages().await? {
            0 => Ok(()),
            packages => Err(refused(
                ErrorCode::NotEmpty,
                format!(
                    "database {} of this cluster has {packages} packages, and a generation would replace them",
                    self.config.local.datastore.database
                ),
                beside.into(),
            )),
        }
    }

    async fn must_be_new(&self, name: &str) -> Result<(), ReplicationError> {
        if !self
            .session
            .databases_named(name)
            .await?
            .iter()
            .any(|found| found == name)
        {
            return Ok(());
        }
        Err(refused(
            ErrorCode::NotEmpty,
            format!("this server has a database {name} already"),
            "give another name, or drop that database".into(),
        ))
    }

    async fn entries(&self, cache: &Cache) -> Result<Vec<Entry>, ReplicationError> {
        let mut entries = Vec::new();
        for list in &self.manifest.lists {
            entries.extend(cache.list(self.place, &list.file).await?);
        }
        Ok(entries)
    }

    async fn put_artifacts(
        &self,
        entries: Vec<Entry>,
        restored: &mut Restored,
        progress: &Progress,
    ) -> Result<(), ReplicationError> {
        let step = progress.begin(Phase::Artifacts, entries.len() as u64);
        let carrier = Carrier {
            from: self.place.clone(),
            to: Place::local_bucket(LocalCluster::of(self.config).store_to_restore()?),
            budget: ByteBudget::new(self.config.replication.buffer.max(2 * COPY_BYTES)),
            throttle: Throttle::new(self.config.replication.bandwidth_limit),
        };
        let mut entries = entries.into_iter();
        let mut busy = JoinSet::new();
        loop {
            while busy.len() < self.config.replication.copies
                && let Some(entry) = entries.next()
            {
                let carrier = carrier.clone();
                busy.spawn(async move {
                    let put = carrier.put(&entry).await;
                    (entry.key, put)
                });
            }
            let Some(done) = busy.join_next().await else {
                return Ok(());
            };
            let (key, put) = done.expect("no copy panics or is cancelled");
            match put? {
                Put::New => restored.put += 1,
                Put::Proved => restored.proved += 1,
                Put::Not(text) => restored.unrestored.push(Unrestored { key, text }),
            }
            step.add(1);
            killpoint::reach("restore.artifact");
        }
    }
}

#[derive(Clone)]
struct Carrier {
    from: Place,
    to: Place,
    budget: ByteBudget,
    throttle: Throttle,
}

enum Put {
    New,
    Proved,
    Not(String),
}

impl Carrier {
    async fn put(&self, entry: &Entry) -> Result<Put, ReplicationError> {
        if self.to.length(&entry.key).await?.is_some() {
            return self.prove(entry).await;
        }
        // Memory is reserved first, because a server gives up a body that is opened and not read.
        let _room = self.budget.room(COPY_BYTES).await;
        let Some(mut reading) = self.from.read(&entry.path).await? else {
            return Ok(Put::Not(format!("{} is not in the archive", entry.path)));
        };
        let mut writing = self.to.write_artifact(&entry.key).await?;
        let mut hasher = Hasher::new();
        while let Some(bytes) = reading.next().await? {
            self.throttle.take(bytes.len()).await;
            hasher.update(&bytes);
            writing.add(bytes).await?;
        }
        let found = hasher.finalize();
        if found.to_string() != entry.checksum {
            return Ok(Put::Not(format!(
                "{} is damaged: its checksum is {found}",
                entry.path
            )));
        }
        match writing.finish().await?.1 {
            Stored::New => Ok(Put::New),
            Stored::Occupied => self.prove(entry).await,
        }
    }

    /// Reads the object that is in the bucket.
    async fn prove(&self, entry: &Entry) -> Result<Put, ReplicationError> {
        let found = match self.to.read(&entry.key).await? {
            None => None,
            Some(mut reading) => {
                let mut hasher = Hasher::new();
                while let Some(bytes) = reading.next().await? {
                    self.throttle.take(bytes.len()).await;
                    hasher.update(&bytes);
                }
                Some(hasher.finalize())
            }
        };
        let wanted: Option<Checksum> = entry.checksum.parse().ok();
        Ok(match found {
            Some(found) if Some(found) == wanted => Put::Proved,
            Some(found) => Put::Not(format!(
                "the bucket has other bytes under this key, with checksum {found}; they stay"
            )),
            None => Put::Not("it was removed from the bucket just now".into()),
        })
    }
}
