//! The file's keys, each known and checked on its own, and where each value comes from.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use toml::{Table, Value};

use super::ConfigError;
use super::binds;
use super::builder::{self, BuilderApi};
use super::keys::{KEYS, Key, LOCAL_DEFAULTS, LOCAL_SERVERS, NOT_BUILT};
use super::kind::{Checked, Kind};
use super::schedule::Schedule;
use super::suggest::nearest;

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Configuration,
    BuilderApi,
    Bind,
    Default,
}

impl Source {
    /// The name under which status shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::BuilderApi => "builder-api",
            Self::Bind => "bind",
            Self::Default => "default",
        }
    }
}

/// Not `Debug`: it holds passwords as plain text.
pub(super) struct Values(BTreeMap<&'static str, (Checked, Source)>);

impl Values {
    /// Takes every key of the file, and the defaults of those that are not set.
    pub fn read(table: &Table) -> Result<Self, ConfigError> {
        let mut values = Self(BTreeMap::new());
        values.take_table("", table)?;
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

    /// Refuses what is well-formed but would do nothing yet.
    pub fn refuse_not_built(&self) -> Result<(), ConfigError> {
        for (name, values) in NOT_BUILT {
            let Some(key) = Key::find(name) else { continue };
            let found = self.0.get(name).map(|(checked, _)| checked);
            let default = key.default_text();
            if values.is_empty() {
                // By meaning: 60s is the default of a key whose default is written 1m.
                if found != key.default_value().ok().flatten().as_ref() {
                    let problem =
                        format!("not built yet; remove it or leave it at its default ({default})");
                    return Err(ConfigError::key(*name, problem));
                }
            } else if let Some(Checked::Text(text)) = found
                && values.contains(&text.as_str())
            {
                let problem = format!(
                    "{text:?} is not built yet; remove it or leave it at its default ({default})"
                );
                return Err(ConfigError::key(*name, problem));
            }
        }
        Ok(())
    }

    /// Gives the local side what builder-api's file says and our own does not, then what its binds say, then what is left
    /// to be assumed.
    pub fn complete_local(&mut self, builder: Option<&BuilderApi>) -> Result<(), ConfigError> {
        if let Some(builder) = builder {
            for key in KEYS {
                if let Some(theirs) = builder_key(key.name)
                    && !self.is_settled(key.name)
                {
                    self.take_builders(key, theirs, builder)?;
                }
            }
        }
        binds::LOCAL.complete(self);
        for (name, default) in LOCAL_DEFAULTS {
            if let Some(key) = Key::find(name) {
                self.0
                    .entry(key.name)
                    .or_insert(match (Key { default, ..*key }).default_value() {
                        Ok(Some(checked)) => (checked, Source::Default),
                        _ => continue,
                    });
            }
        }
        Ok(())
    }

    /// The configuration itself says all that leads to the local servers.
    pub fn local_needs_no_builder(&self) -> bool {
        LOCAL_SERVERS.iter().all(|key| self.is_settled(key))
    }

    /// Whether the configuration itself says what this key is about, by this key or by its counterpart.
    fn is_settled(&self, name: &str) -> bool {
        let counterparts: &[&str] = match name {
            "local.datastore.ssl_cert" | "local.datastore.ssl_key" => {
                &["local.datastore.ssl_cert", "local.datastore.ssl_key"]
            }
            "local.datastore.password" => {
                &["local.datastore.password", "local.datastore.password_file"]
            }
            "local.s3.key_id" => &["local.s3.key_id", "local.s3.key_id_file"],
            "local.s3.secret_key" => &["local.s3.secret_key", "local.s3.secret_key_file"],
            other => return self.source(other) == Some(Source::Configuration),
        };
        counterparts
            .iter()
            .any(|key| self.source(key) == Some(Source::Configuration))
    }

    fn take_builders(
        &mut self,
        key: &'static Key,
        theirs: &str,
        builder: &BuilderApi,
    ) -> Result<(), ConfigError> {
        let Some(value) = builder.value(theirs) else {
            return Ok(());
        };
        // libpq has one mode more. It encrypts if the server insists, which to us is the same as trying first.
        let allowed = key.name == "local.datastore.ssl_mode" && value.as_str() == Some("allow");
        let prefer = Value::String("prefer".to_string());
        let checked = key
            .kind
            .check(if allowed { &prefer } else { value })
            .map_err(|problem| {
                ConfigError::key(
                    builder::KEY,
                    format!("{}: {theirs}: {problem}", builder.path().display()),
                )
            })?;
        if let Some(checked) = checked {
            self.0.insert(key.name, (checked, Source::BuilderApi));
        }
        Ok(())
    }

    pub fn put(&mut self, key: &'static Key, checked: Checked, source: Source) {
        self.0.insert(key.name, (checked, source));
    }

    pub fn source(&self, key: &str) -> Option<Source> {
        self.0.get(key).map(|(_, source)| *source)
    }

    pub fn checked(&self, key: &str) -> Option<&Checked> {
        self.0.get(key).map(|(checked, _)| checked)
    }

    /// The keys of our own file that hold a secret.
    pub fn inline_secrets(&self) -> impl Iterator<Item = &'static str> {
        KEYS.iter()
            .filter(|key| {
                matches!(key.kind, Kind::Secret)
                    && self.source(key.name) == Some(Source::Configuration)
            })
            .map(|key| key.name)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key) {
            Some((Checked::Text(text), _)) => Some(text),
            _ => None,
        }
    }

    pub fn bytes(&self, key: &str) -> Option<u64> {
        match self.0.get(key) {
            Some((Checked::Bytes(bytes), _)) => Some(*bytes),
            _ => None,
        }
    }

    /// The value of an integer key, in the type it is used with.
    pub fn int<T: TryFrom<u64>>(&self, key: &str) -> Result<T, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Int(value), _)) => T::try_from(*value)
                .map_err(|_| ConfigError::key(key, format!("{value} is too large"))),
            _ => Err(self.missing(key)),
        }
    }

    pub fn duration(&self, key: &str) -> Result<Duration, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Duration(duration), _)) => Ok(*duration),
            _ => Err(self.missing(key)),
        }
    }

    pub fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Bool(value), _)) => Ok(*value),
            _ => Err(self.missing(key)),
        }
    }

    pub fn time(&self, key: &str) -> Option<DateTime<Utc>> {
        match self.0.get(key) {
            Some((Checked::Time(time), _)) => Some(*time),
            _ => None,
        }
    }

    pub fn schedule(&self, key: &str) -> Option<&Schedule> {
        match self.0.get(key) {
            Some((Checked::Schedule(schedule), _)) => Some(schedule),
            _ => None,
        }
    }

    pub fn address(&self, key: &str) -> Result<IpAddr, ConfigError> {
        match self.0.get(key) {
            Some((Checked::Ip(address), _)) => Ok(*address),
            _ => Err(self.missing(key)),
        }
    }

    pub fn required(&self, key: &str) -> Result<&str, ConfigError> {
        self.text(key).ok_or_else(|| self.missing(key))
    }

    pub fn missing(&self, key: &str) -> ConfigError {
        let elsewhere = match (builder_key(key), self.text(builder::KEY)) {
            (Some(theirs), Some(path)) => {
                format!("builder-api's configuration ({path}) does not give {theirs} either")
            }
            _ => "it has no default".to_string(),
        };
        let file = Key::find(&format!("{key}_file"));
        let or_file = file.map(|key| format!(", or {}", key.name));
        let problem = format!(
            "not set, and {elsewhere}: set it{}",
            or_file.unwrap_or_default()
        );
        ConfigError::key(key, problem)
    }
}

/// What builder-api's file calls a key of the local side that is also one of its own.
pub(super) fn builder_key(name: &str) -> Option<&str> {
    let theirs = name.strip_prefix("local.")?;
    let ours_alone = ["_file", ".proxy"].iter().any(|end| theirs.ends_with(end));
    (theirs.contains('.') && !ours_alone).then_some(theirs)
}

/// A part of a path as TOML writes it: odd characters in quotes, so that no error runs over several lines.
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
        None => "unknown key; docs/reference.md lists them all".to_string(),
    };
    ConfigError::key(path, problem)
}
