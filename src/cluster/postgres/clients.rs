//! PostgreSQL's own client programs: `pg_dump` and `pg_restore` copy the schema.

use super::datastore::SESSION_OPTIONS;
use super::libpq;
use super::program::{Program, ProgramOutput, not_started, through_a_pipe};
use super::{login, toc};
use crate::config::Datastore;
use crate::domain::Side;
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// A pair of `pg_dump` and `pg_restore` of one major version.
#[derive(Debug, Clone)]
pub struct ClientPrograms {
    pub directory: PathBuf,
    pub major: u32,
    /// Versions of the servers that they will connect to.
    servers: Servers,
    /// Encoding of their connections.
    encoding: &'static str,
}

#[derive(Debug, Clone, Copy)]
struct Servers {
    primary: u32,
    spare: u32,
}

/// Options that leave out roles and tablespaces, because they belong to a server.
const NO_SERVER_OBJECTS: [&str; 3] = ["--no-owner", "--no-privileges", "--no-tablespaces"];
/// Options that leave out our own objects, and limit the wait for a lock.
const BUILDERS_ONLY: [&str; 4] = [
    "--exclude-schema=warm_spare",
    "--no-publications",
    "--no-subscriptions",
    "--lock-wait-timeout=10s",
];

#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error(
        "no pg_dump and pg_restore of a PostgreSQL major version from {from} to {to} is here (found: {found})"
    )]
    NoneFits { from: u32, to: u32, found: String },
    #[error("cannot run {program}: {source}")]
    Start {
        program: String,
        source: std::io::Error,
    },
    #[error("{program} failed: {text}")]
    Failed { program: String, text: String },
}

/// The pairs of programs on this machine.
pub struct InstalledClients(Vec<(PathBuf, u32)>);

impl InstalledClients {
    /// Asks each program for its version, all at once: on some systems it is a script, and slow.
    pub async fn look() -> InstalledClients {
        let asked = candidates().into_iter().map(|directory| async {
            let major = major_of(&directory.join("pg_dump")).await?;
            let both = directory.join("pg_restore").exists();
            both.then_some((directory, major))
        });
        let found = futures_util::future::join_all(asked).await;
        InstalledClients(found.into_iter().flatten().collect())
    }

    /// Returns programs that can read the primary and write a schema for the spare: primary ≤ major
    /// ≤ spare. The programs of the local datastore are preferred, then the oldest that fit.
    pub fn fitting(&self, primary: u32, spare: u32) -> Result<ClientPrograms, ProgramError> {
        let fit = || {
            let all = self.0.iter();
            all.filter(|(_, major)| (primary..=spare).contains(major))
        };
        let own = fit().find(|(directory, _)| directory.starts_with("/hab"));
        let best = own.or_else(|| fit().min_by_key(|(_, major)| *major));
        let (directory, major) = best.ok_or_else(|| ProgramError::NoneFits {
            from: primary,
            to: spare,
            found: self.in_words(),
        })?;
        Ok(ClientPrograms {
            directory: directory.clone(),
            major: *major,
            servers: Servers { primary, spare },
            encoding: "UTF8",
        })
    }

    /// Returns programs that dump a local server of that major version: of the same version, so that
    /// it can restore the dump, otherwise of the oldest newer one.
    pub fn for_dumps_of(&self, server: u32) -> Result<ClientPrograms, ProgramError> {
        match self.fitting(server, server) {
            Ok(clients) => Ok(clients),
            Err(_) => {
                let newer = self.fitting(server, u32::MAX)?;
                let servers = Servers {
                    primary: server,
                    spare: server,
                };
                Ok(ClientPrograms { servers, ..newer })
            }
        }
    }

    /// Returns programs that restore a dump of `pg_dump` of that major version into a server: the
    /// oldest that can read it, if possible not newer than the server.
    pub fn for_restores(
        &self,
        dumped_by: u32,
        server: u32,
    ) -> Result<ClientPrograms, ProgramError> {
        let fitting = self.fitting(dumped_by, server);
        let clients = fitting.or_else(|_| self.fitting(dumped_by.max(server), u32::MAX))?;
        let servers = Servers {
            primary: server,
            spare: server,
        };
        Ok(ClientPrograms { servers, ..clients })
    }

    fn in_words(&self) -> String {
        let all = self.0.iter();
        let all: Vec<String> = all
            .map(|(directory, major)| format!("{major} in {}", directory.display()))
            .collect();
        match all.is_empty() {
            true => "none".into(),
            false => all.join(", "),
        }
    }
}

/// Returns the directories of such programs: the one directory in `WARM_SPARE_PG_CLIENTS`,
/// otherwise Habitat's and Debian's directories and `PATH`.
fn candidates() -> Vec<PathBuf> {
    if let Some(only) = std::env::var_os("WARM_SPARE_PG_CLIENTS") {
        return vec![PathBuf::from(only)];
    }
    let mut directories = Vec::new();
    for (root, depth) in [("/hab/pkgs/core", 3), ("/usr/lib/postgresql", 1)] {
        let mut level = vec![PathBuf::from(root)];
        for _ in 0..depth {
            level = level.iter().flat_map(|dir| children(dir)).collect();
        }
        directories.extend(level.into_iter().map(|dir| dir.join("bin")));
    }
    if let Some(path) = std::env::var_os("PATH") {
        directories.extend(std::env::split_paths(&path));
    }
    directories.retain(|dir| dir.join("pg_dump").exists());
    directories
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let name = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("postgresql"))
    };
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    if directory.ends_with("core") {
        paths.retain(name);
    }
    paths.sort();
    paths
}

async fn major_of(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").output().await.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "pg_dump (PostgreSQL) 15.18 (Debian …)"
    let version = text.split(") ").nth(1)?;
    version.split('.').next()?.trim().parse().ok()
}

impl ClientPrograms {
    /// Returns the programs for a database of that encoding. `SQL_ASCII` does not define what its
    /// bytes mean, so they are not read as UTF-8.
    pub fn for_encoding(self, encoding: &str) -> ClientPrograms {
        match encoding {
            "SQL_ASCII" => ClientPrograms {
                encoding: "SQL_ASCII",
                ..self
            },
            _ => self,
        }
    }

    /// Dumps the schema, as the snapshot sees it, into `archive`.
    pub async fn dump_schema(
        &self,
        from: &Datastore,
        snapshot: &str,
        archive: &Path,
    ) -> Result<(), ProgramError> {
        self.dump(Side::Peer, from, snapshot, archive).await
    }

    async fn dump(
        &self,
        side: Side,
        from: &Datastore,
        snapshot: &str,
        archive: &Path,
    ) -> Result<(), ProgramError> {
        let mut program = self.pg_dump(side, from)?;
        program
            .command
            .args(["--format=custom", "--schema-only"])
            .args(NO_SERVER_OBJECTS)
            .args(BUILDERS_ONLY)
            .arg(format!("--snapshot={snapshot}"))
            .arg("--file")
            .arg(archive)
            .arg(to_database(&from.database));
        program.run().await
    }

    /// Dumps the whole of Builder's database of the local server, as the snapshot sees it, in
    /// format `custom`. The dump names owners and privileges, but nothing of ours.
    pub fn dump_database(
        &self,
        local: &Datastore,
        snapshot: &str,
    ) -> Result<ProgramOutput, ProgramError> {
        let mut program = self.pg_dump(Side::Local, local)?;
        program
            .command
            .arg("--format=custom")
            .args(BUILDERS_ONLY)
            .arg(format!("--snapshot={snapshot}"))
            .arg(to_database(&local.database));
        program.stream()
    }

    /// Lets `pg_dump` connect without dumping anything, because it reads certificates, host names
    /// and pg_hba.conf lines not exactly as our own sessions do.
    pub async fn try_out(
        &self,
        side: Side,
        to: &Datastore,
        database: &str,
    ) -> Result<(), ProgramError> {
        let mut program = self.pg_dump(side, to)?;
        program
            .command
            .args(["--schema-only", "--exclude-schema=*", "--file=/dev/null"])
            .arg(to_database(database));
        program.run().await
    }

    fn pg_dump(&self, side: Side, to: &Datastore) -> Result<Program, ProgramError> {
        let mut program = self.program("pg_dump", side, to)?;
        if side == Side::Local {
            program.name = "pg_dump of the local datastore".into();
        }
        Ok(program)
    }

    /// Restores one section of the archive into `database`, as `owner` if one is given: then all
    /// entries except those that only our own user may create.
    pub async fn restore(
        &self,
        to: &Datastore,
        database: &str,
        section: &str,
        archive: &Path,
        jobs: usize,
        owner: Option<&str>,
    ) -> Result<(), ProgramError> {
        let restoring = async |owner: Option<&str>, list: Option<&Path>| {
            let mut program = self.program("pg_restore", Side::Local, to)?;
            program
                .command
                .arg("--exit-on-error")
                .args(NO_SERVER_OBJECTS)
                .arg(format!("--section={section}"))
                .arg(format!("--jobs={jobs}"))
                .args(owner.map(|name| format!("--role={name}")))
                .args(list.map(|list| format!("--use-list={}", list.display())))
                .arg(to_database(database))
                .arg(archive);
            program.run().await
        };
        let Some(owner) = owner else {
            return restoring(None, None).await;
        };
        let runs = toc::runs(&self.contents(archive, section).await?);
        if runs.iter().all(|run| run.by_owner) {
            return restoring(Some(owner), None).await;
        }
        for run in runs {
            let list = archive.with_extension("list");
            std::fs::write(&list, &run.list).map_err(|source| not_started("pg_restore", source))?;
            restoring(run.by_owner.then_some(owner), Some(&list)).await?;
        }
        Ok(())
    }

    /// Returns the contents as `pg_restore --list` prints them.
    async fn contents(&self, archive: &Path, section: &str) -> Result<String, ProgramError> {
        let mut command = Command::new(self.directory.join("pg_restore"));
        command
            .env("LC_ALL", "C")
            .arg("--list")
            .arg(format!("--section={section}"))
            .arg(archive);
        let program = Program {
            name: "pg_restore --list".into(),
            command,
            _environment: None,
        };
        let output = program.output().await?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// Copies a whole database of the local server, as the snapshot sees it, into another local
    /// database. The rows are not stored on disk; `scratch` takes the schema.
    pub async fn copy_database(
        &self,
        server: &Datastore,
        snapshot: &str,
        to: &str,
        scratch: &Path,
        owner: Option<&str>,
    ) -> Result<(), ProgramError> {
        let archive = scratch.join("schema.dump");
        self.dump(Side::Local, server, snapshot, &archive).await?;
        self.restore(server, to, "pre-data", &archive, 1, owner)
            .await?;
        let mut dump = self.pg_dump(Side::Local, server)?;
        dump.command
            .args(["--format=custom", "--compress=0", "--data-only"])
            .args(NO_SERVER_OBJECTS)
            .args(BUILDERS_ONLY)
            .arg(format!("--snapshot={snapshot}"))
            .arg(to_database(&server.database));
        let mut restore = self.program("pg_restore", Side::Local, server)?;
        restore
            .command
            .args(["--exit-on-error", "--data-only"])
            .args(NO_SERVER_OBJECTS)
            .arg(to_database(to));
        through_a_pipe(dump, restore).await?;
        self.restore(server, to, "post-data", &archive, 1, owner)
            .await
    }

    fn program(&self, name: &str, side: Side, to: &Datastore) -> Result<Program, ProgramError> {
        let mut command = Command::new(self.directory.join(name));
        let environment =
            libpq::connect(&mut command, to).map_err(|source| not_started(name, source))?;
        command
            // We read their output too.
            .env("LC_ALL", "C")
            .env("PGCLIENTENCODING", self.encoding)
            .env("PGOPTIONS", self.options(side) + login::of(to));
        Ok(Program {
            name: name.to_string(),
            command,
            _environment: Some(environment),
        })
    }

    /// Returns the session options of the programs. They lift most limits themselves, but not the
    /// one on idle sessions: their sessions are idle between two indexes. A server refuses a limit
    /// that it does not know.
    fn options(&self, side: Side) -> String {
        let (server, read_only) = match side {
            Side::Peer => (self.servers.primary, "on"),
            Side::Local => (self.servers.spare, "off"),
        };
        let mut options = format!(
            "{SESSION_OPTIONS} -c search_path=pg_catalog -c default_transaction_read_only={read_only} -c maintenance_work_mem=256MB"
        );
        for (limit, since) in [("idle_session_timeout", 14), ("transaction_timeout", 17)] {
            if server >= since {
                options.push_str(&format!(" -c {limit}=0"));
            }
        }
        options
    }
}

/// Returns the argument for a database of any name: a plain name with `=` in it would be read as a
/// connection string.
fn to_database(name: &str) -> String {
    let quoted = name.replace('\\', r"\\").replace('\'', r"\'");
    format!("--dbname=dbname='{quoted}'")
}
