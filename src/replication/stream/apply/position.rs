//! The recovery point of the applied rows: it moves with them, in one transaction.

use crate::cluster::{ApplyPosition, BuilderDb, SpareDb};
use crate::killpoint;
use crate::package::PackageRow;
use crate::replication::stream::Applied;
use crate::replication::stream::apply::Applier;
use crate::replication::stream::changes::Effects;
use crate::replication::stream::error::Gap;
use std::collections::HashSet;

impl Applier<'_> {
    /// Returns the removed packages that do not exist any more, under any checksum. Where a package
    /// was removed and added again in the same transaction, only the table shows which of the two
    /// came last.
    pub(super) async fn gone(&self, effects: &Effects) -> Result<Vec<PackageRow>, Gap> {
        if effects.removed.is_empty() {
            return Ok(Vec::new());
        }
        let package = |row: &PackageRow| (row.ident.clone(), row.target.clone());
        let removed = effects.removed.iter();
        let removed = removed.map(|row| (row.ident.as_str(), row.target.as_str()));
        let (idents, targets): (Vec<&str>, Vec<&str>) = removed.unzip();
        let builder = BuilderDb::of(self.changes.session());
        let there = builder.packages_named(&idents, &targets).await?;
        let mut there: HashSet<_> = there.iter().map(package).collect();
        let mut gone = effects.removed.clone();
        gone.retain(|row| there.insert(package(row)));
        Ok(gone)
    }

    /// Sends the collected changes, and the recovery point in the same transaction. It fails if
    /// another process moved the point or wrote another token.
    pub(super) async fn flush_and_advance(&mut self, point: &ApplyPosition) -> Result<(), Gap> {
        let (from, token) = (self.point.lsn, self.token);
        self.changes
            .flush_with(async |session| {
                let moved = SpareDb::of(session).advance(from, point, token);
                Ok(moved.await?)
            })
            .await
    }

    /// Commits the open transaction, in which the recovery point was moved. COMMIT is not sent
    /// before the answers to all its statements are here.
    pub(super) async fn commit_at(&mut self, point: ApplyPosition) -> Result<(), Gap> {
        killpoint::reach("apply.before_commit");
        self.changes.commit().await?;
        killpoint::reach("apply.after_commit");
        self.point = point;
        let _ = self.durable.send(point.start_lsn());
        Ok(())
    }

    /// Moves the recovery point over log that was read and has no changes for the spare.
    pub(super) async fn advance(&mut self) -> Result<(), Gap> {
        let reached = self.at();
        if reached <= self.point.lsn || self.unproven.is_some() {
            return Ok(());
        }
        let point = ApplyPosition {
            lsn: reached,
            commit_time: self.point.commit_time,
            last_commit_lsn: None,
        };
        self.flush_and_advance(&point).await?;
        killpoint::reach("confirm.before_commit");
        self.commit_at(point).await?;
        self.observer.applied(Applied {
            point,
            transactions: 0,
            waiting: self.ahead.waiting(),
            unavailable_changed: false,
        });
        Ok(())
    }
}
