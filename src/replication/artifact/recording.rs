//! Tells the applier of the stream that another task records unavailable artifacts beside it. The
//! applier keeps the list of them in memory, and must know each one: it removes the record with the
//! row.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A handle for both tasks.
#[derive(Clone, Default)]
pub struct Recording(Arc<Counts>);

#[derive(Default)]
struct Counts {
    under_way: AtomicU64,
    ended: AtomicU64,
}

impl Recording {
    /// Runs a statement that may add a record.
    pub(crate) async fn around<T>(&self, statement: impl Future<Output = T>) -> T {
        let _begun = Begun::of(&self.0);
        statement.await
    }

    /// Returns whether records may be new since `seen`, which is brought up to date.
    pub(crate) fn is_news(&self, seen: &mut u64) -> bool {
        // The end of a statement is counted before it is no longer under way.
        let under_way = self.0.under_way.load(Ordering::SeqCst) > 0;
        let ended = self.0.ended.load(Ordering::SeqCst);
        let is_news = under_way || ended != *seen;
        *seen = ended;
        is_news
    }
}

struct Begun<'a>(&'a Counts);

impl Begun<'_> {
    fn of(counts: &Counts) -> Begun<'_> {
        counts.under_way.fetch_add(1, Ordering::SeqCst);
        Begun(counts)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::SeqCst);
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_record_is_news_while_it_is_made_and_once_after_it() {
        let (recording, mut seen) = (Recording::default(), 0);
        assert!(!recording.is_news(&mut seen));
        recording
            .around(async {
                assert!(recording.is_news(&mut seen));
                assert!(recording.is_news(&mut seen));
            })
            .await;
        assert!(recording.is_news(&mut seen));
        assert!(!recording.is_news(&mut seen));
    }
}
