//! The places of an archive: the one table and the list, and the rules of several keys.

use std::time::Duration;

use super::*;

/// The keys of a bucket.
pub(super) const BUCKET: &str = r#"
    endpoint = "http://archive:9000"
    bucket_name = "generations"
    key_id = "hunter2-archive-id"
    secret_key = "hunter2-archive"
"#;

/// Returns the minimal configuration with this text, in which `DIR` means the folder and `BUCKET` the
/// keys of a bucket.
pub(super) fn with(text: &str) -> Site {
    let mut site = Site::new(MINIMAL);
    let folder = site.folder.path().to_str().unwrap();
    let text = text.replace("BUCKET", BUCKET).replace("DIR", folder);
    site.table.extend(text.parse::<Table>().unwrap());
    site
}

fn archives(text: &str) -> Vec<ArchivePlan> {
    let config = with(text).load();
    config
        .unwrap_or_else(|error| panic!("{text}: {error}"))
        .archives
}

fn refusal(text: &str) -> String {
    let error = with(text).load().expect_err(text);
    assert!(!error.contains("hunter2"), "{error}");
    error
}

const NOTHING: Keep = Keep {
    last: 0,
    hourly: 0,
    daily: 0,
    weekly: 0,
    monthly: 0,
    within: None,
};

fn directory(name: &str, path: &str) -> ArchivePlan {
    ArchivePlan {
        name: name.to_string(),
        place: ArchivePlace::Directory(path.into()),
        schedule: None,
        keep: Keep {
            last: 3,
            daily: 7,
            weekly: 5,
            monthly: 12,
            ..NOTHING
        },
        verify_budget: None,
    }
}

#[test]
fn one_table_and_a_list_mean_the_same() {
    for none in ["", "archive = []"] {
        assert_eq!(archives(none), []);
    }
    let one = directory("archive", "/srv/a");
    for text in ["[archive]", "[[archive]]"] {
        assert_eq!(
            archives(&format!("{text}\nlocation = \"/srv/a\"")),
            std::slice::from_ref(&one)
        );
    }
    assert_eq!(
        archives(
            "[[archive]]\nlocation = \"/srv/a\"\n[[archive]]\nname = \"b\"\nlocation = \"/b\""
        ),
        [one, directory("b", "/b")]
    );
}

#[test]
fn a_place_arrives_whole() {
    let rest = r#"
        schedule = "30 4 * * *"
        verify_budget = "5MB/s"
        keep = { last = 1, hourly = 2, daily = 3, weekly = 4, monthly = 100000, within = "5d" }
    "#;
    let expected = ArchivePlan {
        schedule: Some(Schedule::parse("30 4 * * *").unwrap()),
        verify_budget: Some(5_000_000),
        keep: Keep {
            last: 1,
            hourly: 2,
            daily: 3,
            weekly: 4,
            monthly: 100_000,
            within: Some(Duration::from_secs(5 * 86_400)),
        },
        ..directory("far", "/srv/a")
    };
    let text = format!("[archive]\nname = \"far\"\nlocation = \"/srv/a\"\n{rest}");
    assert_eq!(archives(&text), [expected]);
}

#[test]
fn a_bucket_has_the_keys_of_a_side() {
    let text = r#"
        [archive]
        backend = "aws"
        endpoint = "eu-central-1"
        bucket_name = "generations"
        prefix = "builder/dc2/"
        key_id_file = "DIR/secret"
        secret_key = "hunter2-archive"
        ca_file = "DIR/certificate"
        proxy_file = "DIR/proxy"
    "#;
    let site = with(text);
    let found = site.load().unwrap().archives.remove(0).place;
    let ArchivePlace::Bucket { s3, prefix } = found else {
        panic!("{found:?}");
    };
    assert_eq!(prefix, "builder/dc2/");
    let expected = S3 {
        backend: Backend::Aws,
        endpoint: "https://s3.eu-central-1.amazonaws.com".to_string(),
        region: "eu-central-1".to_string(),
        bucket_name: "generations".to_string(),
        key_id: SecretSource::File(site.path("secret")),
        secret_key: SecretSource::Inline(Secret::new("hunter2-archive")),
        ca_file: Some(site.path("certificate")),
        proxy: Some(SecretSource::File(site.path("proxy"))),
        source: "configuration",
    };
    assert_eq!(*s3, expected);
    let ArchivePlace::Bucket { prefix, .. } = archives("[archive]\nBUCKET").remove(0).place else {
        panic!("no bucket");
    };
    assert_eq!(prefix, "");
}

#[test]
fn a_place_is_a_directory_or_a_bucket() {
    let neither = "archive.location: not set, and archive.endpoint is not set either";
    for text in ["[archive]", "[archive]\nbucket_name = \"generations\""] {
        assert!(refusal(text).starts_with(neither), "{text}");
    }
    let error = refusal("[archive]\nlocation = \"/srv/a\"\nBUCKET");
    assert!(
        error.starts_with("archive.location: is set, and archive.endpoint is set too"),
        "{error}"
    );
    for (name, value) in [
        ("bucket_name", "generations"),
        ("prefix", "builder/"),
        ("key_id", "hunter2-id"),
        ("key_id_file", "DIR/secret"),
        ("secret_key", "hunter2"),
        ("secret_key_file", "DIR/secret"),
        ("ca_file", "DIR/certificate"),
        ("proxy", "http://proxy:3128"),
        ("proxy_file", "DIR/proxy"),
    ] {
        let text = format!("[archive]\nlocation = \"/srv/a\"\n{name} = \"{value}\"");
        let start = format!("archive.{name}: is set, and archive.location is set too");
        assert!(refusal(&text).starts_with(&start), "{name}");
    }
    for name in ["bucket_name", "key_id", "secret_key"] {
        let mut site = with("[archive]\nBUCKET");
        let error = site.set(&format!("archive.{name}"), r#""""#).load();
        let error = error.unwrap_err();
        let start = format!("archive.{name}: not set, and it has no default");
        assert!(error.starts_with(&start), "{error}");
    }
}

#[test]
fn what_keep_does_not_set_keeps_nothing() {
    let keep = |text: &str| {
        let text = format!("[archive]\nlocation = \"/srv/a\"\n{text}");
        archives(&text).remove(0).keep
    };
    assert_eq!(keep(""), directory("", "").keep);
    assert_eq!(
        keep("keep.daily = 7"),
        Keep {
            daily: 7,
            ..NOTHING
        }
    );
    let within = Some(Duration::from_secs(86_400));
    assert_eq!(
        keep("keep = { last = 0, weekly = \"\", within = \"1d\" }"),
        Keep { within, ..NOTHING }
    );
    for text in [
        "keep = {}",
        "keep = { last = 0, hourly = 0, daily = 0, weekly = 0, monthly = 0, within = \"\" }",
    ] {
        let error = refusal(&format!("[archive]\nlocation = \"/srv/a\"\n{text}"));
        assert!(
            error.starts_with("archive.keep: keeps no generation: set at least one of last,"),
            "{error}"
        );
    }
}

#[test]
fn an_error_names_the_place() {
    let second = |text: &str| {
        let first = "[[archive]]\nname = \"first\"\nlocation = \"/srv/first\"";
        refusal(&format!("{first}\n[[archive]]\n{text}"))
    };
    for (text, problem) in [
        (
            "lcation = \"/a\"",
            "archive[2].lcation: unknown key; did you mean archive[2].location?",
        ),
        (
            "keep.dayly = 1",
            "archive[2].keep.dayly: unknown key; did you mean archive[2].keep.daily?",
        ),
        (
            "keep = 3",
            "archive[2].keep: expected a table, found integer",
        ),
        (
            "keep.last = -1",
            "archive[2].keep.last: expected an integer 0-100000, found -1",
        ),
        (
            "name = \"Far Away\"",
            "archive[2].name: expected up to 63 lower-case letters",
        ),
        (
            "",
            "archive[2].location: not set, and archive[2].endpoint is not set either",
        ),
        (
            "location = \"/srv/archive.d\"\nkeep = {}",
            "archive[2].keep: keeps no generation",
        ),
        (
            "endpoint = \"archive\"",
            "archive[2].endpoint: expected a URL",
        ),
        (
            "endpoint = \"http://archive\"",
            "archive[2].bucket_name: not set",
        ),
        (
            "endpoint = \"http://archive\"\nbucket_name = \"generations\"",
            "archive[2].key_id: not set, and it has no default: set this key, or archive[2].key_id_file",
        ),
        (
            "BUCKET\nkey_id_file = \"DIR/secret\"",
            "archive[2].key_id: is set, and archive[2].key_id_file is set too",
        ),
        (
            "BUCKET\nca_file = \"DIR/none\"",
            "archive[2].ca_file: cannot read",
        ),
        (
            "BUCKET\nproxy_file = \"DIR/secret\"",
            "archive[2].proxy_file: ",
        ),
        (
            "BUCKET\nproxy = \"http://u:hunter2@p\"",
            "archive[2].proxy: ",
        ),
        (
            "secret_key_file = \"DIR/open-secret\"\nendpoint = \"http://a\"\nbucket_name = \"abc\"\nkey_id = \"x\"",
            "archive[2].secret_key_file: ",
        ),
    ] {
        let error = second(text);
        assert!(error.starts_with(problem), "{text}: {error}");
    }
    // A list of one place has numbers too.
    let error = refusal("[[archive]]\nname = \"x\"");
    assert!(error.starts_with("archive[1].location: "), "{error}");
    for (text, problem) in [
        (
            "archive = \"/srv/a\"",
            "archive: expected a table or a list of tables, found string",
        ),
        (
            "archive = [\"/srv/a\"]",
            "archive[1]: expected a table, found string",
        ),
        (
            "[archive]\nlast = 3",
            "archive.last: unknown key; did you mean archive.keep.last?",
        ),
        (
            "[archives]\nlocation = \"/a\"",
            "archives: unknown key; did you mean archive?",
        ),
    ] {
        assert_eq!(refusal(text), problem);
    }
}

#[test]
fn two_places_have_two_names() {
    let error = refusal("[[archive]]\nlocation = \"/a\"\n[[archive]]\nlocation = \"/b\"");
    assert_eq!(
        error,
        "archive[2].name: \"archive\" is the name of archive[1] too: give each place a name of its own"
    );
    let named = |name: &str| format!("[[archive]]\nname = \"{name}\"\nlocation = \"/{name}\"\n");
    let error = refusal(&(named("a") + &named("b") + &named("a")));
    assert!(error.starts_with("archive[3].name: \"a\" is the name of archive[1]"));
}

#[test]
fn no_place_is_builder_s_own_bucket() {
    let place = |endpoint: &str, bucket: &str| {
        format!(
            "[archive]\nendpoint = \"{endpoint}\"\nbucket_name = \"{bucket}\"\nprefix = \"x/\"\nkey_id = \"i\"\nsecret_key = \"k\""
        )
    };
    for (endpoint, side) in [
        ("http://127.0.0.1:9000/", "local.s3"),
        ("https://minio.example.org", "peer.s3"),
        ("https://MinIO.example.org:443", "peer.s3"),
    ] {
        let error = refusal(&place(endpoint, "builder"));
        assert!(
            error.starts_with("archive.bucket_name: builder at "),
            "{error}"
        );
        assert!(error.contains(&format!("own bucket ({side})")), "{error}");
    }
    for (endpoint, bucket) in [
        ("http://127.0.0.1:9000", "builder-archive"),
        ("http://127.0.0.1:9001", "builder"),
        ("http://minio.example.org", "builder"),
    ] {
        assert_eq!(archives(&place(endpoint, bucket)).len(), 1, "{endpoint}");
    }
    let second = place("https://minio.example.org", "builder")
        .replace("[archive]", "[[archive]]\nname = \"b\"");
    let error = refusal(&format!("[[archive]]\nlocation = \"/a\"\n{second}"));
    assert!(error.starts_with("archive[2].bucket_name: "), "{error}");
}

#[test]
fn no_directory_is_inside_of_another() {
    let both = |one: &str, other: &str| {
        format!(
            "[[archive]]\nname = \"a\"\nlocation = \"{one}\"\n[[archive]]\nname = \"b\"\nlocation = \"{other}\""
        )
    };
    for (one, other) in [
        ("/srv/a", "/srv/a"),
        ("/srv/a", "/srv/a/"),
        ("/srv/a", "/srv/a/b"),
        ("/srv/a/b", "/srv/a"),
        ("/srv/a", "/srv/b/../a"),
        ("/srv/a", "/"),
        ("DIR/real", "DIR/link"),
        ("DIR/real/new", "DIR/link"),
        ("DIR/real", "DIR/link/new/newer"),
    ] {
        let site = with(&both(one, other));
        fs::create_dir(site.path("real")).unwrap();
        std::os::unix::fs::symlink(site.path("real"), site.path("link")).unwrap();
        let error = site.load().expect_err(other);
        assert!(
            error.starts_with("archive[2].location: ") && error.contains("(archive[1]) are one"),
            "{error}"
        );
    }
    for (one, other) in [
        ("/srv/a", "/srv/ab"),
        ("/srv/a", "/srv/b"),
        ("/srv/a", "/srv/a/../b"),
    ] {
        assert_eq!(archives(&both(one, other)).len(), 2, "{other}");
    }
}

#[test]
fn no_prefix_is_inside_of_another_one_of_its_bucket() {
    let both = |one: &str, other: &str, bucket: &str| {
        let second = BUCKET.replace("generations", bucket);
        format!(
            "[[archive]]\nname = \"a\"\nprefix = \"{one}\"\nBUCKET\n[[archive]]\nname = \"b\"\nprefix = \"{other}\"\n{second}"
        )
    };
    for (one, other) in [
        ("", ""),
        ("", "a/"),
        ("a/", ""),
        ("a/", "a/"),
        ("a/", "a/b/"),
        ("a/b/", "a/"),
    ] {
        let error = refusal(&both(one, other, "generations"));
        assert!(
            error.starts_with("archive[2].prefix: ") && error.contains("(archive[1]) are in one"),
            "{error}"
        );
        assert_eq!(archives(&both(one, other, "elsewhere")).len(), 2);
    }
    for (one, other) in [("a/", "b/"), ("a/", "ab/"), ("a/b/", "a/c/")] {
        assert_eq!(archives(&both(one, other, "generations")).len(), 2);
    }
    assert_eq!(
        archives("[[archive]]\nBUCKET\n[[archive]]\nname = \"b\"\nlocation = \"/a\"").len(),
        2
    );
}

#[test]
fn a_cluster_without_a_peer_has_its_archives() {
    let load = |text: &str| {
        let mut site = with(text);
        site.table.remove("peer");
        let path = site.file("config.toml", &site.table.to_string(), 0o640);
        match load_text_at(&path, &site.places()) {
            Err(ConfigError::PeerUnset { alone }) => Ok(alone.archives),
            other => Err(other.map(|_| ()).unwrap_err().to_string()),
        }
    };
    assert_eq!(load(""), Ok(Vec::new()));
    let text = "[archive]\nlocation = \"/srv/a\"";
    assert_eq!(load(text), Ok(vec![directory("archive", "/srv/a")]));
    let own = BUCKET.replace("archive:9000", "127.0.0.1:9000");
    let own = own.replace("generations", "builder");
    let error = load(&format!("[archive]\n{own}")).unwrap_err();
    assert!(error.contains("(local.s3)"), "{error}");
}
