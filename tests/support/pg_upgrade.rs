//! An upgrade of a datastore's PostgreSQL, with the acts of builder-datastore's own hook.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::postgres::{Release, new_data, own, run, run_alone, unprivileged};
use super::{Postgres, Result};

impl Postgres {
    /// Makes a new server of another version, at the same address and with the same password, and gives it database
    /// `builder` alone. All other databases, the fence and what `ALTER SYSTEM` has set stay in the old data directory.
    /// A server is upgraded once.
    pub async fn upgrade(&self, programs: &Path) -> Result<()> {
        let new = Release::of(programs)?;
        self.stop_fast().await?;
        self.start_without_configuration().await?;
        let dump = self.dir.path().join("upgrade.sql");
        let mut out = Command::new(programs.join("pg_dump"));
        out.args(["--quote-all-identifiers", "-d"])
            .arg(self.url("builder"))
            .arg("-f")
            .arg(&dump);
        unprivileged(&mut out);
        tokio::task::spawn_blocking(move || run(&mut out, "")).await??;
        self.stop_fast().await?;

        let (data, password) = (self.data_dir(), self.password().to_string());
        let (programs, directory) = (new.programs.clone(), self.dir.path().to_path_buf());
        tokio::task::spawn_blocking(move || -> Result<()> {
            let previous = directory.join("previous");
            fs::rename(&data, &previous)?;
            new_data(&programs, &directory)?;
            // Habitat renders it, so it is the same before and after.
            fs::copy(previous.join("pg_hba.conf"), data.join("pg_hba.conf"))?;
            own(&directory)?;
            let statement = format!("ALTER ROLE hab PASSWORD '{password}'\n");
            run_alone(&programs, &data, "md5", &statement)
        })
        .await??;
        assert!(self.upgraded.set(new).is_ok(), "it was upgraded already");
        self.start_again().await?;
        self.create_database("builder").await?;
        let mut load = Command::new(self.program("psql"));
        load.args(["--quiet", "--set=ON_ERROR_STOP=1", "-d"])
            .arg(self.url("builder"))
            .arg("-f")
            .arg(&dump);
        tokio::task::spawn_blocking(move || run(&mut load, "")).await?
    }
}
