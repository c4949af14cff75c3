//! The command that the operator starts on the clone, and the wait for its first answer. The
//! command runs in a process group of its own, and no process of the group outlives the drill.

use crate::cluster::ProgramError;
use crate::config::Config;
use crate::observe;
use crate::replication::ReplicationError;
use http::Uri;
use rustix::process::{Pid, Signal, kill_process_group};
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout};

/// Time limit for the first answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Time for which a command without a URL must run, unless it ends with success.
const TRIAL_TIME: Duration = Duration::from_secs(5);
/// Time between SIGTERM and SIGKILL.
const KILL_AFTER: Duration = Duration::from_secs(5);

/// The group ends itself when our end of the pipe closes, which also happens when we are killed.
const SHELL: &str = "exec 3<&0 0</dev/null
(exec 0<&3 3<&-; cat >/dev/null; kill -TERM 0) &
exec 3<&-
exec sh -c \"$1\"";

/// The running command.
pub(super) struct Running {
    child: Child,
    group: Option<Pid>,
    lifeline: Option<ChildStdin>,
}

impl Running {
    /// Starts the command. Its output goes to our standard error, because our standard output may
    /// be a JSON document.
    pub(super) fn start(
        config: &Config,
        database: &str,
        command: &str,
    ) -> Result<Running, ReplicationError> {
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

    /// Waits until the command ends with success, or has run for a while.
    pub(super) async fn settle(&mut self) -> Result<String, String> {
        match timeout(TRIAL_TIME, self.child.wait()).await {
            Err(_) => Ok(format!("still runs after {} s", TRIAL_TIME.as_secs())),
            Ok(Ok(status)) if status.success() => Ok("ended with success".into()),
            Ok(Ok(status)) => Err(format!("ended: {status}")),
            Ok(Err(error)) => Err(error.to_string()),
        }
    }

    /// Returns an error if the command has ended without success.
    fn check(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(Some(status)) if !status.success() => Err(format!("the command ended: {status}")),
            _ => Ok(()),
        }
    }

    /// Ends the group: by SIGTERM, and after a while by SIGKILL.
    pub(super) async fn end(mut self) {
        let Some(group) = self.group else { return };
        // This fails only if all processes are gone.
        let _ = kill_process_group(group, Signal::TERM);
        drop(self.lifeline.take());
        let deadline = Instant::now() + KILL_AFTER;
        while Instant::now() < deadline && self.lives(group) {
            sleep(RETRY_AFTER / 4).await;
        }
        let _ = kill_process_group(group, Signal::KILL);
        let _ = timeout(KILL_AFTER, self.child.wait()).await;
    }

    fn lives(&mut self, group: Pid) -> bool {
        // Without this the leader would stay as a zombie.
        let _ = self.child.try_wait();
        members(group).next().is_some()
    }
}

/// Returns the processes of the group that have not ended. A zombie is left to its parent.
fn members(group: Pid) -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // The fields after the name, which may hold any character: state, parent, group.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let (state, of) = (fields.next()?, fields.nth(1)?);
        let of: i32 = of.parse().ok()?;
        (of == group.as_raw_nonzero().get() && !["Z", "X"].contains(&state)).then_some(pid)
    })
}

/// Requests the URL until the answer is a success.
pub(super) async fn await_answer(
    url: &Uri,
    running: &mut Option<Running>,
) -> Result<String, String> {
    let host = url.host().unwrap_or_default();
    let address = format!("{host}:{}", url.port_u16().unwrap_or(80));
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    loop {
        let said = match timeout(REQUEST_TIMEOUT, observe::get(&address, path)).await {
            Ok(Ok((status, _))) if status.is_success() => {
                return Ok(format!("{url} answered {status}"));
            }
            Ok(Ok((status, _))) => format!("the server answers {status}"),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the server does not answer".into(),
        };
        if let Some(running) = running {
            running.check()?;
        }
        if Instant::now() > deadline {
            let limit = ANSWER_TIMEOUT.as_secs();
            return Err(format!("{url} gave no good answer for {limit} s: {said}"));
        }
        sleep(RETRY_AFTER).await;
    }
}
