//! A site as Chef's on-prem installer leaves it: one node with the Supervisor and Builder's services
//! in their `default` groups, their configuration in `user.toml` and in gossip, the datastore's
//! password, and the builder key pair.
//!
//! The Supervisor, PostgreSQL, MinIO and memcached are real. The packages of origin `habitat` are
//! stand-ins with the names, binds, exports, files and modes of the real ones. builder-api is one that
//! writes to the database when it starts, as the real one does, and then answers `/v1/status`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::builder_keys::BuilderKey;
use super::habitat::ROOT;
use super::machine::Machine;
use super::packages::{Factory, Package, Spec, account, insert_rows};
use super::process::{find_program, on_path};
use super::service::SOON;
use super::supervisor::Programs;
use super::{Result, Running, S3, wait_until};

const RELEASE: &str = "20260101000000";
const BUCKET: &str = "habitat-builder-artifact-store.local";

/// Programs of this machine that the sites use.
pub struct Parts {
    hab: Programs,
    postgres: PathBuf,
    minio: PathBuf,
    memcached: PathBuf,
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
            warm_spare: super::site::default_program(),
        })
    }
}

/// A node of a site.
pub struct Node {
    pub machine: Machine,
    supervisor: Option<Running>,
    factory: Factory,
}

impl Node {
    /// Prepares the node as it is before Builder is installed: hab, its user, and the packages that an
    /// installation would bring.
    pub async fn new(machine: Machine, parts: &Parts) -> Result<Node> {
        let node = Node {
            machine,
            supervisor: None,
            factory: Factory::seeded(),
        };
        for (name, from) in parts.hab.files() {
            node.program(from, &format!("/usr/bin/{name}"))?;
        }
        node.machine
            .must("groupadd --system hab; useradd --system --no-create-home -g hab hab; hab license accept")
            .await?;
        node.lay_out(parts)?;
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

    /// Lays out the installed packages.
    fn lay_out(&self, parts: &Parts) -> Result<()> {
        let busybox = find_program(on_path("busybox")).ok_or("there is no busybox")?;
        let folder = self.package("core/busybox-static/1.0.0", &[])?;
        self.program(&busybox, &format!("{folder}/bin/busybox"))?;
        let folder = self.package("core/postgresql17/17.0", &[])?;
        for program in [
            "psql",
            "pg_dump",
            "pg_restore",
            "initdb",
            "postgres",
            "createdb",
        ] {
            let link = self.machine.path(&format!("{folder}/bin/{program}"));
            std::os::unix::fs::symlink(parts.postgres.join(program), link)?;
        }
        let postgres = parts.postgres.display();
        let memcached = parts.memcached.display();
        let schema = fs::read_to_string(Path::new(ROOT).join("tests/support/schema.sql"))?;

        let folder = self.package(
            "habitat/builder-datastore/1.0.0",
            &[
                ("EXPORTS", "port=port\n"),
                (
                    "default.toml",
                    "port = 5432\nmax_locks_per_transaction = 64\n",
                ),
                ("config/pg_hba.conf", PG_HBA),
            ],
        )?;
        let run = RUN_DATASTORE.replace("POSTGRES", &postgres.to_string());
        self.file(&format!("{folder}/hooks/run"), &run, 0o755)?;

        let folder = self.package(
            "habitat/builder-minio/1.0.0",
            &[
                ("EXPORTS", "port=port\nbucket-name=bucket_name\n"),
                ("default.toml", "port = 9000\nkey_id = \"depot\"\nsecret_key = \"password\"\nbucket_name = \"habitat-builder-artifact-store.default\"\n"),
            ],
        )?;
        self.program(&parts.minio, &format!("{folder}/bin/minio"))?;
        self.file(&format!("{folder}/hooks/run"), RUN_MINIO, 0o755)?;

        let folder = self.package(
            "habitat/builder-memcached/1.0.0",
            &[
                ("EXPORTS", "port=port\n"),
                ("default.toml", "port = 11211\n"),
            ],
        )?;
        let run =
            format!("#!/bin/bash\nexec 2>&1\nexec {memcached} -l 127.0.0.1 -p {{{{cfg.port}}}}\n");
        self.file(&format!("{folder}/hooks/run"), &run, 0o755)?;

        let folder = self.package(
            "habitat/builder-api/1.0.0",
            &[
                ("EXPORTS", "port=http.port\n"),
                ("BINDS", "memcached=port\n"),
                ("default.toml", API_DEFAULT),
                ("config/config.toml", API_CONFIG),
                ("schema.sql", &schema),
            ],
        )?;
        let run = RUN_API.replace("POSTGRES", &postgres.to_string());
        self.file(&format!("{folder}/hooks/run"), &run, 0o755)
    }

    /// Lays out one package, and returns its folder.
    fn package(&self, name: &str, files: &[(&str, &str)]) -> Result<String> {
        let ident = format!("{name}/{RELEASE}");
        let folder = format!("/hab/pkgs/{ident}");
        fs::create_dir_all(self.machine.path(&format!("{folder}/bin")))?;
        let bin = format!("{folder}/bin");
        let common = [
            ("IDENT", ident.as_str()),
            ("TARGET", "x86_64-linux"),
            ("PATH", &bin),
            ("RUNTIME_PATH", &bin),
            ("SVC_USER", "hab"),
            ("SVC_GROUP", "hab"),
        ];
        for (file, text) in common.iter().chain(files) {
            self.file(&format!("{folder}/{file}"), text, 0o644)?;
        }
        Ok(folder)
    }

    /// Does what the installer does: starts the Supervisor, writes each `user.toml`, loads the services,
    /// gossips the datastore's password, and then the builder key that is in `/hab/cache/keys`, or a
    /// new one. Returns what it says about the key.
    pub async fn install(&mut self) -> Result<String> {
        self.start_supervisor().await?;
        for (service, text) in [
            ("builder-datastore", "max_locks_per_transaction = 128\n"),
            ("builder-minio", MINIO_USER),
            ("builder-api", API_USER),
        ] {
            self.file(
                &format!("/hab/user/{service}/config/user.toml"),
                text,
                0o644,
            )?;
        }
        let said = self.machine.must(INSTALL).await?;
        wait_until("Builder", SOON, || async {
            self.machine
                .must("curl -fsS http://localhost:9636/v1/status")
                .await
                .map(drop)
        })
        .await;
        let store = self.store()?;
        wait_until("the bucket", SOON, || async {
            match store.has_bucket(BUCKET).await? {
                true => Ok(()),
                false => Err("not yet".into()),
            }
        })
        .await;
        let line = said.lines().find(|line| line.contains("builder key"));
        Ok(line.unwrap_or_default().to_string())
    }

    /// Returns a client of its artifact store.
    fn store(&self) -> Result<S3> {
        let endpoint = format!("http://{}:9000", self.machine.address);
        S3::new(&endpoint, "depot", "password", None)
    }

    /// Starts the Supervisor, as the unit `hab-sup` does.
    pub async fn start_supervisor(&mut self) -> Result<()> {
        let run = "export HAB_SUP_BINARY=/usr/bin/hab-sup HAB_LAUNCH_BINARY=/usr/bin/hab-launch\n\
                   cd / && exec hab sup run --no-color > /var/log/hab-sup.log 2>&1";
        self.supervisor = Some(self.machine.spawn("root", run)?);
        wait_until("the Supervisor", Duration::from_secs(60), || async {
            self.machine.must("hab svc status").await.map(drop)
        })
        .await;
        Ok(())
    }

    /// The node loses its power.
    pub async fn cut_power(&mut self) -> Result<()> {
        self.machine.cut_power().await?;
        self.supervisor = None;
        Ok(())
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
        Ok(package)
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

const PG_HBA: &str = "local all all trust\nhost all hab 0.0.0.0/0 md5\nhost all all 127.0.0.1/32 trust\n\
                      host all all ::1/128 trust\nhost all all 0.0.0.0/0 md5\n";

const RUN_DATASTORE: &str = r#"#!/bin/bash
exec 2>&1
set -e
data={{pkg.svc_data_path}}/pgdata
pwfile={{pkg.svc_config_path}}/pwfile
if [ ! -f "$data/PG_VERSION" ]; then
    head -c 33 /dev/urandom | base64 -w 0 > "$pwfile"
    chmod 0400 "$pwfile"
    POSTGRES/initdb -D "$data" --username hab --pwfile "$pwfile" --auth trust --encoding UTF8 --locale C.UTF-8 > /dev/null
fi
exec POSTGRES/postgres -D "$data" -c port={{cfg.port}} -c listen_addresses='*' -c unix_socket_directories=/tmp \
    -c hba_file={{pkg.svc_config_path}}/pg_hba.conf -c password_encryption=md5 \
    -c max_wal_senders=20 -c max_replication_slots=20 -c max_locks_per_transaction={{cfg.max_locks_per_transaction}}
"#;

const RUN_MINIO: &str = r#"#!/bin/bash
exec 2>&1
export MINIO_ROOT_USER={{cfg.key_id}} MINIO_ROOT_PASSWORD={{cfg.secret_key}}
mkdir -p {{pkg.svc_data_path}}/{{cfg.bucket_name}}
exec {{pkg.path}}/bin/minio server --address :{{cfg.port}} {{pkg.svc_data_path}}
"#;

const RUN_API: &str = r#"#!/bin/bash
exec 2>&1
set -e
export PGPASSWORD={{cfg.datastore.password}} PGHOST={{cfg.datastore.host}} PGPORT={{cfg.datastore.port}} PGUSER={{cfg.datastore.user}}
psql="POSTGRES/psql -v ON_ERROR_STOP=1 -qAt"
[ -n "$($psql -d postgres -c "SELECT 1 FROM pg_database WHERE datname = 'builder'")" ] || POSTGRES/createdb builder
if [ -z "$($psql -d builder -c "SELECT to_regclass('public.origin_packages')")" ]; then
    $psql -d builder -f {{pkg.path}}/schema.sql
fi
$psql -d builder -c 'CREATE TABLE IF NOT EXISTS public.accounts (id int8)'
ls {{pkg.svc_files_path}}/bldr-*.box.key > /dev/null
mkdir -p {{pkg.svc_var_path}}/www/v1
touch {{pkg.svc_var_path}}/www/v1/status
exec busybox httpd -f -p {{cfg.http.port}} -h {{pkg.svc_var_path}}/www
"#;

const API_DEFAULT: &str = "[http]\nport = 9636\n[datastore]\nuser = \"hab\"\npassword = \"\"\nhost = \"127.0.0.1\"\nport = 5432\ndatabase = \"builder\"\nssl_mode = \"prefer\"\n\
                           [s3]\nbackend = \"minio\"\nkey_id = \"depot\"\nsecret_key = \"password\"\nendpoint = \"http://localhost:9000\"\nbucket_name = \"habitat-builder-artifact-store.default\"\n";

const API_CONFIG: &str = "[http]\nlisten = \"0.0.0.0\"\nport = {{cfg.http.port}}\n\n[api]\nkey_path = \"{{pkg.svc_files_path}}\"\nfeatures_enabled = \"\"\n\n\
                          [s3]\n{{toToml cfg.s3}}\n\n[datastore]\n{{toToml cfg.datastore}}\n";

const MINIO_USER: &str = "key_id = \"depot\"\nsecret_key = \"password\"\nbucket_name = \"habitat-builder-artifact-store.local\"\n";

const API_USER: &str = "[s3]\nbackend = \"minio\"\nkey_id = \"depot\"\nsecret_key = \"password\"\nendpoint = \"http://localhost:9000\"\n\
                        bucket_name = \"habitat-builder-artifact-store.local\"\n\n[datastore]\nuser = \"hab\"\npassword = \"\"\nhost = \"localhost\"\nport = 5432\nssl_mode = \"prefer\"\n";

/// What the installer does once the Supervisor runs.
const INSTALL: &str = r#"
set -e
hab svc load habitat/builder-datastore --channel on-prem-stable --force
until [ -f /hab/svc/builder-datastore/config/pwfile ] && (exec 3<> /dev/tcp/127.0.0.1/5432) 2> /dev/null; do sleep 0.5; done
printf '[datastore]\npassword = "%s"\n' "$(cat /hab/svc/builder-datastore/config/pwfile)" > /tmp/password.toml
hab config apply builder-api.default "$(date +%s)" /tmp/password.toml
rm /tmp/password.toml
hab svc load habitat/builder-minio --channel on-prem-stable --force
hab svc load habitat/builder-memcached --channel on-prem-stable --force
hab svc load habitat/builder-api --bind memcached:builder-memcached.default --channel on-prem-stable --force
mkdir -p /hab/cache/keys
first=$(ls /hab/cache/keys/bldr-*.pub 2> /dev/null | head -n 1)
if [ -n "$first" ]; then
    name=$(basename "$first" .pub)
    echo "Re-using existing builder key: $name"
else
    name=$(hab user key generate bldr | grep -o 'bldr-[0-9]*' | head -n 1)
    echo "Generated new builder key: $name"
fi
hab file upload builder-api.default "$(date +%s)" "/hab/cache/keys/$name.pub"
hab file upload builder-api.default "$(date +%s)" "/hab/cache/keys/$name.box.key"
"#;
