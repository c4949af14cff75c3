//! The last good configuration is kept, found again, and never read if it is incomplete.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::*;
use crate::config::kept::load_kept_at;

impl Site {
    fn data(&self) -> PathBuf {
        self.path("data")
    }

    fn kept_file(&self) -> PathBuf {
        self.data().join("last-good.toml")
    }

    fn secret_file(&self, key: &str) -> PathBuf {
        self.data().join("secrets").join(key)
    }

    /// Loads the configuration and keeps it.
    fn keep(&self) -> Config {
        let (config, accepted) = self.load_text(0o640).unwrap();
        accepted.keep(&self.data()).unwrap();
        config
    }

    fn load_kept(&self) -> Result<Option<Config>, String> {
        load_kept_at(&self.data(), &self.places()).map_err(|error| error.to_string())
    }

    /// Returns the names and inodes of all kept files.
    fn inodes(&self) -> BTreeMap<PathBuf, u64> {
        let folders = [self.data(), self.data().join("secrets")];
        let entries = folders.iter().flat_map(|f| fs::read_dir(f).unwrap());
        entries
            .map(|entry| {
                let entry = entry.unwrap();
                (entry.path(), entry.metadata().unwrap().ino())
            })
            .collect()
    }
}

/// Returns the configuration with every secret replaced by its current value.
fn with_secrets_read(mut config: Config) -> Config {
    let read = |source: &SecretSource| SecretSource::Inline(source.read("key").unwrap());
    for side in [&mut config.local, &mut config.peer] {
        side.datastore.password = side.datastore.password.as_ref().map(read);
        side.s3.key_id = read(&side.s3.key_id);
        side.s3.secret_key = read(&side.s3.secret_key);
        side.s3.proxy = side.s3.proxy.as_ref().map(read);
    }
    for plan in &mut config.archives {
        if let ArchivePlace::Bucket { s3, .. } = &mut plan.place {
            s3.key_id = read(&s3.key_id);
            s3.secret_key = read(&s3.secret_key);
            s3.proxy = s3.proxy.as_ref().map(read);
        }
    }
    config
}

/// Returns a place of an archive with two secrets of its own.
fn place(name: &str) -> Table {
    let text = format!(
        r#"
            name = "{name}"
            endpoint = "http://archive:9000"
            bucket_name = "generations-{name}"
            key_id_file = "DIR/secret"
            secret_key = "hunter2-{name}"
            proxy = "http://user:hunter2-{name}@proxy:3128"
            keep = {{ last = 1 }}
        "#
    );
    text.parse().unwrap()
}

fn list(site: &Site, names: &[&str]) -> Value {
    let places = names.iter().map(|name| {
        let mut place = place(name);
        let secret = site.path("secret").display().to_string();
        place.insert("key_id_file".into(), Value::String(secret));
        Value::Table(place)
    });
    Value::Array(places.collect())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

#[test]
fn what_is_kept_is_what_was_loaded() {
    let mut site = without_local();
    site.file("builder-api.toml", BUILDER_API, 0o640);
    for (key, value) in [
        ("role", r#""spare""#),
        ("force_epoch", "7"),
        ("paused_until", "2030-01-31T22:00:00+01:00"),
        ("change", r#""CHG \"1\" # é""#),
        ("local.datastore.password_file", r#""DIR/secret""#),
        ("peer.datastore.password", r#""hunter2 \"quoted\"""#),
        ("peer.datastore.password_file", r#""""#),
        ("local.s3.proxy", r#""http://proxy:3128""#),
        ("peer.s3.proxy", r#""http://user:hunter2@proxy:3128""#),
        ("peer.s3.proxy_file", r#""""#),
        ("replication.schedule", r#""*/2 * * * *""#),
        ("verify.schedule", r#""""#),
        ("verify.deep", "true"),
        ("http.listen", r#""::1""#),
    ] {
        site.set(key, value);
    }
    assert_eq!(site.load_kept(), Ok(None), "nothing is kept yet");
    let config = site.keep();
    let kept = site.load_kept().unwrap().unwrap();
    assert_eq!(
        kept.peer.datastore.password,
        Some(SecretSource::File(
            site.secret_file("peer.datastore.password")
        ))
    );
    // A secret in another file is not copied, because it may change there.
    assert_eq!(
        kept.local.datastore.password,
        config.local.datastore.password
    );
    assert_eq!(kept.local.s3.key_id, config.local.s3.key_id);
    // The URL of a proxy is a secret only with a password in it.
    assert_eq!(
        kept.peer.s3.proxy,
        Some(SecretSource::File(site.secret_file("peer.s3.proxy")))
    );
    assert_eq!(kept.local.s3.proxy, config.local.s3.proxy);
    let text = fs::read_to_string(site.kept_file()).unwrap();
    assert!(!text.contains("hunter2"), "{text}");
    assert_ne!(kept, config);
    assert_eq!(with_secrets_read(kept), with_secrets_read(config));
}

#[test]
fn the_places_of_an_archive_are_kept() {
    let mut site = Site::new(MINIMAL);
    site.table
        .insert("archive".into(), list(&site, &["a", "b"]));
    let config = site.keep();
    assert_eq!(config.archives.len(), 2);
    let kept = site.load_kept().unwrap().unwrap();
    let ArchivePlace::Bucket { s3, .. } = &kept.archives[1].place else {
        panic!("{kept:?}");
    };
    let file = site.secret_file("archive.b.secret_key");
    assert_eq!(s3.secret_key, SecretSource::File(file));
    assert_eq!(s3.key_id, SecretSource::File(site.path("secret")));
    let text = fs::read_to_string(site.kept_file()).unwrap();
    assert!(!text.contains("hunter2"), "{text}");
    assert_eq!(with_secrets_read(kept), with_secrets_read(config));

    // The one table has the keys of a side.
    let Value::Array(mut places) = list(&site, &["a"]) else {
        panic!("no list");
    };
    site.table.insert("archive".into(), places.remove(0));
    let config = site.keep();
    assert!(site.secret_file("archive.secret_key").exists());
    assert!(!site.secret_file("archive.a.secret_key").exists());
    let kept = site.load_kept().unwrap().unwrap();
    assert_eq!(with_secrets_read(kept), with_secrets_read(config));
}

#[test]
fn a_kept_secret_never_becomes_that_of_another_place() {
    let mut site = Site::new(MINIMAL);
    site.table
        .insert("archive".into(), list(&site, &["a", "b"]));
    site.keep();
    let before = fs::read(site.kept_file()).unwrap();
    // A crash after the secrets were written and before the configuration was.
    site.table.insert("archive".into(), list(&site, &["b"]));
    site.keep();
    for name in ["secret_key", "proxy"] {
        let file = site.secret_file(&format!("archive.a.{name}"));
        assert!(!file.exists(), "{}", file.display());
        fs::write(&file, "http://user:hunter2-a@proxy:3128").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    fs::write(site.kept_file(), before).unwrap();
    let kept = site.load_kept().unwrap().unwrap();
    for plan in &kept.archives {
        let ArchivePlace::Bucket { s3, .. } = &plan.place else {
            panic!("{plan:?}");
        };
        let secret = s3.secret_key.read("key").unwrap();
        let of_it = format!("hunter2-{}", plan.name);
        assert!(secret.expose().contains(&of_it), "{}", plan.name);
    }
}

#[test]
fn what_is_kept_is_for_nobody_else() {
    let site = Site::new(MINIMAL);
    site.keep();
    assert_eq!(mode(&site.data()), 0o700);
    assert_eq!(mode(&site.data().join("secrets")), 0o700);
    let keys = [
        "local.s3.key_id",
        "local.s3.secret_key",
        "peer.s3.key_id",
        "peer.s3.secret_key",
    ];
    for key in keys {
        assert_eq!(mode(&site.secret_file(key)), 0o600, "{key}");
    }
    assert_eq!(site.inodes().len(), keys.len() + 2, "{:?}", site.inodes());
    assert_eq!(mode(&site.kept_file()), 0o600);
    let text = fs::read_to_string(site.kept_file()).unwrap();
    assert!(!text.contains("hunter2"), "{text}");

    let (_, accepted) = site.load_text(0o640).unwrap();
    let shown = format!("{accepted:?} {accepted:#?}");
    assert!(
        !shown.contains("hunter2") && shown.contains("***"),
        "{shown}"
    );

    // Files that somebody has opened to others are closed again.
    let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    chmod(&site.data().join("secrets"), 0o755).unwrap();
    chmod(&site.secret_file("peer.s3.key_id"), 0o644).unwrap();
    chmod(&site.kept_file(), 0o644).unwrap();
    site.keep();
    assert_eq!(mode(&site.data().join("secrets")), 0o700);
    assert_eq!(mode(&site.secret_file("peer.s3.key_id")), 0o600);
    assert_eq!(mode(&site.kept_file()), 0o600);
}

#[test]
fn only_what_changed_is_written() {
    let mut site = Site::new(MINIMAL);
    site.keep();
    let first = site.inodes();
    site.keep();
    assert_eq!(site.inodes(), first);

    let changed = |before: &BTreeMap<PathBuf, u64>, after: &BTreeMap<PathBuf, u64>| {
        assert!(before.keys().eq(after.keys()), "{before:?} {after:?}");
        let differs = |path: &&PathBuf| before[*path] != after[*path];
        after.keys().filter(differs).cloned().collect::<Vec<_>>()
    };
    site.set("peer.s3.secret_key", r#""hunter2-new""#).keep();
    let second = site.inodes();
    assert_eq!(
        changed(&first, &second),
        [site.secret_file("peer.s3.secret_key")]
    );
    let kept = site.load_kept().unwrap().unwrap();
    let secret = kept.peer.s3.secret_key.read("k").unwrap();
    assert_eq!(secret.expose(), "hunter2-new");

    site.set("paused", "true").keep();
    assert_eq!(changed(&second, &site.inodes()), [site.kept_file()]);
    assert!(site.load_kept().unwrap().unwrap().paused);
}

#[test]
fn secrets_that_are_no_longer_named_are_removed() {
    let mut site = Site::new(MINIMAL);
    site.set("peer.datastore.password", r#""hunter2""#).keep();
    let password = site.secret_file("peer.datastore.password");
    assert!(password.exists());
    // A crash has left half a secret under another name: the file is removed although nothing has
    // changed.
    let torn = site.secret_file(".new-x");
    fs::write(&torn, "hunter2").unwrap();
    let folder = site.secret_file("somebodys-folder");
    fs::create_dir(&folder).unwrap();
    site.keep();
    fs::remove_dir(&folder).unwrap();
    assert!(password.exists() && !torn.exists());

    site.set("peer.datastore.password", r#""""#)
        .set("peer.datastore.password_file", r#""DIR/secret""#)
        .keep();
    assert!(!password.exists());
    let kept = site.load_kept().unwrap().unwrap();
    assert_eq!(
        kept.peer.datastore.password,
        Some(SecretSource::File(site.path("secret")))
    );

    for key in [
        "local.s3.key_id",
        "local.s3.secret_key",
        "peer.s3.key_id",
        "peer.s3.secret_key",
    ] {
        site.set(key, r#""""#)
            .set(&format!("{key}_file"), r#""DIR/secret""#);
    }
    site.keep();
    let left: Vec<PathBuf> = site.inodes().into_keys().collect();
    assert_eq!(left, [site.kept_file(), site.data().join("secrets")]);
    assert!(site.load_kept().unwrap().is_some());
}

#[test]
fn a_secret_keeps_its_line_ends() {
    for secret in [r"x\n", r"x\r", r"x\r\n", r"\n", r" x\ny\n\n", r"é"] {
        let mut site = Site::new(MINIMAL);
        let config = site
            .set("peer.datastore.password", &format!("\"{secret}\""))
            .keep();
        let kept = site.load_kept().unwrap().unwrap();
        assert!(
            with_secrets_read(kept) == with_secrets_read(config),
            "{secret}"
        );
    }
}

#[test]
fn what_is_torn_is_an_error() {
    let mut site = Site::new(MINIMAL);
    site.set("verify.schedule", r#""""#)
        .set("fuse.max_percent", "0")
        .keep();
    let whole = fs::read(site.kept_file()).unwrap();
    for length in 0..whole.len() {
        fs::write(site.kept_file(), &whole[..length]).unwrap();
        let error = site.load_kept().unwrap_err();
        assert!(
            error.contains("last-good.toml: is not whole"),
            "{length}: {error}"
        );
    }
    let zeros = [vec![0; 100], whole[100..].to_vec()].concat();
    let twice = [&whole[..], &whole[..]].concat();
    for garbage in [&zeros, &twice, &vec![0xff; 512], &vec![0; 512]] {
        fs::write(site.kept_file(), garbage).unwrap();
        let error = site.load_kept().unwrap_err();
        assert!(error.contains("last-good.toml"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
    // The next good configuration repairs it.
    site.keep();
    assert_eq!(fs::read(site.kept_file()).unwrap(), whole);

    fs::remove_file(site.kept_file()).unwrap();
    fs::create_dir(site.kept_file()).unwrap();
    assert!(site.load_kept().unwrap_err().contains("last-good.toml"));
}

#[test]
fn the_files_it_names_are_looked_at() {
    let mut site = Site::new(MINIMAL);
    site.set("peer.s3.ca_file", r#""DIR/certificate""#).keep();
    fs::remove_file(site.path("certificate")).unwrap();
    let error = site.load_kept().unwrap_err();
    assert!(error.starts_with("peer.s3.ca_file: "), "{error}");
    site.file("certificate", "", 0o644);

    let secret = site.secret_file("peer.s3.key_id");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    let error = site.load_kept().unwrap_err();
    assert!(error.starts_with("peer.s3.key_id_file: "), "{error}");
    assert!(error.contains("mode 0644"), "{error}");
    fs::remove_file(&secret).unwrap();
    let error = site.load_kept().unwrap_err();
    assert!(error.starts_with("peer.s3.key_id_file: "), "{error}");
    site.keep();
    assert!(site.load_kept().unwrap().is_some());
}

#[test]
fn what_cannot_be_kept_leaves_what_was() {
    let mut site = Site::new(MINIMAL);
    site.keep();
    let before = fs::read(site.kept_file()).unwrap();
    fs::create_dir(site.secret_file("peer.datastore.password")).unwrap();
    site.set("peer.datastore.password", r#""hunter2""#);
    let (_, accepted) = site.load_text(0o640).unwrap();
    let error = accepted.keep(&site.data()).unwrap_err().to_string();
    assert!(
        error.contains("secrets/peer.datastore.password") && !error.contains("hunter2"),
        "{error}"
    );
    assert_eq!(fs::read(site.kept_file()).unwrap(), before);
    assert!(site.load_kept().unwrap().is_some());
    let left = fs::read_dir(site.data().join("secrets")).unwrap().count();
    assert_eq!(left, 5, "four secrets and the folder in the way");
}

#[test]
fn a_relative_data_directory_names_files_that_are_found_from_anywhere() {
    let site = Site::new(MINIMAL);
    let (_, accepted) = site.load_text(0o640).unwrap();
    let depth = std::env::current_dir().unwrap().components().count() - 1;
    let data = PathBuf::from("../".repeat(depth)).join(site.data().strip_prefix("/").unwrap());
    assert!(data.is_relative());
    accepted.keep(&data).unwrap();
    let kept = load_kept_at(&data, &site.places()).unwrap().unwrap();
    let SecretSource::File(path) = kept.peer.s3.key_id else {
        panic!("{:?}", kept.peer.s3.key_id);
    };
    assert!(path.is_absolute(), "{}", path.display());
}

#[test]
fn the_data_directory_is_beside_the_configuration() {
    let here = std::env::current_dir().unwrap();
    for (config, data) in [
        (
            "/hab/svc/warm-spare/config/config.toml",
            "/hab/svc/warm-spare/data",
        ),
        ("/etc/warm-spare.toml", "/etc/data"),
        ("/etc/config/spare.toml", "/etc/config/data"),
        ("/etc/myconfig/config.toml", "/etc/myconfig/data"),
        ("/config/config.toml", "/data"),
        ("/config.toml", "/data"),
    ] {
        assert_eq!(data_dir(Path::new(config)), Path::new(data), "{config}");
    }
    for (config, data) in [
        ("config/config.toml", "data"),
        ("./config/config.toml", "data"),
        ("svc/config/config.toml", "svc/data"),
        ("config.toml", "data"),
        ("x/spare.toml", "x/data"),
    ] {
        assert_eq!(data_dir(Path::new(config)), here.join(data), "{config}");
    }
}
