//! Each key alone: good values, bad values, unknown keys, keys that are not supported yet.

use std::collections::BTreeSet;

use super::*;

/// All keys, each with a good value that is not its default, and with bad values. A key that both
/// sides have begins with `*`.
#[rustfmt::skip]
const KEYS: &[(&str, &str, &[&str])] = &[
    ("role", r#""spare""#, &[r#""chief""#, r#""Spare""#, "1"]),
    ("force_epoch", "7", &["-1", r#""7""#, "1.0"]),
    ("paused", "true", &[r#""yes""#, "1"]),
    (
        "paused_until",
        r#""2030-01-31T22:00:00Z""#,
        &[r#""tomorrow""#, "7", "2030-01-31"],
    ),
    (
        "quiet_until",
        "2030-01-31T22:00:00Z",
        &[r#""22:00""#, "true"],
    ),
    ("change", r#""CHG-1""#, &["1", r#""a\nb""#]),
    ("site", r#""dc2""#, &["[]", r#""a\u0000b""#]),
    ("log_level", r#""debug""#, &[r#""loud""#, r#""off""#, "3"]),
    ("log_format", r#""json""#, &[r#""xml""#, "1"]),
    (
        "local.builder_api_config",
        r#""DIR/certificate""#,
        &[r#""DIR/none""#, r#""config.toml""#, "1"],
    ),
    ("local.builder_keys_dir", r#""/keys""#, &[r#""keys""#, "1"]),
    (
        "*.datastore.host",
        r#""db""#,
        &[r#""/run/postgresql""#, r#""a b""#, "1"],
    ),
    ("*.datastore.port", "6432", &["0", "65536", r#""x""#, "1.5"]),
    ("*.datastore.user", r#""bldr""#, &["1"]),
    ("*.datastore.database", r#""depot""#, &["true"]),
    ("*.datastore.password", r#""hunter2""#, &["4711"]),
    (
        "*.datastore.password_file",
        r#""DIR/secret""#,
        &[
            r#""DIR/none""#,
            r#""DIR/open-secret""#,
            r#""secret""#,
            r#""DIR""#,
        ],
    ),
    (
        "*.datastore.ssl_mode",
        r#""verify-full""#,
        &[r#""allow""#, "true"],
    ),
    (
        "*.datastore.ssl_root_cert",
        r#""DIR/certificate""#,
        &[r#""DIR/none""#, "1"],
    ),
    // Good alone, but refused without its other half.
    (
        "*.datastore.ssl_cert",
        "",
        &[r#""DIR/certificate""#, r#""DIR/none""#, "1"],
    ),
    (
        "*.datastore.ssl_key",
        "",
        &[
            r#""DIR/secret""#,
            r#""DIR/open-secret""#,
            r#""DIR/none""#,
            "1",
        ],
    ),
    ("*.s3.backend", r#""minio""#, &[r#""gcs""#, "1"]),
    (
        "*.s3.endpoint",
        r#""http://minio:9000""#,
        &[
            r#""minio:9000""#,
            r#""http://minio/x""#,
            r#""eu-central-1""#,
            "1",
        ],
    ),
    (
        "*.s3.bucket_name",
        r#""bucket""#,
        &[r#""Bucket""#, r#""ab""#, "1"],
    ),
    ("*.s3.key_id", r#""id""#, &["4711"]),
    ("*.s3.key_id_file", "", &[r#""DIR/secret""#, "1"]),
    ("*.s3.secret_key", r#""key""#, &["4711"]),
    ("*.s3.secret_key_file", "", &[r#""DIR/secret""#, "1"]),
    (
        "*.s3.ca_file",
        r#""DIR/certificate""#,
        &[r#""DIR/none""#, "1"],
    ),
    (
        "*.s3.proxy",
        r#""http://user:hunter2@proxy:3128""#,
        &[
            r#""proxy""#,
            r#""http://proxy""#,
            r#""http://user:hunter2@proxy""#,
            r#""http://user:hunter2@proxy:1/x""#,
            r#""http://user:hunter2\n@proxy:1""#,
            r#""socks5://user:hunter2@proxy:1080""#,
            "1",
        ],
    ),
    (
        "*.s3.proxy_file",
        r#""DIR/proxy""#,
        &[r#""DIR/none""#, r#""DIR/secret""#, r#""proxy""#, "1"],
    ),
    ("artifacts.mode", r#""shared""#, &[r#""none""#, "1"]),
    ("artifacts.fill", "false", &[r#""yes""#, "1", "true"]),
    // Good with `external` only: a test below sets it.
    ("artifacts.own_prefix", "", &[r#"".ours/""#, r#""core/""#, "1"]),
    ("artifacts.arrival_limit", r#""2h""#, &[r#""0s""#, "60"]),
    // Good for a shared bucket only, or together with other keys: `shared.rs` tests them.
    ("artifacts.attach", r#""always""#, &[r#""at_takeover""#, r#""never""#, "1"]),
    ("artifacts.lease_ttl", r#""30s""#, &[r#""900ms""#, r#""0s""#, "15"]),
    ("artifacts.isolated", r#""go_on""#, &[r#""fence""#, r#""stop""#, "true"]),
    ("artifacts.lease.backend", r#""aws""#, &[r#""gcs""#, "1"]),
    ("artifacts.lease.endpoint", "", &[r#""minio:9000""#, "1"]),
    ("artifacts.lease.bucket_name", "", &[r#""Bucket""#, "1"]),
    ("artifacts.lease.key_id", "", &["4711"]),
    ("artifacts.lease.key_id_file", "", &[r#""DIR/secret""#, "1"]),
    ("artifacts.lease.secret_key", "", &["4711"]),
    ("artifacts.lease.secret_key_file", "", &[r#""DIR/secret""#, "1"]),
    ("artifacts.lease.ca_file", r#""DIR/certificate""#, &["1"]),
    ("artifacts.lease.proxy", "", &[r#""proxy""#, "1"]),
    ("artifacts.lease.proxy_file", "", &[r#""proxy""#, "1"]),
    ("replication.mode", r#""stream""#, &[r#""fast""#, "1"]),
    ("replication.direction", r#""pull""#, &[r#""both""#, "1"]),
    (
        "replication.interval",
        r#""2m""#,
        &[r#""0s""#, r#""often""#, "60", r#""5m""#],
    ),
    (
        "replication.schedule",
        r#""*/2 * * * *""#,
        &[r#""daily""#, r#""0 0 3 * * *""#, r#""0 3 * * *""#, "3"],
    ),
    (
        "replication.lag_warn",
        r#""2m""#,
        &[r#""0s""#, r#""1""#, "60"],
    ),
    ("replication.rpo", r#""10m""#, &[r#""1m""#, r#""x""#, "300"]),
    ("replication.jobs", "64", &["0", "65", r#""2""#]),
    ("replication.copies", "1", &["0", "257", "13", r#""8""#]),
    (
        "replication.buffer",
        r#""128MiB""#,
        &[r#""15MiB""#, r#""39MiB""#, r#""64""#, "67108864"],
    ),
    (
        "replication.bandwidth_limit",
        r#""50MB/s""#,
        &[r#""50MB""#, r#""0B/s""#, "50"],
    ),
    ("replication.gate_grace", r#""0s""#, &[r#""-1s""#, "30"]),
    ("replication.retry_missing", r#""1h""#, &[r#""0s""#, "10"]),
    (
        "replication.artifact_retention",
        r#""30d""#,
        &[r#""0s""#, r#""a week""#],
    ),
    (
        "replication.wal_hold_limit",
        r#""8GB""#,
        &[r#""0B""#, r#""8""#, "8"],
    ),
    ("replication.wal_unbounded", "true", &[r#""true""#, "1"]),
    ("replication.slot", r#""dba_made_1""#, &["1", r#""Slot""#, r#""a-b""#, r#""1a""#]),
    ("replication.publication", r#""p""#, &["1", r#""a b""#, r#""a;b""#]),
    (
        "replication.keep_generations",
        "0",
        &["-1", "101", r#""2""#],
    ),
    ("fuse.max_percent", "100", &["-1", "101", r#""10%""#]),
    ("fuse.min_count", "0", &["-1", r#""20""#]),
    ("fuse.window", r#""2h""#, &[r#""0s""#, "1"]),
    ("fuse.approve", r#""f-1""#, &["1"]),
    ("takeover.drain_timeout", r#""1m""#, &[r#""0s""#, "30"]),
    ("takeover.read_only_limit", r#""2h""#, &[r#""0s""#, "30"]),
    ("takeover.fence_retry", r#""1s""#, &[r#""0s""#, "5"]),
    ("takeover.attach_timeout", r#""5m""#, &[r#""0s""#, "5"]),
    ("takeover.fence_command", r#""revoke dc1""#, &["1", "true"]),
    ("takeover.force_lease", r#""8f3c""#, &["1", "true"]),
    (
        "verify.schedule",
        r#""0 4 * * *""#,
        &[r#""0 25 * * *""#, r#""0 0 31 2 *""#, "3"],
    ),
    ("verify.deep", "true", &[r#""deep""#, "1"]),
    ("verify.rolling", "100", &["-1", "101", r#""2%""#]),
    // A place alone is a directory or a bucket: `archive.rs` tests the other keys with one.
    ("archive.name", "", &[r#""Far""#, r#""far-away""#, "1"]),
    ("archive.location", r#""/srv/archive""#, &[r#""srv""#, r#""s3://bucket""#, "1"]),
    ("archive.backend", "", &[r#""gcs""#, "1"]),
    ("archive.endpoint", "", &[r#""minio:9000""#, r#""http://minio/x""#, "1"]),
    ("archive.bucket_name", "", &[r#""Bucket""#, "1"]),
    ("archive.prefix", "", &[r#""/a/""#, r#""a""#, r#""a/../b/""#, r#""a\nb/""#, "1"]),
    ("archive.key_id", "", &["4711"]),
    ("archive.key_id_file", "", &[r#""secret""#, "1"]),
    ("archive.secret_key", "", &["4711"]),
    ("archive.secret_key_file", "", &[r#""secret""#, "1"]),
    ("archive.ca_file", "", &[r#""certificate""#, "1"]),
    ("archive.proxy", "", &[r#""http://user:hunter2@proxy""#, "1"]),
    ("archive.proxy_file", "", &[r#""proxy""#, "1"]),
    ("archive.schedule", "", &[r#""daily""#, r#""0 25 * * *""#, "3"]),
    ("archive.keep.last", "", &["-1", "100001", r#""3""#]),
    ("archive.keep.hourly", "", &["-1", "100001", r#""3""#]),
    ("archive.keep.daily", "", &["-1", "100001", "1.5"]),
    ("archive.keep.weekly", "", &["-1", "100001", "true"]),
    ("archive.keep.monthly", "", &["-1", "100001", r#""3""#]),
    ("archive.keep.within", "", &[r#""0s""#, r#""a week""#, "7"]),
    ("archive.verify_budget", "", &[r#""50MB""#, r#""0B/s""#, "50"]),
    ("http.listen", r#""0.0.0.0""#, &[r#""localhost""#, "1"]),
    ("http.port", "9641", &["0", "70000", r#""9641""#]),
    ("bind.datastore.host", r#""10.0.0.5""#, &[r#""a b""#, "1"]),
    ("bind.datastore.port", "5432", &["0", r#""x""#]),
    ("bind.minio.host", r#""10.0.0.5""#, &[r#""a/b""#]),
    ("bind.minio.port", "9000", &["65536"]),
    ("bind.minio.bucket_name", r#""bucket""#, &[r#""Bucket""#]),
    ("bind.peer-datastore.host", r#""10.0.0.5""#, &[r#""a b""#]),
    ("bind.peer-datastore.port", "5432", &["0"]),
    ("bind.peer-minio.host", r#""10.0.0.5""#, &["true"]),
    ("bind.peer-minio.port", "9000", &["1.5"]),
    ("bind.peer-minio.bucket_name", r#""bucket""#, &[r#""ab""#]),
];

/// Returns the keys of the table, with the keys of both sides written out.
fn cases() -> Vec<(String, &'static str, &'static [&'static str])> {
    let sides = |key: &str| match key.strip_prefix('*') {
        Some(rest) => vec![format!("local{rest}"), format!("peer{rest}")],
        None => vec![key.to_string()],
    };
    KEYS.iter()
        .flat_map(|(key, good, bad)| sides(key).into_iter().map(move |key| (key, *good, *bad)))
        .collect()
}

#[test]
fn the_table_of_tests_holds_every_key() {
    let tested: BTreeSet<String> = cases().into_iter().map(|(key, ..)| key).collect();
    let known: BTreeSet<String> = Config::known_keys()
        .iter()
        .map(|key| key.name.to_string())
        .collect();
    assert_eq!(tested, known);
}

#[test]
fn every_key_takes_a_good_value() {
    for (key, good, _) in cases().into_iter().filter(|(_, good, _)| !good.is_empty()) {
        let found = Site::new(MINIMAL).set(&key, good).load();
        assert!(found.is_ok(), "{key} = {good}: {}", found.unwrap_err());
    }
}

#[test]
fn every_key_refuses_bad_values_by_its_name() {
    for (key, _, bad) in cases() {
        for value in bad {
            let error = problem(&key, value);
            // Some keys are checked together with others, and the error may name the other key.
            let other = match key.as_str() {
                "replication.interval" | "replication.schedule" => "replication.rpo",
                "replication.copies" => "replication.buffer",
                "peer.s3.key_id_file"
                | "local.s3.key_id_file"
                | "peer.s3.secret_key_file"
                | "local.s3.secret_key_file" => key.strip_suffix("_file").unwrap(),
                _ => &key,
            };
            let named =
                error.starts_with(&format!("{key}: ")) || error.starts_with(&format!("{other}: "));
            assert!(named, "{key} = {value}: {error}");
            assert!(
                !error.contains("4711") && !error.contains("hunter2"),
                "{key} = {value}: {error}"
            );
        }
    }
}

#[test]
fn marks_are_in_a_prefix_of_our_own_or_nowhere() {
    let mut site = Site::new(MINIMAL);
    assert_eq!(site.load().unwrap().artifacts.marks(), Some(".warm-spare/"));
    site.set("artifacts.mode", r#""external""#);
    assert_eq!(site.load().unwrap().artifacts.marks(), None);
    site.set("artifacts.own_prefix", r#"".ours/""#);
    assert_eq!(site.load().unwrap().artifacts.marks(), Some(".ours/"));
}

#[test]
fn only_a_provider_s_bucket_is_filled() {
    let error = problem("artifacts.fill", "true");
    assert!(error.contains("artifacts.mode = \"external\""), "{error}");
}

#[test]
fn errors_read_well() {
    assert_eq!(
        problem("a b", "1"),
        "\"a b\": unknown key; docs/reference.md lists all keys"
    );
    assert_eq!(
        problem("peer.datastore.port", r#""x""#),
        r#"peer.datastore.port: expected an integer 1-65535, found "x""#
    );
    assert_eq!(
        problem("peer.datastore.prot", "1"),
        "peer.datastore.prot: unknown key; did you mean peer.datastore.port?"
    );
    assert_eq!(
        problem("lag_warn", r#""1m""#),
        "lag_warn: unknown key; did you mean replication.lag_warn?"
    );
    assert_eq!(
        problem("replicaton.jobs", "1"),
        "replicaton: unknown key; did you mean replication?"
    );
    assert!(
        problem("peer.datastore.pool_size", "1")
            .starts_with("peer.datastore.pool_size: unknown key; docs/")
    );
    assert_eq!(
        problem("fuse", "1"),
        "fuse: expected a table, found integer"
    );
    assert_eq!(
        problem("role.x", "1"),
        "role: expected one of keep, spare, primary, found a table"
    );
    assert!(problem("replication.buffer", r#""39MiB""#).contains("at least \"40MiB\""));
    assert!(problem("replication.buffer", r#""1MiB""#).contains("at least \"16MiB\""));
}

#[test]
fn what_must_be_set_is_asked_for_by_name() {
    for key in [
        "peer.datastore.host",
        "peer.s3.endpoint",
        "peer.s3.key_id",
        "peer.s3.secret_key",
    ] {
        let error = problem(key, r#""""#);
        assert!(
            error.starts_with(&format!(
                "{key}: not set, and it has no default: set this key"
            )),
            "{error}"
        );
    }
    for key in [
        "local.s3.endpoint",
        "local.s3.bucket_name",
        "local.s3.key_id",
        "local.s3.secret_key",
    ] {
        let error = problem(key, r#""""#);
        assert!(
            error.starts_with(&format!("{key}: not set")) && error.contains("builder-api"),
            "{error}"
        );
    }
}
