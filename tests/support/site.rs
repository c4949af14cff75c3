//! A primary and a spare for one test, and the configuration that joins them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio_postgres::Client;
use toml::{Table, Value};

use super::process::{bound, server_dir};
use super::servers::shared_stores;
use super::{Minio, Output, Postgres, Result, Running, S3, Servers, postgres};

/// Our own copy of Builder's schema.
pub const SCHEMA: &str = include_str!("schema.sql");

/// Maximum time of one run of the program in a test.
const RUN_LIMIT: Duration = Duration::from_secs(300);

/// One side: a datastore and an artifact store.
#[derive(Clone)]
pub struct Cluster {
    pub pg: Arc<Postgres>,
    pub database: String,
    pub minio: Arc<Minio>,
    pub bucket: String,
    s3: S3,
}

impl Cluster {
    /// Makes the bucket, but not the database.
    pub async fn new(pg: Arc<Postgres>, minio: Arc<Minio>, bucket: &str) -> Result<Self> {
        let s3 = minio.s3()?;
        s3.create_bucket(bucket).await?;
        Ok(Self {
            pg,
            database: "builder".into(),
            minio,
            bucket: bucket.into(),
            s3,
        })
    }

    /// Makes the database, with Builder's schema in it.
    pub async fn create_builder_database(&self) -> Result<()> {
        self.pg.create_database(&self.database).await?;
        self.make_builders_tables().await
    }

    /// Makes Builder's tables in the existing database.
    pub async fn make_builders_tables(&self) -> Result<()> {
        Ok(self.conn().await?.batch_execute(SCHEMA).await?)
    }

    /// Opens a session in the database.
    pub async fn conn(&self) -> Result<Client> {
        self.pg.conn(&self.database).await
    }

    pub fn s3(&self) -> &S3 {
        &self.s3
    }

    pub async fn put(&self, key: &str, bytes: impl Into<bytes::Bytes>) -> Result<()> {
        self.s3.put(&self.bucket, key, bytes).await
    }

    pub async fn get(&self, key: &str) -> Result<Option<bytes::Bytes>> {
        self.s3.get(&self.bucket, key).await
    }

    pub async fn delete(&self, key: &str) -> Result<()> {
        self.s3.delete(&self.bucket, key).await
    }

    /// Returns all keys, including ours under `.warm-spare/`.
    pub async fn keys(&self) -> Result<Vec<String>> {
        self.s3.list(&self.bucket, "").await
    }

    fn config(&self) -> Table {
        let text = format!(
            r#"
            [datastore]
            host = "{}"
            port = {}
            user = "{}"
            password = "{}"
            database = "{}"
            [s3]
            backend = "minio"
            endpoint = "{}"
            bucket_name = "{}"
            key_id = "{}"
            secret_key = "{}""#,
            self.pg.host(),
            self.pg.port(),
            self.pg.user(),
            self.pg.password(),
            self.database,
            self.minio.endpoint(),
            self.bucket,
            self.minio.access_key(),
            self.minio.secret_key(),
        );
        text.parse().expect("it is TOML")
    }
}

/// A primary with an empty Builder database, and a spare without any.
pub struct Site {
    pub primary: Cluster,
    pub spare: Cluster,
    pub dir: TempDir,
    /// The program under test.
    pub program: PathBuf,
    /// Variables that are set for every run of it.
    pub environment: Vec<(String, String)>,
}

/// The properties that may differ from `site(name)`.
pub struct Builder {
    name: String,
    primary: postgres::Builder,
    spare: postgres::Builder,
    own_stores: bool,
    one_bucket: bool,
    one_file_system: bool,
    spare_database: bool,
}

impl Builder {
    pub fn primary(mut self, postgres: postgres::Builder) -> Self {
        self.primary = postgres;
        self
    }

    pub fn spare(mut self, postgres: postgres::Builder) -> Self {
        self.spare = postgres;
        self
    }

    /// Uses its own MinIO servers, for a test that stops, kills or freezes them.
    pub fn own_stores(mut self) -> Self {
        self.own_stores = true;
        self
    }

    /// Uses one bucket for both sides.
    pub fn one_bucket(mut self) -> Self {
        self.one_bucket = true;
        self
    }

    /// Uses one file system for both sides, which the primary has: the store of the spare does not
    /// run.
    pub fn one_file_system(mut self) -> Self {
        self.one_file_system = true;
        self
    }

    /// Uses a spare on which Builder was installed, so that it has a database.
    pub fn spare_database(mut self) -> Self {
        self.spare_database = true;
        self
    }

    pub async fn start(self) -> Result<Site> {
        let stores = async {
            if self.own_stores {
                let (primary, spare) = tokio::try_join!(Minio::start(), Minio::start())?;
                return Ok((Arc::new(primary), Arc::new(spare)));
            }
            shared_stores().await
        };
        let (primary_pg, spare_pg, (primary_s3, spare_s3)) =
            tokio::try_join!(self.primary.start(), self.spare.start(), stores)?;
        let servers = Servers {
            primary_pg: Arc::new(primary_pg),
            spare_pg: Arc::new(spare_pg),
            primary_s3,
            spare_s3,
        };
        let mut site = Site::on(&servers, &self.name, self.spare_database).await?;
        if self.one_bucket {
            let (spare, primary) = (&mut site.spare, &site.primary);
            (spare.minio, spare.s3) = (primary.minio.clone(), primary.s3.clone());
            spare.bucket.clone_from(&primary.bucket);
        }
        if self.one_file_system {
            let store = Minio::builder().credentials_of(&site.primary.minio);
            let store = store.start().await?;
            store.stop().await?;
            site.spare.s3 = store.s3()?;
            site.spare.minio = Arc::new(store);
            site.spare.bucket.clone_from(&site.primary.bucket);
        }
        Ok(site)
    }
}

/// Makes a site with its own datastores (the program's state has one name for each server), and its
/// own buckets on shared stores.
pub async fn site(name: &str) -> Site {
    Site::builder(name).start().await.expect("the site starts")
}

impl Site {
    pub fn builder(name: &str) -> Builder {
        Builder {
            name: name.into(),
            primary: Postgres::builder(),
            spare: Postgres::builder(),
            own_stores: false,
            one_bucket: false,
            one_file_system: false,
            spare_database: false,
        }
    }

    /// Makes a site whose servers are all its own, for a test that stops, kills or freezes them.
    pub async fn own_servers(name: &str) -> Self {
        let site = Self::builder(name).own_stores().start().await;
        site.expect("the site starts")
    }

    async fn on(servers: &Servers, name: &str, spare_database: bool) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let bucket = |side: &str| format!("{}-{number}-{side}", name.replace('_', "-"));
        let (primary_bucket, spare_bucket) = (bucket("primary"), bucket("spare"));
        let (primary_pg, primary_s3) = (servers.primary_pg.clone(), servers.primary_s3.clone());
        let (spare_pg, spare_s3) = (servers.spare_pg.clone(), servers.spare_s3.clone());
        let (primary, spare) = tokio::try_join!(
            Cluster::new(primary_pg, primary_s3, &primary_bucket),
            Cluster::new(spare_pg, spare_s3, &spare_bucket),
        )?;
        primary.create_builder_database().await?;
        if spare_database {
            spare.create_builder_database().await?;
        }
        Ok(Self {
            primary,
            spare,
            dir: server_dir("site-")?,
            program: default_program(),
            environment: Vec::new(),
        })
    }

    /// Returns the same two clusters with the spare as the primary.
    pub fn turned(&self) -> Result<Site> {
        Ok(Site {
            primary: self.spare.clone(),
            spare: self.primary.clone(),
            dir: server_dir("site-")?,
            program: self.program.clone(),
            environment: self.environment.clone(),
        })
    }

    /// Makes another spare of the same primary, with its own servers.
    pub async fn other_spare(&self, name: &str) -> Result<Site> {
        let (pg, minio) = tokio::try_join!(Postgres::builder().start(), Minio::start())?;
        Ok(Site {
            primary: self.primary.clone(),
            spare: Cluster::new(Arc::new(pg), Arc::new(minio), name).await?,
            dir: server_dir("site-")?,
            program: self.program.clone(),
            environment: self.environment.clone(),
        })
    }

    /// Returns the file that `write_config` writes.
    pub fn config_file(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }

    /// Writes the spare's configuration, with the lines of `extra` added or replacing ours.
    pub fn write_config(&self, extra: &str) -> PathBuf {
        let mut config: Table = r#"
            role = "spare"
            [local]
            builder_api_config = ""
            builder_keys_dir = ""
            [peer]
            [replication]
            gate_grace = "1s""#
            .parse()
            .expect("it is TOML");
        let sides = [("local", &self.spare), ("peer", &self.primary)];
        for (side, cluster) in sides {
            let nested = Table::from_iter([(side.to_string(), cluster.config().into())]);
            merge(&mut config, nested);
        }
        merge(&mut config, extra.parse().expect("`extra` is TOML"));
        let file = self.config_file();
        write_secret(&file, &config.to_string()).expect("the configuration is written");
        file
    }

    /// Runs the program to its end.
    pub async fn warm_spare(&self, arguments: &[&str]) -> Output {
        let running = self.spawn(arguments);
        running.wait(RUN_LIMIT).await.expect("the program ends")
    }

    pub fn spawn(&self, arguments: &[&str]) -> Running {
        if !self.config_file().exists() {
            self.write_config("");
        }
        self.spawn_with_config(&self.config_file(), arguments)
    }

    pub fn spawn_with_config(&self, config: &Path, arguments: &[&str]) -> Running {
        self.spawn_with(config, arguments, &[])
    }

    /// Starts the program with more variables than every run of this site has.
    pub fn spawn_with(
        &self,
        config: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Running {
        let mut command = bound(&self.program);
        command
            .arg("--config")
            .arg(config)
            .args(arguments)
            .current_dir(self.dir.path())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .envs(environment.iter().copied());
        Running::start(command).expect("the program starts")
    }
}

/// Returns `WARM_SPARE_BIN`, or the program that Cargo has built with the running one: two folders
/// above it.
pub fn default_program() -> PathBuf {
    let named = std::env::var_os("WARM_SPARE_BIN").map(PathBuf::from);
    let built = || {
        let ours = std::env::current_exe().ok()?;
        Some(ours.parent()?.parent()?.join("warm-spare"))
    };
    named.or_else(built).unwrap_or_else(|| "warm-spare".into())
}

pub fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

pub fn write_secret(file: &Path, text: &str) -> std::io::Result<()> {
    fs::write(file, text)?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600))
}
