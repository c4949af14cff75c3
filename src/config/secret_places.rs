//! The files of secrets that a configuration by gossip may name.
//!
//! Anyone who can write into the ring can name a host of their own and any file of this node. The
//! content of the file would be sent to that host as a password, or in clear as the id of a key. So
//! a configuration that Habitat has rendered may name only the files of this service and the
//! passwords of Builder's own services. Any other file must be named in `user.toml`, which only the
//! operator of this node writes.

use super::ConfigError;
use super::values::Values;
use std::path::{Component, Path, PathBuf};

const KEYS: [&str; 14] = [
    "archive.key_id_file",
    "archive.secret_key_file",
    "archive.proxy_file",
    "artifacts.lease.key_id_file",
    "artifacts.lease.secret_key_file",
    "artifacts.lease.proxy_file",
    "local.datastore.password_file",
    "local.s3.key_id_file",
    "local.s3.secret_key_file",
    "local.s3.proxy_file",
    "peer.datastore.password_file",
    "peer.s3.key_id_file",
    "peer.s3.secret_key_file",
    "peer.s3.proxy_file",
];

/// The keys whose value this node executes. A configuration by gossip may not choose it.
const COMMANDS: [&str; 1] = ["takeover.fence_command"];

/// The keys whose folder this node writes into. A configuration by gossip may name only a folder of
/// this service.
const FOLDERS: [&str; 1] = ["archive.location"];

/// Returns the folders of Builder's own services whose files hold a secret of this kind. The id of
/// a key goes to the store in clear, so it may not come from a folder of the datastore.
fn builders(key: &str) -> &'static [&'static str] {
    match key {
        _ if key.ends_with("datastore.password_file") => {
            &["builder-api/config", "builder-datastore/config"]
        }
        // No service of Builder has one.
        _ if key.ends_with(".proxy_file") => &[],
        _ => &["builder-minio/config"],
    }
}

/// Refuses a secret's file outside of the allowed places. A configuration that no Supervisor has
/// rendered belongs to the operator, and may name any file.
pub(super) fn check(config: &Path, values: &Values) -> Result<(), ConfigError> {
    let Some(service) = Service::of(config) else {
        return Ok(());
    };
    for key in KEYS {
        let Some(file) = values.text(key) else {
            continue;
        };
        if !service.may_name(key, Path::new(file)) {
            return Err(ConfigError::key(
                key,
                format!(
                    "names {file}, which is outside of {}; a configuration by gossip may name files in these folders only: move the secret there, or name the file in {}",
                    service.places_text(key),
                    service.user_toml().display()
                ),
            ));
        }
    }
    for key in COMMANDS {
        let Some(command) = values.text(key).filter(|command| !command.is_empty()) else {
            continue;
        };
        if !service
            .in_user_toml(key)
            .iter()
            .any(|named| named == command)
        {
            return Err(ConfigError::key(
                key,
                format!(
                    "this node would execute the command, so a configuration by gossip may not set it: set it in {}",
                    service.user_toml().display()
                ),
            ));
        }
    }
    for key in FOLDERS {
        let Some(folder) = values.text(key) else {
            continue;
        };
        let is_ours = real(Path::new(folder)).starts_with(real(&service.folder.join("data")));
        if !is_ours
            && !service
                .in_user_toml(key)
                .iter()
                .any(|named| named == folder)
        {
            return Err(ConfigError::key(
                key,
                format!(
                    "this node would write into {folder}, so a configuration by gossip may name only folders in {}: set it in {}",
                    service.folder.join("data").display(),
                    service.user_toml().display()
                ),
            ));
        }
    }
    Ok(())
}

/// The service whose configuration is at `…/svc/NAME/config/config.toml`.
struct Service {
    /// The folder `…/svc/NAME`.
    folder: PathBuf,
    name: String,
    /// The folder above `svc`, usually `/hab`.
    root: PathBuf,
}

impl Service {
    fn of(config: &Path) -> Option<Service> {
        let config = std::path::absolute(config).ok()?;
        let folder = config
            .ends_with("config/config.toml")
            .then(|| config.parent()?.parent())??;
        let services = folder.parent()?;
        if services.file_name()? != "svc" {
            return None;
        }
        Some(Service {
            name: folder.file_name()?.to_str()?.to_string(),
            root: services.parent()?.to_path_buf(),
            folder: folder.to_path_buf(),
        })
    }

    fn user_toml(&self) -> PathBuf {
        let user = self.root.join("user").join(&self.name);
        user.join("config/user.toml")
    }

    fn places(&self, key: &str) -> Vec<PathBuf> {
        let own = [self.folder.clone(), self.root.join("user").join(&self.name)];
        let builders = builders(key).iter();
        let builders = builders.map(|name| self.root.join("svc").join(name));
        own.into_iter().chain(builders).collect()
    }

    fn places_text(&self, key: &str) -> String {
        let places = self.places(key);
        let places = places.iter().map(|place| place.display().to_string());
        places.collect::<Vec<_>>().join(", ")
    }

    fn may_name(&self, key: &str, file: &Path) -> bool {
        let file = real(file);
        let within = |place: &PathBuf| file.starts_with(real(place));
        self.places(key).iter().any(within) || self.names_itself(key, &file)
    }

    /// Returns whether the operator of this node has named the file in `user.toml`.
    fn names_itself(&self, key: &str, file: &Path) -> bool {
        let named = self.in_user_toml(key);
        named.iter().any(|named| real(Path::new(named)) == file)
    }

    /// Returns the texts of a key in `user.toml`, which only the operator of this node writes. A key
    /// in a list of tables has one for each table.
    fn in_user_toml(&self, key: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.user_toml()).ok();
        let table = text.and_then(|text| text.parse().ok());
        let mut values: Vec<toml::Value> = table.map(toml::Value::Table).into_iter().collect();
        for part in key.split('.') {
            let inner = values.iter().filter_map(|value| value.get(part)).cloned();
            values = inner
                .flat_map(|value| match value {
                    toml::Value::Array(elements) => elements,
                    value => vec![value],
                })
                .collect();
        }
        let texts = values.iter().filter_map(toml::Value::as_str);
        texts.map(String::from).collect()
    }
}

/// Returns the path with every link followed. For a path that does not exist, only `..` is removed.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| {
        let mut plain = PathBuf::new();
        for part in path.components() {
            match part {
                Component::ParentDir => {
                    plain.pop();
                }
                part => plain.push(part),
            }
        }
        plain
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "peer.datastore.password_file";

    fn service(root: &Path) -> Service {
        let config = root.join("svc/warm-spare/config/config.toml");
        Service::of(&config).expect("a service's configuration")
    }

    #[test]
    fn a_configuration_by_gossip_names_no_file_of_others() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path().canonicalize().expect("it is there");
        let found = service(&root);
        let may = |file: &str| found.may_name(KEY, &root.join(file));
        for file in [
            "svc/warm-spare/data/peer-password",
            "user/warm-spare/secrets/peer",
            "svc/builder-datastore/config/pwfile",
        ] {
            assert!(may(file), "{file}");
        }
        let datastores = root.join("svc/builder-datastore/config/pwfile");
        assert!(!found.may_name("peer.s3.key_id_file", &datastores));
        let stores = root.join("svc/builder-minio/config/x");
        assert!(found.may_name("peer.s3.key_id_file", &stores));
        assert!(!found.may_name("peer.s3.proxy_file", &stores));
        for file in [
            "svc/builder-api/files/bldr-1.box.key",
            "svc/warm-spare/../builder-api/files/bldr-1.box.key",
            "svc/warm-spare-2/data/x",
            "../etc/shadow",
            "cache/keys/core-1.sig.key",
        ] {
            assert!(!may(file), "{file}");
        }
    }

    #[test]
    fn a_link_out_of_our_folder_is_followed() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path().canonicalize().expect("it is there");
        let data = root.join("svc/warm-spare/data");
        std::fs::create_dir_all(&data).expect("a folder");
        std::fs::write(root.join("shadow"), "x").expect("a file");
        std::os::unix::fs::symlink(root.join("shadow"), data.join("link")).expect("a link");
        assert!(!service(&root).may_name(KEY, &data.join("link")));
    }

    #[test]
    fn what_the_operator_names_in_user_toml_is_his_own_choice() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path().canonicalize().expect("it is there");
        let user = root.join("user/warm-spare/config");
        std::fs::create_dir_all(&user).expect("a folder");
        let text = format!(
            "[peer.datastore]\npassword_file = \"{}/vault/p\"",
            root.display()
        );
        std::fs::write(user.join("user.toml"), text).expect("a file");
        let found = service(&root);
        assert!(found.may_name(KEY, &root.join("vault/p")));
        assert!(!found.may_name(KEY, &root.join("vault/q")));
        assert!(!found.may_name("peer.s3.key_id_file", &root.join("vault/p")));
    }

    #[test]
    fn a_configuration_by_gossip_writes_into_no_folder_of_others() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path().canonicalize().expect("it is there");
        let config = root.join("svc/warm-spare/config/config.toml");
        let checked = |location: &str| {
            let text = format!("[archive]\nlocation = \"{}/{location}\"", root.display());
            let table = text.parse().expect("it is TOML");
            check(&config, &Values::read(&table).expect("it is good"))
        };
        assert!(checked("svc/warm-spare/data/archive").is_ok());
        for location in [
            "svc/builder-api/config",
            "svc/warm-spare/data/../config",
            "srv/one",
            "srv/two",
        ] {
            let error = checked(location).expect_err(location).to_string();
            assert!(
                error.starts_with("archive.location: this node would write"),
                "{error}"
            );
        }
        let user = root.join("user/warm-spare/config");
        std::fs::create_dir_all(&user).expect("a folder");
        let table = |name: &str| {
            format!(
                "[[archive]]\nname = \"{name}\"\nlocation = \"{}/srv/{name}\"\n",
                root.display()
            )
        };
        std::fs::write(user.join("user.toml"), table("one") + &table("two")).expect("a file");
        assert!(checked("srv/one").is_ok());
        assert!(checked("srv/two").is_ok());
        assert!(checked("srv/three").is_err());
    }

    #[test]
    fn a_configuration_of_the_operators_own_may_name_any_file() {
        for path in ["/etc/warm-spare.toml", "/root/config/config.toml"] {
            assert!(Service::of(Path::new(path)).is_none(), "{path}");
        }
    }
}
