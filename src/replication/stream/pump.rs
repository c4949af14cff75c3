//! Reads the stream without pause, and answers the server: each message is shown to the look-ahead,
//! and stored in the spool.
//!
//! A server that shuts down waits until the client has flushed everything that was sent, or, where
//! no flush is reported, until it has written it. So while anything is not durable here, the last
//! answer reports no flush: the server's shutdown does not wait, its slot does not move, and the
//! transaction is sent again. Just before it, a separate answer reports the durable position.

use super::error::Gap;
use super::lookahead::Lookahead;
use super::spool::{Frame, Sender};
use crate::cluster::{Arrived, WalStream};
use crate::domain::Lsn;
use futures_util::FutureExt;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Interval between keepalive requests to the walsender.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum time without any message. Within a large transaction of which nothing is sent, the
/// server sends a keepalive only by itself, after half of its wal_sender_timeout: 30 s by default.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(45);
/// Maximum number of messages read before an answer may be sent.
const MAX_BATCH: usize = 1000;
/// Number of messages from which on they are collected. A server that is behind sends each message
/// by itself, many in a millisecond. It is faster if it need not wake us for each.
const GATHER_THRESHOLD: usize = 100;
const GATHER_TIME: Duration = Duration::from_millis(1);

pub(super) struct Pump {
    pub stream: WalStream,
    pub spool: Sender,
    /// None: no artifacts are requested for the changes.
    pub lookahead: Option<Lookahead>,
    /// Position up to which everything is durable here.
    pub durable: watch::Receiver<Lsn>,
    pub received: Lsn,
}

impl Pump {
    /// Runs until the stream ends, and returns the reason.
    pub(super) async fn run(mut self) -> Gap {
        let why = match self.read().await {
            Ok(()) => Gap::Decoding("the stream ended without a reason".into()),
            Err(error) => error,
        };
        // Changes that have arrived are still applied.
        self.spool.fail(why.to_string());
        why
    }

    async fn read(&mut self) -> Result<(), Gap> {
        let mut ask = tokio::time::interval(KEEPALIVE_INTERVAL);
        let (mut lately, mut since) = (0, Instant::now());
        self.tell(false).await?;
        loop {
            tokio::select! {
                arrived = self.stream.next() => {
                    let now = Instant::now();
                    if now - since > 4 * GATHER_TIME {
                        (lately, since) = (0, now);
                    }
                    let mut wanted = self.take(arrived?)?;
                    for _ in 0..MAX_BATCH {
                        lately += 1;
                        let Some(more) = self.stream.ready()? else { break };
                        wanted |= self.take(more)?;
                    }
                    if lately >= GATHER_THRESHOLD {
                        wanted |= self.gather().await?;
                    }
                    if wanted {
                        self.tell(false).await?;
                    }
                }
                changed = self.durable.changed() => match changed {
                    Ok(()) => self.tell(false).await?,
                    // The applier has ended, and ends this task with it.
                    Err(_) => std::future::pending().await,
                },
                _ = ask.tick() => {
                    self.stream.judge_silence(RECEIVE_TIMEOUT).await?;
                    self.tell(true).await?;
                }
            }
        }
    }

    /// Waits a moment and reads the messages that have arrived. Over TLS each message is a record,
    /// and is read by itself.
    async fn gather(&mut self) -> Result<bool, Gap> {
        tokio::time::sleep(GATHER_TIME).await;
        let mut wanted = false;
        for _ in 0..MAX_BATCH {
            let Some(arrived) = self.stream.next().now_or_never() else {
                break;
            };
            wanted |= self.take(arrived?)?;
        }
        Ok(wanted)
    }

    /// Stores a message. Returns whether the server wants an answer now.
    fn take(&mut self, arrived: Arrived) -> Result<bool, Gap> {
        match arrived {
            Arrived::Data { bytes, end } => {
                self.received = self.received.max(end);
                if let Some(lookahead) = &mut self.lookahead {
                    lookahead.see(&bytes);
                }
                self.spool.send(Frame::Data(bytes))?;
                Ok(false)
            }
            Arrived::Keepalive { end, reply } => {
                self.received = self.received.max(end);
                self.spool.send(Frame::Reached(end))?;
                Ok(reply)
            }
        }
    }

    async fn tell(&mut self, ask: bool) -> Result<(), Gap> {
        let durable = *self.durable.borrow_and_update();
        let received = self.received.max(durable);
        let level = received == durable;
        self.stream.answer(received, durable, ask && level).await?;
        if !level {
            self.stream.answer(received, Lsn(0), ask).await?;
        }
        Ok(())
    }
}
