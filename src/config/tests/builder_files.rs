//! Builder's own files as the source of the local side.

use super::*;

#[test]
fn the_local_side_comes_from_builder_api() {
    let site = without_local();
    let file = site.file("builder-api.toml", BUILDER_API, 0o640);
    site.file("pwfile", "hunter2-pwfile\n", 0o400);
    let config = site.load().unwrap();
    let Side { datastore, s3 } = &config.local;
    assert_eq!(
        (datastore.host.as_str(), datastore.port, datastore.source),
        ("10.0.0.1", 5433, "builder-api")
    );
    assert_eq!(
        (datastore.user.as_str(), datastore.database.as_str()),
        ("bldr", "depot")
    );
    assert_eq!(datastore.ssl_mode, SslMode::Require);
    assert_eq!(
        (s3.endpoint.as_str(), s3.source),
        ("http://10.0.0.2:9000", "builder-api")
    );
    assert_eq!(s3.bucket_name, "habitat-builder-artifact-store.local");
    assert_eq!(config.peer.s3.bucket_name, s3.bucket_name);
    assert_eq!(s3.key_id.read("k").unwrap().expose(), "hunter2-api-id");
    let password = datastore.password.clone().unwrap();
    assert_eq!(password.read("k").unwrap().expose(), "hunter2-api");

    // Habitat renders the file again when the password changes: the next connection takes the new
    // password.
    fs::write(&file, BUILDER_API.replace("hunter2-api\"", "hunter2-new\"")).unwrap();
    assert_eq!(password.read("k").unwrap().expose(), "hunter2-new");
    fs::write(&file, "").unwrap();
    let error = password
        .read("local.datastore.password")
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("local.datastore.password: ") && error.contains("datastore.password"),
        "{error}"
    );
}

#[test]
fn the_configuration_goes_before_builder_api() {
    let mut site = without_local();
    site.file("builder-api.toml", BUILDER_API, 0o640);
    site.set("local.datastore.host", r#""db""#)
        .set("local.datastore.password_file", r#""DIR/secret""#);
    site.set("local.s3.key_id_file", r#""DIR/secret""#);
    let local = site.load().unwrap().local;
    assert_eq!(
        (local.datastore.host.as_str(), local.datastore.source),
        ("db", "configuration")
    );
    assert_eq!(local.datastore.port, 5433);
    assert_eq!(
        local
            .datastore
            .password
            .unwrap()
            .read("k")
            .unwrap()
            .expose(),
        "hunter2-file"
    );
    assert_eq!(local.s3.key_id.read("k").unwrap().expose(), "hunter2-file");
    assert_eq!(
        local.s3.secret_key.read("k").unwrap().expose(),
        "hunter2-api-key"
    );
}

#[test]
fn the_datastores_own_password_is_the_last_resort() {
    let site = Site::new(MINIMAL);
    site.file("pwfile", "hunter2-pwfile\n", 0o400);
    let datastore = site.load().unwrap().local.datastore;
    assert_eq!(datastore.source, "builder-datastore pwfile");
    assert_eq!(
        datastore.password.unwrap().read("k").unwrap().expose(),
        "hunter2-pwfile"
    );

    site.file(
        "builder-api.toml",
        &BUILDER_API.replace("password = \"hunter2-api\"", "password = \"\""),
        0o640,
    );
    let datastore = site.load().unwrap().local.datastore;
    assert_eq!(datastore.source, "builder-api");
    assert_eq!(
        datastore.password.unwrap().read("k").unwrap().expose(),
        "hunter2-pwfile"
    );

    site.file("pwfile", "hunter2-pwfile\n", 0o404);
    assert!(
        site.load()
            .unwrap_err()
            .starts_with("local.datastore.password: ")
    );
}

#[test]
fn what_is_wrong_in_builder_apis_file_names_file_and_key() {
    let cases = [
        (
            "port = 5433",
            "port = \"x\"",
            "datastore.port: expected an integer 1-65535",
        ),
        (
            "\"hunter2-api\"",
            "4711",
            "datastore.password: expected a text",
        ),
        ("jobsrv", "jobsrv, artifactory", "unsupported_store"),
    ];
    for (from, to, expected) in cases {
        let site = without_local();
        site.file("builder-api.toml", &BUILDER_API.replace(from, to), 0o640);
        let error = site.load().unwrap_err();
        assert!(
            error.starts_with("local.builder_api_config: ") && error.contains(expected),
            "{error}"
        );
        assert!(
            error.contains("builder-api.toml") && !error.contains("4711"),
            "{error}"
        );
    }
    // libpq's own name for "encrypt if the server insists".
    let site = without_local();
    site.file(
        "builder-api.toml",
        &BUILDER_API.replace("\"require\"", "\"allow\""),
        0o640,
    );
    assert_eq!(
        site.load().unwrap().local.datastore.ssl_mode,
        SslMode::Prefer
    );
}

/// The file is Builder's. A fault in it must not stop the service where our own configuration names
/// everything.
#[test]
fn a_spoilt_file_of_builders_is_in_the_way_only_when_something_of_it_is_needed() {
    let mut site = without_local();
    let spoilt = |site: &Site| {
        site.file(
            "builder-api.toml",
            "[datastore]\nssl_root_cert \"x\"",
            0o640,
        )
    };
    spoilt(&site);
    let error = site.load().unwrap_err();
    assert!(
        error.contains("line 2")
            && error.contains("if your own configuration sets local.datastore.host"),
        "{error}"
    );
    for (key, value) in [
        ("local.datastore.host", "\"db\""),
        ("local.datastore.user", "\"hab\""),
        ("local.datastore.password_file", "\"DIR/secret\""),
        ("local.s3.endpoint", "\"http://store:9000\""),
        ("local.s3.bucket_name", "\"depot\""),
        ("local.s3.key_id", "\"depot\""),
    ] {
        site.set(key, value);
        assert!(site.load().is_err(), "local.s3.secret_key is still needed");
    }
    site.set("local.s3.secret_key_file", "\"DIR/secret\"");
    let config = site.load().unwrap();
    let told = config.builder_unread.unwrap();
    assert!(told.contains("builder-api.toml: line 2"), "{told}");
    assert_eq!(config.local.datastore.host, "db");

    site.file("builder-api.toml", "datastore.port = \"x\"", 0o640);
    let config = site.load().unwrap();
    assert!(config.builder_unread.unwrap().contains("datastore.port"));
    assert_eq!(config.local.datastore.port, 5432);

    site.file("builder-api.toml", "datastore.port = 7", 0o640);
    let config = site.load().unwrap();
    assert_eq!(
        (config.builder_unread, config.local.datastore.port),
        (None, 7)
    );
    let artifactory = "api.features_enabled = \"artifactory\"";
    site.file("builder-api.toml", artifactory, 0o640);
    assert!(site.load().unwrap_err().contains("unsupported_store"));
}
