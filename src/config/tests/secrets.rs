//! Secrets stay secret, in files, errors and logs.

use std::path::Path;

use super::*;

#[test]
fn a_secret_and_its_file_exclude_each_other() {
    for key in [
        "peer.datastore.password",
        "local.datastore.password",
        "peer.s3.key_id",
        "local.s3.secret_key",
        "peer.s3.proxy",
    ] {
        let mut site = Site::new(MINIMAL);
        site.set(key, r#""http://u:hunter2@proxy:3128""#)
            .set(&format!("{key}_file"), r#""DIR/secret""#);
        assert_eq!(
            site.load().unwrap_err(),
            format!("{key}: is set, and {key}_file is set too: remove one of them")
        );
    }
}

#[test]
fn a_configuration_with_secrets_is_not_for_everybody() {
    let error = Site::new(MINIMAL).load_with_mode(0o644).unwrap_err();
    assert!(
        error.starts_with("local.s3.key_id: /")
            && error.contains("mode 0644")
            && error.contains("chmod o= /"),
        "{error}"
    );

    let mut site = Site::new(MINIMAL);
    for key in [
        "local.s3.key_id",
        "local.s3.secret_key",
        "peer.s3.key_id",
        "peer.s3.secret_key",
    ] {
        site.set(key, r#""""#)
            .set(&format!("{key}_file"), r#""DIR/secret""#);
    }
    site.set("local.s3.proxy", r#""http://proxy:3128""#)
        .set("peer.s3.proxy_file", r#""DIR/proxy""#);
    site.load_with_mode(0o644).unwrap();
    site.set("local.s3.proxy", r#""http://u:hunter2@proxy:3128""#);
    let error = site.load_with_mode(0o644).unwrap_err();
    assert!(error.starts_with("local.s3.proxy: /"), "{error}");
    assert!(error.contains("local.s3.proxy_file"), "{error}");
}

#[test]
fn no_secret_is_printed() {
    let mut site = without_local();
    site.file("builder-api.toml", BUILDER_API, 0o640);
    let config = site
        .set("peer.datastore.password", r#""hunter2""#)
        .set("peer.s3.proxy", r#""http://user:hunter2@proxy:3128""#)
        .load()
        .unwrap();
    let shown = format!("{config:?} {config:#?}");
    assert!(
        !shown.contains("hunter2") && shown.contains("***"),
        "{shown}"
    );
}

#[test]
fn a_syntax_error_names_its_place_and_not_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    let broken = [
        "x = \"hunter2",
        "x = hunter2",
        "x = 'hunter2",
        "x = \"\"\"hunter2",
        "x = \"hunter2\" hunter2",
        "x = \"\\hunter2\"",
        "x hunter2",
        "x = \"hunter2\"\nx = \"hunter2\"",
        "x = [\"hunter2\"",
        "x = hunter2\"",
        "x = 4hunter2",
    ];
    for text in broken {
        fs::write(&path, format!("role = \"keep\"\n{text}\n")).unwrap();
        let error = load(&path).unwrap_err();
        assert!(matches!(error, ConfigError::Syntax { .. }), "{error}");
        let shown = format!("{error} {error:?}");
        assert!(
            shown.contains("line ") && shown.contains("config.toml"),
            "{shown}"
        );
        assert!(!shown.contains("hunter2"), "{shown}");
    }
    let error = load(Path::new("/nowhere/config.toml")).unwrap_err();
    assert!(matches!(error, ConfigError::Unreadable { .. }), "{error}");
}
