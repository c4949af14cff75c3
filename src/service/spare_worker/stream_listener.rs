//! Receives the reports of the stream, and puts them into the state.

use super::passes::note_brought;
use crate::cluster::{Confirmation, PrimaryStatus};
use crate::domain::{Lsn, Side};
use crate::observe::Held;
use crate::replication::ReplicationError;
use crate::replication::stream::{Applied, StreamObserver};
use crate::service::status_writer::StatusWriter;
use chrono::{DateTime, Utc};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Receiver of the stream's reports. It puts them into the state at once, and leaves everything
/// that must be written down to the chores.
pub(super) struct StreamListener {
    writer: StatusWriter,
    /// The stream makes progress: a change was applied, or no changes wait.
    pub(super) gets_on: Notify,
    progress_reported: AtomicBool,
    pub(super) unavailable_changed: Notify,
    /// The primary was seen read-only.
    pub(super) fenced: Notify,
    pub(super) confirmed: watch::Sender<Option<Confirmation>>,
}

impl StreamListener {
    pub(super) fn of(writer: &StatusWriter) -> Arc<StreamListener> {
        Arc::new(StreamListener {
            writer: writer.clone(),
            gets_on: Notify::new(),
            progress_reported: AtomicBool::new(false),
            unavailable_changed: Notify::new(),
            fenced: Notify::new(),
            confirmed: watch::Sender::new(None),
        })
    }

    /// Reports the first progress. The start of sending does not count, because a failure would
    /// then end and begin again at every try.
    fn gets_on(&self) {
        if !self.progress_reported.swap(true, Ordering::Relaxed) {
            self.gets_on.notify_one();
        }
    }
}

impl StreamObserver for StreamListener {
    fn following(&self) {
        self.writer.see_datastore(Side::Peer, None);
    }

    fn applied(&self, applied: Applied) {
        self.gets_on();
        let counter = &self.writer.counters.transactions_applied;
        counter.inc_by(applied.transactions);
        self.writer.update(|state| {
            if let Some(point) = &mut state.spare.point {
                point.lsn = applied.point.lsn.to_string();
                point.commit_time = applied.point.commit_time;
            }
            state.spare.gate_waiting = Some(applied.waiting);
            if applied.waiting == 0 {
                state.spare.waiting = Some(false);
                state.spare.lag_bytes = Some(0);
            }
        });
        if applied.unavailable_changed {
            self.unavailable_changed.notify_one();
        }
    }

    fn waiting(&self, transactions: u64) {
        self.writer.update(|state| {
            state.spare.gate_waiting = Some(transactions);
            if state.spare.waiting != Some(true) {
                state.spare.waiting = Some(true);
                // Unknown until the primary is asked again.
                state.spare.lag_bytes = None;
            }
        });
    }

    fn waited(&self, time: Duration) {
        self.writer.counters.gate_wait.observe(time.as_secs_f64());
    }

    fn trouble(&self, trouble: Option<&Arc<ReplicationError>>) {
        match trouble {
            Some(error) => {
                self.writer.hold_for(error);
            }
            None => self.writer.release(|hold| !hold.reason.stays()),
        }
    }

    fn copied(&self, bytes: u64) {
        self.writer.counters.artifacts_copied.inc();
        self.writer.counters.artifact_bytes_copied.inc_by(bytes);
    }

    fn awaits(&self, key: &str) {
        self.writer.update(|state| state.spare.arrivals.awaits(key));
    }

    fn awaits_no_more(&self, key: &str) {
        self.writer
            .update(|state| state.spare.arrivals.awaits_no_more(key));
    }

    fn arrived(&self, waited: Duration) {
        let counters = &self.writer.counters;
        counters.artifact_arrival.observe(waited.as_secs_f64());
        self.writer
            .update(|state| state.spare.arrivals.arrived(waited));
    }

    fn brought(&self, artifacts: usize) {
        note_brought(&self.writer, artifacts);
        self.unavailable_changed.notify_one();
    }

    fn seen(&self, seen: &PrimaryStatus) {
        self.writer.see_datastore(Side::Peer, None);
        self.writer.update(|state| {
            state.peer.version = Some(seen.server.version.clone());
            state.peer.tls = Some(seen.server.tls);
            state.peer.fenced = Some(seen.fenced);
            state.on_primary.held = held(seen);
            let reached = state
                .spare
                .point
                .as_ref()
                .and_then(|p| p.lsn.parse::<Lsn>().ok());
            if state.spare.waiting == Some(true) {
                state.spare.lag_bytes = reached.map(|lsn| seen.wal.0.saturating_sub(lsn.0));
            }
        });
        if seen.fenced {
            self.fenced.notify_one();
        }
    }

    fn compared(&self, server_started: &str) {
        self.writer.update(|state| {
            if let Some(point) = &mut state.spare.point {
                point.server_started = server_started.to_string();
            }
        });
    }

    fn compared_tables(&self, oldest: Option<DateTime<Utc>>) {
        self.writer.update(|state| state.checks.compared = oldest);
    }

    fn confirmed(&self, confirmation: Confirmation) {
        self.gets_on();
        self.writer.update(|state| {
            if state.spare.gate_waiting.unwrap_or_default() == 0 {
                state.spare.waiting = Some(false);
                state.spare.lag_bytes = Some(0);
            }
        });
        self.confirmed.send_replace(Some(confirmation));
    }
}

pub(super) fn held(seen: &PrimaryStatus) -> Option<Held> {
    seen.slot.as_ref().map(|slot| Held {
        bytes: slot.held_bytes,
        bound: seen.wal_bound,
        unconfirmed: slot.unconfirmed_bytes,
        oldest_writer: seen.oldest_writer.clone(),
    })
}
