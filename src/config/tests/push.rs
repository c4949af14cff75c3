//! A process that pushes runs at the primary's site: Builder's files and binds of its node are the
//! primary's, so they fill the peer.

use super::*;

/// A pusher names the spare's servers itself.
const FAR: &str = r#"
    [replication]
    direction = "push"
    [local.datastore]
    host = "db.dc2"
    [local.s3]
    endpoint = "http://minio.dc2:9000"
    key_id = "depot"
    secret_key = "hunter2-local"
"#;

#[test]
fn the_near_side_of_a_pusher_is_the_peer() {
    let site = Site::new(FAR);
    site.file("builder-api.toml", BUILDER_API, 0o640);
    site.file("pwfile", "hunter2-pwfile\n", 0o400);
    let config = site.load().unwrap();
    assert_eq!(config.replication.direction, Direction::Push);
    let (local, peer) = (&config.local, &config.peer);
    assert_eq!(
        (local.datastore.address(), local.datastore.source),
        ("db.dc2:5432".into(), "configuration")
    );
    assert_eq!(
        (
            local.datastore.user.as_str(),
            local.datastore.database.as_str()
        ),
        ("hab", "builder")
    );
    assert!(local.datastore.password.is_none());
    assert_eq!(
        (peer.datastore.address(), peer.datastore.source),
        ("10.0.0.1:5433".into(), "builder-api")
    );
    assert_eq!(peer.datastore.user, "bldr");
    let password = peer.datastore.password.as_ref().unwrap();
    assert_eq!(password.read("k").unwrap().expose(), "hunter2-api");
    assert_eq!(peer.s3.endpoint, "http://10.0.0.2:9000");
    assert_eq!(local.s3.bucket_name, peer.s3.bucket_name);
}

/// Builder's keys and API at this node are the primary's, so nothing is said of them.
#[test]
fn a_pusher_has_no_files_of_the_spare() {
    let site = Site::new(FAR);
    site.file("builder-api.toml", BUILDER_API, 0o640);
    let config = site.load().unwrap();
    assert_eq!(config.builder_keys_dir, None);
    assert_eq!(config.builder_api, None);
}

#[test]
fn binds_of_a_pusher_are_of_its_own_site() {
    let mut site = Site::new(FAR);
    for (key, value) in [
        ("bind.datastore.host", r#""10.1.0.5""#),
        ("bind.datastore.port", "7432"),
        ("bind.minio.host", r#""10.1.0.6""#),
        ("bind.minio.port", "9002"),
        ("bind.minio.bucket_name", r#""of-the-bind""#),
        ("peer.datastore.port", "5432"),
        ("peer.s3.key_id", r#""hunter2-id""#),
        ("peer.s3.secret_key", r#""hunter2-peer""#),
    ] {
        site.set(key, value);
    }
    let config = site.load().unwrap();
    assert_eq!(config.peer.datastore.address(), "10.1.0.5:7432");
    assert_eq!(config.peer.s3.endpoint, "http://10.1.0.6:9002");
    assert_eq!(config.local.datastore.address(), "db.dc2:5432");
    assert_eq!(config.local.s3.bucket_name, "of-the-bind");
}

#[test]
fn a_shared_bucket_needs_a_process_of_the_primary() {
    let mut site = Site::new(FAR);
    site.file("builder-api.toml", BUILDER_API, 0o640);
    let error = site
        .set("artifacts.mode", r#""shared""#)
        .load()
        .unwrap_err();
    assert!(error.starts_with("replication.direction: "), "{error}");
    assert!(error.contains("must renew the lease"), "{error}");
}

/// The default 127.0.0.1 would be the primary.
#[test]
fn a_pusher_must_name_the_spare() {
    for (absent, key) in [
        ("datastore", "local.datastore.host"),
        ("s3", "local.s3.endpoint"),
    ] {
        let mut site = Site::new(FAR);
        site.file("builder-api.toml", BUILDER_API, 0o640);
        let local = site.table["local"].as_table_mut().unwrap();
        local.remove(absent);
        let error = site.load().unwrap_err();
        assert!(error.starts_with(&format!("{key}: not set")), "{error}");
        assert!(!error.contains("builder-api"), "{error}");
    }
}
