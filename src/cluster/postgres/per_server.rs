//! Values that this process remembers for each server.

use crate::config::Datastore;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One value for each server, by its address and our user there.
pub(in crate::cluster) struct PerServer<T>(Mutex<BTreeMap<(String, String), T>>);

impl<T: Clone> PerServer<T> {
    pub(crate) const fn new() -> Self {
        PerServer(Mutex::new(BTreeMap::new()))
    }

    pub(crate) fn known(&self, to: &Datastore) -> Option<T> {
        self.all().get(&key(to)).cloned()
    }

    pub(crate) fn remember(&self, to: &Datastore, value: T) {
        self.all().insert(key(to), value);
    }

    pub(crate) fn forget(&self, to: &Datastore) {
        self.all().remove(&key(to));
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<(String, String), T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(to: &Datastore) -> (String, String) {
    (to.address(), to.user.clone())
}
