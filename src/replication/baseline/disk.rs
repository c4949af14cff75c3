//! Room on the disks of the local server for one more copy.

use crate::cluster::{Disk, LocalCluster, Session, WriteSession};
use crate::config::{Config, Direction};
use crate::domain::ErrorCode;
use crate::replication::error::ReplicationError;
use std::path::Path;

/// Factor for the room that a copy needs: the copy itself, and its sorting and WAL.
const DISK_FACTOR: f64 = 1.25;

pub(in crate::replication) async fn enough_disk(
    config: &Config,
    local: &WriteSession,
    database_bytes: i64,
) -> Result<(), ReplicationError> {
    let Some(disk) = disk(config, local).await else {
        log::debug!(
            "the local datastore is on another machine: its free disk space is not known here"
        );
        return Ok(());
    };
    let (directory, free) = (disk.directory, disk.free);
    let needed = (database_bytes as f64 * DISK_FACTOR) as u64;
    if free >= needed {
        return Ok(());
    }
    let size = |bytes: u64| bytesize::ByteSize(bytes).to_string();
    Err(ReplicationError::unfit(
        ErrorCode::DiskFull,
        format!(
            "the spare's datastore has {} free in {directory}; one more copy of the primary's database ({}) needs {}",
            size(free),
            size(database_bytes as u64),
            size(needed)
        ),
        "make room, or lower replication.keep_generations".into(),
    ))
}

/// Returns the free disk space. Only a superuser can see the data directory, and only on the
/// server's own machine can it be checked. A copy is stored where the database is that it replaces.
pub async fn disk(config: &Config, local: &Session) -> Option<Disk> {
    if config.replication.direction == Direction::Push {
        // A node of the spare's site has recorded it.
        let nodes = LocalCluster::of(config).living_standbys().await;
        return nodes.into_iter().find_map(|node| node.told.disk);
    }
    let database = &config.local.datastore.database;
    let (directory, tablespace) = local.directories(database).await.ok()?;
    let directory = directory?;
    let directory = Path::new(&directory).join(tablespace.unwrap_or_default());
    let directory = directory.to_string_lossy().into_owned();
    let here = matches!(
        config.local.datastore.host.as_str(),
        "127.0.0.1" | "localhost" | "::1"
    );
    let directory = Some(directory).filter(|path| here && Path::new(path).is_dir())?;
    let disk = rustix::fs::statvfs(Path::new(&directory)).ok()?;
    Some(Disk {
        free: disk.f_bavail.saturating_mul(disk.f_frsize),
        total: disk.f_blocks.saturating_mul(disk.f_frsize),
        directory,
    })
}
