//! The database at one snapshot: the dump, the rows of the packages, and the point.

use super::Work;
use crate::archive::error::{self, damaged};
use crate::archive::format::{Absent, File, Point, Source};
use crate::archive::layout;
use crate::archive::place::Stored;
use crate::cluster::{
    BuilderDb, CIPHERTEXTS, InstalledClients, LocalCluster, Snapshot, SpareDb, WriteSession,
    sealed_by,
};
use crate::domain::Role;
use crate::killpoint;
use crate::observe::{Phase, Progress};
use crate::package::Checksum;
use crate::replication::ReplicationError;
use chrono::{DateTime, Utc};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// An artifact that a row names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wanted {
    pub key: String,
    pub checksum: Checksum,
}

/// All facts that the snapshot shows.
pub(super) struct Dumped {
    pub file: File,
    /// False: the dump of the generation before is named again.
    pub is_new: bool,
    pub point: Option<Point>,
    /// The server's clock at the snapshot.
    pub clock: DateTime<Utc>,
    pub source: Source,
    pub packages: u64,
    /// The artifacts, by their shard.
    pub wanted: BTreeMap<String, Vec<Wanted>>,
    pub absent: Vec<Absent>,
    pub builder_keys: Vec<String>,
}

impl Work<'_> {
    pub(super) async fn dump(&self, progress: &Progress) -> Result<Dumped, ReplicationError> {
        let step = progress.begin(Phase::Dump, 0);
        let identity = &self.turn.identity;
        let session = LocalCluster::of(self.config).builder().await?;
        let snapshot = session.export_snapshot().await?;
        let server = session.server_state("reading the server's state").await?;
        let database = session.database_facts().await?;
        let spare = SpareDb::of(&session);
        let is_copy = identity.role == Some(Role::Spare);
        let point = match is_copy {
            true => Some(spare.stands_at().await?),
            false => None,
        };
        let state = match &point {
            Some((lsn, _, system_id, timeline)) => format!("{system_id}/{timeline}/{lsn}"),
            None => format!(
                "{}/{}/{}",
                server.system_id, server.started, server.transactions
            ),
        };
        let point = point.map(|(lsn, commit_time, system_id, timeline)| Point {
            lsn,
            commit_time,
            system_id,
            timeline,
        });
        let (rows, mut absent) = self.rows(&session).await?;
        let mut wanted = rows;
        if is_copy {
            leave_out_unavailable(&spare, &mut wanted, &mut absent).await?;
        }
        let builder_keys = sealing_keys(&session).await?;
        let packages = BuilderDb::of(&session).count_packages().await?;
        let clients = InstalledClients::look().await;
        let clients = clients.for_dumps_of(session.major().await?)?;
        let clients = clients.for_encoding(&database.encoding);
        let source = Source {
            cluster: identity.cluster.clone(),
            site: self.config.site.clone(),
            role: identity.role_word().into(),
            epoch: identity.epoch,
            system_id: identity.system_id.clone(),
            server_version: server.server.version.clone(),
            pg_dump: clients.major.to_string(),
            database: serde_json::from_str(&database.properties).unwrap_or_default(),
            encoding: database.encoding.clone(),
            database_bytes: database.bytes.unsigned_abs(),
            state,
        };
        let (file, is_new) = match self.dump_before(&source).await? {
            Some(file) => (file, false),
            None => (self.new_dump(&clients, &snapshot).await?, true),
        };
        // The session held the snapshot until here. If it has ended, the rows are not those of the
        // dump.
        session.wait_until_idle("holding the snapshot").await?;
        drop(step);
        Ok(Dumped {
            file,
            is_new,
            point,
            clock: server.clock,
            source,
            packages,
            wanted,
            absent,
            builder_keys,
        })
    }

    /// Returns the dump of the generation before, if nothing was committed since.
    async fn dump_before(&self, source: &Source) -> Result<Option<File>, ReplicationError> {
        let Some(before) = &self.before else {
            return Ok(None);
        };
        let same = before.source.state == source.state
            && before.source.cluster == source.cluster
            && before.source.server_version == source.server_version
            && before.lineage == self.turn.identity.lineage;
        let is_there =
            same && self.place.length(&before.dump.path).await? == Some(before.dump.bytes);
        Ok(is_there.then(|| before.dump.clone()))
    }

    async fn new_dump(
        &self,
        clients: &crate::cluster::ClientPrograms,
        snapshot: &Snapshot,
    ) -> Result<File, ReplicationError> {
        let path = layout::dump(&self.name);
        let mut output = clients.dump_database(&self.config.local.datastore, snapshot.as_str())?;
        let mut writing = self.place.write(&path).await?;
        while let Some(bytes) = output.next().await? {
            writing.add(bytes).await?;
        }
        killpoint::reach("archive.dumping");
        let (sum, stored) = writing.finish().await?;
        let file = File {
            path,
            bytes: sum.bytes,
            sha256: sum.sha256,
        };
        if stored == Stored::Occupied {
            // An answer was lost, and the file is our own.
            let found = self.place.sum(&file.path).await?;
            if found.as_ref() != Some(&file) {
                return Err(damaged(
                    self.place.name(),
                    &file.path,
                    "other bytes are there",
                ));
            }
        }
        Ok(file)
    }

    /// Reads the rows of the packages, by shard. A row that names no possible artifact is absent.
    async fn rows(
        &self,
        session: &WriteSession,
    ) -> Result<(BTreeMap<String, Vec<Wanted>>, Vec<Absent>), ReplicationError> {
        let mut wanted: BTreeMap<String, Vec<Wanted>> = BTreeMap::new();
        let mut absent = Vec::new();
        let mut rows = BuilderDb::of(session).packages_by_shard().await?;
        while let Some((shard, row)) = rows.next().await? {
            match row.artifact() {
                Some((key, checksum)) => wanted
                    .entry(shard)
                    .or_default()
                    .push(Wanted { key, checksum }),
                None => absent.push(Absent {
                    key: row.name(),
                    checksum: row.checksum,
                    reason: "unsound".into(),
                }),
            }
        }
        drop(rows);
        for wanted in wanted.values_mut() {
            wanted.sort();
            wanted.dedup();
            if let Some(twice) = wanted.windows(2).find(|pair| pair[0].key == pair[1].key) {
                return Err(error::two_rows(&twice[0].key));
            }
        }
        Ok((wanted, absent))
    }
}

/// Moves the artifacts that the primary did not have, or had damaged, to the absent ones.
async fn leave_out_unavailable(
    spare: &SpareDb<'_>,
    wanted: &mut BTreeMap<String, Vec<Wanted>>,
    absent: &mut Vec<Absent>,
) -> Result<(), ReplicationError> {
    let unavailable = spare.unavailable().await?;
    let keys: HashSet<&str> = unavailable.iter().map(|item| item.key.as_str()).collect();
    for wanted in wanted.values_mut() {
        wanted.retain(|wanted| !keys.contains(wanted.key.as_str()));
    }
    wanted.retain(|_, wanted| !wanted.is_empty());
    let listed: HashSet<String> = absent.iter().map(|absent| absent.key.clone()).collect();
    let unlisted = unavailable
        .into_iter()
        .filter(|item| !listed.contains(&item.key));
    absent.extend(unlisted.map(|item| Absent {
        reason: item.reason.to_string(),
        key: item.key,
        checksum: item.checksum,
    }));
    Ok(())
}

/// Returns the names of the builder keys that sealed rows.
async fn sealing_keys(session: &WriteSession) -> Result<Vec<String>, ReplicationError> {
    let mut names = BTreeSet::new();
    for (_, table, column, revision) in CIPHERTEXTS {
        for group in BuilderDb::of(session)
            .sealed_rows(table, column, revision)
            .await?
        {
            let inside = group.newest.iter().find_map(|stored| sealed_by(stored));
            let beside = group
                .revision
                .strip_prefix("bldr-")
                .unwrap_or(&group.revision);
            match inside {
                Some(revision) => names.insert(format!("bldr-{revision}")),
                None if !beside.is_empty() => names.insert(format!("bldr-{beside}")),
                None => false,
            };
        }
    }
    Ok(names.into_iter().collect())
}
