//! All keys of the configuration.
//!
//! `docs/reference.md` describes every key; a test compares the two.

use toml::Value;

use super::kind::{Checked, Kind};

pub(super) const BUILDER_API_CONFIG: &str = "/hab/svc/builder-api/config/config.toml";

const SSL_MODES: &[&str] = &["disable", "prefer", "require", "verify-ca", "verify-full"];
const BACKENDS: &[&str] = &["minio", "aws"];
const ANY: i64 = i64::MAX;
const PORT: Kind = Kind::Int(1, 65535);
const GENERATIONS: Kind = Kind::Int(0, 100_000);

/// A key of the configuration.
#[derive(Debug)]
pub struct Key {
    /// The whole path, such as `peer.datastore.port`.
    pub name: &'static str,
    /// The default, as in TOML but without quotes. Empty: the key is not set, or its value comes
    /// from elsewhere.
    pub default: &'static str,
    pub(super) kind: Kind,
}

impl Key {
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// Returns the default as TOML, for people.
    pub fn default_text(&self) -> String {
        match self.kind {
            Kind::Bool | Kind::Int(..) => self.default.to_string(),
            _ => format!("{:?}", self.default),
        }
    }

    pub(super) fn default_value(&self) -> Result<Option<Checked>, String> {
        let text = || Value::String(self.default.to_string());
        let value = match self.kind {
            Kind::Bool => self.default.parse().map_or_else(|_| text(), Value::Boolean),
            Kind::Int(..) => self.default.parse().map_or_else(|_| text(), Value::Integer),
            _ => text(),
        };
        self.kind.check(&value)
    }

    /// Returns whether an empty text means never or nowhere, instead of the default.
    pub(super) fn empty_means_none(&self) -> bool {
        matches!(self.name, "verify.schedule" | "local.builder_keys_dir")
    }
}

const fn key(name: &'static str, kind: Kind, default: &'static str) -> Key {
    Key {
        name,
        default,
        kind,
    }
}

/// All keys in the order of the reference.
pub(super) const KEYS: &[Key] = &[
    key("role", Kind::Choice(&["keep", "spare", "primary"]), "keep"),
    key("force_epoch", Kind::Int(0, ANY), "0"),
    key("paused", Kind::Bool, "false"),
    key("paused_until", Kind::Time, ""),
    key("quiet_until", Kind::Time, ""),
    key("change", Kind::Text, ""),
    key("site", Kind::Text, ""),
    key(
        "log_level",
        Kind::Choice(&["error", "warn", "info", "debug", "trace"]),
        "info",
    ),
    key("log_format", Kind::Choice(&["text", "json"]), "text"),
    // Keys of the near side that are not set here are taken from Builder's own files, then from
    // `NEAR_DEFAULTS`. The local side is near, unless this process pushes.
    key("local.builder_api_config", Kind::Path, BUILDER_API_CONFIG),
    key(
        "local.builder_keys_dir",
        Kind::Path,
        "/hab/svc/builder-api/files",
    ),
    key("local.datastore.host", Kind::Host, ""),
    key("local.datastore.port", PORT, ""),
    key("local.datastore.user", Kind::Text, ""),
    key("local.datastore.database", Kind::Text, ""),
    key("local.datastore.password", Kind::Secret, ""),
    key("local.datastore.password_file", Kind::Path, ""),
    key("local.datastore.ssl_mode", Kind::Choice(SSL_MODES), ""),
    key("local.datastore.ssl_root_cert", Kind::Path, ""),
    key("local.datastore.ssl_cert", Kind::Path, ""),
    key("local.datastore.ssl_key", Kind::Path, ""),
    key("local.s3.backend", Kind::Choice(BACKENDS), ""),
    key("local.s3.endpoint", Kind::Text, ""),
    key("local.s3.bucket_name", Kind::Bucket, ""),
    key("local.s3.key_id", Kind::Secret, ""),
    key("local.s3.key_id_file", Kind::Path, ""),
    key("local.s3.secret_key", Kind::Secret, ""),
    key("local.s3.secret_key_file", Kind::Path, ""),
    key("local.s3.ca_file", Kind::Path, ""),
    key("local.s3.proxy", Kind::Proxy, ""),
    key("local.s3.proxy_file", Kind::Path, ""),
    key("peer.datastore.host", Kind::Host, ""),
    key("peer.datastore.port", PORT, "5432"),
    key("peer.datastore.user", Kind::Text, "hab"),
    key("peer.datastore.database", Kind::Text, "builder"),
    key("peer.datastore.password", Kind::Secret, ""),
    key("peer.datastore.password_file", Kind::Path, ""),
    key("peer.datastore.ssl_mode", Kind::Choice(SSL_MODES), "prefer"),
    key("peer.datastore.ssl_root_cert", Kind::Path, ""),
    key("peer.datastore.ssl_cert", Kind::Path, ""),
    key("peer.datastore.ssl_key", Kind::Path, ""),
    key("peer.s3.backend", Kind::Choice(BACKENDS), "minio"),
    key("peer.s3.endpoint", Kind::Text, ""),
    key("peer.s3.bucket_name", Kind::Bucket, ""),
    key("peer.s3.key_id", Kind::Secret, ""),
    key("peer.s3.key_id_file", Kind::Path, ""),
    key("peer.s3.secret_key", Kind::Secret, ""),
    key("peer.s3.secret_key_file", Kind::Path, ""),
    key("peer.s3.ca_file", Kind::Path, ""),
    key("peer.s3.proxy", Kind::Proxy, ""),
    key("peer.s3.proxy_file", Kind::Path, ""),
    key(
        "artifacts.mode",
        Kind::Choice(&["replicate", "shared", "external"]),
        "replicate",
    ),
    key("artifacts.fill", Kind::Bool, "false"),
    key("artifacts.own_prefix", Kind::Prefix, ""),
    key("artifacts.arrival_limit", Kind::PositiveDuration, "1h"),
    key(
        "artifacts.attach",
        Kind::Choice(&["always", "at_takeover"]),
        "always",
    ),
    key("artifacts.lease_ttl", Kind::PositiveDuration, "15s"),
    key(
        "artifacts.isolated",
        Kind::Choice(&["go_on", "fence"]),
        "go_on",
    ),
    key("artifacts.lease.backend", Kind::Choice(BACKENDS), "minio"),
    key("artifacts.lease.endpoint", Kind::Text, ""),
    key("artifacts.lease.bucket_name", Kind::Bucket, ""),
    key("artifacts.lease.key_id", Kind::Secret, ""),
    key("artifacts.lease.key_id_file", Kind::Path, ""),
    key("artifacts.lease.secret_key", Kind::Secret, ""),
    key("artifacts.lease.secret_key_file", Kind::Path, ""),
    key("artifacts.lease.ca_file", Kind::Path, ""),
    key("artifacts.lease.proxy", Kind::Proxy, ""),
    key("artifacts.lease.proxy_file", Kind::Path, ""),
    key(
        "replication.mode",
        Kind::Choice(&["auto", "stream", "snapshot"]),
        "auto",
    ),
    key(
        "replication.direction",
        Kind::Choice(&["pull", "push"]),
        "pull",
    ),
    key("replication.interval", Kind::PositiveDuration, "1m"),
    key("replication.schedule", Kind::Cron, ""),
    key("replication.lag_warn", Kind::PositiveDuration, "1m"),
    key("replication.rpo", Kind::PositiveDuration, "5m"),
    key("replication.jobs", Kind::Int(1, 64), "2"),
    key("replication.copies", Kind::Int(1, 256), "8"),
    key(
        "replication.buffer",
        Kind::Size(16 * bytesize::MIB),
        "64MiB",
    ),
    key("replication.bandwidth_limit", Kind::Rate, ""),
    key("replication.gate_grace", Kind::Duration, "30s"),
    key("replication.retry_missing", Kind::PositiveDuration, "10m"),
    key(
        "replication.artifact_retention",
        Kind::PositiveDuration,
        "7d",
    ),
    key("replication.wal_hold_limit", Kind::Size(1), "4GB"),
    key("replication.wal_unbounded", Kind::Bool, "false"),
    key("replication.slot", Kind::Identifier, ""),
    key("replication.publication", Kind::Identifier, ""),
    key("replication.keep_generations", Kind::Int(0, 100), "2"),
    key("fuse.max_percent", Kind::Int(0, 100), "10"),
    key("fuse.min_count", Kind::Int(0, ANY), "20"),
    key("fuse.window", Kind::PositiveDuration, "1h"),
    key("fuse.approve", Kind::Text, ""),
    key("takeover.drain_timeout", Kind::PositiveDuration, "30s"),
    key("takeover.read_only_limit", Kind::PositiveDuration, "1h"),
    key("takeover.fence_retry", Kind::PositiveDuration, "5s"),
    key("takeover.attach_timeout", Kind::PositiveDuration, "10m"),
    key("takeover.fence_command", Kind::Text, ""),
    key("takeover.force_lease", Kind::Text, ""),
    key("verify.schedule", Kind::Cron, "0 3 * * *"),
    key("verify.deep", Kind::Bool, "false"),
    key("verify.rolling", Kind::Int(0, 100), "2"),
    // One place of an archive. The keys of an element of `[[archive]]` are these too.
    key("archive.name", Kind::Identifier, "archive"),
    key("archive.location", Kind::Path, ""),
    key("archive.backend", Kind::Choice(BACKENDS), "minio"),
    key("archive.endpoint", Kind::Text, ""),
    key("archive.bucket_name", Kind::Bucket, ""),
    key("archive.prefix", Kind::Folder, ""),
    key("archive.key_id", Kind::Secret, ""),
    key("archive.key_id_file", Kind::Path, ""),
    key("archive.secret_key", Kind::Secret, ""),
    key("archive.secret_key_file", Kind::Path, ""),
    key("archive.ca_file", Kind::Path, ""),
    key("archive.proxy", Kind::Proxy, ""),
    key("archive.proxy_file", Kind::Path, ""),
    key("archive.schedule", Kind::Cron, ""),
    key("archive.keep.last", GENERATIONS, "3"),
    key("archive.keep.hourly", GENERATIONS, "0"),
    key("archive.keep.daily", GENERATIONS, "7"),
    key("archive.keep.weekly", GENERATIONS, "5"),
    key("archive.keep.monthly", GENERATIONS, "12"),
    key("archive.keep.within", Kind::PositiveDuration, ""),
    key("archive.verify_budget", Kind::Rate, ""),
    key("http.listen", Kind::Ip, "127.0.0.1"),
    key("http.port", PORT, "9640"),
    // The template of the package writes these keys; see `binds`.
    key("bind.datastore.host", Kind::Host, ""),
    key("bind.datastore.port", PORT, ""),
    key("bind.minio.host", Kind::Host, ""),
    key("bind.minio.port", PORT, ""),
    key("bind.minio.bucket_name", Kind::Bucket, ""),
    key("bind.peer-datastore.host", Kind::Host, ""),
    key("bind.peer-datastore.port", PORT, ""),
    key("bind.peer-minio.host", Kind::Host, ""),
    key("bind.peer-minio.port", PORT, ""),
    key("bind.peer-minio.bucket_name", Kind::Bucket, ""),
];

/// Defaults of the near side, the same as Builder's own. They count where neither the configuration
/// nor Builder's files have a value.
pub(super) const NEAR_DEFAULTS: &[(&str, &str)] = &[
    ("datastore.host", "127.0.0.1"),
    ("datastore.port", "5432"),
    ("datastore.user", "hab"),
    ("datastore.database", "builder"),
    ("datastore.ssl_mode", "prefer"),
    ("s3.backend", "minio"),
];

/// The keys that name the servers of one side. A configuration that sets all of them for the near
/// side needs no file of Builder's.
pub(super) const SERVERS: &[&str] = &[
    "datastore.host",
    "datastore.user",
    "datastore.password",
    "s3.endpoint",
    "s3.bucket_name",
    "s3.key_id",
    "s3.secret_key",
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_defaults_are_good() {
        let names: BTreeSet<&str> = KEYS.iter().map(|key| key.name).collect();
        assert_eq!(names.len(), KEYS.len());
        for key in KEYS {
            let default = key.default_value();
            assert!(default.is_ok(), "{}: {default:?}", key.name);
            assert_eq!(
                default.unwrap().is_none(),
                key.default.is_empty(),
                "{}",
                key.name
            );
        }
    }

    #[test]
    fn the_other_tables_speak_of_keys_that_exist() {
        for side in ["local", "peer"] {
            for name in SERVERS {
                let name = format!("{side}.{name}");
                assert!(Key::find(&name).is_some(), "{name}");
            }
            for (name, default) in NEAR_DEFAULTS {
                let name = format!("{side}.{name}");
                let key = Key::find(&name).unwrap_or_else(|| panic!("{name}"));
                assert!(
                    Key { default, ..*key }.default_value().unwrap().is_some(),
                    "{name}"
                );
            }
        }
    }
}
