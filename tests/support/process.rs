//! Children that never outlive this process: killed on drop, by the kernel when this process is
//! killed, and by a reaper in any case.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Result;

/// One running child. Dropping it ends the child and waits for it.
pub struct Guard {
    child: Child,
    /// The signal that ends it when it is dropped, before KILL.
    gentle: Option<Signal>,
}

impl Guard {
    /// Starts `command` so that it dies with this process.
    pub fn spawn(command: &mut Command, gentle: Option<Signal>) -> io::Result<Self> {
        let child = spawn_bound(command)?;
        // The reaper kills the processes in this directory when we are gone.
        fs::write(pid_file(child.id()), "")?;
        Ok(Self { child, gentle })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stdio(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    pub fn exited(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits until the process ends by itself. None: it did not end in time.
    pub fn wait_for(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the process with KILL, and returns its status.
    pub fn kill9(&mut self) -> io::Result<ExitStatus> {
        for stopped in tree(self.pid()) {
            // A stopped child of a killed server would stay for ever.
            if stopped != self.pid() {
                send(stopped, Signal::CONT);
            }
        }
        self.child.kill()?;
        self.child.wait()
    }

    /// Stops the process and its children as they are. Returns when all of their threads have
    /// stopped.
    pub fn freeze(&self) {
        let deadline = Instant::now() + super::SERVER_DEADLINE;
        loop {
            // This is repeated while any thread runs: STOP takes effect later, and a child may have
            // been started in the meantime.
            let running: Vec<u32> = tree(self.pid())
                .into_iter()
                .filter(|pid| runs(*pid))
                .collect();
            if running.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "{running:?} did not stop");
            for pid in running {
                let _ = fs::write(pid_file(pid), "");
                send(pid, Signal::STOP);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn thaw(&self) {
        for pid in tree(self.pid()) {
            send(pid, Signal::CONT);
            if pid != self.pid() {
                let _ = fs::remove_file(pid_file(pid));
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.thaw();
            if let Some(gentle) = self.gentle {
                self.signal(gentle);
                let _ = self.wait_for(Duration::from_secs(3));
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_file(pid_file(self.child.id()));
    }
}

/// Returns the process and all its descendants, parents before children.
pub fn tree(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent_of(pid)?)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(
            parents
                .iter()
                .filter(|(_, p)| *p == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything; the parent is the second word after it.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

/// Returns whether a process with this number runs (a zombie does not).
pub fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            stat.rsplit_once(')')
                .map(|(_, rest)| !rest.starts_with(" Z"))
        })
        .unwrap_or(false)
}

/// Returns whether any thread of the process is neither stopped nor dead.
fn runs(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        !state.is_empty() && !state.starts_with(['T', 't', 'Z', 'X'])
    })
}

fn send(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = kill_process(pid, signal);
    }
}

/// Wraps the command in `setpriv --pdeathsig KILL`, and starts it from a thread that lives as long as we do: the kernel
/// sends that signal when the *thread* that started the child ends, and a test's thread ends with its test.
fn spawn_bound(command: &mut Command) -> io::Result<Child> {
    type Job = (Command, Sender<io::Result<Child>>);
    static STARTER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        std::thread::Builder::new()
            .name("starts children".into())
            .spawn(move || {
                for (mut command, answer) in jobs {
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("a thread");
        Mutex::new(sender)
    });
    let (answer, child) = channel();
    let job = (std::mem::replace(command, Command::new("false")), answer);
    starter
        .lock()
        .expect("the starter's lock")
        .send(job)
        .expect("the starter lives");
    child.recv().expect("the starter answers")
}

/// Returns a command that will die with us; arguments, environment and streams are still to be set.
pub fn bound(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program.as_ref())
        .stdin(Stdio::null())
        // A terminal's interrupt must reach the tests, which then end their servers, and not the servers first.
        .process_group(0);
    for name in PROXIES {
        command.env_remove(name);
    }
    command
}

const PROXIES: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
];

/// Returns the directory of all files of this process's servers. The reaper removes it after we are
/// gone, for any reason.
pub fn run_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let me = std::process::id();
        let dir = tempfile::Builder::new()
            .prefix(&format!("warm-spare-run-{me}-"))
            // PostgreSQL runs as another user than ours if we are root.
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir()
            .expect("a temporary directory")
            .keep();
        fs::create_dir(dir.join("pids")).expect("a directory");
        start_reaper(me, &dir).expect("sh starts");
        dir
    })
}

/// Starts the reaper, because Rust does not drop statics, and a killed process drops nothing.
fn start_reaper(me: u32, dir: &Path) -> io::Result<()> {
    let script = r#"
        while kill -0 "$1" 2>/dev/null; do sleep 0.2; done
        for file in "$2"/pids/*; do
            pid=${file##*/}
            [ "$pid" = '*' ] || kill -KILL "$pid" 2>/dev/null
        done
        rm -rf "$2" || { sleep 1; rm -rf "$2"; }"#;
    Command::new("sh")
        .args(["-c", script, "warm-spare-test-reaper", &me.to_string()])
        .arg(dir)
        .stdin(Stdio::null())
        // A test runner waits until no process holds its streams any more.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map(drop)
}

fn pid_file(pid: u32) -> PathBuf {
    run_dir().join("pids").join(pid.to_string())
}

/// Returns a new directory for one server, readable for the server's user.
pub fn server_dir(prefix: &str) -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new()
        .prefix(prefix)
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(run_dir())?)
}

/// Returns the last lines of a server's log, for an error.
pub fn tail(file: &Path) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// Returns the first of these programs that exists.
pub fn find_program(candidates: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    candidates.into_iter().find(|path| path.is_file())
}

pub fn on_path(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .collect()
}
