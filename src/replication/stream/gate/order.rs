//! The order of jobs at a key: one job at a time, and requests of the open transaction before all
//! others.

use super::{RequestId, Table};

impl Table {
    /// Queues a request of the open transaction before all requests of later transactions. A
    /// running job for the key, or a claim on it, finishes first. True: there is neither.
    pub(super) fn queue_late(&mut self, key: &str, id: RequestId) -> bool {
        let queue = self.keys.entry(key.to_string()).or_default();
        let is_busy = |other: &RequestId| match self.wants.get(other) {
            Some(want) => want.begun && want.settled.is_none(),
            // A claim is not a request.
            None => true,
        };
        let busy = queue.iter().any(is_busy);
        queue.push_back(id);
        !busy
    }

    /// Puts the requests of the open transaction before all others; no job for the key runs now.
    /// Results of the others do not count any more, because other bytes may be under the key when
    /// it is their turn.
    pub(super) fn late_ones_first(&mut self, key: &str) {
        let Some(queue) = self.keys.get_mut(key) else {
            return;
        };
        let wants = &mut self.wants;
        let is_late = |id: &RequestId| wants.get(id).is_some_and(|want| want.tx.is_none());
        let (late, others): (Vec<RequestId>, Vec<RequestId>) =
            queue.iter().partition(|id| is_late(id));
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

    /// Returns a request that came while a job for the key was running, and that is next.
    pub(super) fn next_late(&mut self, key: &str) -> Option<RequestId> {
        self.late_ones_first(key);
        let waits = |id: &&RequestId| {
            let want = self.wants.get(id);
            want.is_some_and(|want| want.tx.is_none() && !want.begun)
        };
        self.keys.get(key)?.iter().find(waits).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Admission, ArtifactRequest, Item};
    use super::*;
    use crate::domain::Lsn;
    use crate::package::Checksum;
    use std::str::FromStr;

    const KEY: &str = "k";

    fn add(table: &mut Table, id: RequestId, tx: Option<u64>) {
        let checksum = Checksum::from_str(&"0".repeat(64)).expect("a checksum");
        let want = ArtifactRequest {
            item: Some(Item {
                key: KEY.into(),
                checksum,
                ident: String::new(),
                target: String::new(),
            }),
            row: Vec::new(),
            tx: tx.map(Lsn),
            begun: false,
            released: false,
            settled: None,
        };
        table.wants.insert(id, want);
    }

    fn early(table: &mut Table, id: RequestId, tx: u64) {
        add(table, id, Some(tx));
        table.keys.entry(KEY.into()).or_default().push_back(id);
    }

    fn late(table: &mut Table, id: RequestId) -> bool {
        let first = table.queue_late(KEY, id);
        add(table, id, None);
        if first {
            table.late_ones_first(KEY);
        }
        first
    }

    fn order(table: &Table) -> Vec<RequestId> {
        table.keys[KEY].iter().copied().collect()
    }

    fn begin(table: &mut Table, id: RequestId) {
        table.wants.get_mut(&id).expect("a want").begun = true;
    }

    fn settle(table: &mut Table, id: RequestId) {
        table.wants.get_mut(&id).expect("a want").settled = Some(Admission::Here);
    }

    #[test]
    fn what_was_found_for_a_later_transaction_is_found_again_after_an_earlier_one() {
        let mut table = Table::default();
        early(&mut table, 1, 9);
        begin(&mut table, 1);
        settle(&mut table, 1);
        assert!(late(&mut table, 2), "nobody is at work");
        assert_eq!(order(&table), [2, 1]);
        let later = &table.wants[&1];
        assert!(!later.begun && later.settled.is_none());
    }

    #[test]
    fn nobody_begins_beside_a_job_at_work_and_the_open_transaction_keeps_its_order() {
        let mut table = Table::default();
        early(&mut table, 1, 9);
        begin(&mut table, 1);
        assert!(!late(&mut table, 2), "one is at work");
        assert!(!late(&mut table, 3));
        settle(&mut table, 1);
        assert_eq!(table.next_late(KEY), Some(2));
        assert_eq!(order(&table), [2, 3, 1]);
        begin(&mut table, 2);
        settle(&mut table, 2);
        assert_eq!(table.next_late(KEY), Some(3));
        begin(&mut table, 3);
        settle(&mut table, 3);
        assert_eq!(table.next_late(KEY), None);
        assert!(!table.wants[&1].begun, "it has its turn after them");
    }

    #[test]
    fn a_claim_is_waited_for() {
        let mut table = Table::default();
        table.keys.entry(KEY.into()).or_default().push_back(7);
        assert!(!late(&mut table, 8), "somebody has claimed it");
    }
}
