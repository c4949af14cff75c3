//! The packages that an installation brings: PostgreSQL of origin `core`, and Builder's services of origin `habitat` in
//! two releases. The second release has another PostgreSQL, and a migration of Builder's tables.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::habitat::ROOT;
use super::super::process::{find_program, on_path};
use super::super::{Result, postgres};
use super::{DEPOT, Node, Parts};

const RELEASE: &str = "20260101000000";

/// A release of Builder, as the installer finds it.
struct Release {
    /// Its folder in the depot, and its version.
    name: &'static str,
    version: &'static str,
    /// The package of origin `core` with its PostgreSQL, and that PostgreSQL's programs.
    postgres: (&'static str, PathBuf),
    migration: &'static str,
}

impl Node {
    /// Lays out what is installed before Builder, and the releases that its installer finds.
    pub(super) fn lay_out(&self, parts: &Parts) -> Result<()> {
        let busybox = find_program(on_path("busybox")).ok_or("there is no busybox")?;
        let folder = self.package("/hab/pkgs", "core/busybox-static/1.0.0", &[])?;
        self.program(&busybox, &format!("{folder}/bin/busybox"))?;
        let newer = postgres::other_version(18).ok_or("there is no PostgreSQL 18 here")?;
        let first = Release {
            name: "first",
            version: "1.0.0",
            postgres: ("core/postgresql17/17.0", parts.postgres.clone()),
            migration: "",
        };
        let second = Release {
            name: "second",
            version: "2.0.0",
            postgres: ("core/postgresql18/18.0", newer),
            migration: "ALTER TABLE public.origins ADD COLUMN IF NOT EXISTS of_the_second_release bool;\n",
        };
        for release in [first, second] {
            self.postgres(&release)?;
            self.datastore(&release, parts)?;
            self.minio(&release, parts)?;
            self.memcached(&release, parts)?;
            self.api(&release, parts)?;
        }
        Ok(())
    }

    /// The installer brings the PostgreSQL of each release, so it is there before.
    fn postgres(&self, release: &Release) -> Result<()> {
        let (package, programs) = &release.postgres;
        let folder = self.package("/hab/pkgs", package, &[])?;
        for program in [
            "psql",
            "pg_dump",
            "pg_restore",
            "pg_ctl",
            "initdb",
            "postgres",
            "createdb",
        ] {
            let link = self.machine.path(&format!("{folder}/bin/{program}"));
            std::os::unix::fs::symlink(programs.join(program), link)?;
        }
        Ok(())
    }

    fn service(&self, release: &Release, name: &str, files: &[(&str, &str)]) -> Result<String> {
        let package = format!("habitat/{name}/{}", release.version);
        self.package(&format!("{DEPOT}/{}", release.name), &package, files)
    }

    fn hook(&self, folder: &str, name: &str, text: &str) -> Result<()> {
        self.file(&format!("{folder}/hooks/{name}"), text, 0o755)
    }

    fn datastore(&self, release: &Release, parts: &Parts) -> Result<()> {
        let folder = self.service(
            release,
            "builder-datastore",
            &[
                ("EXPORTS", "port=port\n"),
                (
                    "default.toml",
                    "port = 5432\nmax_locks_per_transaction = 64\n",
                ),
                ("config/pg_hba.conf", PG_HBA),
            ],
        )?;
        let run = RUN_DATASTORE
            .replace("OLD", &parts.postgres.to_string_lossy())
            .replace("POSTGRES", &release.postgres.1.to_string_lossy());
        self.hook(&folder, "run", &run)
    }

    fn minio(&self, release: &Release, parts: &Parts) -> Result<()> {
        let folder = self.service(
            release,
            "builder-minio",
            &[
                ("EXPORTS", "port=port\nbucket-name=bucket_name\n"),
                ("default.toml", "port = 9000\nkey_id = \"depot\"\nsecret_key = \"password\"\nbucket_name = \"habitat-builder-artifact-store.default\"\n"),
            ],
        )?;
        self.program(&parts.minio, &format!("{folder}/bin/minio"))?;
        self.hook(&folder, "run", RUN_MINIO)
    }

    fn memcached(&self, release: &Release, parts: &Parts) -> Result<()> {
        let folder = self.service(
            release,
            "builder-memcached",
            &[
                ("EXPORTS", "port=port\n"),
                ("default.toml", "port = 11211\n"),
            ],
        )?;
        let memcached = parts.memcached.display();
        let run =
            format!("#!/bin/bash\nexec 2>&1\nexec {memcached} -l 0.0.0.0 -p {{{{cfg.port}}}}\n");
        self.hook(&folder, "run", &run)
    }

    fn api(&self, release: &Release, parts: &Parts) -> Result<()> {
        let schema = fs::read_to_string(Path::new(ROOT).join("tests/support/schema.sql"))?;
        let folder = self.service(
            release,
            "builder-api",
            &[
                ("EXPORTS", "port=http.port\n"),
                ("BINDS", "memcached=port\n"),
                ("default.toml", API_DEFAULT),
                ("config/config.toml", API_CONFIG),
                ("schema.sql", &schema),
                ("migration.sql", release.migration),
            ],
        )?;
        let programs = release.postgres.1.to_string_lossy();
        let start = match &parts.builder_api {
            Some(program) => {
                self.program(program, &format!("{folder}/bin/bldr-api"))?;
                START_REAL_API
            }
            None => START_STAND_IN,
        };
        let run = format!("{RUN_API}{start}").replace("POSTGRES", &programs);
        self.hook(&folder, "run", &run)
    }

    /// Lays out one package, and returns its folder.
    fn package(&self, root: &str, name: &str, files: &[(&str, &str)]) -> Result<String> {
        let ident = format!("{name}/{RELEASE}");
        let folder = format!("{root}/{ident}");
        fs::create_dir_all(self.machine.path(&format!("{folder}/bin")))?;
        let bin = format!("/hab/pkgs/{ident}/bin");
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
}

const PG_HBA: &str = "local all all trust\nhost all hab 0.0.0.0/0 md5\nhost all all 127.0.0.1/32 trust\n\
                      host all all ::1/128 trust\nhost all all 0.0.0.0/0 md5\n";

/// Of another PostgreSQL than the data: database `builder` alone is carried into a new server, as the real package's
/// hook does when it is installed.
const RUN_DATASTORE: &str = r#"#!/bin/bash
exec 2>&1
set -e
data={{pkg.svc_data_path}}
pwfile={{pkg.svc_config_path}}/pwfile
make() {
    POSTGRES/initdb -D "$data" --username hab --pwfile "$pwfile" --auth trust --encoding UTF8 --locale C.UTF-8 > /dev/null
}
alone() {
    "$1/pg_ctl" "$2" -w -s -D "$data" -m fast -l {{pkg.svc_var_path}}/upgrade.log \
        -o "-c port=$PGPORT -c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp" > /dev/null
}
# Nobody shall take the server of the upgrade for the new one: the real hook has ended before a client can come.
export PGHOST=127.0.0.1 PGPORT=1{{cfg.port}} PGUSER=hab
chmod 0700 "$data"
if [ ! -f "$data/PG_VERSION" ]; then
    if [ ! -f "$pwfile" ]; then
        head -c 33 /dev/urandom | base64 -w 0 > "$pwfile"
        chmod 0400 "$pwfile"
    fi
    make
elif [ "$(POSTGRES/postgres --version | sed 's/.*) \([0-9]*\).*/\1/')" != "$(cat "$data/PG_VERSION")" ]; then
    folder={{pkg.svc_var_path}}/tmp/upgrades/$(date +%Y%m%d%H%M%S)
    mkdir -p "$folder/previous"
    alone OLD start
    POSTGRES/pg_dump --quote-all-identifiers -f "$folder/pg_dump.sql" builder
    alone OLD stop
    cp -r "$data" "$folder/previous/data"
    rm -rf "${data:?}"/*
    make
    alone POSTGRES start
    POSTGRES/createdb builder
    POSTGRES/psql -q -v ON_ERROR_STOP=1 -f "$folder/pg_dump.sql" builder > /dev/null
    alone POSTGRES stop
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
"#;

/// What builder-api does at its start where a change of roles matters: it writes.
const START_STAND_IN: &str = r#"
if [ -z "$($psql -d builder -c "SELECT to_regclass('public.origin_packages')")" ]; then
    $psql -d builder -f {{pkg.path}}/schema.sql
fi
$psql -d builder -c 'CREATE TABLE IF NOT EXISTS public.accounts (id int8)'
$psql -d builder -f {{pkg.path}}/migration.sql
ls {{pkg.svc_files_path}}/bldr-*.box.key > /dev/null
mkdir -p {{pkg.svc_var_path}}/www/v1
touch {{pkg.svc_var_path}}/www/v1/status
exec busybox httpd -f -p {{cfg.http.port}} -h {{pkg.svc_var_path}}/www
"#;

const START_REAL_API: &str = r#"
if [ -n "$($psql -d builder -c "SELECT to_regclass('public.origins')")" ]; then
    $psql -d builder -f {{pkg.path}}/migration.sql
fi
export HOME={{pkg.svc_data_path}} RUST_LOG=error
exec {{pkg.path}}/bin/bldr-api start -c {{pkg.svc_config_path}}/config.toml
"#;

const API_DEFAULT: &str = "[http]\nport = 9636\n[datastore]\nuser = \"hab\"\npassword = \"\"\nhost = \"127.0.0.1\"\nport = 5432\ndatabase = \"builder\"\nssl_mode = \"prefer\"\n\
                           [s3]\nbackend = \"minio\"\nkey_id = \"depot\"\nsecret_key = \"password\"\nendpoint = \"http://localhost:9000\"\nbucket_name = \"habitat-builder-artifact-store.default\"\n";

const API_CONFIG: &str = "[http]\nlisten = \"0.0.0.0\"\nport = {{cfg.http.port}}\n\n[api]\nkey_path = \"{{pkg.svc_files_path}}\"\ndata_path = \"{{pkg.svc_data_path}}\"\n\
                          log_path = \"{{pkg.svc_var_path}}\"\nfeatures_enabled = \"\"\n\n\
                          [s3]\n{{toToml cfg.s3}}\n\n[memcache]\nttl = 15\n{{#each bind.memcached.members as |member|}}[[memcache.hosts]]\nhost = \"{{member.sys.ip}}\"\n\
                          port = {{member.cfg.port}}\n{{/each}}\n[datastore]\n{{toToml cfg.datastore}}\n";
