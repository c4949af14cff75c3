//! The configuration: one TOML file, every key checked and named in its error, secrets by type and from files.
//!
//! Reading it has no side effects; [`Accepted::keep`] alone writes. What a key means and may hold stands in `docs/reference.md`.

mod binds;
mod builder;
mod endpoint;
mod kept;
mod keys;
mod kind;
mod load;
mod schedule;
mod secret;
mod secret_places;
mod sides;
mod suggest;
#[cfg(test)]
mod tests;
mod units;
mod values;

pub(crate) use kept::write_whole;
pub use kept::{Accepted, data_dir, load_kept};
pub use keys::Key;
pub use load::{http_of, load, load_text};
pub use schedule::Schedule;
pub use secret::{Secret, SecretSource};
pub use units::{parse_duration, parse_rate, parse_size};

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};

/// A configuration in which every key was read and found good.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub role: WantedRole,
    pub force_epoch: u64,
    /// Nothing is applied; the primary is still asked for changes.
    pub paused: bool,
    /// The same until then.
    pub paused_until: Option<DateTime<Utc>>,
    /// Until then health goes no higher than a warning.
    pub quiet_until: Option<DateTime<Utc>>,
    pub change: String,
    pub site: String,
    /// Where the builder keys lie; None: not on this node.
    pub builder_keys_dir: Option<PathBuf>,
    /// Why builder-api's file could not be read, though nothing of it is needed.
    pub builder_unread: Option<String>,
    pub log_level: log::LevelFilter,
    pub log_format: LogFormat,
    pub local: Side,
    pub peer: Side,
    pub replication: Replication,
    pub fuse: Fuse,
    pub takeover: Takeover,
    pub verify: VerifyPlan,
    pub http: Http,
}

impl Config {
    /// Every key there is, in the order of the reference.
    pub fn known_keys() -> &'static [Key] {
        keys::KEYS
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedRole {
    /// Whatever role is recorded in the cluster's own state.
    Keep,
    Spare,
    Primary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// One cluster: its datastore (PostgreSQL) and its artifact store (MinIO or S3).
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    pub datastore: Datastore,
    pub s3: S3,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Datastore {
    pub host: String,
    pub port: u16,
    pub user: String,
    pub database: String,
    /// None: the server is asked without one (trust, peer, client certificate).
    pub password: Option<SecretSource>,
    pub ssl_mode: SslMode,
    pub ssl_root_cert: Option<PathBuf>,
    pub ssl_cert: Option<PathBuf>,
    pub ssl_key: Option<PathBuf>,
    /// Where the host came from, for people: `configuration`, `builder-api`, `bind`, `builder-datastore pwfile` (the usual host, and
    /// the password from there) or `default`.
    pub source: &'static str,
}

/// As libpq has them: encryption is tried, insisted on, and checked against an authority and a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    /// libpq's word, and the configuration's.
    pub fn as_str(self) -> &'static str {
        match self {
            SslMode::Disable => "disable",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct S3 {
    pub backend: Backend,
    /// URL of the server: scheme, host, port; no path.
    pub endpoint: String,
    /// Region that requests are signed for.
    pub region: String,
    pub bucket_name: String,
    pub key_id: SecretSource,
    pub secret_key: SecretSource,
    pub ca_file: Option<PathBuf>,
    /// Where the endpoint came from: `configuration` or `builder-api`.
    pub source: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Minio,
    Aws,
}

/// How changes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The stream where it is possible, else snapshots.
    Auto,
    /// Logical decoding, or nothing.
    Stream,
    /// A full copy whenever something has changed.
    Snapshot,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Replication {
    pub mode: Mode,
    /// How often the primary is asked whether anything was committed.
    pub interval: Duration,
    /// When passes are made; None: whenever something was committed.
    pub schedule: Option<Schedule>,
    /// Lag above which health warns.
    pub lag_warn: Duration,
    /// Lag above which health is critical: longer than the interval and than any pause of the schedule.
    pub rpo: Duration,
    /// Tables copied at once.
    pub jobs: usize,
    /// Artifacts copied at once.
    pub copies: usize,
    /// Bytes that all transfer buffers may hold together.
    pub buffer: u64,
    /// Bytes a second, all transfers together; None: no limit.
    pub bandwidth_limit: Option<u64>,
    /// How long an artifact that the primary lacks is waited for.
    pub gate_grace: Duration,
    /// How often one that is missing or damaged on the primary is tried again.
    pub retry_missing: Duration,
    /// How long an artifact is kept after its package was deleted.
    pub artifact_retention: Duration,
    /// Bytes of write-ahead log that the primary may hold for us.
    pub wal_hold_limit: u64,
    /// Whether a primary is accepted that sets no bound of its own to that.
    pub wal_unbounded: bool,
    /// Replication slot that a database administrator has made for us.
    pub slot: Option<String>,
    /// Likewise, the publication.
    pub publication: Option<String>,
    /// Replaced databases kept.
    pub keep_generations: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Fuse {
    pub max_percent: u32,
    pub min_count: u64,
    pub window: Duration,
    /// Ids of the cases that are let through, with commas between them: one promotion may need two.
    pub approve: String,
}

impl Fuse {
    pub fn approves(&self, id: &str) -> bool {
        self.approved().any(|approved| approved == id)
    }

    /// Gives the value that lets this case through as well.
    pub fn with(&self, id: &str) -> String {
        let all: Vec<&str> = self.approved().chain([id]).collect();
        all.join(", ")
    }

    fn approved(&self) -> impl Iterator<Item = &str> {
        let ids = self.approve.split(',').map(str::trim);
        ids.filter(|id| !id.is_empty())
    }
}

/// A change of roles.
#[derive(Debug, Clone, PartialEq)]
pub struct Takeover {
    /// For the fenced primary's last transactions to be applied.
    pub drain_timeout: Duration,
    /// How long a planned handover by a last copy may hold the primary read-only.
    pub read_only_limit: Duration,
    /// Between two looks of a primary for its peer.
    pub fence_retry: Duration,
}

/// When the spare is compared with what the primary sent.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifyPlan {
    /// None: never.
    pub schedule: Option<Schedule>,
    /// Whether every artifact of the local bucket is read then.
    pub deep: bool,
    /// So many percent of the time one table after the other is compared with the primary's; 0: never.
    pub rolling: u32,
}

/// Where the HTTP interface listens. Read at the start only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Http {
    pub listen: IpAddr,
    pub port: u16,
}

/// As the keys' defaults have it: where a service without any configuration is looked for.
impl Default for Http {
    fn default() -> Self {
        Http {
            listen: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
            port: 9640,
        }
    }
}

/// What is wrong with the configuration: each error names its key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}: {source}. Give its path with --config FILE")]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {message}")]
    Syntax { path: PathBuf, message: String },
    /// `key` as in the reference, such as `peer.datastore.host`; `problem` says what was found and what is expected.
    #[error("{key}: {problem}")]
    Key { key: String, problem: String },
}

impl ConfigError {
    fn key(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Key {
            key: key.into(),
            problem: problem.into(),
        }
    }
}

/// A syntax error with its place, and without the line itself: that may hold a password.
fn syntax(text: &str, error: &toml::de::Error) -> String {
    let before = error
        .span()
        .and_then(|span| text.get(..span.start))
        .unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!(
        "line {line}, column {column}: {}",
        error.message().trim_end()
    )
}
