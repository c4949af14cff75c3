//! All keys together, and the values that the local side takes from Builder.

use std::time::Duration;

use super::*;

#[test]
fn a_whole_configuration_arrives_whole() {
    let mut site = Site::new(MINIMAL);
    let settings = [
        ("role", r#""spare""#),
        ("force_epoch", "7"),
        ("paused", "true"),
        ("paused_until", r#""2030-01-31T23:00:00+01:00""#),
        ("quiet_until", "2031-01-31T22:00:00Z"),
        ("log_format", r#""json""#),
        ("change", r#""CHG-1""#),
        ("site", r#""dc2""#),
        ("log_level", r#""debug""#),
        ("peer.datastore.port", "6432"),
        ("peer.datastore.user", r#""u""#),
        ("peer.datastore.database", r#""d""#),
        ("peer.datastore.password_file", r#""DIR/secret""#),
        ("peer.datastore.ssl_mode", r#""verify-ca""#),
        ("peer.datastore.ssl_root_cert", r#""DIR/certificate""#),
        ("peer.datastore.ssl_cert", r#""DIR/certificate""#),
        ("peer.datastore.ssl_key", r#""DIR/secret""#),
        ("peer.s3.backend", r#""aws""#),
        ("peer.s3.endpoint", r#""eu-central-1""#),
        ("peer.s3.bucket_name", r#""other""#),
        ("peer.s3.ca_file", r#""DIR/certificate""#),
        ("replication.interval", r#""2m""#),
        ("replication.schedule", r#""*/4 * * * *""#),
        ("replication.lag_warn", r#""3m""#),
        ("replication.rpo", r#""14m""#),
        ("replication.retry_missing", r#""15m""#),
        ("replication.jobs", "3"),
        ("replication.copies", "4"),
        ("replication.buffer", r#""20MiB""#),
        ("replication.bandwidth_limit", r#""5MB/s""#),
        ("replication.gate_grace", r#""6s""#),
        ("replication.mode", r#""stream""#),
        ("replication.artifact_retention", r#""16m""#),
        ("replication.wal_hold_limit", r#""3GB""#),
        ("replication.wal_unbounded", "true"),
        ("replication.slot", r#""a_slot""#),
        ("replication.publication", r#""a_publication""#),
        ("replication.keep_generations", "9"),
        ("fuse.max_percent", "11"),
        ("fuse.min_count", "12"),
        ("fuse.window", r#""13m""#),
        ("fuse.approve", r#""f-1""#),
        ("verify.schedule", r#""30 4 * * *""#),
        ("verify.deep", "true"),
        ("verify.rolling", "3"),
        ("http.listen", r#""::1""#),
        ("http.port", "9641"),
    ];
    for (key, value) in settings {
        site.set(key, value);
    }
    let config = site.load().unwrap();
    assert_eq!((config.role, config.force_epoch), (WantedRole::Spare, 7));
    assert_eq!(
        (config.change.as_str(), config.site.as_str()),
        ("CHG-1", "dc2")
    );
    assert_eq!(
        (config.log_level, config.log_format),
        (log::LevelFilter::Debug, LogFormat::Json)
    );
    assert_eq!(
        (config.paused, config.paused_until, config.quiet_until),
        (
            true,
            Some("2030-01-31T22:00:00Z".parse().unwrap()),
            Some("2031-01-31T22:00:00Z".parse().unwrap())
        )
    );
    let Side { datastore, s3 } = &config.peer;
    assert_eq!(
        (datastore.host.as_str(), datastore.port),
        ("db.example.org", 6432)
    );
    assert_eq!(
        (datastore.user.as_str(), datastore.database.as_str()),
        ("u", "d")
    );
    assert_eq!(
        datastore
            .password
            .as_ref()
            .unwrap()
            .read("k")
            .unwrap()
            .expose(),
        "hunter2-file"
    );
    assert_eq!(
        (datastore.ssl_mode, datastore.source),
        (SslMode::VerifyCa, "configuration")
    );
    assert_eq!(datastore.ssl_root_cert, Some(site.path("certificate")));
    assert_eq!(datastore.ssl_cert, Some(site.path("certificate")));
    assert_eq!(datastore.ssl_key, Some(site.path("secret")));
    assert_eq!(
        (s3.backend, s3.region.as_str(), s3.source),
        (Backend::Aws, "eu-central-1", "configuration")
    );
    assert_eq!(
        (s3.endpoint.as_str(), s3.bucket_name.as_str()),
        ("https://s3.eu-central-1.amazonaws.com", "other")
    );
    assert_eq!(s3.key_id.read("k").unwrap().expose(), "hunter2-id");
    assert_eq!(s3.secret_key.read("k").unwrap().expose(), "hunter2-peer");
    assert_eq!(s3.ca_file, Some(site.path("certificate")));
    let Replication {
        interval,
        schedule,
        lag_warn,
        rpo,
        retry_missing,
        jobs,
        copies,
        buffer,
        bandwidth_limit,
        gate_grace,
        keep_generations,
        mode,
        direction,
        artifact_retention,
        wal_hold_limit,
        wal_unbounded,
        slot,
        publication,
    } = config.replication;
    assert_eq!(
        (mode, direction, wal_hold_limit, wal_unbounded),
        (Mode::Stream, Direction::Pull, 3_000_000_000, true)
    );
    assert_eq!(
        (slot.as_deref(), publication.as_deref()),
        (Some("a_slot"), Some("a_publication"))
    );
    assert_eq!(artifact_retention, Duration::from_secs(960));
    assert_eq!(
        (jobs, copies, buffer, bandwidth_limit),
        (3, 4, 20 << 20, Some(5_000_000))
    );
    assert_eq!((gate_grace, keep_generations), (Duration::from_secs(6), 9));
    let minutes = |n: u64| Duration::from_secs(n * 60);
    assert_eq!((interval, lag_warn), (minutes(2), minutes(3)));
    assert_eq!((rpo, retry_missing), (minutes(14), minutes(15)));
    assert_eq!(schedule, Some(Schedule::parse("*/4 * * * *").unwrap()));
    assert_eq!((config.fuse.max_percent, config.fuse.min_count), (11, 12));
    assert_eq!(
        (config.fuse.window, config.fuse.approve.as_str()),
        (Duration::from_secs(780), "f-1")
    );
    assert_eq!(
        config.verify,
        VerifyPlan {
            schedule: Some(Schedule::parse("30 4 * * *").unwrap()),
            deep: true,
            rolling: 3
        }
    );
    assert_eq!(
        config.http,
        Http {
            listen: "::1".parse().unwrap(),
            port: 9641
        }
    );
}

#[test]
fn defaults_are_the_references() {
    let config = Site::new(MINIMAL).load().unwrap();
    assert_eq!(
        (config.role, config.force_epoch, config.log_level),
        (WantedRole::Keep, 0, log::LevelFilter::Info)
    );
    let Side { datastore, s3 } = &config.local;
    assert_eq!(
        (datastore.host.as_str(), datastore.port),
        ("127.0.0.1", 5432)
    );
    assert_eq!(
        (datastore.user.as_str(), datastore.database.as_str()),
        ("hab", "builder")
    );
    assert_eq!(
        (datastore.ssl_mode, datastore.source),
        (SslMode::Prefer, "default")
    );
    assert!(datastore.password.is_none() && config.peer.datastore.password.is_none());
    assert_eq!(
        (s3.backend, s3.region.as_str(), s3.source),
        (Backend::Minio, "minio_s3", "configuration")
    );
    let peer = &config.peer;
    assert_eq!(
        (
            peer.datastore.port,
            peer.datastore.user.as_str(),
            peer.datastore.database.as_str()
        ),
        (5432, "hab", "builder")
    );
    assert_eq!(
        (peer.datastore.ssl_mode, peer.s3.backend),
        (SslMode::Prefer, Backend::Minio)
    );
    assert_eq!(peer.s3.bucket_name, "builder", "the local bucket's name");
    let replication = &config.replication;
    assert_eq!(
        (replication.jobs, replication.copies, replication.buffer),
        (2, 8, 64 << 20)
    );
    assert_eq!(
        (replication.bandwidth_limit, replication.keep_generations),
        (None, 2)
    );
    assert_eq!(replication.gate_grace, Duration::from_secs(30));
    assert_eq!(
        (replication.mode, replication.wal_hold_limit),
        (Mode::Auto, 4_000_000_000)
    );
    assert_eq!(
        (&replication.slot, &replication.publication),
        (&None, &None)
    );
    assert!(!replication.wal_unbounded);
    let week = Duration::from_secs(7 * 24 * 3600);
    assert_eq!(replication.artifact_retention, week);
    assert_eq!((config.fuse.max_percent, config.fuse.min_count), (10, 20));
    assert_eq!(config.fuse.window, Duration::from_secs(3600));
    let minutes = |n: u64| Duration::from_secs(n * 60);
    assert_eq!(
        (replication.interval, replication.lag_warn),
        (minutes(1), minutes(1))
    );
    assert_eq!(
        (replication.rpo, replication.retry_missing),
        (minutes(5), minutes(10))
    );
    assert_eq!(replication.schedule, None);
    assert_eq!(
        (config.paused, config.paused_until, config.quiet_until),
        (false, None, None)
    );
    assert_eq!(config.log_format, LogFormat::Text);
    let nightly = Schedule::parse("0 3 * * *").unwrap();
    assert_eq!(
        (config.verify.schedule, config.verify.deep),
        (Some(nightly), false)
    );
    assert_eq!(
        (config.http.listen.to_string().as_str(), config.http.port),
        ("127.0.0.1", 9640)
    );
}

#[test]
fn the_spare_may_be_compared_never() {
    let mut site = Site::new(MINIMAL);
    let config = site.set("verify.schedule", r#""""#).load().unwrap();
    assert_eq!(config.verify.schedule, None);
}

#[test]
fn lag_by_design_is_not_critical() {
    let with_rpo = |rpo: &str| {
        let mut site = Site::new(MINIMAL);
        site.set("replication.schedule", r#""0 3 * * *""#);
        site.set("replication.rpo", rpo).load().map(|_| ())
    };
    let refusal = |found: &str| {
        Err(format!(
            "replication.rpo: must exceed the longest pause of replication.schedule (1day), found {found}"
        ))
    };
    assert_eq!(with_rpo(r#""5m""#), refusal("5m"));
    assert_eq!(with_rpo(r#""24h""#), refusal("1day"));
    assert_eq!(with_rpo(r#""25h""#), Ok(()));
    assert_eq!(
        problem("replication.interval", r#""5m""#),
        "replication.rpo: must exceed replication.interval (5m), found 5m"
    );
}

#[test]
fn configurations_that_differ_are_not_equal() {
    let config = Site::new(MINIMAL).load().unwrap();
    assert_eq!(config, config.clone());
    let other = Config {
        paused: true,
        ..config.clone()
    };
    assert_ne!(config, other);
    let mut other = config.clone();
    other.peer.s3.secret_key = SecretSource::Inline(Secret::new("hunter2-other"));
    assert_ne!(config, other);
}

#[test]
fn one_promotion_may_have_two_consents() {
    let fuse = |approve: &str| Fuse {
        max_percent: 10,
        min_count: 10,
        window: Duration::ZERO,
        approve: approve.into(),
    };
    let none = fuse("");
    assert!(!none.approves("") && !none.approves("a1"));
    assert_eq!(none.with("artifacts-2"), "artifacts-2");
    let one = fuse("artifacts-2");
    assert!(one.approves("artifacts-2") && !one.approves("artifacts"));
    let both = fuse(&one.with("6d19d900"));
    assert!(both.approves("artifacts-2") && both.approves("6d19d900"));
    assert!(!both.approves("artifacts-2, 6d19d900"));
}
