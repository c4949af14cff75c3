//! The view of a running service that every output reads. Readers never write.

use super::clock::Clock;
use super::counters::Counters;
use super::meter::Meter;
use super::state::ServiceState;
use chrono::{DateTime, Utc};
use std::sync::Arc;
use tokio::sync::watch;

/// The data of all readers. Readers never write.
#[derive(Clone)]
pub struct ServiceView {
    state: watch::Receiver<ServiceState>,
    meter: Arc<Meter>,
    counters: Counters,
    clock: Clock,
}

impl ServiceView {
    pub fn new(
        state: watch::Receiver<ServiceState>,
        meter: Arc<Meter>,
        counters: Counters,
        clock: Clock,
    ) -> Self {
        ServiceView {
            state,
            meter,
            counters,
            clock,
        }
    }

    pub fn state(&self) -> ServiceState {
        self.state.borrow().clone()
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
