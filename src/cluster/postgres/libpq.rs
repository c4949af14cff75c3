//! The environment of PostgreSQL's own programs. They connect as our sessions do, or not at all:
//! they must not read the environment that this process was started with, nor files in the user's
//! home directory.

use super::{channel, tls};
use crate::config::Datastore;
use std::io;
use std::path::Path;
use tempfile::NamedTempFile;
use tokio::process::Command;

/// A path at which no file can be. libpq treats an empty variable as one that is not set, and then
/// looks into the home directory.
const NO_FILE: &str = "/dev/null/none";

/// Files that a program reads while it runs. They are deleted with this value.
pub(in crate::cluster) struct Environment {
    /// The certificate authorities of this system, as our own sessions read them.
    _authorities: Option<NamedTempFile>,
}

/// Sets the server, the user, and how the server must prove its identity. Secrets are passed in the
/// environment, where only our own user can read them.
pub(in crate::cluster) fn connect(
    command: &mut Command,
    to: &Datastore,
) -> io::Result<Environment> {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    command
        .env("PGHOST", &to.host)
        .env("PGPORT", to.port.to_string())
        .env("PGUSER", &to.user)
        .env("PGAPPNAME", "warm-spare")
        .env("PGCONNECT_TIMEOUT", "10")
        .env("PGPASSFILE", NO_FILE)
        .env("PGSSLMODE", to.ssl_mode.as_str())
        .env("PGGSSENCMODE", "disable");
    // Clients before 16 do not know this variable; our sessions have asked the same server before.
    if !channel::is_loopback(&to.host) && !channel::is_verified(to) {
        command.env("PGREQUIREAUTH", "!password");
    }
    // An unreadable password fails in the program with the server's own words.
    if let Some(Ok(password)) = to.password.as_ref().map(|source| source.read("password")) {
        command.env("PGPASSWORD", password.expose());
    }
    let authorities = match (channel::is_verified(to), &to.ssl_root_cert) {
        (true, None) => Some(system_authorities()?),
        _ => None,
    };
    let root = match (&authorities, &to.ssl_root_cert) {
        (Some(file), _) => file.path(),
        (None, Some(path)) if channel::is_verified(to) => path,
        // libpq checks any certificate for which it finds an authority, even if nobody asked for
        // it.
        (None, _) => Path::new(NO_FILE),
    };
    let (cert, key) = match (&to.ssl_cert, &to.ssl_key) {
        (Some(cert), Some(key)) => (cert.as_path(), key.as_path()),
        _ => (Path::new(NO_FILE), Path::new(NO_FILE)),
    };
    command
        .env("PGSSLROOTCERT", root)
        .env("PGSSLCERT", cert)
        .env("PGSSLKEY", key)
        .env("PGSSLCRL", NO_FILE);
    Ok(Environment {
        _authorities: authorities,
    })
}

/// Writes the certificate authorities of this system to a file. libpq before 16 does not know them,
/// and a later one may know others than we do.
fn system_authorities() -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new()?;
    tls::write_system_authorities(&mut file)?;
    Ok(file)
}
