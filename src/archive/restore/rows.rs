//! Restores the rows into a database of another name, and gives it its name at the end.

use super::Work;
use crate::archive::error::damaged;
use crate::archive::format::hex;
use crate::cluster::{BuilderDb, InstalledClients, LocalCluster, end_sessions};
use crate::domain::ErrorCode;
use crate::killpoint;
use crate::observe::{Phase, Progress};
use crate::replication::{ReplicationError, locale_options, replaced_name, scratch};
use sha2::{Digest, Sha256};
use std::path::Path;
use tokio::io::AsyncWriteExt;

impl Work<'_> {
    pub(super) async fn restore_rows(
        &self,
        name: &str,
        progress: &Progress,
    ) -> Result<(), ReplicationError> {
        let step = progress.begin(Phase::Dump, 0);
        let scratch = scratch()?;
        let dump = scratch.path().join("builder.dump");
        self.fetch_dump(&dump).await?;
        drop(step);
        let _step = progress.begin(Phase::Tables, 0);
        let (local, source) = (&self.config.local.datastore, &self.manifest.source);
        let server = self.session.major().await?;
        let properties = self
            .session
            .database_properties(&local.database, name)
            .await?;
        let owner = properties
            .owner
            .as_deref()
            .filter(|owner| *owner != local.user);
        let locale = locale_options(&source.database.to_string(), &source.encoding, server);
        self.session
            .create_database(
                "creating the database for the restore",
                name,
                &locale,
                owner,
                &properties,
            )
            .await?;
        killpoint::reach("restore.created");
        let dumped_by = source.pg_dump.parse().unwrap_or(server);
        let clients = InstalledClients::look()
            .await
            .for_restores(dumped_by, server)?;
        let clients = clients.for_encoding(&source.encoding);
        let jobs = self.config.replication.jobs;
        for section in ["pre-data", "data", "post-data"] {
            clients
                .restore(local, name, section, &dump, jobs, owner)
                .await?;
        }
        self.session.give_properties(&properties).await?;
        let inside = LocalCluster::of(self.config).database(name).await?;
        let found = BuilderDb::of(&inside).count_packages().await?;
        if found != self.manifest.packages {
            return Err(ReplicationError::Precondition {
                check: ErrorCode::RowCount,
                text: format!(
                    "the restored database has {found} packages, and the manifest names {}",
                    self.manifest.packages
                ),
                next_step: "run `warm-spare archive verify` for this generation, and report it"
                    .into(),
            });
        }
        Ok(())
    }

    /// Reads the dump into a file, and checks its bytes.
    async fn fetch_dump(&self, to: &Path) -> Result<(), ReplicationError> {
        let dump = &self.manifest.dump;
        let failed = |source| ReplicationError::Scratch {
            what: to.display().to_string(),
            source,
        };
        let reading = self.place.read(&dump.path).await?;
        let mut reading =
            reading.ok_or_else(|| damaged(self.place.name(), &dump.path, "it is not there"))?;
        let mut file = tokio::fs::File::create(to).await.map_err(failed)?;
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        while let Some(chunk) = reading.next().await? {
            hash.update(&chunk);
            bytes += chunk.len() as u64;
            file.write_all(&chunk).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        let found = hex(&hash.finalize());
        if bytes != dump.bytes || found != dump.sha256 {
            let text = format!(
                "expected {} bytes with SHA-256 {}, found {bytes} bytes with {found}",
                dump.bytes, dump.sha256
            );
            return Err(damaged(self.place.name(), &dump.path, &text));
        }
        Ok(())
    }

    /// Gives the restored database its name. A database that has the name is kept under another
    /// one, which is returned.
    pub(super) async fn give_name(
        &self,
        from: &str,
        to: &str,
    ) -> Result<Option<String>, ReplicationError> {
        let found = self.session.databases_named(to).await?;
        let replaced = found
            .iter()
            .any(|name| name == to)
            .then(|| replaced_name(to));
        for name in [from, to] {
            end_sessions(self.session, name).await?;
        }
        self.session.begin("beginning the rename").await?;
        if let Some(replaced) = &replaced {
            self.session
                .rename_database("renaming the replaced database", to, replaced)
                .await?;
        }
        self.session
            .rename_database("renaming the restored database", from, to)
            .await?;
        self.session.commit("committing the rename").await?;
        Ok(replaced)
    }
}
