//! Reads numbers, texts and rows from a frame. Each length is checked before it is used.

use super::{DecodeError, Value};
use crate::domain::Lsn;
use bytes::Bytes;
use chrono::{DateTime, Utc};

/// 2000-01-01, from which the server counts its microseconds, in microseconds since 1970.
pub(super) const EPOCH: i64 = 946_684_800_000_000;

/// A frame, with the position up to which it was read.
pub(super) struct Reader {
    frame: Bytes,
    at: usize,
    /// Kind of the message, for errors.
    pub message: &'static str,
}

impl Reader {
    pub(super) fn new(frame: Bytes) -> Self {
        Reader {
            frame,
            at: 0,
            message: "?",
        }
    }

    pub(super) fn left(&self) -> usize {
        self.frame.len() - self.at
    }

    pub(super) fn error(&self, problem: String) -> DecodeError {
        DecodeError {
            message: self.message,
            offset: self.at,
            problem,
        }
    }

    /// Returns an error about the byte that was just read.
    pub(super) fn unknown(&self, what: &str, byte: u8) -> DecodeError {
        DecodeError {
            message: self.message,
            offset: self.at - 1,
            problem: format!("unknown {what} {:?}", char::from(byte)),
        }
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&[u8], DecodeError> {
        if length > self.left() {
            let problem = format!("{length} bytes expected, {} left", self.left());
            return Err(self.error(problem));
        }
        self.at += length;
        Ok(&self.frame[self.at - length..self.at])
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        self.array().map(u64::from_be_bytes).map(Lsn)
    }

    pub(super) fn time(&mut self) -> Result<DateTime<Utc>, DecodeError> {
        let start = self.at;
        let micros = self.array().map(i64::from_be_bytes)?;
        micros
            .checked_add(EPOCH)
            .and_then(DateTime::from_timestamp_micros)
            .ok_or_else(|| DecodeError {
                message: self.message,
                offset: start,
                problem: format!("{micros} µs since 2000 is not a valid time"),
            })
    }

    /// Reads a byte in which only the bits of `known` may be set.
    pub(super) fn flags(&mut self, known: u8) -> Result<u8, DecodeError> {
        let flags = self.u8()?;
        if flags & !known == 0 {
            return Ok(flags);
        }
        let problem = format!("unknown flags {flags:#04x}");
        self.at -= 1;
        Err(self.error(problem))
    }

    pub(super) fn string(&mut self) -> Result<String, DecodeError> {
        let rest = &self.frame[self.at..];
        let Some(length) = rest.iter().position(|byte| *byte == 0) else {
            return Err(self.error("a text without an end".into()));
        };
        match std::str::from_utf8(&rest[..length]) {
            Ok(text) => {
                let text = text.to_string();
                self.at += length + 1;
                Ok(text)
            }
            Err(_) => Err(self.error("a text that is not UTF-8".into())),
        }
    }

    /// Reads the name of a schema. The server sends an empty name for its own schema, pg_catalog.
    pub(super) fn schema(&mut self) -> Result<String, DecodeError> {
        let name = self.string()?;
        Ok(if name.is_empty() {
            "pg_catalog".into()
        } else {
            name
        })
    }

    /// Reads a number, and then this number of bytes.
    pub(super) fn counted(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.u32()? as usize;
        self.take(length)?;
        Ok(self.frame.slice(self.at - length..self.at))
    }

    /// Returns an empty list with capacity for this number of items, if the frame can hold them: a
    /// number alone must not cost memory.
    pub(super) fn room_for<T>(
        &self,
        number: usize,
        least_bytes: usize,
    ) -> Result<Vec<T>, DecodeError> {
        if number > self.left() / least_bytes {
            let left = self.left();
            return Err(self.error(format!("{number} items expected, {left} bytes left")));
        }
        Ok(Vec::with_capacity(number))
    }

    pub(super) fn row(&mut self) -> Result<Vec<Value>, DecodeError> {
        let number = usize::from(self.u16()?);
        let mut values = self.room_for(number, 1)?;
        for _ in 0..number {
            values.push(match self.u8()? {
                b'n' => Value::Null,
                b'u' => Value::Unchanged,
                b't' => Value::Text(self.counted()?),
                other => return Err(self.unknown("kind of value", other)),
            });
        }
        Ok(values)
    }
}
