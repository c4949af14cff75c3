//! The running service under test: asked over HTTP, and waited for by its own reports.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::ports::free_port;
use super::{Error, Output, Result, Running, Site, wait_until};

/// Maximum time for an action that the service does by itself, on a busy machine.
pub const SOON: Duration = Duration::from_secs(120);

pub struct Service<'a> {
    pub site: &'a Site,
    pub port: u16,
    pub running: Running,
}

/// A point of the program at which a service waits.
pub struct Halt(tempfile::TempDir);

impl Halt {
    /// Returns the point, and the value of `WARM_SPARE_WAIT_AT` for the process that shall wait
    /// there.
    pub fn at(point: &str) -> (Halt, String) {
        let directory = super::process::server_dir("halt-").expect("a folder");
        let wanted = format!("{point}:{}", directory.path().display());
        (Halt(directory), wanted)
    }

    pub async fn reached(&self) {
        wait_until("the point is reached", SOON, || async {
            match self.0.path().join("reached").exists() {
                true => Ok(()),
                false => Err("not yet".into()),
            }
        })
        .await;
    }

    /// Waits for a point that may not be reached.
    pub async fn is_reached_within(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.reached()).await.is_ok()
    }

    pub fn go(&self) {
        std::fs::write(self.0.path().join("go"), "").expect("it is written");
    }
}

/// The HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub kind: String,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }
}

/// The clock of one service.
pub struct OwnTime(tempfile::TempDir);

impl OwnTime {
    fn file(&self) -> std::path::PathBuf {
        self.0.path().join("clock")
    }

    /// Returns the variables that give a process this clock.
    fn variables(&self) -> Result<[(&'static str, String); 3]> {
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        Ok([
            ("LD_PRELOAD", text(&super::postgres::faketime()?)),
            ("FAKETIME_TIMESTAMP_FILE", text(&self.file())),
            ("FAKETIME_NO_CACHE", "1".into()),
        ])
    }

    /// Moves this clock ahead by a number of seconds, in addition to the real time.
    pub fn pass(&self, seconds: u64) -> Result<()> {
        let new = self.0.path().join("clock.new");
        std::fs::write(&new, format!("+{seconds}"))?;
        Ok(std::fs::rename(&new, self.file())?)
    }
}

impl<'a> Service<'a> {
    /// Starts it with checks every second and phases in its log; `extra` is merged into the
    /// configuration.
    pub fn start(site: &'a Site, extra: &str) -> Self {
        Self::start_with(site, extra, &[])
    }

    /// Starts a service that is killed when it reaches this point of the program, `name` or
    /// `name:count`.
    pub fn doomed(site: &'a Site, extra: &str, point: &str) -> Self {
        Self::start_with(site, extra, &[("WARM_SPARE_KILL_AT", point)])
    }

    /// Starts a service that waits at this point of the program until the test lets it go on.
    pub fn halting(site: &'a Site, extra: &str, point: &str) -> (Self, Halt) {
        let (halt, wanted) = Halt::at(point);
        let service = Self::start_with(site, extra, &[("WARM_SPARE_WAIT_AT", &wanted)]);
        (service, halt)
    }

    /// Starts a service with its own clock: for the calendar and for its own time limits.
    pub fn with_own_time(site: &'a Site, extra: &str) -> Result<(Self, OwnTime)> {
        let time = OwnTime(super::process::server_dir("time-")?);
        time.pass(0)?;
        let variables = time.variables()?;
        let variables = variables
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        Ok((Self::start_with(site, extra, &variables), time))
    }

    /// Does the same with this text as its configuration, for which a port is chosen.
    pub fn of_text_with_own_time(site: &'a Site, text: &str) -> Result<(Self, OwnTime)> {
        let time = OwnTime(super::process::server_dir("time-")?);
        time.pass(0)?;
        let port = free_port()?;
        let mut config: toml::Table = text.parse()?;
        super::site::merge(&mut config, format!("[http]\nport = {port}").parse()?);
        super::site::write_secret(&site.config_file(), &config.to_string())?;
        let variables = time.variables()?;
        let variables = variables
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let running = site.spawn_with(&site.config_file(), &["run"], &variables);
        Ok((
            Self {
                site,
                port,
                running,
            },
            time,
        ))
    }

    fn start_with(site: &'a Site, extra: &str, environment: &[(&str, &str)]) -> Self {
        let port = free_port().expect("a port");
        Self::start_on(port, site, extra, environment)
    }

    /// Starts it on the port of one that has ended.
    pub fn start_on(port: u16, site: &'a Site, extra: &str, environment: &[(&str, &str)]) -> Self {
        let file = site.write_config(&configuration(port, extra));
        Self {
            site,
            port,
            running: site.spawn_with(&file, &["run"], environment),
        }
    }

    /// Waits until the doomed service is dead.
    pub async fn dead(self) -> Result<()> {
        let ended = self.running.wait(SOON).await?;
        match ended.code {
            None => Ok(()),
            Some(_) => Err(format!("it was to be killed: {ended}").into()),
        }
    }

    /// Starts another service on the same cluster, with its own configuration.
    pub fn beside(&self, extra: &str) -> Service<'a> {
        let port = free_port().expect("a port");
        let here = self.site.config_file();
        let kept = std::fs::read(&here).expect("a configuration");
        let other = self.site.write_config(&configuration(port, extra));
        let beside = other
            .with_file_name(format!("beside-{port}"))
            .join("config.toml");
        std::fs::create_dir_all(beside.parent().expect("a folder")).expect("a folder");
        std::fs::rename(&other, &beside).expect("it is moved");
        super::site::write_secret(&here, &String::from_utf8_lossy(&kept)).expect("it is written");
        Service {
            site: self.site,
            port,
            running: self.site.spawn_with_config(&beside, &["run"]),
        }
    }

    /// Writes another configuration and lets the service read it.
    pub fn reconfigure(&self, extra: &str) {
        self.site.write_config(&configuration(self.port, extra));
        self.running.signal(rustix::process::Signal::HUP);
    }

    /// Writes text that is no configuration and lets the service read it.
    pub fn write_raw(&self, text: &str) {
        std::fs::write(self.site.config_file(), text).expect("it is written");
        self.running.signal(rustix::process::Signal::HUP);
    }

    /// Starts the same service again after its end.
    pub fn start_again(self) -> Self {
        let Self { site, port, .. } = self;
        Self {
            site,
            port,
            running: site.spawn(&["run"]),
        }
    }

    pub async fn get(&self, path: &str) -> Result<Answer> {
        get(self.port, path).await
    }

    pub async fn status(&self) -> Result<Value> {
        Ok(self.get("/status").await?.json())
    }

    /// Waits until the status fulfils `so`, and returns it.
    pub async fn until(&self, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        wait_until(what, SOON, || async {
            let status = self.status().await?;
            if so(&status) {
                return Ok(status);
            }
            Err(Box::new(NotSo {
                status,
                said: self.running.last_said(25),
            }) as Error)
        })
        .await
    }

    pub async fn until_state(&self, state: &str) -> Value {
        self.until(state, |status| status["state"] == state).await
    }

    /// Waits until nothing waits, and there is no hold.
    pub async fn until_level(&self) -> Value {
        self.until("level with the primary", |status| {
            status["state"] == "following" && status["lag"]["bytes"] == 0
        })
        .await
    }

    pub async fn until_hold(&self, reason: &str) -> Value {
        self.until(reason, |status| status["hold"]["reason"] == reason)
            .await
    }

    /// Returns the value of a sample without labels, or of the one with exactly these:
    /// `name{side="peer"}`.
    pub async fn metric(&self, sample: &str) -> Result<Option<f64>> {
        let page = self.get("/metrics").await?.text;
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(line.map(|value| value.parse()).transpose()?)
    }

    pub async fn health(&self) -> Output {
        self.site.warm_spare(&["health"]).await
    }

    /// Ends the service as the Supervisor does.
    pub async fn stop(self) -> Output {
        self.running.terminate();
        let ended = self.running.wait(Duration::from_secs(30)).await;
        ended.expect("it ends")
    }
}

fn configuration(port: u16, extra: &str) -> String {
    let mut config: toml::Table = format!(
        r#"
        log_level = "debug"
        [http]
        port = {port}
        [replication]
        interval = "1s"
        [verify]
        schedule = """#
    )
    .parse()
    .expect("it is TOML");
    super::site::merge(&mut config, extra.parse().expect("`extra` is TOML"));
    config.to_string()
}

pub async fn get(port: u16, path: &str) -> Result<Answer> {
    request(port, "GET", path).await
}

pub async fn request(port: u16, method: &str, path: &str) -> Result<Answer> {
    let asking = async {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let talking = tokio::spawn(connection);
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "127.0.0.1")
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let kind = response.headers().get("content-type").cloned();
        let body = response.into_body().collect().await?.to_bytes();
        talking.abort();
        Ok(Answer {
            status,
            kind: kind.map_or(Ok(String::new()), |kind| kind.to_str().map(String::from))?,
            text: String::from_utf8_lossy(&body).into_owned(),
        })
    };
    tokio::time::timeout(Duration::from_secs(10), asking).await?
}

/// Returns the operator's approval that the hold asks for, as configuration.
pub fn approval(status: &Value) -> String {
    let id = approval_id(status).unwrap_or_else(|| panic!("no approval in {status:#}"));
    format!("[fuse]\napprove = \"{id}\"")
}

/// Returns the id of that approval. None: the hold, if there is one, asks for none.
pub fn approval_id(status: &Value) -> Option<&str> {
    let step = status["hold"]["next_step"].as_str()?;
    let (_, rest) = step.split_once("fuse.approve = \"")?;
    Some(rest.split_once('"')?.0)
}

/// Waits for a hold that only an operator ends, and whose text has these words.
pub async fn until_conflict(service: &Service<'_>, words: &[&str]) -> Value {
    let status = service
        .until(&format!("a conflict: {words:?}"), |status| {
            let detail = status["hold"]["detail"].as_str().unwrap_or_default();
            status["hold"]["reason"] == "conflict" && words.iter().all(|word| detail.contains(word))
        })
        .await;
    assert_eq!(status["health"]["level"], 2, "{status:#}");
    status
}

/// A status that is not the expected one. It is formatted only when the wait is over: there are
/// thousands of them.
#[derive(Debug)]
struct NotSo {
    status: Value,
    said: Vec<String>,
}

impl std::fmt::Display for NotSo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:#}\n--- its log\n{}",
            self.status,
            self.said.join("\n")
        )
    }
}

impl std::error::Error for NotSo {}
