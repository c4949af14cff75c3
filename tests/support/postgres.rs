//! A PostgreSQL server as builder-datastore has it: superuser `hab`, a random password by md5, here on loopback alone.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use super::managed::Managed;
use super::ports::free_port;
use super::process::{Guard, bound, find_program, on_path, server_dir, tail};
use super::{Result, SERVER_DEADLINE, random_word};

/// A server; ended when dropped.
pub struct Postgres {
    server: Mutex<Option<Guard>>,
    port: u16,
    password: String,
    first: Release,
    /// What [`Postgres::upgrade`] has put in the place of the first.
    pub(super) upgraded: OnceLock<Release>,
    pub(super) dir: TempDir,
    settings: Vec<(String, String)>,
    own_clock: bool,
    /// The provider whose server this one imitates.
    pub(super) managed: Option<Managed>,
}

/// The programs of one version of PostgreSQL.
#[derive(Clone)]
pub(super) struct Release {
    pub(super) programs: PathBuf,
    major: u32,
}

impl Release {
    pub(super) fn of(programs: &Path) -> Result<Release> {
        Ok(Release {
            major: major(programs)?,
            programs: programs.into(),
        })
    }
}

/// The settings that may differ from builder-datastore's own.
#[derive(Default)]
pub struct Builder {
    settings: Vec<(String, String)>,
    /// Lines of `postgresql.auto.conf`, as `ALTER SYSTEM` writes them.
    altered: Vec<(&'static str, &'static str)>,
    scram: bool,
    tls: Option<(String, String)>,
    own_clock: bool,
    /// None: the programs of this machine's own version.
    programs: Option<PathBuf>,
    managed: Option<Managed>,
}

impl Builder {
    /// Adds a command-line option, which has precedence over every file; of several with one name
    /// the last one counts.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Adds the settings that a stream needs: logical decoding, and a limit on the WAL that is held
    /// for it; with `ALTER SYSTEM`, as `prepare` sets them.
    pub fn logical(mut self) -> Self {
        self.altered = vec![("wal_level", "logical"), ("max_slot_wal_keep_size", "2GB")];
        self
    }

    /// Uses SCRAM-SHA-256 in place of md5.
    pub fn scram(mut self) -> Self {
        self.scram = true;
        self
    }

    /// Uses TLS for clients that ask for it, with this certificate and key, both PEM text.
    pub fn ssl(mut self, certificate: &str, key: &str) -> Self {
        self.tls = Some((certificate.into(), key.into()));
        self
    }

    /// Uses its own clock, which [`Postgres::set_clock`] sets.
    pub fn own_clock(mut self) -> Self {
        self.own_clock = true;
        self
    }

    /// Uses another major version, from the directory that [`other_version`] returns.
    pub fn programs(mut self, directory: &Path) -> Self {
        self.programs = Some(directory.into());
        self
    }

    /// Imitates the server of a provider, whose user `hab` is no superuser. It has the settings of
    /// [`Builder::logical`] as the provider's parameters, and accepts TLS alone from other machines.
    pub fn managed(mut self, managed: Managed) -> Self {
        self.managed = Some(managed);
        self.scram()
    }

    pub async fn start(self) -> Result<Postgres> {
        // It blocks, because it copies a data directory and waits for a server.
        let server = tokio::task::spawn_blocking(|| self.prepare()).await??;
        server.start_on_a_free_port().await
    }

    fn prepare(self) -> Result<Postgres> {
        let programs = match &self.programs {
            Some(directory) => directory.clone(),
            None => programs()?,
        };
        let first = Release::of(&programs)?;
        let dir = server_dir("pg-")?;
        let data = dir.path().join("data");
        let password = random_word(20);
        new_data(&programs, dir.path())?;

        let method = if self.scram { "scram-sha-256" } else { "md5" };
        let mut settings = stock_settings(method, dir.path());
        let tls = match (self.tls, &self.managed) {
            (None, Some(_)) => {
                let made = super::tls::certificates(&["127.0.0.1", "localhost"])?;
                Some((made.certificate, made.key))
            }
            (tls, _) => tls,
        };
        if let Some((certificate, key)) = &tls {
            write_private(&data.join("server.crt"), certificate)?;
            write_private(&data.join("server.key"), key)?;
            settings.push(("ssl".into(), "on".into()));
        }
        settings.extend(self.settings);
        // The setting is not on the command line, where it would have precedence over
        // `ALTER SYSTEM`.
        append(&data.join("postgresql.conf"), "wal_level = replica\n")?;
        if let Some(managed) = &self.managed {
            append(&data.join("postgresql.conf"), &managed.parameters())?;
        }
        for (name, value) in self.altered {
            let line = format!("{name} = '{value}'\n");
            append(&data.join("postgresql.auto.conf"), &line)?;
        }
        let (socket, host) = match &self.managed {
            // The tests' own sessions come by the socket, which no provider gives.
            Some(_) => ("all", "hostssl"),
            None => ("hab", "host"),
        };
        write_private(
            &data.join("pg_hba.conf"),
            &format!("local all {socket} {method}\n{host} all all 0.0.0.0/0 {method}\n"),
        )?;
        own(dir.path())?;
        let statements = match &self.managed {
            Some(managed) => managed.roles(&password),
            None => format!("ALTER ROLE hab PASSWORD '{password}'\n"),
        };
        run_alone(&programs, &data, method, &statements)?;
        Ok(Postgres {
            server: Mutex::new(None),
            port: 0,
            password,
            first,
            upgraded: OnceLock::new(),
            dir,
            settings,
            own_clock: self.own_clock,
            managed: self.managed,
        })
    }
}

/// Returns libfaketime, as `scripts/setup` has found it.
pub fn faketime() -> Result<PathBuf> {
    let named = std::env::var("WARM_SPARE_FAKETIME").unwrap_or_default();
    match Path::new(&named).is_file() {
        true => Ok(named.into()),
        false => Err("libfaketime is not here: run scripts/setup, and source .tools/env".into()),
    }
}

impl Postgres {
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Starts a physical standby of this server, on its own port.
    pub async fn standby(&self) -> Result<Postgres> {
        append(
            &self.data_dir().join("pg_hba.conf"),
            "host replication hab 127.0.0.1/32 md5\n",
        )?;
        let reload = "SELECT pg_reload_conf()";
        self.conn("postgres").await?.batch_execute(reload).await?;
        let dir = server_dir("pg-")?;
        let data = dir.path().join("data");
        own(dir.path())?;
        let mut copy = Command::new(self.program("pg_basebackup"));
        copy.args([
            "--checkpoint=fast",
            "--no-sync",
            "--write-recovery-conf",
            "-d",
        ])
        .arg(self.url("postgres"))
        .arg("-D")
        .arg(&data);
        unprivileged(&mut copy);
        tokio::task::spawn_blocking(move || run(&mut copy, "")).await??;
        let mut settings = self.settings.clone();
        for (name, value) in &mut settings {
            if name == "unix_socket_directories" {
                *value = dir.path().to_string_lossy().into_owned();
            }
        }
        let standby = Postgres {
            server: Mutex::new(None),
            port: 0,
            password: self.password.clone(),
            first: self.release().clone(),
            upgraded: OnceLock::new(),
            dir,
            settings,
            own_clock: false,
            managed: self.managed,
        };
        standby.start_on_a_free_port().await
    }

    /// Promotes a standby to a separate server. Its control file names the old timeline until its
    /// next checkpoint.
    pub async fn promote(&self) -> Result<()> {
        let client = self.conn("postgres").await?;
        client.query_one("SELECT pg_promote()", &[]).await?;
        Ok(())
    }

    async fn start_on_a_free_port(mut self) -> Result<Self> {
        let mut attempt = 0;
        loop {
            self.port = free_port()?;
            match self.start_again().await {
                Ok(()) => return Ok(self),
                Err(error) if attempt < 5 && error.to_string().contains("in use") => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    pub fn host(&self) -> &'static str {
        "127.0.0.1"
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn user(&self) -> &'static str {
        "hab"
    }

    pub fn password(&self) -> &str {
        &self.password
    }

    fn release(&self) -> &Release {
        self.upgraded.get().unwrap_or(&self.first)
    }

    /// The major version, such as 15.
    pub fn version(&self) -> u32 {
        self.release().major
    }

    /// Returns the directory of `psql`, `pg_dump` and the other programs of this server's version.
    pub fn programs(&self) -> &Path {
        &self.release().programs
    }

    /// One of the programs that came with the server, such as `psql`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A connection string with the password, for `psql` and the like.
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgresql://hab:{}@127.0.0.1:{}/{database}",
            self.password, self.port
        )
    }

    /// Opens a session that is driven on the caller's runtime.
    pub async fn conn(&self, database: &str) -> Result<Client> {
        self.conn_as(self.user(), database, "warm-spare-tests")
            .await
    }

    /// Does the same as another user with the same password.
    pub async fn conn_as(&self, user: &str, database: &str, application: &str) -> Result<Client> {
        let mut config = tokio_postgres::Config::new();
        match self.managed {
            Some(_) => config.host_path(self.dir.path()),
            None => config.host(self.host()),
        };
        let (client, connection) = config
            .port(self.port)
            .user(user)
            .password(&self.password)
            .dbname(database)
            .application_name(application)
            .connect_timeout(Duration::from_secs(5))
            .connect(NoTls)
            .await?;
        tokio::spawn(async move {
            // A test that kills the server ends this with an error, which the client's next call
            // reports.
            let _ = connection.await;
        });
        Ok(client)
    }

    /// Configuration that names this server as the peer's datastore, after `extra`.
    pub fn as_peer(&self, extra: &str) -> String {
        format!(
            "{extra}\n[peer.datastore]\nport = {}\npassword = \"{}\"",
            self.port, self.password
        )
    }

    /// Sets the fence on Builder's database, or lifts it, as any owner of the database may.
    pub async fn set_fence(&self, stands: bool) -> Result<()> {
        let set = if stands {
            "SET default_transaction_read_only = on"
        } else {
            "RESET default_transaction_read_only"
        };
        let sql = format!("ALTER DATABASE builder {set}");
        Ok(self.conn("postgres").await?.batch_execute(&sql).await?)
    }

    pub async fn create_database(&self, name: &str) -> Result<()> {
        let sql = format!("CREATE DATABASE \"{name}\" TEMPLATE template0");
        Ok(self.conn("postgres").await?.batch_execute(&sql).await?)
    }

    /// Returns whether there is such a database.
    pub async fn has_database(&self, name: &str) -> Result<bool> {
        let sql = "SELECT 1 FROM pg_database WHERE datname = $1";
        let client = self.conn("postgres").await?;
        Ok(client.query_opt(sql, &[&name]).await?.is_some())
    }

    fn clock_file(&self) -> PathBuf {
        self.dir.path().join("clock")
    }

    /// Steps the clock of a server with its own clock: this number of seconds ahead of the
    /// machine's.
    pub fn set_clock(&self, ahead_seconds: i64) -> Result<()> {
        let new = self.dir.path().join("clock.new");
        fs::write(&new, format!("{ahead_seconds:+}"))?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o644))?;
        Ok(fs::rename(&new, self.clock_file())?)
    }

    /// Returns the process id of the postmaster.
    pub fn pid(&self) -> u32 {
        self.with(|server| server.pid())
    }

    /// Ends sessions and shuts down cleanly, as `pg_ctl stop -m fast` does.
    pub async fn stop_fast(&self) -> Result<()> {
        let mut server = self.take();
        server.signal(Signal::INT);
        tokio::task::spawn_blocking(move || match server.wait_for(SERVER_DEADLINE)? {
            Some(_) => Ok(()),
            None => Err("PostgreSQL did not stop: some session holds it".into()),
        })
        .await?
    }

    /// Requests a *smart* shutdown, as the Supervisor does by TERM: it waits until every ordinary
    /// session has ended. Returns how long it took; None: it was not over in time, and was made a
    /// fast one.
    pub async fn stop_smart(&self, limit: Duration) -> Result<Option<Duration>> {
        let mut server = self.take();
        let began = std::time::Instant::now();
        server.signal(Signal::TERM);
        tokio::task::spawn_blocking(move || {
            if server.wait_for(limit)?.is_some() {
                return Ok(Some(began.elapsed()));
            }
            server.signal(Signal::INT);
            match server.wait_for(SERVER_DEADLINE)? {
                Some(_) => Ok(None),
                None => Err("PostgreSQL did not stop: some session holds it".into()),
            }
        })
        .await?
    }

    /// Copies the data directory of a stopped server, replacing an older copy.
    pub async fn keep_data(&self) -> Result<()> {
        self.exchange(self.data_dir(), self.dir.path().join("kept"))
            .await
    }

    /// Replaces the stopped server's data directory by the copy of `keep_data`.
    pub async fn restore_data(&self) -> Result<()> {
        self.exchange(self.dir.path().join("kept"), self.data_dir())
            .await
    }

    async fn exchange(&self, from: PathBuf, to: PathBuf) -> Result<()> {
        tokio::task::spawn_blocking(move || {
            if to.exists() {
                fs::remove_dir_all(&to)?;
            }
            copy_template(&from, &to)
        })
        .await?
    }

    /// Kills the server as if the machine had lost power, except for the data that the kernel
    /// already had.
    pub fn kill9(&self) {
        let mut server = self.take();
        let family = super::process::tree(server.pid());
        server.kill9().expect("the postmaster ends");
        // The next start refuses while an orphan holds the shared memory.
        let orphans = |pid: &u32| super::process::alive(*pid);
        let deadline = std::time::Instant::now() + SERVER_DEADLINE;
        while family.iter().any(orphans) && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it again on the same port and data, after `stop_fast` or `kill9`.
    pub async fn start_again(&self) -> Result<()> {
        self.start_with(&self.settings).await
    }

    /// Returns the shell line with which a package's run hook starts it, after `stop_fast`: the
    /// line ends in the server.
    pub fn shell_line(&self) -> String {
        let user = match server_user() {
            Some((user, group)) => {
                format!("setpriv --reuid {user} --regid {group} --clear-groups -- ")
            }
            None => String::new(),
        };
        let settings = self.settings.iter();
        let settings: String = settings.map(|(n, v)| format!(" -c '{n}={v}'")).collect();
        format!(
            "cd / && exec {user}{} -D {} -c port={}{settings}",
            self.program("postgres").display(),
            self.data_dir().display(),
            self.port,
        )
    }

    async fn start_with(&self, settings: &[(String, String)]) -> Result<()> {
        let log = self.dir.path().join("log");
        let out = File::options().create(true).append(true).open(&log)?;
        let mut command = bound(self.program("postgres"));
        command
            .arg("-D")
            .arg(self.data_dir())
            .args(["-c", &format!("port={}", self.port)])
            .stdout(Stdio::null())
            .stderr(out);
        for (name, value) in settings {
            command.args(["-c", &format!("{name}={value}")]);
        }
        if self.own_clock {
            if !self.clock_file().exists() {
                self.set_clock(0)?;
            }
            command
                .env("LD_PRELOAD", faketime()?)
                .env("FAKETIME_TIMESTAMP_FILE", self.clock_file())
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        unprivileged(&mut command);
        // QUIT also releases the System V shared memory, which KILL leaves behind.
        let mut server = Guard::spawn(&mut command, Some(Signal::QUIT))?;
        let deadline = std::time::Instant::now() + SERVER_DEADLINE;
        loop {
            if server.exited()?.is_some() {
                return Err(format!("PostgreSQL did not start:\n{}", tail(&log)).into());
            }
            match self.conn("postgres").await {
                Ok(_) => break,
                Err(error) if std::time::Instant::now() > deadline => {
                    return Err(format!("PostgreSQL: {error}:\n{}", tail(&log)).into());
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(15)).await,
            }
        }
        *self.server.lock().expect("the server's lock") = Some(server);
        Ok(())
    }

    /// Adds lines at the end of `postgresql.conf`, for the next start.
    pub fn append_configuration(&self, lines: &str) -> Result<()> {
        append(&self.data_dir().join("postgresql.conf"), lines)
    }

    /// Starts the server as builder-datastore's upgrade hook starts the old one: without Builder's
    /// configuration file, so that only `postgresql.auto.conf` counts.
    pub async fn start_without_configuration(&self) -> Result<()> {
        let file = self.data_dir().join("postgresql.conf");
        fs::write(&file, "")?;
        let sockets = self.dir.path().to_string_lossy().into_owned();
        let needed = [
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", sockets.as_str()),
            ("fsync", "off"),
        ];
        let needed = needed.map(|(name, value)| (name.to_string(), value.to_string()));
        self.start_with(&needed).await
    }

    /// Requests a *smart* shutdown, which takes as long as any session is open.
    pub fn begin_smart_stop(&self) {
        self.with(|server| server.signal(Signal::TERM));
    }

    /// Freezes the server with all its sessions: nothing answers, nothing is closed.
    pub fn sigstop(&self) {
        self.with(|server| server.freeze());
    }

    pub fn sigcont(&self) {
        self.with(|server| server.thaw());
    }

    /// Returns the server's log until now.
    pub fn log(&self) -> String {
        let log = fs::read(self.dir.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn with<T>(&self, act: impl FnOnce(&Guard) -> T) -> T {
        act(self
            .server
            .lock()
            .expect("the server's lock")
            .as_ref()
            .expect("PostgreSQL runs"))
    }

    fn take(&self) -> Guard {
        let mut server = self.server.lock().expect("the server's lock");
        server.take().expect("PostgreSQL runs")
    }
}

/// Returns builder-datastore's settings where they matter, and settings for a machine that will not
/// be switched off.
fn stock_settings(method: &str, sockets: &Path) -> Vec<(String, String)> {
    [
        ("password_encryption", method),
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", &sockets.to_string_lossy()),
        ("max_connections", "100"),
        ("max_wal_senders", "20"),
        ("max_replication_slots", "20"),
        ("max_worker_processes", "20"),
        ("shared_buffers", "32MB"),
        ("fsync", "off"),
        // Its transactions come at any time, and a service reacts to them with a copy, which no
        // test could expect.
        ("autovacuum", "off"),
        ("timezone", "UTC"),
        ("log_line_prefix", "%m [%p] %a %d "),
        ("log_statement", "ddl"),
    ]
    .map(|(name, value)| (name.to_string(), value.to_string()))
    .to_vec()
}

/// Returns the directory of `initdb`, `postgres` and the others: `WARM_SPARE_PG_BIN`, Debian's
/// newest, or the one on the path.
fn programs() -> Result<PathBuf> {
    let mut debian: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .collect();
    debian.sort();
    let candidates = std::env::var_os("WARM_SPARE_PG_BIN")
        .map(|dir| PathBuf::from(dir).join("initdb"))
        .into_iter()
        .chain(
            debian
                .into_iter()
                .rev()
                .map(|(_, dir)| dir.join("bin/initdb")),
        )
        .chain(on_path("initdb"));
    let initdb = find_program(candidates)
        .ok_or("no PostgreSQL server here: run scripts/setup, or set WARM_SPARE_PG_BIN")?;
    Ok(initdb
        .canonicalize()?
        .parent()
        .expect("it is in a directory")
        .into())
}

fn major(programs: &Path) -> Result<u32> {
    let output = Command::new(programs.join("postgres"))
        .arg("--version")
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let digits = |word: &str| word.split('.').next().and_then(|major| major.parse().ok());
    text.split_whitespace()
        .find_map(digits)
        .ok_or_else(|| format!("no version in {text:?}").into())
}

/// Returns a data directory as initdb leaves it, made once for each machine and server version,
/// because initdb takes seconds.
fn template(programs: &Path) -> Result<PathBuf> {
    let me = rustix::process::getuid().as_raw();
    let programs_name = programs.to_string_lossy().replace('/', "-");
    let cache = std::env::temp_dir().join(format!("warm-spare-initdb-1-{me}{programs_name}"));
    fs::create_dir_all(&cache)?;
    let lock = File::create(cache.join("lock"))?;
    lock.lock()?;
    let done = cache.join("data");
    if !done.exists() {
        let new = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(&cache)?;
        initdb(programs, new.path())?;
        fs::rename(new.path().join("data"), &done)?;
    }
    Ok(done)
}

/// Makes the directory `data` there, with a system id of its own.
pub(super) fn new_data(programs: &Path, directory: &Path) -> Result<()> {
    if !programs.join("pg_resetwal").is_file() {
        return initdb(programs, directory);
    }
    let data = directory.join("data");
    copy_template(&template(programs)?, &data)?;
    give_own_system_id(programs, &data)
}

/// Makes the directory `data` there.
fn initdb(programs: &Path, directory: &Path) -> Result<()> {
    // The password comes from a file, because the server's user may not open a pipe of ours. It is
    // replaced in every copy.
    let password = directory.join("password");
    write_private(&password, &random_word(20))?;
    own(directory)?;
    let mut initdb = Command::new(programs.join("initdb"));
    initdb
        .arg("-D")
        .arg(directory.join("data"))
        .args(["--username=hab", "--encoding=UTF8", "--locale=C.UTF-8"])
        .args(["--auth=md5", "--no-sync", "--pwfile"])
        .arg(password);
    unprivileged(&mut initdb);
    run(&mut initdb, "")
}

/// Returns the directory of the programs of that major version, if `scripts/setup` has found them.
pub fn other_version(major: u32) -> Option<PathBuf> {
    let named = std::env::var_os(format!("WARM_SPARE_PG{major}_BIN"))?;
    let directory = PathBuf::from(named);
    directory.join("initdb").is_file().then_some(directory)
}

fn copy_template(from: &Path, to: &Path) -> Result<()> {
    let mut copy = Command::new("cp");
    run(
        copy.args(["-a", "--reflink=auto", "--"]).arg(from).arg(to),
        "",
    )
}

/// Gives the server its own system id: the product distinguishes servers by it, and would take two
/// servers of one template for one.
fn give_own_system_id(programs: &Path, data: &Path) -> Result<()> {
    // The id is the first field of the control file. The checksum at its end is then wrong:
    // pg_resetwal notices that, corrects it and writes a log with the new identifier.
    let control = File::options()
        .write(true)
        .open(data.join("global/pg_control"))?;
    control.write_all_at(&(rand::random::<u64>() >> 1).to_ne_bytes(), 0)?;
    let mut reset = Command::new(programs.join("pg_resetwal"));
    reset.arg("--force").arg("-D").arg(data);
    unprivileged(&mut reset);
    run(&mut reset, "")
}

/// Runs statements, one a line, as the superuser of a server that does not run yet.
pub(super) fn run_alone(
    programs: &Path,
    data: &Path,
    method: &str,
    statements: &str,
) -> Result<()> {
    let mut single = Command::new(programs.join("postgres"));
    single
        .args(["--single", "-D"])
        .arg(data)
        .args([
            "-c",
            "fsync=off",
            "-c",
            &format!("password_encryption={method}"),
        ])
        .arg("postgres");
    unprivileged(&mut single);
    run(&mut single, statements)
}

pub(super) fn run(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{command:?}: {error}"))?;
    child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    // A standalone postmaster exits with 0 after a refused statement.
    if output.status.success() && !complaint.contains("ERROR") {
        return Ok(());
    }
    Err(format!("{command:?}: {}: {complaint}", output.status).into())
}

fn append(file: &Path, text: &str) -> Result<()> {
    Ok(File::options()
        .append(true)
        .open(file)?
        .write_all(text.as_bytes())?)
}

fn write_private(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text)?;
    Ok(fs::set_permissions(
        file,
        fs::Permissions::from_mode(0o600),
    )?)
}

/// Returns the server's user, because PostgreSQL does not run as root.
fn server_user() -> Option<(u32, u32)> {
    if !rustix::process::getuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let entry = |name: &str| {
        let line = users
            .lines()
            .find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    entry("postgres").or_else(|| entry("nobody"))
}

pub fn unprivileged(command: &mut Command) {
    if let Some((user, group)) = server_user() {
        command.uid(user).gid(group).current_dir("/");
    }
}

/// Gives the directory and its content to the server's user.
pub fn own(dir: &Path) -> Result<()> {
    let Some((user, group)) = server_user() else {
        return Ok(());
    };
    let mut chown = Command::new("chown");
    run(
        chown
            .arg("-R")
            .arg(format!("{user}:{group}"))
            .arg("--")
            .arg(dir),
        "",
    )
}
