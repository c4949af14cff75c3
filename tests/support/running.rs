//! The program under test as a child of this process.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::sync::watch;

use super::Result;
use super::process::Guard;

/// The result of a run.
#[derive(Debug, Clone)]
pub struct Output {
    /// None: it was ended by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Output {
    /// Expects success. Otherwise it fails with the whole output.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    /// Returns the output of `--json`.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "exit {:?} after {:?}", self.code, self.took)?;
        writeln!(f, "--- stdout\n{}--- stderr\n{}", self.stdout, self.stderr)
    }
}

/// A running program; killed when dropped.
pub struct Running {
    guard: Option<Guard>,
    started: Instant,
    /// Lines of stderr until now.
    lines: watch::Receiver<Vec<String>>,
    stdout: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
    /// Start of the next search: a line that was found once is not found again.
    seen: usize,
}

impl Running {
    /// `command` comes from `process::bound`.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut guard = Guard::spawn(&mut command, None)?;
        let child = guard.stdio();
        let (sender, lines) = watch::channel(Vec::new());
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut stdout = child.stdout.take().expect("a pipe");
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keep = kept.clone();
        let readers = vec![
            std::thread::spawn(move || {
                for line in stderr.split(b'\n').map_while(std::io::Result::ok) {
                    let line = String::from_utf8_lossy(&line).into_owned();
                    sender.send_modify(|lines| lines.push(line));
                }
            }),
            std::thread::spawn(move || {
                let mut chunk = [0; 4096];
                while let Ok(read @ 1..) = stdout.read(&mut chunk) {
                    keep.lock()
                        .expect("stdout's lock")
                        .extend_from_slice(&chunk[..read]);
                }
            }),
        ];
        Ok(Self {
            guard: Some(guard),
            started: Instant::now(),
            lines,
            stdout: kept,
            readers,
            seen: 0,
        })
    }

    pub fn pid(&self) -> u32 {
        self.guard.as_ref().expect("it was not waited for").pid()
    }

    /// Waits for the next line of stderr that `wanted` accepts; fails with all lines if it does not
    /// come in time.
    pub async fn wait_for_line(
        &mut self,
        wanted: impl Fn(&str) -> bool,
        limit: Duration,
    ) -> Result<String> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let news = self.lines.borrow_and_update()[self.seen..].to_vec();
            for line in news {
                self.seen += 1;
                if wanted(&line) {
                    return Ok(line);
                }
            }
            let ended = match tokio::time::timeout_at(deadline, self.lines.changed()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) if self.seen < self.lines.borrow().len() => continue,
                Ok(Err(_)) => "it ended without",
                Err(_) => "not in time",
            };
            let said = self.lines.borrow().join("\n");
            return Err(format!("the line that was waited for: {ended}:\n{said}").into());
        }
    }

    /// Lets `wait_for_line` skip all present lines.
    pub fn forget(&mut self) {
        self.seen = self.lines.borrow().len();
    }

    /// Returns everything on stderr until now.
    pub fn stderr(&self) -> Vec<String> {
        self.lines.borrow().clone()
    }

    /// Returns the last lines of stderr.
    pub fn last_said(&self, count: usize) -> Vec<String> {
        let lines = self.lines.borrow();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }

    /// Returns everything on stdout until now.
    pub fn stdout(&self) -> String {
        let stdout = self.stdout.lock().expect("stdout's lock");
        String::from_utf8_lossy(&stdout).into_owned()
    }

    /// Ends the program as the Supervisor ends a service.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    pub fn signal(&self, signal: Signal) {
        self.guard.as_ref().expect("it runs").signal(signal);
    }

    pub fn sigstop(&self) {
        self.guard.as_ref().expect("it runs").freeze();
    }

    pub fn sigcont(&self) {
        self.guard.as_ref().expect("it runs").thaw();
    }

    pub fn kill9(mut self) -> Result<Output> {
        let status = self.guard.take().expect("it runs").kill9()?;
        Ok(self.output(status))
    }

    /// Waits until it ends by itself; after `limit` it is killed and that is an error.
    pub async fn wait(mut self, limit: Duration) -> Result<Output> {
        let mut guard = self.guard.take().expect("it runs");
        let waited = tokio::task::spawn_blocking(move || match guard.wait_for(limit)? {
            Some(status) => std::io::Result::Ok(Some(status)),
            None => guard.kill9().map(|_| None),
        });
        match waited.await?? {
            Some(status) => Ok(self.output(status)),
            None => {
                let said = self.stderr().join("\n");
                Err(format!("still running after {limit:?}:\n{said}").into())
            }
        }
    }

    fn output(&mut self, status: ExitStatus) -> Output {
        // A child of the killed program may still hold its streams; the output arrives soon enough.
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut stderr = self.lines.borrow().join("\n");
        if !stderr.is_empty() {
            stderr.push('\n');
        }
        Output {
            code: status.code(),
            stdout: String::from_utf8_lossy(&self.stdout.lock().expect("stdout's lock")).into(),
            stderr,
            took: self.started.elapsed(),
        }
    }
}
