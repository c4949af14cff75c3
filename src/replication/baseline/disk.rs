//! Room on the disks of the local server for one more copy.

use crate::cluster::{LocalSession, Session};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::baseline::checks::unfit;
use crate::replication::error::PassError;
use std::path::Path;

/// Factor for the room that a copy needs: the copy itself, and its sorting and WAL.
const DISK_FACTOR: f64 = 1.25;

pub(in crate::replication) async fn enough_disk(
    config: &Config,
    local: &LocalSession,
    database_bytes: i64,
) -> Result<(), PassError> {
    let Some(disk) = disk(config, local).await else {
        log::debug!("the local datastore is on another machine: its free disk space is not known");
        return Ok(());
    };
    let (directory, free) = (disk.directory, disk.free);
    let needed = (database_bytes as f64 * DISK_FACTOR) as u64;
    if free >= needed {
        return Ok(());
    }
    let size = |bytes: u64| bytesize::ByteSize(bytes).to_string();
    Err(unfit(
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

/// Disk of the local datastore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub directory: String,
    pub free: u64,
    pub total: u64,
}

/// Returns the free disk space. Only a superuser can see the data directory, and only on the
/// server's own machine can it be checked. A copy is stored where the database is that it replaces.
pub async fn disk(config: &Config, local: &Session) -> Option<Disk> {
    let sql = "SELECT current_setting('data_directory', true), \
                 (SELECT pg_tablespace_location(dattablespace) FROM pg_database WHERE datname = $1)";
    let doing = "asking for the data directory";
    let database = &config.local.datastore.database;
    let asked = local.row(doing, sql, &[database]).await.ok()?;
    let directory: String = asked.get::<Option<String>>(0).ok()??;
    // Empty for the server's own tablespaces, and relative for a tablespace within its directory.
    let tablespace: Option<String> = asked.get(1).ok()?;
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

pub(in crate::replication) async fn lz4(local: &LocalSession) -> Result<bool, PassError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals))";
    Ok(local.row("asking for lz4", sql, &[]).await?.get(0)?)
}
