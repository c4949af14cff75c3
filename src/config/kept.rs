//! The last good configuration, kept in the data directory of the service. A service that finds a
//! bad configuration at its start continues with this one.
//!
//! Secrets are kept in files of their own, so that the kept configuration itself can be shown.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::archive::Entry;
use super::builder::Places;
use super::load::{accept, read};
use super::values::Values;
use super::{Config, ConfigError, Secret};

const FILE: &str = "last-good.toml";
pub(super) const SECRETS: &str = "secrets";

const FIRST_LINE: &str = "# Kept by warm-spare, which overwrites it: do not edit.\n";

/// Last line of a complete file. Half a configuration can be a good configuration with other
/// settings, so the end is marked.
const LAST_LINE: &str = "# This line is the last one.\n";

/// A good configuration as it was written, with its secrets separate from the rest.
#[derive(Debug)]
pub struct Accepted {
    table: Table,
    secrets: Vec<Inline>,
    /// Binds that are absent now. Their last addresses stay in force.
    pub remembered: Vec<String>,
    /// Binds with a new address, each with the old and the new one.
    pub moved: Vec<String>,
}

/// A secret that was in the configuration itself.
#[derive(Debug)]
struct Inline {
    key: &'static str,
    /// Index of the place that has the key, if the places are a list.
    element: Option<usize>,
    /// Name of the file that keeps the secret.
    file: String,
    secret: Secret,
}

impl Accepted {
    pub(super) fn new(
        mut table: Table,
        values: &Values,
        archives: &[Entry],
        remembered: Vec<String>,
        moved: Vec<String>,
    ) -> Self {
        let mut secrets = Vec::new();
        let of_sides = values.inline_secrets();
        let of_sides = of_sides.map(|key| (key, None, key.to_string()));
        let of_places = archives.iter().flat_map(|entry| {
            let keys = entry.values.inline_secrets();
            keys.map(|key| (key, entry.index, entry.secret_file(key)))
        });
        for (key, element, file) in of_sides.chain(of_places) {
            if let Some((inner, name)) = table_of(&mut table, key, element)
                && let Some(Value::String(text)) = inner.remove(name)
            {
                let secret = Secret::new(text);
                secrets.push(Inline {
                    key,
                    element,
                    file,
                    secret,
                });
            }
        }
        Self {
            table,
            secrets,
            remembered,
            moved,
        }
    }

    /// Writes the configuration into the directory `data`, which is made if needed. A file that has
    /// the right content already is not written again.
    ///
    /// Secrets are written first, and secrets that are no longer named are removed last. So a kept
    /// configuration never names a file that does not exist.
    pub fn keep(&self, data: &Path) -> io::Result<()> {
        let data = std::path::absolute(data)?;
        let folder = data.join(SECRETS);
        let text = self.text(&folder)?;
        make_folder(&data)?;
        if !self.secrets.is_empty() {
            make_folder(&folder)?;
            make_private(&folder)?;
        }
        for Inline { file, secret, .. } in &self.secrets {
            write_whole(&folder.join(file), file_of(secret).as_bytes())?;
        }
        write_whole(&data.join(FILE), text.as_bytes())?;
        let named = self.secrets.iter().map(|inline| inline.file.as_str());
        let named = named.collect();
        remove_others(&folder, &named)
    }

    /// Returns the text of the configuration, with the files in `folder` in place of the secrets.
    fn text(&self, folder: &Path) -> io::Result<String> {
        let mut table = self.table.clone();
        for inline in &self.secrets {
            let path = folder.join(&inline.file);
            let path = path.to_str().ok_or_else(|| {
                let problem = format!(
                    "{}: this path is not UTF-8, and TOML allows no other path",
                    path.display()
                );
                io::Error::new(ErrorKind::InvalidInput, problem)
            })?;
            if let Some((inner, name)) = table_of(&mut table, inline.key, inline.element) {
                inner.insert(format!("{name}_file"), Value::String(path.to_string()));
            }
        }
        Ok(format!("{FIRST_LINE}{table}{LAST_LINE}"))
    }
}

/// Loads the kept configuration, and checks the files it names as `load` does. None:
/// nothing is kept.
pub fn load_kept(data: &Path) -> Result<Option<Config>, ConfigError> {
    load_kept_at(data, &Places::default())
}

/// [`load_kept`], with Builder's own files at other places. Tests use it.
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

/// Returns the kept configuration as it was written, if the file is complete.
pub(super) fn kept_table(data: &Path) -> Option<Table> {
    let (text, _) = read(&data.join(FILE)).ok()?;
    text.ends_with(LAST_LINE).then(|| text.parse().ok())?
}

/// Makes the error of a broken kept file. It is not [`ConfigError::Unreadable`], because no
/// operator gives the path of this file.
fn broken(path: &Path, problem: &str) -> ConfigError {
    ConfigError::Syntax {
        path: path.to_path_buf(),
        message: problem.to_string(),
    }
}

/// Returns the data directory of the service. Habitat has it beside the folder `config`. For a
/// configuration at any other place it is beside that file.
pub fn data_dir(config_path: &Path) -> PathBuf {
    // Someone in the folder of the file may name it without that folder.
    let path = std::path::absolute(config_path).unwrap_or_else(|_| config_path.to_path_buf());
    let folder = path.parent().unwrap_or(Path::new(""));
    match folder.parent() {
        Some(service) if path.ends_with("config/config.toml") => service.join("data"),
        _ => folder.join("data"),
    }
}

/// Returns the table that holds a key such as `peer.s3.key_id`, and the name of the key in it. Of a list
/// of tables it is the `element`.
fn table_of<'a, 'b>(
    table: &'a mut Table,
    key: &'b str,
    element: Option<usize>,
) -> Option<(&'a mut Table, &'b str)> {
    let (tables, name) = key.rsplit_once('.')?;
    let inner = tables
        .split('.')
        .try_fold(table, |table, part| match table.get_mut(part)? {
            Value::Array(list) => list.get_mut(element?)?.as_table_mut(),
            value => value.as_table_mut(),
        })?;
    Some((inner, name))
}

/// Returns the content of a file from which the secret is read unchanged. Reading drops one line
/// end, so a secret that ends with one gets a second.
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

/// Sets mode 0700 on the folder, even if somebody else made it.
fn make_private(folder: &Path) -> io::Result<()> {
    let tighten = || match fs::metadata(folder)?.permissions().mode() & 0o777 {
        0o700 => Ok(()),
        _ => fs::set_permissions(folder, Permissions::from_mode(0o700)),
    };
    tighten().map_err(|error| at(folder, error))
}

/// Writes a file so that after a crash the old content or the new content is there, and nothing
/// else.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if is_there(path, bytes) {
        return Ok(());
    }
    let write = |folder: &Path| {
        // The temporary file has mode 0600.
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

/// Returns whether the file needs no write. A file that other users may read is replaced too.
fn is_there(path: &Path, bytes: &[u8]) -> bool {
    let is_private =
        |found: fs::Metadata| found.is_file() && found.permissions().mode() & 0o777 == 0o600;
    fs::symlink_metadata(path).is_ok_and(is_private)
        && fs::read(path).is_ok_and(|found| found == bytes)
}

/// Removes secrets that are no longer named, and the temporary files of a crash.
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

/// Syncs the folder, because a new name is durable only when its folder is.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Adds the path to an error, because errors of the system do not name the file.
fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
