//! The lease of a shared bucket, as this cluster saw or wrote it last. It shows a store that was set
//! back, and names the lease that an operator may override.

use super::state::{StateDb, StateError};
use crate::domain::{Isolated, Lease};
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRecord {
    pub series: String,
    pub number: u64,
    pub epoch: i64,
    pub holder: String,
    pub nonce: String,
    /// Epoch of the cluster for whose question this cluster has fenced itself.
    pub fenced_for: Option<i64>,
    /// Life of the last lease that this cluster wrote as its holder, if it promised there to fence
    /// itself. Others rely on it until another lease is written.
    pub promised: Option<Duration>,
    /// True: a takeover of this cluster may have written the lease.
    pub touched: bool,
}

impl StateDb {
    /// Returns the record. None: this cluster has never seen a lease.
    pub async fn lease_record(&self) -> Result<Option<LeaseRecord>, StateError> {
        let sql = "SELECT series, number, epoch, holder, nonce, fenced_for, promised_ms, touched FROM lease";
        let rows = self
            .session()
            .query("reading the last lease", sql, &[])
            .await?;
        Ok(rows.first().map(|row| LeaseRecord {
            series: row.get(0),
            number: row.get::<_, i64>(1).unsigned_abs(),
            epoch: row.get(2),
            holder: row.get(3),
            nonce: row.get(4),
            fenced_for: row.get(5),
            promised: row
                .get::<_, Option<i64>>(6)
                .map(|ms| Duration::from_millis(ms.unsigned_abs())),
            touched: row.get(7),
        }))
    }

    /// Records a lease that was seen, or that was written for another holder. The promise of a
    /// lease that another cluster holds is not ours.
    pub async fn saw_lease(&self, lease: &Lease) -> Result<(), StateError> {
        // Two tasks may look at the same time: the later lease counts.
        let sql = "INSERT INTO lease (series, number, epoch, holder, nonce) VALUES ($1, $2, $3, $4, $5) \
                   ON CONFLICT (one) DO UPDATE SET series = excluded.series, number = excluded.number, \
                     epoch = excluded.epoch, holder = excluded.holder, nonce = excluded.nonce, \
                     promised_ms = CASE WHEN excluded.holder = (SELECT id FROM cluster) THEN lease.promised_ms END \
                   WHERE lease.series <> excluded.series OR lease.number < excluded.number";
        let number = i64::try_from(lease.number).unwrap_or(i64::MAX);
        let line = &lease.line;
        self.session()
            .execute(
                "recording the lease",
                sql,
                &[
                    &lease.series,
                    &number,
                    &line.epoch,
                    &line.holder,
                    &lease.nonce,
                ],
            )
            .await?;
        Ok(())
    }

    /// Records a lease that this cluster has written as its holder, with its promise.
    pub async fn wrote_lease(&self, lease: &Lease) -> Result<(), StateError> {
        self.saw_lease(lease).await?;
        let terms = lease.terms();
        let promised = (terms.isolated == Isolated::Fence)
            .then(|| i64::try_from(terms.ttl.as_millis()).unwrap_or(i64::MAX));
        let sql = "UPDATE lease SET promised_ms = $1";
        let doing = "recording the promise of the lease";
        self.session().execute(doing, sql, &[&promised]).await?;
        Ok(())
    }

    /// Records, before a takeover writes the lease, that it may have done so; or that nothing of it
    /// is left there.
    pub async fn touches_lease(&self, touches: bool) -> Result<(), StateError> {
        let sql = "UPDATE lease SET touched = $1";
        let doing = "recording the write of the lease";
        self.session().execute(doing, sql, &[&touches]).await?;
        Ok(())
    }

    /// Records, before the fence is set, that this cluster fences itself for a cluster that takes
    /// that epoch; None: that fence is lifted.
    pub async fn fences_for(&self, epoch: Option<i64>) -> Result<(), StateError> {
        let sql = "UPDATE lease SET fenced_for = $1";
        let doing = "recording the fence for another cluster";
        self.session().execute(doing, sql, &[&epoch]).await?;
        Ok(())
    }
}
