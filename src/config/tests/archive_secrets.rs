//! The secrets of an archive, and the files and directories of its places that gossip may name.

use super::archive::{BUCKET, with};
use super::*;

/// Returns a site whose sides take every secret from a file.
fn without_inline_secrets(text: &str) -> Site {
    let mut site = with(text);
    for side in ["local", "peer"] {
        for key in ["key_id", "secret_key"] {
            site.set(&format!("{side}.s3.{key}"), r#""""#)
                .set(&format!("{side}.s3.{key}_file"), r#""DIR/secret""#);
        }
    }
    site
}

#[test]
fn a_configuration_with_the_secret_of_a_place_is_not_for_everybody() {
    let files = BUCKET.replace("key_id =", "key_id_file =");
    let files = files.replace("secret_key =", "secret_key_file =");
    let files = files.replace("hunter2-archive-id", "DIR/secret");
    let files = files.replace("hunter2-archive", "DIR/secret");
    for (text, key) in [
        ("[archive]\nBUCKET".to_string(), "archive.key_id"),
        ("[[archive]]\nBUCKET".to_string(), "archive[1].key_id"),
        (
            format!("[[archive]]\n{files}\n[[archive]]\nname = \"b\"\nprefix = \"b/\"\nBUCKET"),
            "archive[2].key_id",
        ),
        (
            format!("[archive]\n{files}\nproxy = \"http://u:hunter2@proxy:1\""),
            "archive.proxy",
        ),
    ] {
        let site = without_inline_secrets(&text);
        let error = site.load_with_mode(0o644).expect_err(key);
        assert!(error.starts_with(&format!("{key}: /")), "{error}");
        assert!(error.ends_with(&format!("or use {key}_file")), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
    let harmless = format!("[archive]\n{files}\nproxy = \"http://proxy:1\"");
    without_inline_secrets(&harmless)
        .load_with_mode(0o644)
        .unwrap();
}

#[test]
fn no_secret_of_a_place_is_printed() {
    let text = "[[archive]]\nBUCKET\nproxy = \"http://u:hunter2@proxy:1\"";
    let (config, accepted) = with(text).load_text(0o640).unwrap();
    let shown = format!("{config:?} {config:#?} {accepted:?} {accepted:#?}");
    assert!(
        !shown.contains("hunter2") && shown.contains("***"),
        "{shown}"
    );
}

/// A service of a Supervisor, with the data that the test gives it.
struct Service {
    root: tempfile::TempDir,
}

impl Service {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in [
            "svc/warm-spare/config",
            "svc/warm-spare/data",
            "user/warm-spare/config",
            "vault",
        ] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        Self { root }
    }

    /// Returns the text with the folder of the service in place of `ROOT`.
    fn text(&self, text: &str) -> String {
        text.replace("BUCKET", BUCKET)
            .replace("ROOT", self.root.path().to_str().unwrap())
    }

    fn write(&self, file: &str, text: &str) -> PathBuf {
        let path = self.root.path().join(file);
        fs::write(&path, self.text(text)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        path
    }

    /// Loads the minimal configuration with this text, as the Supervisor would have rendered it.
    fn load(&self, text: &str) -> Result<Vec<ArchivePlan>, String> {
        let text = format!("{MINIMAL}{text}");
        let path = self.write("svc/warm-spare/config/config.toml", &text);
        let places = Places {
            api_config: self.root.path().join("none"),
            datastore_password: self.root.path().join("none"),
        };
        let loaded = load_text_at(&path, &places);
        loaded
            .map(|(config, _)| config.archives)
            .map_err(|error| error.to_string())
    }
}

const GOSSIPED: &str = "ROOT/svc/warm-spare/data/archive";

#[test]
fn gossip_names_a_directory_of_this_service_only() {
    let service = Service::new();
    let data = service.root.path().join("svc/warm-spare/data");
    std::os::unix::fs::symlink(service.root.path(), data.join("link")).unwrap();
    let location = |path: &str| format!("[archive]\nlocation = \"{path}\"");
    for good in [GOSSIPED, "ROOT/svc/warm-spare/data/a/b/../c"] {
        assert!(service.load(&location(good)).is_ok(), "{good}");
    }
    for bad in [
        "/srv/archive",
        "ROOT/svc/warm-spare/data",
        "ROOT/svc/warm-spare/data/",
        "ROOT/svc/warm-spare/data/secrets",
        "ROOT/svc/warm-spare/data/secrets/a",
        "ROOT/svc/warm-spare/data/../config",
        "ROOT/svc/warm-spare/data/none/../../x",
        "ROOT/svc/warm-spare/database",
        "ROOT/svc/warm-spare/data/link/new",
        "ROOT/svc/warm-spare/data/link",
    ] {
        let error = service.load(&location(bad)).expect_err(bad);
        assert!(
            error.starts_with("archive.location: this node would write into ")
                && error.contains("user.toml"),
            "{error}"
        );
    }
    let text = format!(
        "[[archive]]\nname = \"a\"\nlocation = \"{GOSSIPED}\"\n[[archive]]\nlocation = \"/srv/a\""
    );
    let error = service.load(&text).unwrap_err();
    assert!(
        error.starts_with("archive[2].location: this node would"),
        "{error}"
    );
}

#[test]
fn the_operator_names_any_directory_in_user_toml() {
    for user in [
        "[archive]\nlocation = \"/srv/a\"",
        "[[archive]]\nlocation = \"/srv/b\"\n[[archive]]\nlocation = \"/srv/a/\"",
    ] {
        let service = Service::new();
        service.write("user/warm-spare/config/user.toml", user);
        for form in ["[archive]", "[[archive]]"] {
            let load = |path: &str| service.load(&format!("{form}\nlocation = \"{path}\""));
            assert!(load("/srv/a").is_ok(), "{user}");
            assert!(load("/srv/a/inside").is_err(), "{user}");
            assert!(load("/srv").is_err(), "{user}");
        }
    }
}

#[test]
fn gossip_names_no_secret_of_others_for_a_place() {
    let service = Service::new();
    service.write("vault/secret", "x");
    service.write("svc/warm-spare/data/secret", "x");
    let proxy = "http://proxy:3128";
    service.write("vault/proxy", proxy);
    let place = |key: &str, path: &str| {
        let inline = key.trim_end_matches("_file");
        let text = BUCKET
            .lines()
            .filter(|line| !line.contains(&format!("{inline} =")));
        let text = text.collect::<Vec<_>>().join("\n");
        format!("[[archive]]\n{text}\n{key} = \"ROOT/{path}\"")
    };
    for (key, file) in [
        ("key_id_file", "vault/secret"),
        ("secret_key_file", "vault/secret"),
        ("proxy_file", "vault/proxy"),
    ] {
        let error = service.load(&place(key, file)).expect_err(key);
        assert!(
            error.starts_with(&format!("archive[1].{key}: names ")) && error.contains("user.toml"),
            "{error}"
        );
    }
    let own = place("secret_key_file", "svc/warm-spare/data/secret");
    assert!(service.load(&own).is_ok(), "{:?}", service.load(&own));
    service.write(
        "user/warm-spare/config/user.toml",
        "[[archive]]\nlocation = \"/srv/b\"\n[[archive]]\nsecret_key_file = \"ROOT/vault/secret\"",
    );
    assert!(
        service
            .load(&place("secret_key_file", "vault/secret"))
            .is_ok()
    );
    assert!(service.load(&place("key_id_file", "vault/secret")).is_err());
}
