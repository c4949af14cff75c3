//! The whole configuration: from files to a configuration, or to the one right error.

mod alone;
mod archive;
mod archive_secrets;
mod binds;
mod builder_files;
mod each_key;
mod kept;
mod push;
mod secrets;
mod shared;
mod sides;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use toml::{Table, Value};

use super::builder::Places;
use super::load::load_text_at;
use super::*;

/// A folder with everything a configuration may name, and Builder's files where a test puts them.
struct Site {
    folder: tempfile::TempDir,
    table: Table,
}

const MINIMAL: &str = r#"
    [local.s3]
    endpoint = "http://127.0.0.1:9000"
    bucket_name = "builder"
    key_id = "depot"
    secret_key = "hunter2-local"
    [peer.datastore]
    host = "db.example.org"
    [peer.s3]
    endpoint = "https://minio.example.org"
    key_id = "hunter2-id"
    secret_key = "hunter2-peer"
"#;

const BUILDER_API: &str = r#"
    [api]
    features_enabled = "jobsrv"
    key_path = "/hab/svc/builder-api/files"
    [memcache]
    ttl = 15
    [[memcache.hosts]]
    host = "10.0.0.9"
    [s3]
    backend = "minio"
    key_id = "hunter2-api-id"
    secret_key = "hunter2-api-key"
    endpoint = "http://10.0.0.2:9000/"
    bucket_name = "habitat-builder-artifact-store.local"
    [datastore]
    host = "10.0.0.1"
    port = 5433
    user = "bldr"
    password = "hunter2-api"
    database = "depot"
    ssl_mode = "require"
    connection_retry_ms = 300
"#;

impl Site {
    fn new(text: &str) -> Self {
        let site = Self {
            folder: tempfile::tempdir().unwrap(),
            table: text.parse().unwrap(),
        };
        site.file("secret", "hunter2-file\n", 0o640);
        site.file("open-secret", "hunter2-open\n", 0o644);
        site.file("certificate", "", 0o644);
        site.file("proxy", "http://user:hunter2@proxy:3128\n", 0o640);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    /// Sets a key to a value written as TOML, in which `DIR` means the folder.
    fn set(&mut self, key: &str, value: &str) -> &mut Self {
        let value = value.replace("DIR", self.folder.path().to_str().unwrap());
        let value = format!("x = {value}").parse::<Table>().unwrap()["x"].clone();
        let (tables, name) = key.rsplit_once('.').unwrap_or(("", key));
        let mut table = &mut self.table;
        for part in tables.split('.').filter(|part| !part.is_empty()) {
            let inner = table
                .entry(part)
                .or_insert_with(|| Value::Table(Table::new()));
            table = inner.as_table_mut().unwrap();
        }
        table.insert(name.to_string(), value);
        self
    }

    fn places(&self) -> Places {
        Places {
            api_config: self.path("builder-api.toml"),
            datastore_password: self.path("pwfile"),
        }
    }

    fn load_text(&self, mode: u32) -> Result<(Config, Accepted), String> {
        let path = self.file("config.toml", &self.table.to_string(), mode);
        load_text_at(&path, &self.places()).map_err(|error| error.to_string())
    }

    fn load_with_mode(&self, mode: u32) -> Result<Config, String> {
        self.load_text(mode).map(|(config, _)| config)
    }

    fn load(&self) -> Result<Config, String> {
        self.load_with_mode(0o640)
    }
}

/// Returns the error of the minimal configuration with one key set.
fn problem(key: &str, value: &str) -> String {
    let mut site = Site::new(MINIMAL);
    match site.set(key, value).load() {
        Ok(_) => panic!("{key} = {value} was accepted"),
        Err(error) => error,
    }
}

/// Returns a site that configures nothing of the local side.
fn without_local() -> Site {
    let mut site = Site::new(MINIMAL);
    site.table.remove("local");
    site
}

#[test]
fn without_a_configuration_http_is_where_it_is_by_default() {
    assert_eq!(
        Site::new(MINIMAL).load().expect("it is good").http,
        super::Http::default()
    );
}

#[test]
fn of_a_refused_configuration_http_is_taken_where_it_is_good() {
    let site = Site::new(MINIMAL);
    let default = super::Http::default();
    for (text, listen, port) in [
        ("role = \"boss\"\nhttp.port = 7000", "127.0.0.1", 7000),
        ("http = { listen = \"::1\", port = 0 }", "::1", 9640),
        ("http = { listen = \"x\", port = 7000 }", "127.0.0.1", 7000),
        ("http = 1", "127.0.0.1", 9640),
        ("http.port = \"\"", "127.0.0.1", 9640),
        ("no TOML", "127.0.0.1", 9640),
    ] {
        let path = site.file("config.toml", text, 0o640);
        let found = super::http_of(&path);
        assert_eq!(
            (found.listen.to_string().as_str(), found.port),
            (listen, port),
            "{text}"
        );
    }
    assert_eq!(super::http_of(&site.path("absent.toml")), default);
}
