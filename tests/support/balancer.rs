//! nginx and HAProxy in front of two sites, with the files of `docs/balancer`, or without them.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::ports::free_port;
use super::postgres::{own, unprivileged};
use super::process::{Guard, bound, find_program, on_path, server_dir, tail};
use super::service::request;
use super::{Result, SERVER_DEADLINE};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// nginx with `docs/balancer/nginx.conf`.
    Nginx,
    /// HAProxy with `docs/balancer/haproxy.cfg`.
    Haproxy,
    /// nginx that sends everything to the first side that accepts a connection.
    PlainNginx,
    /// HAProxy that sends everything to the first side whose frontend answers.
    PlainHaproxy,
}

pub const WITH_SNIPPET: [Kind; 2] = [Kind::Nginx, Kind::Haproxy];
pub const PLAIN: [Kind; 2] = [Kind::PlainNginx, Kind::PlainHaproxy];

const PLAIN_NGINX: &str = "\
upstream builder {
    server builder.dc1.example.org:80;
    server builder.dc2.example.org:80 backup;
}
server {
    listen 80;
    client_max_body_size 0;
    location / { proxy_pass http://builder; }
}
";
const PLAIN_HAPROXY: &str = "\
defaults
    mode http
    timeout connect 2s
    timeout client 300s
    timeout server 300s
frontend clients
    bind :80
    default_backend builder
backend builder
    option httpchk GET /v1/status
    server dc1 builder.dc1.example.org:80 check
    server dc2 builder.dc2.example.org:80 check backup
";

/// The addresses of one site.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// Of the frontend.
    pub builder: SocketAddr,
    /// Of `warm-spare`.
    pub warm_spare: SocketAddr,
}

impl Addresses {
    /// The site is on this machine, at these ports.
    pub fn here(builder: u16, warm_spare: u16) -> Addresses {
        let [builder, warm_spare] =
            [builder, warm_spare].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        Addresses {
            builder,
            warm_spare,
        }
    }
}

/// The balancer ends when this is dropped.
pub struct Balancer {
    pub kind: Kind,
    port: u16,
    _server: Guard,
    dir: tempfile::TempDir,
}

impl Balancer {
    pub async fn start(kind: Kind, sites: [Addresses; 2]) -> Result<Balancer> {
        Self::start_with(kind, sites, |text| text).await
    }

    /// Starts it with another text than the document's.
    pub async fn start_with(
        kind: Kind,
        sites: [Addresses; 2],
        change: impl Fn(String) -> String,
    ) -> Result<Balancer> {
        let dir = server_dir("balancer-")?;
        let port = free_port()?;
        let text = place(&change(kind.text()?), port, sites, dir.path());
        let mut command = match kind {
            Kind::Nginx | Kind::PlainNginx => nginx(dir.path(), &text)?,
            Kind::Haproxy | Kind::PlainHaproxy => {
                let file = dir.path().join("haproxy.cfg");
                fs::write(&file, text)?;
                let mut command = bound(program("haproxy", "WARM_SPARE_HAPROXY")?);
                command.arg("-f").arg(&file);
                command
            }
        };
        own(dir.path())?;
        let log = dir.path().join("output");
        command.stdout(File::create(&log)?);
        command.stderr(File::options().append(true).open(&log)?);
        unprivileged(&mut command);
        let mut server = Guard::spawn(&mut command, Some(Signal::INT))?;
        let deadline = Instant::now() + SERVER_DEADLINE;
        // Any answer will do: the sides may not be there yet.
        while request(port, "GET", "/v1/status").await.is_err() {
            if server.exited()?.is_some() || Instant::now() > deadline {
                return Err(format!("{kind:?} did not start:\n{}", tail(&log)).into());
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        Ok(Balancer {
            kind,
            port,
            _server: server,
            dir,
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the last lines that it has printed.
    pub fn said(&self) -> String {
        tail(&self.dir.path().join("output"))
    }
}

impl Kind {
    pub fn has_snippet(self) -> bool {
        WITH_SNIPPET.contains(&self)
    }

    fn text(self) -> Result<String> {
        let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/balancer");
        Ok(match self {
            Kind::Nginx => fs::read_to_string(documents.join("nginx.conf"))?,
            Kind::Haproxy => fs::read_to_string(documents.join("haproxy.cfg"))?,
            Kind::PlainNginx => PLAIN_NGINX.into(),
            Kind::PlainHaproxy => PLAIN_HAPROXY.into(),
        })
    }
}

/// Puts these addresses and one directory in the place of the document's, and changes nothing else.
fn place(text: &str, port: u16, sites: [Addresses; 2], dir: &Path) -> String {
    let mut text = text
        .replace("listen 80;", &format!("listen 127.0.0.1:{port};"))
        .replace("bind :80", &format!("bind 127.0.0.1:{port}"))
        .replace("/var/cache/nginx", &dir.join("cache").to_string_lossy());
    for (number, site) in sites.iter().enumerate() {
        let name = format!("builder.dc{}.example.org", number + 1);
        for (documented, here) in [(80, site.builder), (9640, site.warm_spare)] {
            for end in [" ", ";", "\n"] {
                let from = format!("{name}:{documented}{end}");
                text = text.replace(&from, &format!("{here}{end}"));
            }
        }
    }
    text
}

/// The document is a part of the http block: the rest is written here.
fn nginx(dir: &Path, text: &str) -> Result<std::process::Command> {
    let (part, whole) = (dir.join("builder.conf"), dir.join("nginx.conf"));
    fs::write(&part, text)?;
    fs::create_dir(dir.join("cache"))?;
    let folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let folders = folders.map(|name| format!("{name}_temp_path {name};\n"));
    fs::write(
        &whole,
        format!(
            "daemon off;\nmaster_process off;\npid pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{}include {};\n}}\n",
            folders.concat(),
            part.display()
        ),
    )?;
    let mut command = bound(program("nginx", "WARM_SPARE_NGINX")?);
    command.arg("-p").arg(dir).arg("-c").arg(&whole);
    command.args(["-e", "stderr"]);
    Ok(command)
}

fn program(name: &str, variable: &str) -> Result<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let usual = PathBuf::from("/usr/sbin").join(name);
    find_program(named.into_iter().chain(on_path(name)).chain([usual]))
        .ok_or_else(|| format!("no {name} here: run scripts/setup").into())
}
