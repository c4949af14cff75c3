//! The keys of the file, each checked alone, with the source of each value.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use toml::{Table, Value};

use super::builder::{self, BuilderApi};
use super::keys::{KEYS, Key, NEAR_DEFAULTS, SERVERS};
use super::kind::Checked;
use super::schedule::Schedule;
use super::suggest::nearest;
use super::{ConfigError, archive, binds};

/// The source of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Configuration,
    BuilderApi,
    Bind,
    Default,
}

impl Source {
    /// Returns the name of the source in the status.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::BuilderApi => "builder-api",
            Self::Bind => "bind",
            Self::Default => "default",
        }
    }
}

/// The values. The type is not `Debug`, because it holds passwords as plain text.
pub(super) struct Values(BTreeMap<&'static str, (Checked, Source)>);

impl Values {
    /// Reads every key of the file but those of the archive, and adds the defaults of the keys that are not set.
    pub(super) fn read(table: &Table) -> Result<Self, ConfigError> {
        Self::read_table("", table)
    }

    /// [`Values::read`] for one table of the file, of which `path` is the name.
    pub(super) fn read_table(path: &str, table: &Table) -> Result<Self, ConfigError> {
        let mut values = Self(BTreeMap::new());
        values.take_table(path, table)?;
        for key in KEYS {
            values.set_default(key)?;
        }
        Ok(values)
    }

    fn take_table(&mut self, path: &str, table: &Table) -> Result<(), ConfigError> {
        for (name, value) in table {
            let name = key_part(name);
            let path = if path.is_empty() {
                name
            } else {
                format!("{path}.{name}")
            };
            match (Key::find(&path), value) {
                (Some(key), _) => {
                    let checked = key
                        .kind
                        .check(value)
                        .map_err(|problem| ConfigError::key(key.name, problem))?;
                    let empty = key.empty_means_none().then(|| Checked::Text(String::new()));
                    if let Some(checked) = checked.or(empty) {
                        self.0.insert(key.name, (checked, Source::Configuration));
                    }
                }
                // Each place is read alone: it may be an element of a list.
                (None, _) if path == archive::TABLE => {}
                (None, Value::Table(inner)) if is_table(&path) => self.take_table(&path, inner)?,
                (None, _) if is_table(&path) => {
                    return Err(ConfigError::key(
                        path,
                        format!("expected a table, found {}", value.type_str()),
                    ));
                }
                (None, _) => return Err(unknown(path)),
            }
        }
        Ok(())
    }

    fn set_default(&mut self, key: &'static Key) -> Result<(), ConfigError> {
        let default = key
            .default_value()
            .map_err(|problem| ConfigError::key(key.name, problem))?;
        if let Some(default) = default {
            self.0.entry(key.name).or_insert((default, Source::Default));
        }
        Ok(())
    }

    /// Returns the side whose Builder is at this node: `local`, or `peer` if this process pushes.
    pub(super) fn near(&self) -> &'static str {
        match self.text("replication.direction") {
            Some("push") => "peer",
            _ => "local",
        }
    }

    /// Completes the near side: first from builder-api's file, then from the binds, then from the
    /// defaults. A value of our own configuration always stays.
    pub(super) fn complete_near(
        &mut self,
        builder: Option<&BuilderApi>,
    ) -> Result<(), ConfigError> {
        let near = self.near();
        if let Some(builder) = builder {
            for key in KEYS {
                if let Some(api_key) = builder_key(key.name, near)
                    && !self.is_configured(key)
                {
                    self.take_builders(key, api_key, builder)?;
                }
            }
        }
        binds::Binds::near(near).complete(self);
        // The peer's keys have defaults of their own, except for the host.
        for side in [near, "local"] {
            for (name, default) in NEAR_DEFAULTS {
                let Some(key) = Key::find(&format!("{side}.{name}")) else {
                    continue;
                };
                if *name == "datastore.host" && side != near {
                    continue;
                }
                if let Ok(Some(checked)) = (Key { default, ..*key }).default_value() {
                    self.0.entry(key.name).or_insert((checked, Source::Default));
                }
            }
        }
        Ok(())
    }

    /// Returns whether the configuration itself names the servers of the near side completely.
    pub(super) fn needs_no_builder(&self) -> bool {
        let near = self.near();
        let mut keys = SERVERS
            .iter()
            .map(|name| Key::find(&format!("{near}.{name}")));
        let is_there = |key: &Key| {
            // The package writes the defaults of the peer, and they are as good as others.
            self.is_configured(key) || self.source(key.name) == Some(Source::Configuration)
        };
        keys.all(|key| key.is_some_and(is_there))
    }

    /// Returns whether the operator has set this key or its counterpart. The package writes every
    /// default into the file, so a default value counts as not set.
    fn is_configured(&self, key: &Key) -> bool {
        let counterparts: &[&str] = match key.name.split_once('.') {
            Some((_, "datastore.ssl_cert" | "datastore.ssl_key")) => {
                &["datastore.ssl_cert", "datastore.ssl_key"]
            }
            Some((_, "datastore.password")) => &["datastore.password", "datastore.password_file"],
            Some((_, "s3.key_id")) => &["s3.key_id", "s3.key_id_file"],
            Some((_, "s3.secret_key")) => &["s3.secret_key", "s3.secret_key_file"],
            _ => return self.is_set(key),
        };
        let side = key.name.split('.').next().unwrap_or_default();
        counterparts.iter().any(|name| {
            let counterpart = Key::find(&format!("{side}.{name}"));
            counterpart.is_some_and(|key| self.is_set(key))
        })
    }

    /// Returns whether the configuration gives the key a value other than the default.
    pub(super) fn is_set(&self, key: &Key) -> bool {
        let default = key.default_value().ok().flatten();
        self.source(key.name) == Some(Source::Configuration)
            && self.checked(key.name) != default.as_ref()
    }

    fn take_builders(
        &mut self,
        key: &'static Key,
        api_key: &str,
        builder: &BuilderApi,
    ) -> Result<(), ConfigError> {
        let Some(value) = builder.value(api_key) else {
            return Ok(());
        };
        // libpq has one mode more, `allow`: it encrypts if the server insists. For us that is the
        // same as `prefer`.
        let allowed = key.name.ends_with(".datastore.ssl_mode") && value.as_str() == Some("allow");
        let prefer = Value::String("prefer".to_string());
        let checked = key
            .kind
            .check(if allowed { &prefer } else { value })
            .map_err(|problem| {
                ConfigError::key(
                    builder::KEY,
                    format!("{}: {api_key}: {problem}", builder.path().display()),
                )
            })?;
        if let Some(checked) = checked {
            self.0.insert(key.name, (checked, Source::BuilderApi));
        }
        Ok(())
    }

    pub(super) fn put(&mut self, key: &'static Key, checked: Checked, source: Source) {
        self.0.insert(key.name, (checked, source));
    }

    pub(super) fn source(&self, key: &str) -> Option<Source> {
        self.0.get(key).map(|(_, source)| *source)
    }

    pub(super) fn checked(&self, key: &str) -> Option<&Checked> {
        self.0.get(key).map(|(checked, _)| checked)
    }

    /// Returns the keys of our own file that hold a secret.
    pub(super) fn inline_secrets(&self) -> impl Iterator<Item = &'static str> {
        KEYS.iter()
            .filter(|key| match self.0.get(key.name) {
                Some((checked, Source::Configuration)) => key.kind.is_secret(checked),
                _ => false,
            })
            .map(|key| key.name)
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key) {
            Some((Checked::Text(text), _)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn bytes(&self, key: &str) -> Option<u64> {
        match self.0.get(key) {
            Some((Checked::Bytes(bytes), _)) => Some(*bytes),
            _ => None,
        }
    }

    /// Returns the value of an integer key in the type of its user.
    pub(super) fn int<T: TryFrom<u64>>(&self, key: &str) -> Result<T, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Int(value), _)) => T::try_from(*value)
                .map_err(|_| ConfigError::key(key, format!("{value} is too large"))),
            _ => Err(self.missing(key)),
        }
    }

    pub(super) fn duration(&self, key: &str) -> Result<Duration, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Duration(duration), _)) => Ok(*duration),
            _ => Err(self.missing(key)),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Bool(value), _)) => Ok(*value),
            _ => Err(self.missing(key)),
        }
    }

    pub(super) fn time(&self, key: &str) -> Option<DateTime<Utc>> {
        match self.0.get(key) {
            Some((Checked::Time(time), _)) => Some(*time),
            _ => None,
        }
    }

    pub(super) fn schedule(&self, key: &str) -> Option<&Schedule> {
        match self.0.get(key) {
            Some((Checked::Schedule(schedule), _)) => Some(schedule),
            _ => None,
        }
    }

    pub(super) fn address(&self, key: &str) -> Result<IpAddr, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Ip(address), _)) => Ok(*address),
            _ => Err(self.missing(key)),
        }
    }

    pub(super) fn required(&self, key: &str) -> Result<&str, ConfigError> {
        self.text(key).ok_or_else(|| self.missing(key))
    }

    pub(super) fn missing(&self, key: &str) -> ConfigError {
        let elsewhere = match (builder_key(key, self.near()), self.text(builder::KEY)) {
            (Some(api_key), Some(path)) => {
                format!("builder-api's configuration ({path}) does not set {api_key} either")
            }
            _ => "it has no default".to_string(),
        };
        let file = Key::find(&format!("{key}_file"));
        let or_file = file.map(|key| format!(", or {}", key.name));
        let problem = format!(
            "not set, and {elsewhere}: set this key{}",
            or_file.unwrap_or_default()
        );
        ConfigError::key(key, problem)
    }
}

/// Returns the name in builder-api's file of a key of the near side, if that file has it too.
pub(super) fn builder_key<'a>(name: &'a str, near: &str) -> Option<&'a str> {
    let api_key = name.strip_prefix(near)?.strip_prefix('.')?;
    let has_no_counterpart = ["_file", ".proxy"].iter().any(|end| api_key.ends_with(end));
    (api_key.contains('.') && !has_no_counterpart).then_some(api_key)
}

/// Returns a part of a path as TOML writes it. Odd characters are quoted, so that an error stays on
/// one line.
fn key_part(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(bare) {
        name.to_string()
    } else {
        format!("{name:?}")
    }
}

fn is_table(path: &str) -> bool {
    KEYS.iter().any(|key| {
        key.name
            .strip_prefix(path)
            .is_some_and(|rest| rest.starts_with('.'))
    })
}

fn unknown(path: String) -> ConfigError {
    let tables = KEYS
        .iter()
        .filter_map(|key| key.name.rsplit_once('.'))
        .map(|(table, _)| table);
    let problem = match nearest(&path, KEYS.iter().map(|key| key.name).chain(tables)) {
        Some(known) => format!("unknown key; did you mean {known}?"),
        None => "unknown key; docs/reference.md lists all keys".to_string(),
    };
    ConfigError::key(path, problem)
}
