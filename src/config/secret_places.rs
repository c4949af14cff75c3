//! The files of secrets, the commands and the directories that a configuration by gossip may name.
//!
//! Anyone who can write into the ring can name a host of their own and any file of this node. The
//! content of the file would be sent to that host as a password, or in clear as the id of a key. So
//! a configuration that Habitat has rendered may name only the files of this service and the
//! passwords of Builder's own services. Any other file must be named in `user.toml`, which only the
//! operator of this node writes. For the same reason only `user.toml` may have a command to execute, or
//! a directory outside of this service's own to write into.

use super::ConfigError;
use super::kept::SECRETS;
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

/// The keys that name a directory into which this node writes.
const DIRECTORIES: [&str; 1] = ["archive.location"];

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

/// Refuses a secret's file or a directory outside of the allowed places, and a command that is not in
/// `user.toml`. A configuration that no Supervisor has rendered belongs to the operator, and may name
/// any of them.
pub(super) fn check(config: &Path, values: &Values) -> Result<(), ConfigError> {
    let Some(service) = Service::of(config) else {
        return Ok(());
    };
    check_files(&service, values)?;
    check_commands(&service, values)?;
    check_directories(&service, values)
}

fn check_files(service: &Service, values: &Values) -> Result<(), ConfigError> {
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
    Ok(())
}

fn check_commands(service: &Service, values: &Values) -> Result<(), ConfigError> {
    for key in COMMANDS {
        let Some(command) = values.text(key).filter(|command| !command.is_empty()) else {
            continue;
        };
        let named = service.in_user_toml(key);
        if !named.iter().any(|named| named == command) {
            return Err(ConfigError::key(
                key,
                format!(
                    "this node would execute the command, so a configuration by gossip may not set it: set it in {}",
                    service.user_toml().display()
                ),
            ));
        }
    }
    Ok(())
}

fn check_directories(service: &Service, values: &Values) -> Result<(), ConfigError> {
    for key in DIRECTORIES {
        let Some(directory) = values.text(key) else {
            continue;
        };
        if !service.may_write(key, Path::new(directory)) {
            return Err(ConfigError::key(
                key,
                format!(
                    "this node would write into {directory}; a configuration by gossip may name a directory inside of {} only, and not {SECRETS} there: name such a directory, or set this key in {}",
                    service.data().display(),
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

    /// Returns the folder of the service's own data, as [`super::data_dir`] does.
    fn data(&self) -> PathBuf {
        self.folder.join("data")
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

    /// Returns whether a configuration by gossip may have this node write into the directory. The
    /// service's own files are in `data` itself, and those of its secrets in a folder there, in which
    /// it removes every other file.
    fn may_write(&self, key: &str, directory: &Path) -> bool {
        let directory = real(directory);
        let data = real(&self.data());
        let is_own = directory != data
            && directory.starts_with(&data)
            && !directory.starts_with(data.join(SECRETS));
        is_own || self.names_itself(key, &directory)
    }

    /// Returns whether the operator of this node has named the file or directory in `user.toml`.
    fn names_itself(&self, key: &str, file: &Path) -> bool {
        let named = self.in_user_toml(key);
        named.iter().any(|named| real(Path::new(named)) == file)
    }

    /// Returns the texts of a key in `user.toml`, which only the operator of this node writes. There
    /// may be several, because `archive` may be a list of tables.
    fn in_user_toml(&self, key: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.user_toml()).ok();
        let table = text.and_then(|text| text.parse::<toml::Table>().ok());
        let mut values: Vec<toml::Value> = table.map(toml::Value::Table).into_iter().collect();
        for part in key.split('.') {
            let inner = values.iter().filter_map(|value| value.get(part).cloned());
            values = inner.flat_map(elements).collect();
        }
        let texts = values.iter().filter_map(toml::Value::as_str);
        texts.map(String::from).collect()
    }
}

/// Returns the elements of a list, or the one value that is none.
fn elements(value: toml::Value) -> Vec<toml::Value> {
    match value {
        toml::Value::Array(elements) => elements,
        value => vec![value],
    }
}

/// Returns the path with every link followed. Of a path that does not exist, the part that does is
/// followed, because a directory may be made in it later.
pub(super) fn real(path: &Path) -> PathBuf {
    let followed = path.canonicalize();
    followed.unwrap_or_else(|_| {
        let parent = path.parent().map(real).unwrap_or_default();
        match path.components().next_back() {
            Some(Component::ParentDir) => parent.parent().unwrap_or(&parent).to_path_buf(),
            Some(Component::Normal(name)) => parent.join(name),
            _ => path.to_path_buf(),
        }
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
    fn a_configuration_of_the_operators_own_may_name_any_file() {
        for path in ["/etc/warm-spare.toml", "/root/config/config.toml"] {
            assert!(Service::of(Path::new(path)).is_none(), "{path}");
        }
    }
}
