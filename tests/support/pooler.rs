//! PgBouncer before a PostgreSQL server.

use super::ports::free_port;
use super::postgres::{own, unprivileged};
use super::process::{Guard, bound, find_program, on_path, server_dir, tail};
use super::{Postgres, Result, SERVER_DEADLINE};
use rustix::process::Signal;
use std::fs::{self, File};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub struct Pooler {
    port: u16,
    _server: Guard,
    _dir: tempfile::TempDir,
}

impl Pooler {
    /// `settings`: lines of `[pgbouncer]`.
    pub async fn start(to: &Postgres, settings: &str) -> Result<Self> {
        let dir = server_dir("pooler-")?;
        let port = free_port()?;
        let file = dir.path().join("pgbouncer.ini");
        fs::write(
            &file,
            format!(
                "[databases]\n* = host=127.0.0.1 port={} user={} password={}\n\
                 [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\nunix_socket_dir =\n{settings}\n",
                to.port(),
                to.user(),
                to.password(),
            ),
        )?;
        own(dir.path())?;
        let log = dir.path().join("log");
        let mut command = bound(program()?);
        command.arg(&file).stdout(File::create(&log)?);
        command.stderr(File::options().append(true).open(&log)?);
        unprivileged(&mut command);
        let mut server = Guard::spawn(&mut command, Some(Signal::INT))?;
        let deadline = Instant::now() + SERVER_DEADLINE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if server.exited()?.is_some() || Instant::now() > deadline {
                return Err(format!("PgBouncer did not start:\n{}", tail(&log)).into());
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        Ok(Pooler {
            port,
            _server: server,
            _dir: dir,
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

fn program() -> Result<PathBuf> {
    let usual = PathBuf::from("/usr/sbin/pgbouncer");
    find_program(on_path("pgbouncer").into_iter().chain([usual]))
        .ok_or_else(|| "no pgbouncer here: run scripts/setup".into())
}
