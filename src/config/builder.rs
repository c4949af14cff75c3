//! Settings that the Builder services on this node use themselves: builder-api's rendered
//! configuration, and the password that builder-datastore made for itself. These are the values
//! that really work.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{ConfigError, syntax};

/// The key that names the file. Errors in the file are reported under this key.
pub(super) const KEY: &str = "local.builder_api_config";

/// The port at which builder-api listens if its file does not say.
const USUAL_PORT: u16 = 9636;

/// The places where Habitat puts the files of Builder's services.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// Builder may run on another node: if this file is absent, nothing is taken from it. A file
    /// that is configured elsewhere must exist.
    pub api_config: PathBuf,
    pub datastore_password: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            api_config: PathBuf::from(super::keys::BUILDER_API_CONFIG),
            datastore_password: PathBuf::from("/hab/svc/builder-datastore/config/pwfile"),
        }
    }
}

/// The rendered configuration of builder-api.
#[derive(Debug)]
pub(super) struct BuilderApi {
    path: PathBuf,
    table: Table,
}

impl BuilderApi {
    /// Returns the file at `path`. It may be absent only where `path` is the usual place.
    pub(super) fn find(path: &Path, usual: &Path) -> Result<Option<Self>, ConfigError> {
        match std::fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound && path == usual => Ok(None),
            _ => Self::read(path).map(Some),
        }
    }

    /// Reads the file. An error never shows a value from the file.
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let wrong = |why: String| ConfigError::key(KEY, format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path)
            .map_err(|error| wrong(format!("cannot read builder-api's configuration: {error}")))?;
        let table = text
            .parse::<Table>()
            .map_err(|error| wrong(syntax(&text, &error)))?;
        Ok(Self {
            path: path.to_path_buf(),
            table,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the value of a key such as `datastore.host`.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        let (table, name) = key.split_once('.')?;
        let table = self.table.get(table)?.as_table()?;
        table.get(name).or_else(|| table.get(other_name(key)?))
    }

    /// Returns the text of the key, or None if it is empty.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.value(key)?.as_str().filter(|text| !text.is_empty())
    }

    /// Returns the address at which builder-api listens on this node.
    pub(super) fn address(&self) -> SocketAddr {
        let listen = self.text("http.listen").and_then(|ip| ip.parse().ok());
        let listen = listen.filter(|ip: &IpAddr| !ip.is_unspecified());
        let port = self.value("http.port").and_then(Value::as_integer);
        let port = port.and_then(|port| u16::try_from(port).ok());
        SocketAddr::new(
            listen.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            port.unwrap_or(USUAL_PORT),
        )
    }

    /// Returns whether the feature is on. builder-api takes its features as one text with commas;
    /// an operator may write a list instead.
    pub(super) fn has_feature(&self, name: &str) -> bool {
        let among = |text: &str| {
            text.split(',')
                .any(|found| found.trim().eq_ignore_ascii_case(name))
        };
        match self.value("api.features_enabled") {
            Some(Value::String(text)) => among(text),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(among),
            _ => false,
        }
    }
}

/// Returns the other name of a key. The Builder inside Automate has other names for some keys.
fn other_name(key: &str) -> Option<&'static str> {
    (key == "s3.key_id").then_some("access_key")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn automates_name_of_a_key_is_known() {
        let of = |text: &str| BuilderApi {
            path: PathBuf::new(),
            table: text.parse().unwrap(),
        };
        let automate = of("[s3]\naccess_key = \"depot\"");
        assert_eq!(automate.text("s3.key_id"), Some("depot"));
        let both = of("[s3]\naccess_key = \"depot\"\nkey_id = \"own\"");
        assert_eq!(both.text("s3.key_id"), Some("own"));
        assert_eq!(automate.text("s3.secret_key"), None);
    }

    fn with_features(features: &str) -> BuilderApi {
        BuilderApi {
            path: PathBuf::new(),
            table: format!("[api]\nfeatures_enabled = {features}")
                .parse()
                .unwrap(),
        }
    }

    #[test]
    fn features_are_found_in_a_text_and_in_a_list() {
        for features in [
            "\"jobsrv, Artifactory\"",
            "\"ARTIFACTORY\"",
            "[\"jobsrv\", \"artifactory\"]",
        ] {
            assert!(
                with_features(features).has_feature("ARTIFACTORY"),
                "{features}"
            );
        }
        for features in ["\"\"", "\"jobsrv\"", "\"NOARTIFACTORY\"", "[]", "7"] {
            assert!(
                !with_features(features).has_feature("ARTIFACTORY"),
                "{features}"
            );
        }
    }

    #[test]
    fn only_the_usual_file_may_be_absent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        assert!(BuilderApi::find(&path, &path).unwrap().is_none());
        let error = BuilderApi::find(&path, Path::new("/usual"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(KEY) && error.contains(path.to_str().unwrap()),
            "{error}"
        );

        std::fs::write(&path, "[datastore]\npassword = \"hunter2\nhost = 1").unwrap();
        let error = BuilderApi::find(&path, &path).unwrap_err().to_string();
        assert!(
            error.starts_with(KEY) && error.contains("line 2"),
            "{error}"
        );
        assert!(!error.contains("hunter2"), "{error}");

        std::fs::write(&path, "[datastore]\nhost = \"db\"\npassword = \"\"").unwrap();
        let found = BuilderApi::find(&path, Path::new("/usual"))
            .unwrap()
            .unwrap();
        assert_eq!(found.text("datastore.host"), Some("db"));
        assert_eq!(found.text("datastore.password"), None);
        assert_eq!(found.text("s3.endpoint"), None);
    }
}
