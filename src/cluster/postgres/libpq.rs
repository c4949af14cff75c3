//! The environment of PostgreSQL's own programs. They connect as our sessions do, or not at all: whatever this process was
//! started with, and whatever lies in the user's home directory, is not theirs to read.

use super::{channel, tls};
use crate::config::Datastore;
use std::io;
use std::path::Path;
use tempfile::NamedTempFile;
use tokio::process::Command;

/// No file can be here. libpq takes a variable that is empty for one that is not set, and then looks into the home
/// directory.
const NOWHERE: &str = "/dev/null/none";

/// Files that a program reads while it runs. They go with this.
pub(in crate::cluster) struct Environment {
    /// The authorities of this system, as our own sessions read them.
    _authorities: Option<NamedTempFile>,
}

/// Names the server, the user, and how the server is to prove itself. Secrets go by the environment, where only our own
/// user can read them.
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
        .env("PGPASSFILE", NOWHERE)
        .env("PGSSLMODE", to.ssl_mode.as_str())
        .env("PGGSSENCMODE", "disable");
    // Clients before 16 do not know this; ours have asked the same server before.
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
        // libpq checks whatever certificate it finds an authority for, also where nobody asked for it.
        (None, _) => Path::new(NOWHERE),
    };
    let (cert, key) = match (&to.ssl_cert, &to.ssl_key) {
        (Some(cert), Some(key)) => (cert.as_path(), key.as_path()),
        _ => (Path::new(NOWHERE), Path::new(NOWHERE)),
    };
    command
        .env("PGSSLROOTCERT", root)
        .env("PGSSLCERT", cert)
        .env("PGSSLKEY", key)
        .env("PGSSLCRL", NOWHERE);
    Ok(Environment {
        _authorities: authorities,
    })
}

/// libpq before 16 knows no authorities of a system, and a later one may know others than we do.
fn system_authorities() -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new()?;
    tls::write_system_authorities(&mut file)?;
    Ok(file)
}
