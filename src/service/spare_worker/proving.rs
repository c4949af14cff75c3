//! Hashes the artifacts of a shared bucket that a copy has admitted by their presence. This runs
//! beside the looks, the stream and the passes. A handover ends it.

use super::SpareWorker;
use crate::config::Config;
use crate::replication::{ReplicationError, Settled, prove_unproven};
use chrono::TimeDelta;
use std::pin::Pin;
use std::sync::Arc;

/// Wait before hashing is tried again after a failure.
const PROVE_RETRY_AFTER: TimeDelta = TimeDelta::seconds(30);

pub(super) type Proving = Pin<Box<dyn Future<Output = Result<(), ReplicationError>>>>;

impl SpareWorker<'_> {
    /// Begins to hash, if artifacts are unproven and nothing hashes them.
    pub(super) fn prove_if_due(&mut self, config: &Arc<Config>) {
        let steady = self.writer.clock.steady();
        let waits = self.prove_again.is_some_and(|again| again > steady);
        let none_left = self
            .writer
            .read(|state| state.spare.point.is_none() || state.spare.unproven.left == 0);
        if self.proving.is_some() || waits || none_left {
            return;
        }
        self.prove_again = None;
        let (config, lock) = (config.clone(), self.leadership.lock);
        let (writer, beside) = (self.writer.clone(), self.beside.clone());
        let unavailable = self.found_unavailable.clone();
        self.proving = Some(Box::pin(async move {
            let report = |settled| {
                writer.update(|state| state.spare.unproven.settled_one());
                if settled == Settled::Unavailable {
                    unavailable.notify_one();
                }
            };
            prove_unproven(&config, lock, &writer.throttle, &beside, report).await
        }));
    }

    /// Notes the end of the hashing.
    pub(super) fn proved(&mut self, ended: Result<(), ReplicationError>) {
        self.proving = None;
        match ended {
            Ok(()) => {
                log::info!("local: every artifact that was copied by its presence is hashed");
                // The number was counted once, and the stream may have proved some of them.
                self.writer.update(|state| state.spare.unproven.left = 0);
            }
            Err(error) => {
                self.prove_again = Some(self.writer.clock.steady() + PROVE_RETRY_AFTER);
                log::warn!("{error}; artifacts that were not hashed yet are read later");
            }
        }
    }
}

/// Returns the result of the hashing; never returns if nothing is hashed.
pub(super) async fn proving_ended(proving: &mut Option<Proving>) -> Result<(), ReplicationError> {
    match proving {
        Some(proving) => proving.await,
        None => std::future::pending().await,
    }
}
