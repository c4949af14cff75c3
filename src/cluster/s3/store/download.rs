//! A download that goes on where a line was lost.

use super::{PROGRESS_BYTES, Store};
use crate::cluster::error_text;
use crate::cluster::s3::store::object::Stored;
use crate::cluster::s3::store_error::{StoreError, StoreFault};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::pin::Pin;
use std::time::Duration;

/// The body of an object that is being read.
pub struct Download {
    pub stored: Stored,
    pub(super) body: Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>,
    pub(super) store: Store,
    pub(super) key: String,
    /// Number of bytes returned until now.
    pub(super) at: u64,
    pub(super) tries: usize,
    pub(super) resumed_at: u64,
    pub(super) kept: Option<Bytes>,
}

impl Download {
    /// Returns the next bytes; None at the end, when exactly the announced number has come. After
    /// an interruption the rest of the same object is requested.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        loop {
            match tokio::time::timeout(self.store.patience, self.body.next()).await {
                Ok(Some(Ok(bytes))) => {
                    self.at += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Ok(None) if self.at == self.stored.bytes => return Ok(None),
                Ok(None) => self.resume("the body ended early").await?,
                Ok(Some(Err(cause))) => self.resume(&error_text::chain(&cause)).await?,
                Err(_) => self.resume("the body stalled").await?,
            }
        }
    }

    /// Keeps bytes for which a reader had no room; [`Download::take_kept`] returns them.
    pub fn keep(&mut self, rest: Bytes) {
        self.kept = Some(rest);
    }

    pub fn take_kept(&mut self) -> Option<Bytes> {
        self.kept.take()
    }

    async fn resume(&mut self, why: &str) -> Result<(), StoreError> {
        // A large object may be interrupted often; only progress counts.
        if self.at >= self.resumed_at + PROGRESS_BYTES {
            self.tries = 0;
        }
        self.resumed_at = self.at;
        let doing = format!("reading {} from byte {}", self.key, self.at);
        let cut = |text: String| self.store.fault(&doing, StoreFault::Unreachable, text);
        self.tries += 1;
        if self.tries >= self.store.tries {
            return Err(cut(format!("{why}, {} times", self.tries)));
        }
        log::debug!("{}", cut(format!("{why}; asking for the rest")));
        tokio::time::sleep(Duration::from_millis(50 << self.tries.min(6))).await;
        if self.at >= self.stored.bytes {
            return Err(cut(format!(
                "{why}: {} bytes came, {} were announced",
                self.at, self.stored.bytes
            )));
        }
        let (store, key, at) = (&self.store, &self.key, self.at);
        let opened = store
            .persist(&doing, || store.open_body(&doing, key, at))
            .await;
        // The object may be shorter by now.
        let opened = match opened {
            Err(error) if error.fault == StoreFault::Changed => None,
            opened => opened?,
        };
        match opened {
            Some((body, rest)) if rest == self.stored => {
                self.body = body;
                Ok(())
            }
            _ => Err(cut(format!("{why}, and the object has changed since"))),
        }
    }
}
