//! The configuration: one TOML file. Every key is checked, and an error names its key. Secrets have
//! a type of their own and come from files.
//!
//! Reading has no side effects; only `Accepted::keep` writes. `docs/reference.md` describes the
//! meaning and the values of every key.

mod archive;
mod binds;
mod builder;
mod endpoint;
mod kept;
mod keys;
mod kind;
mod load;
mod proxy;
mod schedule;
mod secret;
mod secret_places;
mod sides;
mod suggest;
#[cfg(test)]
mod tests;
mod units;
mod values;

pub use archive::{ArchivePlace, ArchivePlan, Keep};
pub(crate) use kept::write_whole;
pub use kept::{Accepted, data_dir, load_kept};
pub use keys::Key;
pub use load::{http_of, load, load_alone, load_text};
pub use proxy::Proxy;
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
    /// True: changes are not applied. The primary is still asked for changes.
    pub paused: bool,
    /// Until this time changes are not applied, as with `paused`.
    pub paused_until: Option<DateTime<Utc>>,
    /// Until this time health is never worse than a warning.
    pub quiet_until: Option<DateTime<Utc>>,
    pub change: String,
    pub site: String,
    /// Directory of the builder keys; None: the keys are not on this node.
    pub builder_keys_dir: Option<PathBuf>,
    /// The error of builder-api's file, if the file could not be read but is not needed.
    pub builder_unread: Option<String>,
    /// Address of Builder's API on this node. None: it has no file here.
    pub builder_api: Option<std::net::SocketAddr>,
    pub log_level: log::LevelFilter,
    pub log_format: LogFormat,
    pub local: Side,
    pub peer: Side,
    pub replication: Replication,
    pub artifacts: Artifacts,
    /// The places that keep generations; empty: none.
    pub archives: Vec<ArchivePlan>,
    pub fuse: Fuse,
    pub takeover: Takeover,
    pub verify: VerifyPlan,
    pub http: Http,
}

impl Config {
    /// Returns all keys in the order of the reference.
    pub fn known_keys() -> &'static [Key] {
        keys::KEYS
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedRole {
    /// The role that the state of the cluster has on record.
    Keep,
    Spare,
    Primary,
}

impl WantedRole {
    const ALL: [WantedRole; 3] = [WantedRole::Keep, WantedRole::Spare, WantedRole::Primary];

    /// Returns the word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            WantedRole::Keep => "keep",
            WantedRole::Spare => "spare",
            WantedRole::Primary => "primary",
        }
    }

    /// Returns the role of that word. None: it is none.
    pub fn parse(word: &str) -> Option<WantedRole> {
        WantedRole::ALL
            .into_iter()
            .find(|role| role.as_str() == word)
    }
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
    /// None: the session uses no password (trust, peer, client certificate).
    pub password: Option<SecretSource>,
    pub ssl_mode: SslMode,
    pub ssl_root_cert: Option<PathBuf>,
    pub ssl_cert: Option<PathBuf>,
    pub ssl_key: Option<PathBuf>,
    /// Source of the host, for people: `configuration`, `builder-api`, `bind`,
    /// `builder-datastore pwfile` (the usual host, and the password from that file) or `default`.
    pub source: &'static str,
}

impl Datastore {
    /// Returns the server's address, for messages.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// The modes of libpq: encryption is off, tried, or required, and the certificate is checked
/// against an authority, or against an authority and a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    /// Returns the word that libpq and the configuration use.
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
    /// Region for which requests are signed.
    pub region: String,
    pub bucket_name: String,
    pub key_id: SecretSource,
    pub secret_key: SecretSource,
    pub ca_file: Option<PathBuf>,
    /// URL of the HTTP proxy for all requests, which may hold a password. None: no proxy.
    pub proxy: Option<SecretSource>,
    /// Source of the endpoint: `configuration` or `builder-api`.
    pub source: &'static str,
}

impl S3 {
    /// Reads the current proxy. None: requests go to the server itself. Errors name `key`, such as
    /// `peer.s3.proxy`, or its counterpart for a file.
    pub fn read_proxy(&self, key: &str) -> Result<Option<Proxy>, ConfigError> {
        let source = self.proxy.as_ref();
        source
            .map(|source| sides::read_proxy(source, key))
            .transpose()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Minio,
    Aws,
}

/// The way in which changes of the primary are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The stream where it is possible, otherwise snapshots.
    Auto,
    /// Logical decoding only.
    Stream,
    /// A full copy after every change.
    Snapshot,
}

/// The site at which the process at work runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The spare's site: it fetches.
    Pull,
    /// The primary's site: it sends. The local side is the spare all the same.
    Push,
}

impl Direction {
    /// Returns the word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Pull => "pull",
            Direction::Push => "push",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Replication {
    pub mode: Mode,
    pub direction: Direction,
    /// Interval between two questions to the primary whether anything was committed.
    pub interval: Duration,
    /// Times of the passes; None: a pass after every commit.
    pub schedule: Option<Schedule>,
    /// Lag above which health warns.
    pub lag_warn: Duration,
    /// Lag above which health is critical. It exceeds the interval and every pause of the schedule.
    pub rpo: Duration,
    /// Number of tables copied at once.
    pub jobs: usize,
    /// Number of artifacts copied at once.
    pub copies: usize,
    /// Maximum number of bytes in all transfer buffers together.
    pub buffer: u64,
    /// Maximum number of bytes a second of all transfers together; None: no limit.
    pub bandwidth_limit: Option<u64>,
    /// Time for which a row waits for an artifact that the primary does not have.
    pub gate_grace: Duration,
    /// Interval between two tries to copy an artifact that is missing or damaged on the primary.
    pub retry_missing: Duration,
    /// Time for which an artifact is kept after its package was deleted.
    pub artifact_retention: Duration,
    /// Maximum number of bytes of write-ahead log that the primary may keep for our slot.
    pub wal_hold_limit: u64,
    /// True: a primary is accepted that sets no limit for that log.
    pub wal_unbounded: bool,
    /// Replication slot that a database administrator has made for us; None: the service makes one.
    pub slot: Option<String>,
    /// Publication that a database administrator has made for us; None: `prepare` makes one.
    pub publication: Option<String>,
    /// Number of replaced databases to keep.
    pub keep_generations: usize,
}

/// The one who copies artifacts to the spare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArtifactsMode {
    /// This program.
    Replicate,
    /// Nobody: both sites use one bucket, or one file system.
    Shared,
    /// The provider of the bucket.
    External,
}

impl ArtifactsMode {
    /// Returns the word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            ArtifactsMode::Replicate => "replicate",
            ArtifactsMode::Shared => "shared",
            ArtifactsMode::External => "external",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Artifacts {
    pub mode: ArtifactsMode,
    /// True: artifacts that the provider never brings are copied by this program.
    pub fill: bool,
    /// Prefix in the provider's bucket under which we may write marks of our own; None: nowhere.
    pub own_prefix: Option<String>,
    /// Age of an object on the primary from which on the provider is not expected to bring it.
    pub arrival_limit: Duration,
    /// True: the shared file system comes to this site only at a takeover.
    pub attach_at_takeover: bool,
    pub lease: LeasePlan,
}

impl Artifacts {
    /// Returns the prefix of our own objects in the local bucket, such as probes and the epoch.
    /// None: we write none.
    pub fn marks(&self) -> Option<&str> {
        match self.mode {
            ArtifactsMode::Replicate => Some(".warm-spare/"),
            ArtifactsMode::External => self.own_prefix.as_deref(),
            ArtifactsMode::Shared => None,
        }
    }

    /// Returns whether the local store has no artifacts before a takeover.
    pub fn are_detached(&self) -> bool {
        self.mode == ArtifactsMode::Shared && self.attach_at_takeover
    }
}

/// The plan for the lease of a shared bucket.
#[derive(Debug, Clone, PartialEq)]
pub struct LeasePlan {
    /// Time for which the lease holds without a renewal.
    pub ttl: Duration,
    /// True: this cluster, as the primary, fences itself when it can renew the lease no more.
    pub fences_isolated: bool,
    /// The store of the lease. None: the shared bucket.
    pub store: Option<S3>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Fuse {
    pub max_percent: u32,
    pub min_count: u64,
    pub window: Duration,
    /// Ids of the cases to let through, separated by commas. One promotion may need two.
    pub approve: String,
}

impl Fuse {
    pub fn approves(&self, id: &str) -> bool {
        self.approved().any(|approved| approved == id)
    }

    /// Returns the value of `fuse.approve` that lets this case through as well.
    pub fn with(&self, id: &str) -> String {
        let all: Vec<&str> = self.approved().chain([id]).collect();
        all.join(", ")
    }

    fn approved(&self) -> impl Iterator<Item = &str> {
        let ids = self.approve.split(',').map(str::trim);
        ids.filter(|id| !id.is_empty())
    }
}

/// Limits of a change of roles.
#[derive(Debug, Clone, PartialEq)]
pub struct Takeover {
    /// Time limit for applying the last transactions of the fenced primary.
    pub drain_timeout: Duration,
    /// Time for which a planned handover with a last copy may keep the primary read-only.
    pub read_only_limit: Duration,
    /// Interval between two attempts of a primary to reach its peer.
    pub fence_retry: Duration,
    /// Time for which a takeover waits for the shared file system.
    pub attach_timeout: Duration,
    /// Command that fences the other site. Its success is a proof.
    pub fence_command: String,
    /// Nonce of the lease that may be overridden; empty: none.
    pub force_lease: String,
}

/// The plan for comparing the spare with the data that the primary sent.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifyPlan {
    /// Times of the verifications; None: never.
    pub schedule: Option<Schedule>,
    /// True: a verification also reads every artifact of the local bucket.
    pub deep: bool,
    /// Percentage of the time in which single tables are compared with the primary's; 0: never.
    pub rolling: u32,
}

/// The address of the HTTP interface. It is read at the start only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Http {
    pub listen: IpAddr,
    pub port: u16,
}

/// The defaults of the keys. A client looks here for a service without any configuration.
impl Default for Http {
    fn default() -> Self {
        Http {
            listen: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
            port: 9640,
        }
    }
}

/// An error in the configuration. It names the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}: {source}. Give its path with --config FILE")]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {message}")]
    Syntax { path: PathBuf, message: String },
    /// `key` is written as in the reference, such as `peer.datastore.host`; `problem` says what was
    /// found and what was expected.
    #[error("{key}: {problem}")]
    Key { key: String, problem: String },
    /// The file is good so far, and names no other cluster.
    #[error(
        "peer.datastore.host: not set, and neither is peer.s3.endpoint: set both, they name the other cluster"
    )]
    PeerUnset {
        /// The whole configuration otherwise, for work that uses only the local cluster. Nobody can
        /// reach its peer: the host is empty, and the endpoint is in the domain `invalid`.
        alone: Box<Config>,
    },
}

impl ConfigError {
    fn key(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Key {
            key: key.into(),
            problem: problem.into(),
        }
    }
}

/// Returns a syntax error with its line and column. The text of the line is left out, because it
/// may hold a password.
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
