//! A queue between the task that reads the socket and the applier: limited in memory, and beyond
//! that on disk.
//!
//! The socket must always be read, because a primary that shuts down waits for a client that does
//! not read. Files are read and written in place: they are on this machine, and mostly in its
//! memory.

mod record;
#[cfg(test)]
mod tests;

use crate::domain::Lsn;
use bytes::Bytes;
use record::{DATA, HEADER, REACHED, header, read_some};
use std::collections::VecDeque;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// Bytes that a frame in memory takes in addition to its content.
const COST: usize = 64;
/// Maximum bytes of a file. The disk space is freed when the whole file was read, so it must not
/// become too large.
const MAX_SEGMENT_BYTES: u64 = 64 << 20;

#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    Data(Bytes),
    /// Every change before this position was sent: the server's position in a keepalive.
    Reached(Lsn),
}

impl Frame {
    fn cost(&self) -> usize {
        match self {
            Frame::Data(bytes) => COST + bytes.len(),
            Frame::Reached(_) => COST,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("{limit} bytes of changes wait on disk already, which is the limit")]
    Full { limit: u64 },
    #[error("cannot {doing} a spool file in {}: {source}", dir.display())]
    Io {
        doing: &'static str,
        dir: PathBuf,
        source: io::Error,
    },
    /// The sender's final error, after everything that it had sent.
    #[error("{0}")]
    Failed(String),
    /// The receiver is gone: nobody will ever read the frame.
    #[error("the changes are not read any more")]
    Abandoned,
}

/// Waiting bytes: in memory, with their overhead, and in files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    pub memory: usize,
    pub disk: u64,
}

/// Makes a queue. Up to `memory` bytes wait in memory (or a single frame that is longer, and a
/// position), up to `disk` bytes in files in `dir`. The files have no name and only we can read
/// them, because they hold rows.
pub fn spool(memory: usize, disk: u64, dir: &Path) -> (Sender, Receiver) {
    let shared = Arc::new(Shared {
        memory,
        disk,
        segment: (disk / 8).clamp(64 << 10, MAX_SEGMENT_BYTES),
        dir: dir.to_path_buf(),
        state: Mutex::new(State::default()),
        news: Notify::new(),
    });
    (Sender(shared.clone()), Receiver(shared))
}

pub struct Sender(Arc<Shared>);

pub struct Receiver(Arc<Shared>);

struct Shared {
    memory: usize,
    disk: u64,
    segment: u64,
    dir: PathBuf,
    state: Mutex<State>,
    news: Notify,
}

/// The queue, in order: frames in memory, frames in files, the tail.
#[derive(Default)]
struct State {
    queue: VecDeque<Frame>,
    in_memory: usize,
    segments: VecDeque<Segment>,
    /// A position after everything in the files; None while there are no files. It is not written,
    /// because the next position may replace it.
    tail: Option<Lsn>,
    end: End,
}

/// A file that is not read to its end yet.
struct Segment {
    file: Arc<File>,
    read: u64,
    written: u64,
}

#[derive(Default)]
enum End {
    #[default]
    Open,
    Ended,
    Failed(String),
    Abandoned,
}

impl Sender {
    /// Stores a frame; it never waits for the receiver. An error loses nothing that was sent
    /// before, and ends the queue: after a frame that was not stored no other frame is stored,
    /// least of all a position.
    pub fn send(&mut self, frame: Frame) -> Result<(), SpoolError> {
        let mut state = self.0.state();
        match &state.end {
            End::Open | End::Ended => {}
            End::Failed(error) => return Err(SpoolError::Failed(error.clone())),
            End::Abandoned => return Err(SpoolError::Abandoned),
        }
        match frame {
            Frame::Reached(lsn) => state.reach(lsn),
            Frame::Data(bytes) => {
                let fits = state.in_memory + COST + bytes.len() <= self.0.memory;
                if state.segments.is_empty() && (fits || state.queue.is_empty()) {
                    state.push(Frame::Data(bytes));
                } else if let Err(error) = self.0.write(&mut state, &bytes) {
                    state.end = End::Failed(error.to_string());
                    return Err(error);
                }
            }
        }
        drop(state);
        self.0.news.notify_one();
        Ok(())
    }

    /// Ends the queue: the receiver gets everything that was sent, and then this error, again and
    /// again.
    pub fn fail(self, error: String) {
        self.0.state().end = End::Failed(error);
    }

    pub fn held(&self) -> Held {
        self.0.held()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if matches!(state.end, End::Open) {
            state.end = End::Ended;
        }
        drop(state);
        self.0.news.notify_one();
    }
}

impl Receiver {
    /// Returns the next frame. None: the sender is gone, and everything it sent was read. The
    /// future may be dropped while it waits: nothing is lost.
    pub async fn recv(&mut self) -> Result<Option<Frame>, SpoolError> {
        loop {
            if let Some(frame) = self.try_recv()? {
                return Ok(Some(frame));
            }
            if self.0.ended()? {
                return Ok(None);
            }
            self.0.news.notified().await;
        }
    }

    /// Returns the next frame without waiting. None: there is none at present, and perhaps there
    /// never will be.
    pub fn try_recv(&mut self) -> Result<Option<Frame>, SpoolError> {
        loop {
            let mut state = self.0.state();
            if let Some(frame) = state.queue.pop_front() {
                state.in_memory -= frame.cost();
                return Ok(Some(frame));
            }
            let Some(Segment {
                file,
                read,
                written,
            }) = state.segments.front()
            else {
                return Ok(None);
            };
            // The lock is not held: written bytes do not change, and the sender appends after them.
            let (file, read, written) = (file.clone(), *read, *written);
            drop(state);
            let (frames, end) =
                read_some(&file, read, written, self.0.memory).map_err(|e| self.0.io("read", e))?;
            let mut state = self.0.state();
            frames.into_iter().for_each(|frame| state.push(frame));
            state.was_read(end);
        }
    }

    pub fn held(&self) -> Held {
        self.0.held()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        *self.0.state() = State {
            end: End::Abandoned,
            ..State::default()
        };
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn held(&self) -> Held {
        let state = self.state();
        Held {
            memory: state.in_memory,
            disk: state.on_disk(),
        }
    }

    fn io(&self, doing: &'static str, source: io::Error) -> SpoolError {
        SpoolError::Io {
            doing,
            dir: self.dir.clone(),
            source,
        }
    }

    /// Returns whether no frame will come any more. It is asked when no frame is there.
    fn ended(&self) -> Result<bool, SpoolError> {
        let state = self.state();
        match &state.end {
            // A frame may have come in the meantime.
            _ if !state.queue.is_empty() || !state.segments.is_empty() => Ok(false),
            End::Open => Ok(false),
            End::Ended | End::Abandoned => Ok(true),
            End::Failed(error) => Err(SpoolError::Failed(error.clone())),
        }
    }

    /// Appends to the last file, or to a new one.
    fn write(&self, state: &mut State, bytes: &[u8]) -> Result<(), SpoolError> {
        let mut head = Vec::with_capacity(2 * HEADER + 8);
        if let Some(lsn) = state.tail {
            head.extend(header(REACHED, 8));
            head.extend(lsn.0.to_be_bytes());
        }
        let length = u32::try_from(bytes.len());
        head.extend(header(
            DATA,
            length.map_err(|e| self.io("write", io::Error::other(e)))?,
        ));
        let more = (head.len() + bytes.len()) as u64;
        if state.on_disk() + more > self.disk {
            return Err(SpoolError::Full { limit: self.disk });
        }
        let last = match state.segments.back() {
            Some(last) if last.written < self.segment => Some((last.file.clone(), last.written)),
            _ => None,
        };
        let is_new = last.is_none();
        let (file, at) = match last {
            Some(last) => last,
            None => {
                let file = private_file(&self.dir).map_err(|e| self.io("make", e))?;
                (Arc::new(file), 0)
            }
        };
        // A record that was written only in part is overwritten by the next one.
        file.write_all_at(&head, at)
            .and_then(|()| file.write_all_at(bytes, at + head.len() as u64))
            .map_err(|e| self.io("write", e))?;
        if is_new {
            state.segments.push_back(Segment {
                file,
                read: 0,
                written: 0,
            });
        }
        if let Some(last) = state.segments.back_mut() {
            last.written = at + more;
        }
        state.tail = None;
        Ok(())
    }
}

impl State {
    fn push(&mut self, frame: Frame) {
        self.in_memory += frame.cost();
        self.queue.push_back(frame);
    }

    /// Stores a position. Of positions without a frame in between only the last one is needed.
    fn reach(&mut self, lsn: Lsn) {
        if !self.segments.is_empty() {
            self.tail = Some(lsn);
        } else if let Some(Frame::Reached(last)) = self.queue.back_mut() {
            *last = lsn;
        } else {
            self.push(Frame::Reached(lsn));
        }
    }

    fn on_disk(&self) -> u64 {
        self.segments.iter().map(|segment| segment.written).sum()
    }

    /// Notes that the first file was read up to `end`. A file without a name is gone when it is
    /// closed.
    fn was_read(&mut self, end: u64) {
        if let Some(first) = self.segments.front_mut() {
            first.read = end;
            if first.read == first.written {
                self.segments.pop_front();
            }
        }
        if self.segments.is_empty()
            && let Some(lsn) = self.tail.take()
        {
            self.push(Frame::Reached(lsn));
        }
    }
}

fn private_file(dir: &Path) -> io::Result<File> {
    let file = tempfile::tempfile_in(dir)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}
