//! An archive as a person without warm-spare meets it: files, restored with `pg_restore` and `cp`, checked with `b2sum`.

use super::packages::{blake2b, object_key};
use super::postgres::Postgres;
use super::{Cluster, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::process::Command;

/// Files of an archive that is a directory.
pub struct Archive(pub PathBuf);

/// A generation that was restored by hand: the rows, and each artifact's bytes by its key in Builder's bucket.
pub struct ByHand {
    pub rows: Vec<String>,
    pub artifacts: BTreeMap<String, Vec<u8>>,
}

impl Archive {
    pub fn manifest(&self, name: &str) -> Result<Value> {
        let path = self.0.join("generations").join(name).join("manifest.json");
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// Returns the names of the generations that have a manifest, the oldest first.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.0.join("generations"))? {
            let entry = entry?;
            if entry.path().join("manifest.json").exists() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Returns the paths of all files below a folder, as the archive names them.
    pub fn files(&self, folder: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.0.join(folder)];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.path() {
                    path if path.is_dir() => folders.push(path),
                    path => found.push(
                        path.strip_prefix(&self.0)
                            .expect("below")
                            .display()
                            .to_string(),
                    ),
                }
            }
        }
        found.sort();
        found
    }

    /// Restores a generation as README.txt says, into a new database of a server. Each file's bytes are checked.
    pub async fn restore_by_hand(
        &self,
        name: &str,
        pg: &Arc<Postgres>,
        database: &str,
    ) -> Result<ByHand> {
        let manifest = self.manifest(name)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let dump = self.0.join(text(&manifest["dump"]["path"]));
        let environment = [
            ("PGHOST", pg.host().to_string()),
            ("PGPORT", pg.port().to_string()),
            ("PGUSER", pg.user().to_string()),
            ("PGPASSWORD", pg.password().to_string()),
        ];
        let run = async |program: PathBuf, arguments: &[&str]| -> Result<()> {
            let mut command = Command::new(&program);
            command
                .args(arguments)
                .envs(environment.iter().map(|(k, v)| (k, v)));
            let output = command.output().await?;
            match output.status.success() {
                true => Ok(()),
                false => Err(format!(
                    "{}: {}",
                    program.display(),
                    String::from_utf8_lossy(&output.stderr)
                )
                .into()),
            }
        };
        run(
            pg.program("createdb"),
            &[
                "--template=template0",
                "--encoding=UTF8",
                "--lc-collate=C",
                "--lc-ctype=C",
                database,
            ],
        )
        .await?;
        let to = format!("--dbname={database}");
        let dump = dump.display().to_string();
        run(
            pg.program("pg_restore"),
            &[
                &to,
                "--no-owner",
                "--no-privileges",
                "--exit-on-error",
                &dump,
            ],
        )
        .await?;
        sha256sum(&self.0, &manifest["dump"]).await?;
        let mut artifacts = BTreeMap::new();
        for list in manifest["lists"].as_array().ok_or("no lists")? {
            sha256sum(&self.0, list).await?;
            let lines = std::fs::read_to_string(self.0.join(text(&list["path"])))?;
            for line in lines.lines() {
                let entry: Value = serde_json::from_str(line)?;
                let bytes = std::fs::read(self.0.join(text(&entry["path"])))?;
                let found = blake2b().update(&bytes).finalize().to_hex().to_string();
                if found != text(&entry["checksum"]) || bytes.len() as u64 != entry["bytes"] {
                    return Err(format!("{entry}: found {} bytes with {found}", bytes.len()).into());
                }
                if artifacts.insert(text(&entry["key"]), bytes).is_some() {
                    return Err(format!("{entry}: its key is there twice").into());
                }
            }
        }
        let rows = super::packages::rows_of(&pg.conn(database).await?).await?;
        Ok(ByHand { rows, artifacts })
    }
}

async fn sha256sum(root: &Path, file: &Value) -> Result<()> {
    let path = file["path"].as_str().ok_or("no path")?;
    let output = Command::new("sha256sum")
        .arg(root.join(path))
        .output()
        .await?;
    let found = String::from_utf8_lossy(&output.stdout);
    let found = found
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_string();
    match file["sha256"] == found.as_str() {
        true => Ok(()),
        false => Err(format!("{path}: expected {}, found {found}", file["sha256"]).into()),
    }
}

impl ByHand {
    /// Fails unless each row of a package has its artifact, with the bytes that the row names.
    pub async fn is_whole(&self, pg: &Postgres, database: &str, except: &[String]) -> Result<()> {
        let client = pg.conn(database).await?;
        let sql = "SELECT ident, target, checksum FROM origin_packages";
        let mut named = 0;
        for row in client.query(sql, &[]).await? {
            let (ident, target, checksum): (String, String, String) =
                (row.get(0), row.get(1), row.get(2));
            let key = object_key(&ident, &target);
            if except.contains(&key) {
                continue;
            }
            named += 1;
            let bytes = self
                .artifacts
                .get(&key)
                .ok_or_else(|| format!("{key} is not there"))?;
            let found = blake2b().update(bytes).finalize().to_hex().to_string();
            if found != checksum {
                return Err(format!("{key}: the row names {checksum}, found {found}").into());
            }
        }
        match named == self.artifacts.len() {
            true => Ok(()),
            false => Err(format!("{named} rows, {} artifacts", self.artifacts.len()).into()),
        }
    }
}

/// Returns the cluster with another database.
pub fn with_database(cluster: &Cluster, database: &str) -> Cluster {
    let mut cluster = cluster.clone();
    cluster.database = database.into();
    cluster
}
