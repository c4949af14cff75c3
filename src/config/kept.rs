//! The last good configuration, kept in the service's own data directory: with it a service that finds a bad one at its
//! start goes on as before.
//!
//! Secrets lie beside it, a file each, so that the kept configuration itself may be looked at.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::builder::Places;
use super::load::{accept, read};
use super::values::Values;
use super::{Config, ConfigError, Secret};

const FILE: &str = "last-good.toml";
const SECRETS: &str = "secrets";

const FIRST_LINE: &str = "# Kept by warm-spare, which writes it anew: nothing to be edited.\n";

/// Half a configuration can be a good one with other settings. What is whole ends so.
const LAST_LINE: &str = "# This line is the last one.\n";

/// A configuration that was found good, as it was written; its secrets apart from the rest.
#[derive(Debug)]
pub struct Accepted {
    table: Table,
    secrets: Vec<(&'static str, Secret)>,
    /// Binds that are not there at present, and count on as they last were.
    pub remembered: Vec<String>,
    /// Binds with another address than before, and both.
    pub moved: Vec<String>,
}

impl Accepted {
    pub(super) fn new(
        mut table: Table,
        values: &Values,
        remembered: Vec<String>,
        moved: Vec<String>,
    ) -> Self {
        let mut secrets = Vec::new();
        for key in values.inline_secrets() {
            if let Some((inner, name)) = table_of(&mut table, key)
                && let Some(Value::String(text)) = inner.remove(name)
            {
                secrets.push((key, Secret::new(text)));
            }
        }
        Self {
            table,
            secrets,
            remembered,
            moved,
        }
    }

    /// Keeps it in the directory `data`, which is made if need be. What is there already is not written again.
    ///
    /// Secrets go first and what is no longer named goes last, so a kept configuration never names a file that is not
    /// there.
    pub fn keep(&self, data: &Path) -> io::Result<()> {
        let data = std::path::absolute(data)?;
        let folder = data.join(SECRETS);
        let text = self.text(&folder)?;
        make_folder(&data)?;
        if !self.secrets.is_empty() {
            make_folder(&folder)?;
            make_private(&folder)?;
        }
        for (key, secret) in &self.secrets {
            write_whole(&folder.join(key), file_of(secret).as_bytes())?;
        }
        write_whole(&data.join(FILE), text.as_bytes())?;
        let named = self.secrets.iter().map(|(key, _)| *key).collect();
        remove_others(&folder, &named)
    }

    /// The configuration with the files in `folder` in place of the secrets.
    fn text(&self, folder: &Path) -> io::Result<String> {
        let mut table = self.table.clone();
        for (key, _) in &self.secrets {
            let path = folder.join(key);
            let path = path.to_str().ok_or_else(|| {
                let problem = format!("{}: not UTF-8, as paths in TOML are", path.display());
                io::Error::new(ErrorKind::InvalidInput, problem)
            })?;
            if let Some((inner, name)) = table_of(&mut table, key) {
                inner.insert(format!("{name}_file"), Value::String(path.to_string()));
            }
        }
        Ok(format!("{FIRST_LINE}{table}{LAST_LINE}"))
    }
}

/// The kept configuration, with the files it names checked as [`load`](super::load) does. None: there is none.
pub fn load_kept(data: &Path) -> Result<Option<Config>, ConfigError> {
    load_kept_at(data, &Places::default())
}

/// [`load_kept`], with Builder's own files at other places.
pub(super) fn load_kept_at(data: &Path, places: &Places) -> Result<Option<Config>, ConfigError> {
    let path = data.join(FILE);
    let (text, mode) = match read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(broken(&path, &format!("cannot be read: {error}"))),
        Ok(found) => found,
    };
    if !text.ends_with(LAST_LINE) {
        return Err(broken(&path, "is not whole: its last line is missing"));
    }
    accept(&path, &text, mode, places, None).map(|(config, _)| Some(config))
}

/// The kept configuration as it was written, if it is whole.
pub(super) fn kept_table(data: &Path) -> Option<Table> {
    let (text, _) = read(&data.join(FILE)).ok()?;
    text.ends_with(LAST_LINE).then(|| text.parse().ok())?
}

/// Not [`ConfigError::Unreadable`]: nobody gives the path of this file.
fn broken(path: &Path, problem: &str) -> ConfigError {
    ConfigError::Syntax {
        path: path.to_path_buf(),
        message: problem.to_string(),
    }
}

/// The service's data directory: where Habitat has it, beside the folder `config`; with a configuration from anywhere
/// else, beside that file.
pub fn data_dir(config_path: &Path) -> PathBuf {
    // Started in the folder of the file, one names it without that folder.
    let path = std::path::absolute(config_path).unwrap_or_else(|_| config_path.to_path_buf());
    let folder = path.parent().unwrap_or(Path::new(""));
    match folder.parent() {
        Some(service) if path.ends_with("config/config.toml") => service.join("data"),
        _ => folder.join("data"),
    }
}

/// The table in which a key such as `peer.s3.key_id` stands, and its name there.
fn table_of<'a, 'b>(table: &'a mut Table, key: &'b str) -> Option<(&'a mut Table, &'b str)> {
    let (tables, name) = key.rsplit_once('.')?;
    let inner = tables
        .split('.')
        .try_fold(table, |table, part| table.get_mut(part)?.as_table_mut())?;
    Some((inner, name))
}

/// A secret as a file from which it is read unchanged: of that one line's end is dropped.
fn file_of(secret: &Secret) -> String {
    let text = secret.expose();
    let end = if text.ends_with('\n') { "\n" } else { "" };
    format!("{text}{end}")
}

fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| path.parent().map_or(Ok(()), sync_folder))
        .map_err(|error| at(path, error))
}

/// Ours alone, whoever made it.
fn make_private(folder: &Path) -> io::Result<()> {
    let tighten = || match fs::metadata(folder)?.permissions().mode() & 0o777 {
        0o700 => Ok(()),
        _ => fs::set_permissions(folder, Permissions::from_mode(0o700)),
    };
    tighten().map_err(|error| at(folder, error))
}

/// Writes a file so that after a crash there is either the old one or the new one.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if is_there(path, bytes) {
        return Ok(());
    }
    let write = |folder: &Path| {
        // Made with mode 0600.
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        sync_folder(folder)
    };
    path.parent()
        .map_or(Ok(()), write)
        .map_err(|error| at(path, error))
}

/// Whether nothing need be written. A file that others may read is replaced too.
fn is_there(path: &Path, bytes: &[u8]) -> bool {
    let ours = |found: fs::Metadata| found.is_file() && found.permissions().mode() & 0o777 == 0o600;
    fs::symlink_metadata(path).is_ok_and(ours) && fs::read(path).is_ok_and(|found| found == bytes)
}

/// Removes secrets that are no longer named, and what a crash left of writing one.
fn remove_others(folder: &Path, named: &BTreeSet<&str>) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|error| at(folder, error))?,
    };
    for entry in entries {
        let entry = entry.map_err(|error| at(folder, error))?;
        let is_named = entry
            .file_name()
            .to_str()
            .is_some_and(|n| named.contains(n));
        if !is_named && !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path()).map_err(|error| at(&entry.path(), error))?;
        }
    }
    Ok(())
}

/// A new name is durable only when its folder is.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The system's errors do not say which file they are about.
fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
