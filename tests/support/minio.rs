//! A MinIO server with random credentials on loopback.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::ports::free_port;
use super::process::{Guard, bound, find_program, on_path, server_dir, tail};
use super::{Result, S3, SERVER_DEADLINE, random_word};

/// A server; ended when dropped.
pub struct Minio {
    server: Mutex<Option<Guard>>,
    program: PathBuf,
    port: u16,
    console_port: u16,
    access_key: String,
    secret_key: String,
    tls: bool,
    /// Variables that are set at its next start.
    environment: Mutex<Vec<(String, String)>>,
    dir: TempDir,
}

#[derive(Default)]
pub struct Builder {
    tls: Option<(String, String)>,
    credentials: Option<(String, String)>,
}

impl Builder {
    /// Uses HTTPS with this certificate and key, both PEM text.
    pub fn ssl(mut self, certificate: &str, key: &str) -> Self {
        self.tls = Some((certificate.into(), key.into()));
        self
    }

    /// Uses the root credentials of another server, whose files it may get.
    pub fn credentials_of(mut self, other: &Minio) -> Self {
        self.credentials = Some((other.access_key.clone(), other.secret_key.clone()));
        self
    }

    pub async fn start(self) -> Result<Minio> {
        let new = || (random_word(20), random_word(40));
        let (access_key, secret_key) = self.credentials.unwrap_or_else(new);
        let dir = server_dir("minio-")?;
        let certificates = dir.path().join("certs");
        fs::create_dir(&certificates)?;
        if let Some((certificate, key)) = &self.tls {
            fs::write(certificates.join("public.crt"), certificate)?;
            fs::write(certificates.join("private.key"), key)?;
        }
        let mut server = Minio {
            server: Mutex::new(None),
            program: program()?,
            port: 0,
            console_port: 0,
            access_key,
            secret_key,
            tls: self.tls.is_some(),
            environment: Mutex::default(),
            dir,
        };
        let mut attempt = 0;
        loop {
            server.port = free_port()?;
            server.console_port = free_port()?;
            match server.start_again().await {
                Ok(()) => return Ok(server),
                Err(error) if attempt < 5 && error.to_string().contains("in use") => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

impl Minio {
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    pub fn builder() -> Builder {
        Builder::default()
    }

    pub fn endpoint(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn access_key(&self) -> &str {
        &self.access_key
    }

    pub fn secret_key(&self) -> &str {
        &self.secret_key
    }

    /// Returns the directory of its objects, with a directory for each bucket.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Gives its files to another server. Neither of both runs.
    pub fn move_files_to(&self, other: &Minio) -> Result<()> {
        if other.data_dir().exists() {
            fs::remove_dir_all(other.data_dir())?;
        }
        Ok(fs::rename(self.data_dir(), other.data_dir())?)
    }

    /// Copies its files to another server, which does not run.
    pub fn copy_files_to(&self, other: &Minio) -> Result<()> {
        if other.data_dir().exists() {
            fs::remove_dir_all(other.data_dir())?;
        }
        let mut copying = std::process::Command::new("cp");
        let copied = copying
            .arg("-a")
            .args([self.data_dir(), other.data_dir()])
            .status()?;
        match copied.success() {
            true => Ok(()),
            false => Err("the files were not copied".into()),
        }
    }

    /// A client for the caller's runtime: its pool of connections must not be shared between runtimes.
    pub fn s3(&self) -> Result<S3> {
        S3::credulous(&self.endpoint(), &self.access_key, &self.secret_key)
    }

    pub fn pid(&self) -> u32 {
        self.with(|server| server.pid())
    }

    pub async fn stop(&self) -> Result<()> {
        let mut server = self.take();
        server.signal(Signal::TERM);
        tokio::task::spawn_blocking(move || match server.wait_for(SERVER_DEADLINE)? {
            Some(_) => Ok(()),
            None => Err("MinIO did not stop".into()),
        })
        .await?
    }

    pub fn kill9(&self) {
        self.take().kill9().expect("MinIO ends");
    }

    /// Returns the shell line with which a package's run hook starts it, after `stop`: the line
    /// ends in the server.
    pub fn shell_line(&self) -> String {
        format!(
            "cd / && HOME={dir} MINIO_ROOT_USER={} MINIO_ROOT_PASSWORD={} MINIO_BROWSER=off MINIO_UPDATE=off \
             MINIO_CI_CD=on CI=true exec {} server --address 127.0.0.1:{} --console-address 127.0.0.1:{} \
             --certs-dir {dir}/certs {}",
            self.access_key,
            self.secret_key,
            self.program.display(),
            self.port,
            self.console_port,
            self.data_dir().display(),
            dir = self.dir.path().display(),
        )
    }

    /// Sets a variable from its next start on.
    pub fn set(&self, name: &str, value: &str) {
        let mut environment = self.environment.lock().expect("its lock");
        environment.push((name.into(), value.into()));
    }

    /// On the same ports and data; after `stop` or `kill9`.
    pub async fn start_again(&self) -> Result<()> {
        let log = self.dir.path().join("log");
        let out = File::options().create(true).append(true).open(&log)?;
        let mut command = bound(&self.program);
        command
            .arg("server")
            .args(["--address", &format!("127.0.0.1:{}", self.port)])
            .args([
                "--console-address",
                &format!("127.0.0.1:{}", self.console_port),
            ])
            .arg("--certs-dir")
            .arg(self.dir.path().join("certs"))
            .arg(self.data_dir())
            .env("MINIO_ROOT_USER", &self.access_key)
            .env("MINIO_ROOT_PASSWORD", &self.secret_key)
            .env("MINIO_BROWSER", "off")
            .env("MINIO_UPDATE", "off")
            // Without this, it refuses a data directory on the root file system.
            .env("MINIO_CI_CD", "on")
            .env("CI", "true")
            .env("HOME", self.dir.path())
            .envs(self.environment.lock().expect("its lock").iter().cloned())
            .current_dir(self.dir.path())
            .stdout(out.try_clone()?)
            .stderr(out);
        let mut server = Guard::spawn(&mut command, Some(Signal::TERM))?;
        let deadline = std::time::Instant::now() + SERVER_DEADLINE;
        loop {
            if server.exited()?.is_some() {
                return Err(format!("MinIO did not start:\n{}", tail(&log)).into());
            }
            if self.ready().await {
                break;
            }
            if std::time::Instant::now() > deadline {
                return Err(format!("MinIO is not ready:\n{}", tail(&log)).into());
            }
            tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        }
        *self.server.lock().expect("the server's lock") = Some(server);
        Ok(())
    }

    /// `/minio/health/live` answers 200 before buckets can be used, so a real request is made as well.
    async fn ready(&self) -> bool {
        if !self.tls && !live(self.port).await {
            return false;
        }
        match self.s3() {
            Ok(s3) => s3.has_bucket("ready-or-not").await.is_ok(),
            Err(_) => false,
        }
    }

    /// Freezes the server: connections are accepted by the kernel and never answered.
    pub fn sigstop(&self) {
        self.with(|server| server.freeze());
    }

    pub fn sigcont(&self) {
        self.with(|server| server.thaw());
    }

    fn with<T>(&self, act: impl FnOnce(&Guard) -> T) -> T {
        act(self
            .server
            .lock()
            .expect("the server's lock")
            .as_ref()
            .expect("MinIO runs"))
    }

    fn take(&self) -> Guard {
        let mut server = self.server.lock().expect("the server's lock");
        server.take().expect("MinIO runs")
    }
}

async fn live(port: u16) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let request = b"GET /minio/health/live HTTP/1.0\r\nHost: localhost\r\n\r\n";
        stream.write_all(request).await?;
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).await?;
        std::io::Result::Ok(answer.ends_with(b"200 OK") || answer.windows(5).any(|w| w == b" 200 "))
    };
    ask.await.unwrap_or(false)
}

/// `WARM_SPARE_MINIO`, the path, Go's directory, or where `scripts/setup` put it.
fn program() -> Result<PathBuf> {
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_default();
    let tools = Path::new(super::habitat::ROOT).join(".tools");
    let noted = fs::read_to_string(tools.join("env")).unwrap_or_default();
    let noted = noted
        .lines()
        .find_map(|line| line.strip_prefix("WARM_SPARE_MINIO="));
    let candidates = std::env::var_os("WARM_SPARE_MINIO")
        .map(PathBuf::from)
        .into_iter()
        .chain(on_path("minio"))
        .chain([home.join("go/bin/minio"), tools.join("bin/minio")])
        .chain(noted.map(PathBuf::from));
    find_program(candidates)
        .ok_or_else(|| "no MinIO here: run scripts/setup, or set WARM_SPARE_MINIO".into())
}
