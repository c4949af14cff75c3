//! The recovery point of the applied rows: it moves with them, in one transaction.

use super::BEGIN;
use crate::cluster::StateError;
use crate::killpoint;
use crate::replication::stream::Applied;
use crate::replication::stream::apply::{Applier, Point};
use crate::replication::stream::changes::{Effects, Named};
use crate::replication::stream::error::Gap;
use std::collections::HashSet;

impl Applier<'_> {
    /// Returns the removed packages that do not exist any more, under any checksum. Where a package
    /// was removed and added again in the same transaction, only the table shows which of the two
    /// came last.
    pub(super) async fn gone(&self, effects: &Effects) -> Result<Vec<Named>, Gap> {
        if effects.removed.is_empty() {
            return Ok(Vec::new());
        }
        let package = |named: &Named| (named.ident.clone(), named.target.clone());
        let removed: (Vec<String>, Vec<String>) = effects.removed.iter().map(package).unzip();
        let sql = "SELECT DISTINCT ident, target FROM public.origin_packages \
                   WHERE (ident, target) IN (SELECT * FROM unnest($1::text[], $2::text[]))";
        let doing = "looking for packages that exist again";
        let session = self.changes.session();
        let rows = session.query(doing, sql, &[&removed.0, &removed.1]).await?;
        let mut there: HashSet<_> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let mut gone = effects.removed.clone();
        gone.retain(|named| there.insert(package(named)));
        Ok(gone)
    }

    /// Stores the recovery point in the open transaction, and commits it. It fails if another
    /// process moved the point or wrote another token.
    pub(super) async fn store(&mut self, point: Point) -> Result<(), Gap> {
        let sql = "UPDATE warm_spare.recovery_point SET lsn = $1::text::pg_lsn, commit_time = $2, \
                     mark = $5::text::pg_lsn WHERE lsn = $3::text::pg_lsn AND token = $4";
        let (new, old) = (point.lsn.to_string(), self.point.lsn.to_string());
        let mark = point.mark.map(|mark| mark.to_string());
        let session = self.changes.session();
        let stored = session
            .execute(
                "storing the recovery point",
                sql,
                &[&new, &point.commit_time, &old, &self.token, &mark],
            )
            .await?;
        if stored != 1 {
            return Err(StateError::Superseded.into());
        }
        killpoint::reach("apply.before_commit");
        session
            .batch("committing what was applied", "COMMIT")
            .await?;
        killpoint::reach("apply.after_commit");
        self.point = point;
        let _ = self.durable.send(point.resume());
        Ok(())
    }

    /// Moves the recovery point over log that was read and has no changes for the spare.
    pub(super) async fn advance(&mut self) -> Result<(), Gap> {
        let reached = self.at();
        if reached <= self.point.lsn || self.unproven.is_some() {
            return Ok(());
        }
        self.changes
            .session()
            .batch("beginning to apply", BEGIN)
            .await?;
        killpoint::reach("confirm.before_commit");
        let point = Point {
            lsn: reached,
            commit_time: self.point.commit_time,
            mark: None,
        };
        self.store(point).await?;
        self.told.applied(Applied {
            point,
            transactions: 0,
            waiting: self.ahead.waiting(),
            lacking: false,
        });
        Ok(())
    }
}
