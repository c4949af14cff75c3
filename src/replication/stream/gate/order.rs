//! Who has their turn at a key: one job at a time, and what the open transaction wants before all else.

use super::{Table, WantId};

impl Table {
    /// A want that goes before all that are not of the open transaction. A job at work on the key, or a claim of it, is let
    /// finish first. True: nobody is.
    pub(super) fn queue_late(&mut self, key: &str, id: WantId) -> bool {
        let queue = self.keys.entry(key.to_string()).or_default();
        let is_busy = |other: &WantId| match self.wants.get(other) {
            Some(want) => want.begun && want.settled.is_none(),
            // A claim is no want.
            None => true,
        };
        let busy = queue.iter().any(is_busy);
        queue.push_back(id);
        !busy
    }

    /// Nobody is at work on the key now: what the open transaction wants goes before all others. Other bytes may be under
    /// the key when it is their turn, so what was found out for them does not count.
    pub(super) fn late_ones_first(&mut self, key: &str) {
        let Some(queue) = self.keys.get_mut(key) else {
            return;
        };
        let wants = &mut self.wants;
        let is_late = |id: &WantId| wants.get(id).is_some_and(|want| want.tx.is_none());
        let (late, others): (Vec<WantId>, Vec<WantId>) = queue.iter().partition(|id| is_late(id));
        if late.is_empty() || queue.iter().take(late.len()).all(is_late) {
            return;
        }
        for id in &others {
            if let Some(want) = wants.get_mut(id) {
                want.settled = None;
                want.begun = false;
            }
        }
        *queue = late.into_iter().chain(others).collect();
    }

    /// One that came while somebody was at work on the key has its turn.
    pub(super) fn next_late(&mut self, key: &str) -> Option<WantId> {
        self.late_ones_first(key);
        let waits = |id: &&WantId| {
            let want = self.wants.get(id);
            want.is_some_and(|want| want.tx.is_none() && !want.begun)
        };
        self.keys.get(key)?.iter().find(waits).copied()
    }
}
