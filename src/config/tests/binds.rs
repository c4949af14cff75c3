//! Addresses from binds: they count for less than Builder's own files, and for more than a default.

use super::*;

const BINDS: &str = r#"
    [bind.datastore]
    host = "10.2.0.5"
    port = 6432
    [bind.minio]
    host = "fd00::6"
    port = 9001
    bucket_name = "of-the-bind"
    [bind.peer-datastore]
    host = "10.1.0.5"
    port = 7432
    [bind.peer-minio]
    host = "10.1.0.6"
    port = 9002
    bucket_name = "of-the-peer"
"#;

/// Everything that has an address comes from binds, and the package's defaults are set as its
/// template sets them.
fn bound() -> Site {
    let mut site = Site::new(BINDS);
    for (key, value) in [
        ("local.s3.key_id", r#""depot""#),
        ("local.s3.secret_key", r#""hunter2-local""#),
        ("peer.datastore.port", "5432"),
        ("peer.s3.backend", r#""minio""#),
        ("peer.s3.key_id", r#""hunter2-id""#),
        ("peer.s3.secret_key", r#""hunter2-peer""#),
    ] {
        site.set(key, value);
    }
    site
}

fn addresses(config: &Config) -> Vec<String> {
    let side = |side: &Side| {
        let (d, s) = (&side.datastore, &side.s3);
        vec![
            format!("{}:{} {}", d.host, d.port, d.source),
            format!("{} {} {}", s.endpoint, s.bucket_name, s.source),
        ]
    };
    [side(&config.local), side(&config.peer)].concat()
}

#[test]
fn binds_give_addresses_and_the_port_belongs_to_the_host() {
    assert_eq!(
        addresses(&bound().load().unwrap()),
        [
            "10.2.0.5:6432 bind",
            "http://[fd00::6]:9001 of-the-bind bind",
            "10.1.0.5:7432 bind",
            "http://10.1.0.6:9002 of-the-peer bind",
        ]
    );
}

#[test]
fn the_configuration_comes_first_and_then_builder_api() {
    let site = bound();
    site.file("builder-api.toml", BUILDER_API, 0o640);
    let local = addresses(&site.load().unwrap());
    assert_eq!(local[0], "10.0.0.1:5433 builder-api");
    assert_eq!(
        local[1],
        "http://10.0.0.2:9000 habitat-builder-artifact-store.local builder-api"
    );
    let mut site = bound();
    site.set("local.datastore.host", r#""db""#)
        .set("local.s3.endpoint", r#""https://minio""#)
        .set("local.s3.bucket_name", r#""here""#)
        .set("peer.datastore.host", r#""peer-db""#)
        .set("peer.s3.bucket_name", r#""named""#);
    assert_eq!(
        addresses(&site.load().unwrap()),
        [
            "db:5432 configuration",
            "https://minio here configuration",
            "peer-db:5432 configuration",
            "http://10.1.0.6:9002 named bind",
        ]
    );
}

/// Another server has other buckets.
#[test]
fn a_binds_bucket_is_taken_with_its_endpoint_only() {
    let mut site = bound();
    site.set("local.s3.endpoint", r#""https://minio""#);
    let error = site.load().unwrap_err();
    assert!(
        error.starts_with("local.s3.bucket_name: not set"),
        "{error}"
    );

    let mut site = bound();
    site.set("peer.s3.endpoint", r#""https://minio""#);
    assert_eq!(
        addresses(&site.load().unwrap())[3],
        "https://minio of-the-bind configuration",
        "the local bucket's name"
    );
}

#[test]
fn a_configured_port_stays_and_one_that_is_the_default_does_not() {
    let mut site = bound();
    site.set("local.datastore.port", "5432")
        .set("peer.datastore.port", "6000");
    let found = addresses(&site.load().unwrap());
    assert_eq!(found[0], "10.2.0.5:5432 bind");
    assert_eq!(found[2], "10.1.0.5:6000 bind");
}

#[test]
fn a_bind_to_minio_is_no_address_of_amazons() {
    let mut site = bound();
    site.set("peer.s3.backend", r#""aws""#);
    let error = site.load().unwrap_err();
    assert!(error.starts_with("peer.s3.endpoint: not set"), "{error}");
}

#[test]
fn a_bind_that_vanishes_keeps_its_last_address() {
    let mut site = bound();
    let (before, accepted) = site.load_text(0o640).unwrap();
    assert!(accepted.remembered.is_empty());
    accepted.keep(&site.path("data")).unwrap();

    let binds = site.table["bind"].as_table_mut().unwrap();
    binds.remove("datastore");
    binds.remove("peer-minio");
    let (without, accepted) = site.load_text(0o640).unwrap();
    assert_eq!(without, before);
    assert_eq!(accepted.remembered, ["datastore", "peer-minio"]);
    accepted.keep(&site.path("data")).unwrap();

    site.table.remove("bind");
    let (without, accepted) = site.load_text(0o640).unwrap();
    assert_eq!((without, accepted.remembered.len()), (before, 4));

    site.set("bind.datastore.host", r#""10.2.0.9""#)
        .set("bind.datastore.port", "6432");
    let (moved, accepted) = site.load_text(0o640).unwrap();
    assert_eq!(addresses(&moved)[0], "10.2.0.9:6432 bind");
    assert_eq!(
        accepted.moved,
        ["datastore: from 10.2.0.5:6432 to 10.2.0.9:6432"]
    );
    accepted.keep(&site.path("data")).unwrap();
    let (_, accepted) = site.load_text(0o640).unwrap();
    assert!(accepted.moved.is_empty(), "told once");
}

#[test]
fn what_was_never_kept_is_not_remembered() {
    let mut site = bound();
    site.table.remove("bind");
    let error = site.load().unwrap_err();
    assert!(error.starts_with("local.s3.endpoint: "), "{error}");
}
