//! The view of a running service that every output reads. Readers never write.

use super::clock::Clock;
use super::counters::Counters;
use super::meter::Meter;
use super::state::ServiceState;
use chrono::{DateTime, Utc};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Maximum time for which an answer waits for a look at the local server. An answer that comes later
/// counts as none for many load balancers.
const LOOK_PATIENCE: Duration = Duration::from_secs(1);

/// The data of all readers. Readers never write.
#[derive(Clone)]
pub struct ServiceView {
    state: watch::Receiver<ServiceState>,
    /// Asks for a look at the local server.
    look: Arc<Notify>,
    meter: Arc<Meter>,
    counters: Counters,
    clock: Clock,
}

impl ServiceView {
    pub fn new(
        state: watch::Receiver<ServiceState>,
        look: Arc<Notify>,
        meter: Arc<Meter>,
        counters: Counters,
        clock: Clock,
    ) -> Self {
        ServiceView {
            state,
            look,
            meter,
            counters,
            clock,
        }
    }

    pub fn state(&self) -> ServiceState {
        self.state.borrow().clone()
    }

    /// Has the local server looked at, and returns the state after that look. If the look takes too
    /// long, the state is returned as it is.
    pub async fn state_after_a_look(&self) -> ServiceState {
        let asked = Instant::now();
        self.look.notify_one();
        let mut state = self.state.clone();
        let looked = state.wait_for(|state| state.seen.is_some_and(|seen| seen.at >= asked));
        // Too late, or the writer is gone: the last look counts, as long as it is young enough.
        let _ = tokio::time::timeout(LOOK_PATIENCE, looked).await;
        self.state()
    }

    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Returns the state without a copy of it.
    pub(super) fn borrow(&self) -> watch::Ref<'_, ServiceState> {
        self.state.borrow()
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }
}
