//! PostgreSQL's client programs as processes: started, read, ended.

use super::clients::ProgramError;
use super::libpq::Environment;
use bytes::Bytes;
use std::process::Stdio;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinSet;

/// Returns the first line that mentions an error, which is the cause, and the last few lines.
fn telling(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let tail = lines.len().saturating_sub(5);
    let cause = lines[..tail]
        .iter()
        .find(|line| line.to_lowercase().contains("error"));
    cause
        .into_iter()
        .chain(&lines[tail..])
        .copied()
        .collect::<Vec<_>>()
        .join("; ")
}

/// A running program. If nobody waits for it any more, it gets TERM, at which it ends its workers
/// and cancels their statements on the server. With KILL they would go on, and the server with
/// them.
struct Running(Option<u32>);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = self.0.and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // This fails only if the program has just ended.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

/// A program that is ready to be started.
pub(super) struct Program {
    pub(super) name: String,
    pub(super) command: Command,
    /// Files that it reads while it runs.
    pub(super) _environment: Option<Environment>,
}

impl Program {
    pub(super) async fn run(mut self) -> Result<(), ProgramError> {
        self.command.stdin(Stdio::null()).stdout(Stdio::null());
        let (child, running) = self.start()?;
        self.finish(child, running).await.map(drop)
    }

    pub(super) async fn output(mut self) -> Result<Vec<u8>, ProgramError> {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped());
        let (child, running) = self.start()?;
        self.finish(child, running).await
    }

    /// Starts the program, and returns its output as it comes.
    pub(super) fn stream(mut self) -> Result<ProgramOutput, ProgramError> {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped());
        let (mut child, running) = self.start()?;
        let stdout = child.stdout.take().ok_or_else(|| {
            not_started(
                &self.name,
                std::io::Error::other("it has no standard output"),
            )
        })?;
        let mut ending = JoinSet::new();
        // Its messages are read at the same time: a full pipe would stop the program.
        ending.spawn(async move { self.finish(child, running).await.map(drop) });
        Ok(ProgramOutput { stdout, ending })
    }

    fn start(&mut self) -> Result<(Child, Running), ProgramError> {
        let child = self
            .command
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| not_started(&self.name, source))?;
        let running = Running(child.id());
        Ok((child, running))
    }

    /// Returns the program's output, if that is read.
    async fn finish(&self, child: Child, mut running: Running) -> Result<Vec<u8>, ProgramError> {
        let output = child
            .wait_with_output()
            .await
            .map_err(|source| not_started(&self.name, source))?;
        running.0 = None;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let text = String::from_utf8_lossy(&output.stderr);
        Err(ProgramError::Failed {
            program: self.name.clone(),
            text: telling(&text),
        })
    }
}

pub(super) fn not_started(program: &str, source: std::io::Error) -> ProgramError {
    ProgramError::Start {
        program: program.to_string(),
        source,
    }
}

pub(super) async fn through_a_pipe(mut from: Program, mut to: Program) -> Result<(), ProgramError> {
    from.command.stdin(Stdio::null()).stdout(Stdio::piped());
    let (mut sending, sends) = from.start()?;
    let pipe: Option<Stdio> = match sending.stdout.take() {
        Some(out) => Some(out.try_into().map_err(|e| not_started(&from.name, e))?),
        None => None,
    };
    to.command
        .stdin(pipe.unwrap_or_else(Stdio::null))
        .stdout(Stdio::null());
    let (receiving, receives) = to.start()?;
    // This process's copy of the pipe's end would keep the sender from noticing that the receiver
    // is gone.
    to.command.stdin(Stdio::null());
    let (sent, received) =
        tokio::join!(from.finish(sending, sends), to.finish(receiving, receives));
    match (sent.map(drop), received.map(drop)) {
        (Ok(()), received) => received,
        // The program that failed first made the other one fail too: an operator reads both texts.
        (Err(sent), Err(received)) => Err(ProgramError::Failed {
            program: format!("{} into {}", from.name, to.name),
            text: format!("{received}; {sent}"),
        }),
        (sent, Ok(())) => sent,
    }
}

/// Maximum number of bytes that are read from a program at once.
const CHUNK_BYTES: usize = 256 << 10;

/// The output of a running program. If it is dropped, the program is ended.
pub struct ProgramOutput {
    stdout: ChildStdout,
    ending: JoinSet<Result<(), ProgramError>>,
}

impl ProgramOutput {
    /// Returns the next bytes. None: the program has ended with success, and all its output was
    /// returned.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ProgramError> {
        let mut chunk = bytes::BytesMut::with_capacity(CHUNK_BYTES);
        let read = self.stdout.read_buf(&mut chunk).await;
        match read.map_err(|e| not_started("pg_dump", e))? {
            0 => match self.ending.join_next().await {
                Some(Ok(ended)) => ended.map(|()| None),
                Some(Err(error)) => Err(not_started("pg_dump", std::io::Error::other(error))),
                None => Ok(None),
            },
            _ => Ok(Some(chunk.freeze())),
        }
    }
}
