//! Remembers which objects were hashed, so that one that does not have the wanted bytes is not read
//! at every look.

use super::courier::hash;
use super::inventory::Todo;
use crate::cluster::{Store, StoreError, Stored, Throttle};
use crate::package::Checksum;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Maximum number of objects that are remembered.
const MAX_HASHED: usize = 10_000;

#[derive(Clone)]
pub(super) struct Hashed {
    objects: Arc<Mutex<HashMap<String, (Checksum, Stored)>>>,
    throttle: Throttle,
}

impl Hashed {
    pub(super) fn within(throttle: &Throttle) -> Hashed {
        Hashed {
            objects: Arc::default(),
            throttle: throttle.clone(),
        }
    }

    /// Returns the checksum of the object that was found under the key. It is read unless it is
    /// known. None: it is gone by now.
    pub(super) async fn checksum(
        &self,
        store: &Store,
        todo: &Todo,
        stored: Stored,
    ) -> Result<Option<(Checksum, Stored)>, StoreError> {
        if let Some(known) = todo.known
            && todo.present.as_ref() == Some(&stored)
        {
            return Ok(Some((known, stored)));
        }
        if let Some(found) = self.objects().get(&todo.key)
            && found.1 == stored
        {
            return Ok(Some(found.clone()));
        }
        let found = hash(store, &todo.key, Some(&self.throttle)).await?;
        if let Some(found) = &found {
            let mut objects = self.objects();
            if objects.len() >= MAX_HASHED {
                objects.clear();
            }
            objects.insert(todo.key.clone(), found.clone());
        }
        Ok(found)
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<String, (Checksum, Stored)>> {
        self.objects.lock().expect("no holder panics")
    }
}
