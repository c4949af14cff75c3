//! A real Habitat Supervisor on loopback, with its own root, and the packages that are laid out in
//! it.
//!
//! It needs root, a user `hab`, and the three programs `hab`, `hab-sup` and `hab-launch`:
//! `WARM_SPARE_HAB` names the first, or it is on PATH; the others are beside it, or
//! `HAB_SUP_BINARY` and `HAB_LAUNCH_BINARY` name them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::habitat::ROOT;
use super::ports::free_port;
use super::process::{alive, bound, find_program, on_path, run_dir, server_dir, tree};
use super::service::{Answer, SOON, get};
use super::{Minio, Output, Postgres, Result, Running, wait_until};

const RELEASE: &str = "20260101000000";

/// The programs, or the reason why no Supervisor can be started here.
pub struct Programs {
    hab: PathBuf,
    sup: PathBuf,
    launch: PathBuf,
}

impl Programs {
    pub fn find() -> Result<Self, String> {
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        if !users.lines().any(|line| line.starts_with("hab:")) {
            return Err("there is no user hab here, as which the services run".into());
        }
        Self::find_without_users()
    }

    /// Finds them for a machine that has users of its own.
    pub fn find_without_users() -> Result<Self, String> {
        let named = std::env::var_os("WARM_SPARE_HAB").map(PathBuf::from);
        let hab = find_program(named.into_iter().chain(on_path("hab")))
            .ok_or("there is no hab here: put it on PATH, or name it by WARM_SPARE_HAB")?;
        let beside = |name: &str, variable: &str| {
            let named = std::env::var_os(variable).map(PathBuf::from);
            let place = named.into_iter().chain([hab.with_file_name(name)]);
            find_program(place.chain(on_path(name))).ok_or(format!(
                "there is no {name} beside hab: name it by {variable}"
            ))
        };
        let sup = beside("hab-sup", "HAB_SUP_BINARY")?;
        let launch = beside("hab-launch", "HAB_LAUNCH_BINARY")?;
        find_program(on_path("busybox")).ok_or("there is no busybox, which hab wants")?;
        if !rustix::process::geteuid().is_root() {
            return Err("the Supervisor, of which hab is here, would need root".into());
        }
        Ok(Self { hab, sup, launch })
    }

    /// Returns the programs with their usual names.
    pub fn files(&self) -> [(&str, &Path); 3] {
        [
            ("hab", &self.hab),
            ("hab-sup", &self.sup),
            ("hab-launch", &self.launch),
        ]
    }
}

pub struct Supervisor {
    programs: Programs,
    /// Its root directory `/`.
    root: tempfile::TempDir,
    gossip: u16,
    pub http: u16,
    control: u16,
    running: Option<Running>,
}

impl Supervisor {
    /// Makes a Supervisor with its own root and ports; it is not started yet.
    pub fn new() -> Result<Self> {
        let root = server_dir("hab-")?;
        let supervisor = Self {
            programs: Programs::find()?,
            gossip: free_port()?,
            http: free_port()?,
            control: free_port()?,
            running: None,
            root,
        };
        supervisor.lay_out_busybox()?;
        Ok(supervisor)
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn hab_program(&self) -> &Path {
        &self.programs.hab
    }

    pub fn packages(&self) -> PathBuf {
        self.root.path().join("hab/pkgs")
    }

    pub fn svc(&self, name: &str) -> PathBuf {
        self.root.path().join("hab/svc").join(name)
    }

    /// Starts it. `peers`: the Supervisors that it joins.
    pub async fn start(&mut self, peers: &[&Supervisor]) -> Result<()> {
        let address = |port: u16| format!("127.0.0.1:{port}");
        let mut command = self.command();
        command
            .args(["sup", "run", "--sys-ip-address", "127.0.0.1", "--no-color"])
            .args(["--listen-gossip", &address(self.gossip)])
            .args(["--listen-http", &address(self.http)])
            .args(["--listen-ctl", &address(self.control)])
            .args(["--health-check-interval", "2"])
            // An operator's token; our service must not get it.
            .env("HAB_AUTH_TOKEN", "hunter2-token");
        for peer in peers {
            command.args(["--peer", &address(peer.gossip)]);
        }
        self.running = Some(Running::start(command)?);
        wait_until("the Supervisor answers", SOON, || async {
            get(self.http, "/services").await.map(drop)
        })
        .await;
        self.note_children();
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = bound(&self.programs.hab);
        command
            .env("FS_ROOT", self.root.path())
            .env("HAB_LICENSE", "accept-no-persist")
            .env("HAB_SUP_BINARY", &self.programs.sup)
            .env("HAB_LAUNCH_BINARY", &self.programs.launch)
            .env("HAB_NOCOLORING", "1")
            .env("HAB_NONINTERACTIVE", "1")
            .current_dir("/");
        command
    }

    /// Runs a verb of `hab` against this Supervisor to its end.
    pub async fn hab(&self, arguments: &[&str]) -> Output {
        let mut command = self.command();
        command.args(arguments);
        let control = format!("127.0.0.1:{}", self.control);
        command.args(["--remote-sup", &control]);
        let running = Running::start(command).expect("hab starts");
        let ended = running.wait(Duration::from_secs(60)).await;
        let ended = ended.expect("hab ends");
        self.note_children();
        ended
    }

    /// Runs `hab config apply`, with the text as a file.
    pub async fn apply(&self, group: &str, version: u64, text: &str) {
        let file = self.root.path().join(format!("apply-{version}.toml"));
        fs::write(&file, text).expect("it is written");
        let file = file.display().to_string();
        let version = version.to_string();
        self.hab(&["config", "apply", group, &version, &file])
            .await
            .ok();
    }

    pub async fn ask(&self, path: &str) -> Result<Answer> {
        get(self.http, path).await
    }

    /// Returns the Supervisor's report on the health of `service.group`: HTTP status, and body.
    pub async fn health(&self, service: &str, group: &str) -> Result<(u16, Value)> {
        let answer = self
            .ask(&format!("/services/{service}/{group}/health"))
            .await?;
        Ok((answer.status, serde_json::from_str(&answer.text)?))
    }

    /// Returns the process that the Launcher started for a service.
    pub fn pid(&self, service: &str) -> Result<u32> {
        let text = fs::read_to_string(self.svc(service).join("PID"))?;
        let pid = text.trim().parse()?;
        match alive(pid) {
            true => Ok(pid),
            false => Err(format!("{pid} is dead").into()),
        }
    }

    /// Writes `user.toml` of a service.
    pub fn write_user_toml(&self, service: &str, text: &str) -> Result<()> {
        let folder = self
            .root
            .path()
            .join("hab/user")
            .join(service)
            .join("config");
        fs::create_dir_all(&folder)?;
        Ok(fs::write(folder.join("user.toml"), text)?)
    }

    pub fn user_toml(&self, service: &str) -> Result<String> {
        let folder = self.root.path().join("hab/user").join(service);
        Ok(fs::read_to_string(folder.join("config/user.toml"))?)
    }

    /// Writes a secret that only the services' user can read.
    pub fn write_secret(&self, name: &str, text: &str) -> Result<String> {
        let file = self.root.path().join(name);
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640))?;
        let given = Command::new("chgrp").arg("hab").arg(&file).status()?;
        assert!(given.success());
        Ok(file.display().to_string())
    }

    /// Stops as `systemctl stop` does: the Launcher ends everything, and kills after 8 s.
    pub async fn stop(&mut self) -> Result<Output> {
        let running = self.running.take().expect("it runs");
        running.terminate();
        running.wait(Duration::from_secs(60)).await
    }

    pub fn log(&self) -> String {
        let Some(running) = &self.running else {
            return "not running".into();
        };
        let lines = [running.stdout(), running.stderr().join("\n")].concat();
        let lines: Vec<&str> = lines.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Returns how often the Supervisor's log has these words.
    pub fn said(&self, words: &str) -> usize {
        let running = self.running.as_ref().expect("it runs");
        running.stdout().matches(words).count()
    }

    /// Notes the children, which the reaper kills if this process is killed.
    fn note_children(&self) {
        for pid in self.family() {
            let _ = fs::write(run_dir().join("pids").join(pid.to_string()), "");
        }
    }

    fn family(&self) -> Vec<u32> {
        self.running
            .as_ref()
            .map_or_else(Vec::new, |running| tree(running.pid()))
    }

    /// Lays out the packages that the Supervisor needs before it starts anything.
    fn lay_out_busybox(&self) -> Result<()> {
        let folder = self.lay_out_empty("core/busybox-static")?;
        let busybox = find_program(on_path("busybox")).ok_or("there is no busybox here")?;
        fs::copy(busybox, folder.join("bin/busybox"))?;
        Ok(())
    }

    /// Lays out an empty package. `name`: origin and name, and the version where it matters.
    pub fn lay_out_empty(&self, name: &str) -> Result<PathBuf> {
        let ident = match name.matches('/').count() {
            1 => format!("{name}/1.0.0/{RELEASE}"),
            _ => format!("{name}/{RELEASE}"),
        };
        let folder = self.packages().join(&ident);
        fs::create_dir_all(folder.join("bin"))?;
        let path = folder.join("bin").display().to_string();
        for (file, text) in [
            ("IDENT", ident.as_str()),
            ("TARGET", "x86_64-linux"),
            ("PATH", &path),
            ("RUNTIME_PATH", &path),
        ] {
            fs::write(folder.join(file), text)?;
        }
        Ok(folder)
    }

    /// Lays out our package, with `scripts/package`.
    pub fn lay_out_warm_spare(&self) -> Result<()> {
        let made = Command::new(Path::new(ROOT).join("scripts/package"))
            .arg(self.packages())
            .env("WARM_SPARE_BIN", super::site::default_program())
            .env("WARM_SPARE_RELEASE", RELEASE)
            .env_remove("HAB_ORIGIN")
            .output()?;
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        Ok(())
    }

    /// Lays out a package of Builder's that runs `line`, and exports the same names as the real
    /// one.
    fn lay_out(&self, name: &str, line: &str, default: &str, exports: &str) -> Result<()> {
        let ident = format!("habitat/{name}/1.0.0/{RELEASE}");
        let folder = self.packages().join(&ident);
        fs::create_dir_all(folder.join("hooks"))?;
        let hook = folder.join("hooks/run");
        fs::write(&hook, format!("#!/bin/bash\nexec 2>&1\n{line}\n"))?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
        for (file, text) in [
            ("IDENT", ident.as_str()),
            ("TARGET", "x86_64-linux"),
            ("default.toml", default),
            ("EXPORTS", exports),
            ("SVC_USER", "root"),
            ("SVC_GROUP", "root"),
        ] {
            fs::write(folder.join(file), text)?;
        }
        Ok(())
    }

    /// Takes a running server over: from now on the Supervisor starts and stops it.
    pub async fn load_datastore(&self, server: &Postgres, group: &str) -> Result<()> {
        server.stop_fast().await?;
        let default = format!("port = {}\n", server.port());
        self.lay_out(
            "builder-datastore",
            &server.shell_line(),
            &default,
            "port=port\n",
        )?;
        self.hab(&["svc", "load", "habitat/builder-datastore", "--group", group])
            .await
            .ok();
        wait_until("the datastore", SOON, || async {
            server.conn("postgres").await.map(drop)
        })
        .await;
        self.note_children();
        Ok(())
    }

    /// Takes a running store over. Its exported secrets are wrong on purpose, because no program
    /// should use them.
    pub async fn load_minio(&self, server: &Minio, bucket: &str, group: &str) -> Result<()> {
        server.stop().await?;
        let default = format!(
            "port = {}\nbucket_name = \"{bucket}\"\n[env]\nMINIO_ACCESS_KEY = \"depot\"\nMINIO_SECRET_KEY = \"password\"\n",
            server.port()
        );
        let exports = "port=port\nbucket-name=bucket_name\nminio-access-key=env.MINIO_ACCESS_KEY\n\
                       minio-secret-key=env.MINIO_SECRET_KEY\n";
        self.lay_out("builder-minio", &server.shell_line(), &default, exports)?;
        self.hab(&["svc", "load", "habitat/builder-minio", "--group", group])
            .await
            .ok();
        wait_until("the artifact store", SOON, || async {
            server.s3()?.has_bucket(bucket).await.map(drop)
        })
        .await;
        self.note_children();
        Ok(())
    }
}

/// Stops everything, because services are children of the Launcher, not of the Supervisor, and both
/// would outlive a Launcher that is killed.
impl Drop for Supervisor {
    fn drop(&mut self) {
        let family = self.family();
        if std::thread::panicking() {
            eprintln!("--- the Supervisor's last words\n{}", self.log());
        }
        if let Some(running) = &self.running {
            running.terminate();
            let deadline = std::time::Instant::now() + Duration::from_secs(12);
            while family.iter().any(|pid| alive(*pid)) && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        for pid in family.into_iter().filter(|pid| alive(*pid)) {
            send(pid, Signal::KILL);
        }
    }
}

fn send(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = kill_process(pid, signal);
    }
}
