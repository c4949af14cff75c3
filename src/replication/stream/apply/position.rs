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

    /// Stores the recovery point in the open transaction, and commits it. It fails if another
    /// process moved the point or wrote another token.
    pub(super) async fn store(&mut self, point: ApplyPosition) -> Result<(), Gap> {
        let session = self.changes.session();
        SpareDb::of(session)
            .advance(self.point.lsn, &point, self.token)
            .await?;
        killpoint::reach("apply.before_commit");
        session.commit("committing what was applied").await?;
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
        SpareDb::of(self.changes.session()).begin_to_apply().await?;
        killpoint::reach("confirm.before_commit");
        let point = ApplyPosition {
            lsn: reached,
            commit_time: self.point.commit_time,
            last_commit_lsn: None,
        };
        self.store(point).await?;
        self.observer.applied(Applied {
            point,
            transactions: 0,
            waiting: self.ahead.waiting(),
            unavailable_changed: false,
        });
        Ok(())
    }
}
