//! A site as Chef's on-prem installer leaves it: one node with the Supervisor and Builder's services
//! in their `default` groups, their configuration in `user.toml` and in gossip, the datastore's
//! password, and the builder key pair.
//!
//! The Supervisor, PostgreSQL, MinIO and memcached are real, and builder-api is where `WARM_SPARE_BLDR_API` names it. The
//! packages of origin `habitat` are stand-ins with the names, binds, exports, files and modes of the real ones, and so
//! are Chef's scripts.

mod packages;
mod scripts;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::builder_keys::BuilderKey;
use super::habitat::ROOT;
use super::machine::Machine;
use super::packages::{Factory, Package, Spec, account, insert_rows};
use super::process::{find_program, on_path};
use super::service::SOON;
use super::supervisor::Programs;
use super::{Result, S3, wait_until};

/// The releases that the installer finds.
const DEPOT: &str = "/var/depot";
/// The folder of Chef's on-prem repository.
pub const SCRIPTS: &str = "/root/on-prem-builder";
const BUCKET: &str = "habitat-builder-artifact-store.local";

/// Programs of this machine that the sites use.
pub struct Parts {
    hab: Programs,
    postgres: PathBuf,
    minio: PathBuf,
    memcached: PathBuf,
    /// Builder's real API. None: a stand-in that writes at its start and then answers `/v1/status`.
    builder_api: Option<PathBuf>,
    warm_spare: PathBuf,
}

impl Parts {
    /// Returns the reason why no site can be made here.
    pub fn find() -> Result<Parts, String> {
        let program =
            |name: &str| find_program(on_path(name)).ok_or(format!("there is no {name} on PATH"));
        let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
        for name in ["ip", "nsenter", "unshare", "xz"] {
            program(name)?;
        }
        Ok(Parts {
            hab: Programs::find_without_users()?,
            postgres: named("WARM_SPARE_PG_BIN").ok_or("WARM_SPARE_PG_BIN is not set")?,
            minio: named("WARM_SPARE_MINIO").ok_or("WARM_SPARE_MINIO is not set")?,
            memcached: program("memcached")?,
            builder_api: named("WARM_SPARE_BLDR_API"),
            warm_spare: super::site::default_program(),
        })
    }
}

/// A node of a site.
pub struct Node {
    pub machine: Machine,
    factory: Factory,
    /// What was uploaded.
    packages: Vec<Package>,
    real_api: bool,
}

impl Node {
    /// Prepares the node as it is before Builder is installed: hab, its user, and the packages that an
    /// installation would bring.
    pub async fn new(machine: Machine, parts: &Parts) -> Result<Node> {
        let node = Node {
            machine,
            factory: Factory::seeded(),
            packages: Vec::new(),
            real_api: parts.builder_api.is_some(),
        };
        for (name, from) in parts.hab.files() {
            node.program(from, &format!("/usr/bin/{name}"))?;
        }
        node.machine
            .must("groupadd --system hab; useradd --system --no-create-home -g hab hab; hab license accept")
            .await?;
        node.lay_out(parts)?;
        node.write_scripts()?;
        let offer = format!("ln -sfn first {DEPOT}/newest");
        node.machine.must(&offer).await?;
        Ok(node)
    }

    fn program(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.machine.path(to);
        fs::create_dir_all(to.parent().ok_or("a directory")?)?;
        fs::copy(from, &to)?;
        Ok(fs::set_permissions(to, fs::Permissions::from_mode(0o755))?)
    }

    fn file(&self, path: &str, text: &str, mode: u32) -> Result<()> {
        let to = self.machine.path(path);
        fs::create_dir_all(to.parent().ok_or("a directory")?)?;
        fs::write(&to, text)?;
        Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
    }

    /// Runs the installer as its operator does, and waits for Builder. Returns what it says about the key.
    pub async fn install(&mut self) -> Result<String> {
        let script = format!("cd {SCRIPTS} && HAB_LICENSE=accept ./install.sh");
        let said = self.machine.must(&script).await?;
        self.until_builder().await;
        let line = said.lines().find(|line| line.contains("builder key"));
        Ok(line.unwrap_or_default().to_string())
    }

    /// Waits until Builder answers, and its bucket is there.
    pub async fn until_builder(&self) {
        wait_until("Builder", SOON, || async {
            let ask = "curl -fsS http://localhost:9636/v1/status";
            self.machine.must(ask).await.map(drop)
        })
        .await;
        wait_until("the bucket", SOON, || async {
            match self.store()?.has_bucket(BUCKET).await? {
                true => Ok(()),
                false => Err("not yet".into()),
            }
        })
        .await;
    }

    /// From now on the installer finds the second release.
    pub async fn offer_upgrade(&self) -> Result<()> {
        let offer = format!("ln -sfn second {DEPOT}/newest");
        self.machine.must(&offer).await.map(drop)
    }

    /// Returns a client of its artifact store.
    fn store(&self) -> Result<S3> {
        let endpoint = format!("http://{}:9000", self.machine.address);
        S3::new(&endpoint, "depot", "password", None)
    }

    pub async fn start_supervisor(&self) -> Result<()> {
        self.machine.must("systemctl start hab-sup").await.map(drop)
    }

    /// The node loses its power.
    pub async fn cut_power(&self) -> Result<()> {
        self.machine.cut_power().await
    }

    /// Uploads a package, as builder-api does: the object, then its rows.
    pub async fn upload(&mut self, name: &str) -> Result<Package> {
        let package = self.factory.make(Spec::new("core", name, "1"));
        let store = self.store()?;
        store.put(BUCKET, &package.key, package.bytes()).await?;
        let client = self.connect().await?;
        let known = "SELECT 1 FROM origins WHERE name = 'core'";
        if client.query_opt(known, &[]).await?.is_none() {
            let owner = account(&client, "owner").await?;
            let member = account(&client, "member").await?;
            self.factory
                .origin_rows(&client, "core", owner, member)
                .await?;
        }
        insert_rows(&client, &package).await?;
        self.packages.push(package.clone());
        Ok(package)
    }

    pub fn has_real_api(&self) -> bool {
        self.real_api
    }

    /// Returns the ident of the first uploaded package.
    pub fn first_ident(&self) -> String {
        self.packages[0].ident.clone()
    }

    /// Gives the owner of origin `core` an access token.
    pub async fn token(&self, key: &BuilderKey) -> Result<String> {
        let client = self.connect().await?;
        let sql = "SELECT id FROM accounts WHERE name = 'owner'";
        let account: i64 = client.query_one(sql, &[]).await?.get(0);
        let token = key.token(account);
        let sql = "INSERT INTO account_tokens (account_id, token) VALUES ($1, $2) \
                   ON CONFLICT (account_id) DO UPDATE SET token = excluded.token";
        client.execute(sql, &[&account, &token]).await?;
        Ok(token)
    }

    /// Seals the secrets in Builder's database by the builder key of the site.
    pub async fn seal(&self, key: &BuilderKey) -> Result<()> {
        key.seal_in(&self.connect().await?).await
    }

    /// Opens a session in Builder's database.
    async fn connect(&self) -> Result<tokio_postgres::Client> {
        let password = self
            .machine
            .must("cat /hab/svc/builder-datastore/config/pwfile")
            .await?;
        let to = format!(
            "host={} user=hab dbname=builder password={}",
            self.machine.address,
            password.trim()
        );
        let (client, connection) = tokio_postgres::connect(&to, tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Makes the two files that `hab pkg build` gives to those who install: the package, signed, and the
    /// public key of its origin.
    pub async fn build_package(&self, parts: &Parts, origin: &str) -> Result<()> {
        let script = format!(
            "set -e\ncd /tmp && mkdir -p build && export HAB_CACHE_KEY_PATH=/tmp/keys\n\
             hab origin key generate {origin}\n\
             HAB_ORIGIN={origin} WARM_SPARE_RELEASE=20261130101530 WARM_SPARE_BIN={} {ROOT}/scripts/package build/hab/pkgs\n\
             XZ_OPT=-0 tar -C build -cJf {origin}.tar.xz hab\n\
             version=$(ls build/hab/pkgs/{origin}/warm-spare)\n\
             hab pkg sign --origin {origin} {origin}.tar.xz /root/{origin}-warm-spare-$version-20261130101530-x86_64-linux.hart\n\
             hab origin key export {origin} --type public > /root/{origin}.pub\n\
             rm -r build {origin}.tar.xz keys",
            parts.warm_spare.display(),
        );
        self.machine.must(&script).await.map(drop)
    }
}
