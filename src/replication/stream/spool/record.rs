//! The format of frames in a file: kind, length, bytes.

use super::Frame;
use crate::domain::Lsn;
use bytes::Bytes;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Maximum bytes that are read from a file at once, unless one frame is longer.
const CHUNK_BYTES: u64 = 256 << 10;
/// Bytes of kind and length.
pub(super) const HEADER: usize = 5;
pub(super) const DATA: u8 = b'd';
pub(super) const REACHED: u8 = b'r';

pub(super) fn header(kind: u8, length: u32) -> [u8; HEADER] {
    let [a, b, c, d] = length.to_be_bytes();
    [kind, a, b, c, d]
}

/// Returns the next frames, at least one and no more than `memory` holds, and the position at which
/// they end.
pub(super) fn read_some(
    file: &File,
    from: u64,
    to: u64,
    memory: usize,
) -> io::Result<(Vec<Frame>, u64)> {
    let most = CHUNK_BYTES.min(memory as u64).max(HEADER as u64 + 8);
    let mut chunk = read(file, from, most.min(to - from))?;
    let first = record(&chunk, 0)?.1 as u64;
    if first > chunk.len() as u64 {
        chunk = read(file, from, first.min(to - from))?;
    }
    let chunk = Bytes::from(chunk);
    let (mut frames, mut at, mut cost) = (Vec::new(), 0, 0);
    while chunk.len() >= at + HEADER {
        let (kind, end) = record(&chunk, at)?;
        if end > chunk.len() {
            break;
        }
        let body = chunk.slice(at + HEADER..end);
        let frame = match (kind, <[u8; 8]>::try_from(&body[..])) {
            (DATA, _) => Frame::Data(body),
            (REACHED, Ok(lsn)) => Frame::Reached(Lsn(u64::from_be_bytes(lsn))),
            _ => return Err(spoiled()),
        };
        cost += frame.cost();
        if cost > memory && !frames.is_empty() {
            break;
        }
        frames.push(frame);
        at = end;
    }
    if frames.is_empty() {
        return Err(spoiled());
    }
    Ok((frames, from + at as u64))
}

fn read(file: &File, from: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
}

/// Returns the kind of the record that begins there, and its end.
fn record(chunk: &[u8], at: usize) -> io::Result<(u8, usize)> {
    match chunk[at..] {
        [kind, a, b, c, d, ..] => {
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            Ok((kind, at + HEADER + length))
        }
        _ => Err(spoiled()),
    }
}

fn spoiled() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "it does not hold the bytes that were written",
    )
}
