//! The places of generations: one table, or a list of them.

use super::*;
use std::time::Duration;

const DIRECTORY: &str = r#"
    [archive]
    location = "/srv/archive"
"#;

const TWO: &str = r#"
    [[archive]]
    name = "near"
    location = "/srv/archive"
    schedule = "*/5 * * * *"
    keep.last = 10
    [[archive]]
    name = "far"
    endpoint = "https://s3.example.org"
    bucket_name = "archive"
    prefix = "builder/"
    key_id_file = "DIR/secret"
    secret_key_file = "DIR/secret"
    verify_budget = "50MB/s"
    keep.within = "30d"
"#;

/// Makes a site of this configuration, in which `DIR` means its folder.
fn site_of(text: &str) -> Site {
    let mut site = Site::new("");
    let folder = site.folder.path().to_str().unwrap();
    site.table = text.replace("DIR", folder).parse().unwrap();
    site
}

fn loaded(text: &str) -> Result<Vec<ArchivePlan>, String> {
    let site = site_of(&format!("{MINIMAL}{text}"));
    site.load().map(|config| config.archives)
}

fn refused(text: &str) -> String {
    loaded(text).expect_err("it is refused")
}

#[test]
fn without_a_place_there_is_no_archive() {
    assert_eq!(loaded("").unwrap(), []);
    // The package writes every default.
    let defaults =
        "[archive]\nname = \"archive\"\nlocation = \"\"\n[archive.keep]\nlast = 3\nwithin = \"\"";
    assert_eq!(loaded(defaults).unwrap(), []);
}

#[test]
fn one_table_is_one_place_with_the_defaults() {
    let plans = loaded(DIRECTORY).unwrap();
    let [plan] = plans.as_slice() else {
        panic!("{plans:?}")
    };
    assert_eq!(plan.name, "archive");
    assert_eq!(plan.place, ArchivePlace::Directory("/srv/archive".into()));
    assert_eq!(plan.schedule, None);
    assert_eq!(plan.max_hold, Duration::from_secs(600));
    let keep = Keep {
        last: 3,
        hourly: 0,
        daily: 7,
        weekly: 5,
        monthly: 12,
        within: None,
    };
    assert_eq!(plan.keep, keep);
}

#[test]
fn a_list_has_several_places() {
    let plans = loaded(TWO).unwrap();
    let names: Vec<&str> = plans.iter().map(|plan| plan.name.as_str()).collect();
    assert_eq!(names, ["near", "far"]);
    assert_eq!(plans[0].keep.last, 10);
    assert_eq!(plans[0].keep.daily, 7);
    assert_eq!(plans[1].keep.within, Some(Duration::from_secs(30 * 86400)));
    assert_eq!(plans[1].verify_budget, Some(50_000_000));
    let ArchivePlace::Bucket { s3, prefix } = &plans[1].place else {
        panic!("{:?}", plans[1])
    };
    assert_eq!(
        (s3.bucket_name.as_str(), prefix.as_str()),
        ("archive", "builder/")
    );
    assert_eq!(s3.endpoint, "https://s3.example.org");
}

#[test]
fn a_place_is_a_directory_or_a_bucket() {
    let bucket = "endpoint = \"http://a:9000\"\nbucket_name = \"abc\"\nkey_id = \"k\"\nsecret_key = \"hunter2\"\n";
    for (text, start) in [
        (
            "[archive]\nschedule = \"0 3 * * *\"".to_string(),
            "archive.location: not set",
        ),
        (
            format!("{DIRECTORY}{bucket}"),
            "archive.location: is set, and archive.endpoint",
        ),
        (
            format!("{DIRECTORY}bucket_name = \"abc\""),
            "archive.bucket_name: is set, and archive.location",
        ),
        (
            "[archive]\nendpoint = \"http://a:9000\"".into(),
            "archive.bucket_name: not set",
        ),
        (
            "[archive]\nendpoint = \"http://a:9000\"\nbucket_name = \"abc\"".into(),
            "archive.key_id: not set",
        ),
        (
            "[archive]\nbucket_name = \"abc\"".into(),
            "archive.location: not set",
        ),
        (
            "[archive]\nlocations = \"/srv\"".into(),
            "archive.locations: unknown key; did you mean archive.location?",
        ),
        ("archive = \"/srv\"".into(), "archive: expected a table"),
        (
            "archive = [\"/srv\"]".into(),
            "archive[1]: expected a table",
        ),
        (
            format!("{DIRECTORY}[archive.keep]\nlast = 0\ndaily = 0\nweekly = 0\nmonthly = 0"),
            "archive.keep: keeps nothing",
        ),
    ] {
        let text = match text.starts_with("archive =") {
            true => format!("{text}\n{MINIMAL}"),
            false => format!("{MINIMAL}{text}"),
        };
        let error = Site::new(&text).load().expect_err("it is refused");
        assert!(error.starts_with(start), "{error}\n{text}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn an_error_in_a_list_names_its_place() {
    for (from, to, start) in [
        (
            "location = \"/srv/archive\"",
            "location = \"srv\"",
            "archive[1].location: expected",
        ),
        (
            "prefix = \"builder/\"",
            "prefix = \"builder\"",
            "archive[2].prefix: expected",
        ),
        (
            "prefix = \"builder/\"",
            "prefixes = \"x/\"",
            "archive[2].prefixes: unknown key",
        ),
        (
            "name = \"far\"",
            "name = \"near\"",
            "archive[2].name: two archives",
        ),
        (
            "key_id_file = \"DIR/secret\"",
            "key_id = \"hunter2\"",
            "archive[2].key_id: a list of archives takes secrets from files only",
        ),
        (
            "key_id_file = \"DIR/secret\"",
            "",
            "archive[2].key_id: not set",
        ),
    ] {
        assert!(TWO.contains(from));
        let error = refused(&TWO.replace(from, to));
        assert!(error.starts_with(start), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn no_place_is_another_one_or_builders_own_bucket() {
    let directories = |one: &str, two: &str| {
        format!(
            "[[archive]]\nname = \"a\"\nlocation = {one:?}\n[[archive]]\nname = \"b\"\nlocation = {two:?}\n"
        )
    };
    for (one, two) in [("/srv", "/srv"), ("/srv", "/srv/b"), ("/srv/b", "/srv")] {
        let error = refused(&directories(one, two));
        assert!(error.starts_with("archive[2].location: "), "{error}");
    }
    assert!(loaded(&directories("/srv/a", "/srv/ab")).is_ok());
    let bucket = |name: &str, endpoint: &str, bucket: &str, prefix: &str| {
        format!(
            "[[archive]]\nname = {name:?}\nendpoint = {endpoint:?}\nbucket_name = {bucket:?}\nprefix = {prefix:?}\n\
             key_id_file = \"DIR/secret\"\nsecret_key_file = \"DIR/secret\"\n"
        )
    };
    let own = bucket("a", "http://127.0.0.1:9000", "builder", "x/");
    assert!(refused(&own).contains("Builder's own bucket (local.s3)"));
    let peers = bucket("a", "https://minio.example.org", "builder", "x/");
    assert!(refused(&peers).contains("Builder's own bucket (peer.s3)"));
    let two = |one: &str, two: &str| {
        bucket("a", "http://s:9000", "abc", one) + &bucket("b", "http://s:9000", "abc", two)
    };
    for (one, other) in [("", ""), ("x/", ""), ("", "x/"), ("x/", "x/y/")] {
        let error = refused(&two(one, other));
        assert!(error.contains("same bucket"), "{error}");
    }
    assert!(loaded(&two("x/", "y/")).is_ok());
}

#[test]
fn a_cluster_without_a_peer_may_have_an_archive() {
    let text = MINIMAL
        .split("[peer.datastore]")
        .next()
        .unwrap()
        .to_string()
        + DIRECTORY;
    let site = site_of(&text);
    let path = site.file("config.toml", &site.table.to_string(), 0o640);
    let error = load_text_at(&path, &site.places()).expect_err("it has no peer");
    let ConfigError::PeerUnset { alone } = error else {
        panic!("{error}")
    };
    assert_eq!(alone.archives.len(), 1);
    assert_eq!(alone.peer.datastore.host, "");
    assert_ne!(alone.peer.s3.endpoint, alone.local.s3.endpoint);
}
