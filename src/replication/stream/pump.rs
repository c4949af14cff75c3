//! Always reads the stream, and answers it: what arrives is looked at, and laid into the spool.
//!
//! A server that shuts down waits until what it sent is flushed here, or, where no flush is told, written. So while
//! anything is not durable here, the last answer tells no flush: its shutdown does not wait, its slot does not move, and
//! the transaction comes again. What is durable is told in an answer of its own just before.

use super::error::Gap;
use super::lookahead::Lookahead;
use super::spool::{Frame, Sender};
use crate::cluster::{Arrived, WalStream};
use crate::domain::Lsn;
use futures_util::FutureExt;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The server is asked for a sign of life so often.
const ASK: Duration = Duration::from_secs(2);
/// Within a large transaction of which nothing is sent, the server gives a sign of life by itself alone, after half of its
/// wal_sender_timeout: 30 s as it comes.
const SILENCE: Duration = Duration::from_secs(45);
/// Messages taken before the answers have their turn.
const AT_ONCE: usize = 1000;
/// A server that is behind sends each message by itself, many in a millisecond. It is faster when it need not wake us for each.
const MANY: usize = 100;
const GATHER: Duration = Duration::from_millis(1);

pub struct Pump {
    pub stream: WalStream,
    pub spool: Sender,
    /// None: nothing is to be brought for what comes.
    pub lookahead: Option<Lookahead>,
    /// Up to where everything is durable here.
    pub durable: watch::Receiver<Lsn>,
    pub received: Lsn,
}

impl Pump {
    /// Runs until the stream ends, and says why.
    pub async fn run(mut self) -> Gap {
        let why = match self.read().await {
            Ok(()) => Gap::Decoding("the stream ended without a reason".into()),
            Err(error) => error,
        };
        // What has arrived is still applied.
        self.spool.fail(why.to_string());
        why
    }

    async fn read(&mut self) -> Result<(), Gap> {
        let mut ask = tokio::time::interval(ASK);
        let (mut lately, mut since) = (0, Instant::now());
        self.tell(false).await?;
        loop {
            tokio::select! {
                arrived = self.stream.next() => {
                    let now = Instant::now();
                    if now - since > 4 * GATHER {
                        (lately, since) = (0, now);
                    }
                    let mut wanted = self.take(arrived?)?;
                    for _ in 0..AT_ONCE {
                        lately += 1;
                        let Some(more) = self.stream.ready()? else { break };
                        wanted |= self.take(more)?;
                    }
                    if lately >= MANY {
                        wanted |= self.gather().await?;
                    }
                    if wanted {
                        self.tell(false).await?;
                    }
                }
                changed = self.durable.changed() => match changed {
                    Ok(()) => self.tell(false).await?,
                    // The applier is gone, and takes us with it.
                    Err(_) => std::future::pending().await,
                },
                _ = ask.tick() => {
                    self.stream.judge_silence(SILENCE).await?;
                    self.tell(true).await?;
                }
            }
        }
    }

    /// What has come in a moment. Over TLS each message is a record, and is read by itself.
    async fn gather(&mut self) -> Result<bool, Gap> {
        tokio::time::sleep(GATHER).await;
        let mut wanted = false;
        for _ in 0..AT_ONCE {
            let Some(arrived) = self.stream.next().now_or_never() else {
                break;
            };
            wanted |= self.take(arrived?)?;
        }
        Ok(wanted)
    }

    /// Whether the server wants an answer now.
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
