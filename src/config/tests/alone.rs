//! A cluster without a peer has a whole configuration of its own.

use super::*;

/// Returns a site whose configuration names no peer.
fn without_peer() -> Site {
    let mut site = Site::new(MINIMAL);
    site.table.remove("peer");
    site
}

fn alone(site: &Site) -> Config {
    let path = site.file("config.toml", &site.table.to_string(), 0o640);
    match load_text_at(&path, &site.places()) {
        Err(ConfigError::PeerUnset { alone }) => *alone,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_peer_the_rest_is_whole() {
    let mut site = without_peer();
    site.set("site", r#""dc1""#)
        .set("local.datastore.password", r#""hunter2""#);
    let found = alone(&site);
    let with_peer = {
        let mut site = Site::new(MINIMAL);
        site.set("site", r#""dc1""#)
            .set("local.datastore.password", r#""hunter2""#);
        site.load().unwrap()
    };
    let peer = found.peer.clone();
    assert_eq!(found, Config { peer, ..with_peer });
}

#[test]
fn without_a_peer_nobody_is_reached() {
    let peer = alone(&without_peer()).peer;
    assert_eq!(peer.datastore.host, "");
    assert!(peer.s3.endpoint.contains(".invalid"), "{peer:?}");
    // A server that answers under that name all the same gets none of our secrets.
    assert_eq!(peer.datastore.password, None);
    for secret in [&peer.s3.key_id, &peer.s3.secret_key] {
        assert_eq!(secret.read("k").unwrap().expose(), "");
    }
    assert_eq!(peer.s3.proxy, None);
}

#[test]
fn builder_s_own_files_fill_a_cluster_without_a_peer() {
    let mut site = without_peer();
    site.table.remove("local");
    site.file("builder-api.toml", BUILDER_API, 0o640);
    let found = alone(&site);
    assert_eq!(found.local.datastore.host, "10.0.0.1");
    assert_eq!(found.local.s3.endpoint, "http://10.0.0.2:9000");
    assert!(found.builder_api.is_some());
}

#[test]
fn only_the_missing_peer_is_forgiven() {
    let site = without_peer();
    let path = site.file("config.toml", &site.table.to_string(), 0o640);
    assert_eq!(load_alone(&path).unwrap(), alone(&site));

    for (key, value) in [
        ("role", r#""chief""#),
        ("local.s3.key_id", r#""""#),
        ("peer.s3.endpoint", r#""https://minio.example.org""#),
        ("peer.datastore.host", r#""db""#),
    ] {
        let mut site = without_peer();
        site.set(key, value);
        let path = site.file("config.toml", &site.table.to_string(), 0o640);
        let error = load_alone(&path).unwrap_err();
        assert!(matches!(error, ConfigError::Key { .. }), "{key}: {error}");
    }

    let site = Site::new(MINIMAL);
    let path = site.file("config.toml", &site.table.to_string(), 0o640);
    assert_eq!(load_alone(&path).unwrap(), site.load().unwrap());
}

#[test]
fn the_error_of_a_missing_peer_prints_no_secret() {
    let mut site = without_peer();
    site.set("local.datastore.password", r#""hunter2""#);
    let path = site.file("config.toml", &site.table.to_string(), 0o640);
    let error = load_text_at(&path, &site.places()).unwrap_err();
    let shown = format!("{error} {error:?} {error:#?}");
    assert!(
        shown.starts_with("peer.datastore.host: not set") && shown.contains("***"),
        "{shown}"
    );
    assert!(!shown.contains("hunter2"), "{shown}");
}
