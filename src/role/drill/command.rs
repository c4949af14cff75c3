//! What the operator has started on the clone, and the wait for its first answer. It runs in a process group of its own,
//! and none of that outlives the drill.

use crate::cluster::ProgramError;
use crate::config::Config;
use crate::observe;
use crate::replication::PassError;
use http::Uri;
use rustix::process::{Pid, Signal, kill_process_group};
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout};

/// For the first answer.
const LIMIT: Duration = Duration::from_secs(60);
const ONE_ANSWER: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
/// A command that nobody asks must run for so long, or end well.
const SETTLED: Duration = Duration::from_secs(5);
/// Between TERM and KILL.
const GRACE: Duration = Duration::from_secs(5);

/// The group ends itself when the pipe closes that we hold: also when we are killed.
const SHELL: &str = "exec 3<&0 0</dev/null
(exec 0<&3 3<&-; cat >/dev/null; kill -TERM 0) &
exec 3<&-
exec sh -c \"$1\"";

/// The command, under way.
pub struct Running {
    child: Child,
    group: Option<Pid>,
    lifeline: Option<ChildStdin>,
}

impl Running {
    /// Its output goes where our errors go: what stands on our own may be a document.
    pub fn start(config: &Config, database: &str, command: &str) -> Result<Running, PassError> {
        let failed = |source| ProgramError::Start {
            program: "sh".into(),
            source,
        };
        let local = &config.local.datastore;
        let output = || std::io::stderr().as_fd().try_clone_to_owned();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", SHELL, "sh", command])
            .env("PGHOST", &local.host)
            .env("PGPORT", local.port.to_string())
            .env("PGUSER", &local.user)
            .env("PGDATABASE", database)
            .env("WARM_SPARE_DRILL_DATABASE", database)
            .stdin(Stdio::piped())
            .stdout(output().map_err(failed)?)
            .process_group(0)
            .kill_on_drop(true);
        let password = local
            .password
            .as_ref()
            .map(|source| source.read("password"));
        if let Some(Ok(password)) = password {
            shell.env("PGPASSWORD", password.expose());
        }
        let mut child = shell.spawn().map_err(failed)?;
        let group = child.id().and_then(|id| i32::try_from(id).ok());
        Ok(Running {
            group: group.and_then(Pid::from_raw),
            lifeline: child.stdin.take(),
            child,
        })
    }

    /// Waits until it ends well, or has run for a while.
    pub async fn settle(&mut self) -> Result<String, String> {
        match timeout(SETTLED, self.child.wait()).await {
            Err(_) => Ok(format!("still runs after {} s", SETTLED.as_secs())),
            Ok(Ok(status)) if status.success() => Ok("ended with success".into()),
            Ok(Ok(status)) => Err(format!("ended: {status}")),
            Ok(Err(error)) => Err(error.to_string()),
        }
    }

    /// Err: it has ended, and not well.
    fn check(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(Some(status)) if !status.success() => Err(format!("the command ended: {status}")),
            _ => Ok(()),
        }
    }

    /// Ends the group: by TERM, and what then still lives by KILL.
    pub async fn end(mut self) {
        let Some(group) = self.group else { return };
        // Fails only if all of them are gone.
        let _ = kill_process_group(group, Signal::TERM);
        drop(self.lifeline.take());
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline && self.lives(group) {
            sleep(PAUSE / 4).await;
        }
        let _ = kill_process_group(group, Signal::KILL);
        let _ = timeout(GRACE, self.child.wait()).await;
    }

    fn lives(&mut self, group: Pid) -> bool {
        // Else the leader would stay as a zombie.
        let _ = self.child.try_wait();
        members(group).next().is_some()
    }
}

/// Processes of the group that have not ended. A zombie is the business of whoever adopted it.
fn members(group: Pid) -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name, which may hold anything: state, parent, group.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let (state, of) = (fields.next()?, fields.nth(1)?);
        let of: i32 = of.parse().ok()?;
        (of == group.as_raw_nonzero().get() && !["Z", "X"].contains(&state)).then_some(pid)
    })
}

/// Asks until the answer is a success.
pub async fn await_answer(url: &Uri, running: &mut Option<Running>) -> Result<String, String> {
    let host = url.host().unwrap_or_default();
    let address = format!("{host}:{}", url.port_u16().unwrap_or(80));
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let deadline = Instant::now() + LIMIT;
    loop {
        let said = match timeout(ONE_ANSWER, observe::get(&address, path)).await {
            Ok(Ok((status, _))) if status.is_success() => {
                return Ok(format!("{url} answered {status}"));
            }
            Ok(Ok((status, _))) => format!("it answers {status}"),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not answer".into(),
        };
        if let Some(running) = running {
            running.check()?;
        }
        if Instant::now() > deadline {
            let limit = LIMIT.as_secs();
            return Err(format!("{url} gave no good answer for {limit} s: {said}"));
        }
        sleep(PAUSE).await;
    }
}
