//! Sets a fence together with the record of its reason, withdraws it, and sets it again. Each of
//! these is done so that it does not undo a promotion or a withdrawal at the same moment.

use super::setting::{FenceError, Waived, enforce_fence, fence_statement, fenced, lift_statement};
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::session::{WriteSession, quote_literal};
use crate::cluster::state_db::state::{StateDb, StateError};
use crate::config::Datastore;
use crate::domain::{EventKind, Role, Side};
use crate::killpoint;
use tokio_postgres::types::ToSql;

/// Returns the number of the transaction that set a fence, or of a later one if no client can have
/// written between the two. The record of the fence is as old as its last change, and so is the
/// setting, which somebody may have removed for a while. The older of the two counts. None: the
/// database is not fenced. `session` is a session on the state database.
pub async fn fence_number_of(
    session: &WriteSession,
    database: &str,
) -> Result<Option<String>, DatastoreError> {
    let sql = "SELECT number::text FROM ( \
                 SELECT s.xmin AS number FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase \
                 WHERE d.datname = $1 AND s.setrole = 0 UNION ALL SELECT xmin FROM fence) set_by \
               ORDER BY age(number) DESC LIMIT 1";
    let doing = "looking when the fence was set";
    let rows = session.rows(doing, sql, &[&database]).await?;
    rows.first().map(|row| row.get(0)).transpose()
}

impl StateDb {
    /// Writes the setting and the record of its reason, in one transaction.
    pub async fn record_fence(
        &self,
        database: &str,
        epoch: i64,
        by_cluster: &str,
        settled: bool,
    ) -> Result<(), StateError> {
        let recorded = async {
            let session = &self.session;
            session.batch("beginning the fence", "BEGIN").await?;
            self.not_overtaken(epoch, by_cluster).await?;
            // A fence that is recorded but not set was lifted by somebody. A final fence that finds
            // neither record nor setting comes late: this cluster was set back to a copy from
            // before its fence, and was open since then.
            let sql = concat!(
                "WITH old AS (DELETE FROM fence RETURNING *), same AS (SELECT * FROM old WHERE epoch = $1 AND by_cluster = $2) \
                 INSERT INTO fence (epoch, by_cluster, since, settled, lifted) \
                 SELECT $1, $2, coalesce((SELECT min(since) FROM old WHERE epoch = $1), now()), \
                   $3 OR coalesce((SELECT bool_or(settled) FROM same), false), \
                   coalesce((SELECT bool_or(lifted) FROM same), false) OR (EXISTS (SELECT FROM same) AND NOT ",
                fenced!("$4"),
                ") OR ($3 AND NOT EXISTS (SELECT FROM old) AND NOT ",
                fenced!("$4"),
                ")"
            );
            let is: [&(dyn ToSql + Sync); 4] = [&epoch, &by_cluster, &settled, &database];
            session.execute("recording the fence", sql, &is).await?;
            let set = fence_statement(database);
            session.batch("setting the fence", &set).await?;
            session.batch("committing the fence", "COMMIT").await?;
            Ok::<(), StateError>(())
        };
        self.or_roll_back(recorded.await).await
    }

    /// Checks, within the transaction that sets a fence, that no cluster has taken that epoch, or a
    /// later one, on this cluster.
    async fn not_overtaken(&self, epoch: i64, by_cluster: &str) -> Result<(), StateError> {
        let sql = "SELECT role, epoch FROM cluster FOR UPDATE";
        let doing = "reading the role that is to be fenced";
        let row = self.session.row(doing, sql, &[]).await?;
        let (role, has): (Option<Role>, i64) = (row.get(0)?, row.get(1)?);
        if role == Some(Role::Primary) && has >= epoch {
            return Err(StateError::Overtaken {
                side: self.session.side(),
                text: format!(
                    "the cluster that is to be fenced under epoch {epoch} is the primary of epoch {has} by now"
                ),
            });
        }
        let sql = "SELECT epoch, by_cluster FROM fence \
                   WHERE epoch > $1 OR (epoch = $1 AND by_cluster <> $2)";
        let rows = self
            .session
            .query(doing, sql, &[&epoch, &by_cluster])
            .await?;
        match rows.first() {
            None => Ok(()),
            Some(row) => Err(StateError::Overtaken {
                side: self.session.side(),
                text: format!(
                    "the cluster that is to be fenced under epoch {epoch} is fenced by cluster {} under epoch {}",
                    row.get::<_, String>(1),
                    row.get::<_, i64>(0)
                ),
            }),
        }
    }

    /// Withdraws a fence under which no cluster was promoted; only the cluster that set it knows
    /// that. A fence of another cluster, of another epoch, or of a promotion that was committed in
    /// the meantime, stays.
    pub async fn withdraw_fence(
        &self,
        database: &str,
        epoch: i64,
        by_cluster: &str,
    ) -> Result<bool, StateError> {
        let withdrawn = async {
            let session = &self.session;
            session.batch("beginning to withdraw", "BEGIN").await?;
            let sql = "DELETE FROM fence WHERE epoch = $1 AND by_cluster = $2 AND NOT settled";
            let found = session
                .execute("withdrawing the fence", sql, &[&epoch, &by_cluster])
                .await?;
            if found > 0 {
                let lift = lift_statement(database);
                session.batch("lifting the fence", &lift).await?;
            }
            session.batch("committing the withdrawal", "COMMIT").await?;
            Ok::<bool, StateError>(found > 0)
        };
        self.or_roll_back(withdrawn.await).await
    }

    /// Fences a primary that can renew its lease no more, by its own epoch, which is
    /// returned. None: another fence is set already, or this cluster is no primary.
    pub async fn record_own_fence(&self, database: &str) -> Result<Option<i64>, StateError> {
        let recorded = async {
            let session = &self.session;
            session.batch("beginning the fence", "BEGIN").await?;
            let sql = "INSERT INTO fence (epoch, by_cluster, since, settled, lifted) \
                       SELECT epoch, id, now(), false, false FROM cluster \
                       WHERE role = 'primary' AND NOT EXISTS (SELECT FROM fence) FOR UPDATE RETURNING epoch";
            let made = session.query("recording the fence", sql, &[]).await?;
            let epoch = made.first().map(|row| row.get(0));
            if epoch.is_some() {
                let set = fence_statement(database);
                session.batch("setting the fence", &set).await?;
            }
            session.batch("committing the fence", "COMMIT").await?;
            Ok::<Option<i64>, StateError>(epoch)
        };
        self.or_roll_back(recorded.await).await
    }

    async fn or_roll_back<T>(&self, done: Result<T, StateError>) -> Result<T, StateError> {
        if done.is_err() {
            let _ = self.session.batch("giving it up", "ROLLBACK").await;
        }
        done
    }

    /// Sets a spare's fence again, unless it is not a spare any more: a promotion may be in
    /// progress. It is one statement, because the session has other users. `finish_fence` must
    /// follow, whatever process is killed before it.
    pub async fn fence_if_spare(&self, database: &str) -> Result<(), StateError> {
        let sql = format!(
            "DO $$ BEGIN \
               UPDATE cluster SET fence_begun = true WHERE role = 'spare'; \
               IF FOUND THEN EXECUTE {}; END IF; \
             END $$",
            quote_literal(&fence_statement(database))
        );
        self.session.batch("setting the fence", &sql).await?;
        killpoint::reach("fence.set_again");
        Ok(())
    }

    /// Enforces a spare's fence that was set again. Until then, sessions that began before it may
    /// write.
    pub async fn finish_fence(&self, local: &Datastore, database: &str) -> Result<(), FenceError> {
        self.enforce(local, database).await?;
        let sql = "UPDATE cluster SET fence_begun = false WHERE fence_begun";
        Ok(self.session.batch("finishing the fence", sql).await?)
    }

    /// Enforces the local fence, and keeps an event of the roles that it waives.
    pub(super) async fn enforce(
        &self,
        local: &Datastore,
        database: &str,
    ) -> Result<(), FenceError> {
        let waived = enforce_fence(&self.session, local, database).await?;
        self.note_waived(Side::Local, &waived, database).await?;
        Ok(())
    }

    /// Keeps an event of the roles that a fence waives, on either side.
    pub async fn note_waived(
        &self,
        side: Side,
        waived: &Waived,
        database: &str,
    ) -> Result<(), DatastoreError> {
        let Some(text) = waived.describe(side, database) else {
            return Ok(());
        };
        log::warn!("{text}");
        match self.event(EventKind::Fence, &text, "").await {
            Err(StateError::Datastore(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// Sets the fence's setting again after somebody has lifted it, unless its record was withdrawn
    /// at this very moment.
    pub async fn fence_if_recorded(&self, database: &str) -> Result<(), StateError> {
        let sql = format!(
            "DO $$ BEGIN \
               LOCK TABLE fence IN SHARE ROW EXCLUSIVE MODE; \
               IF EXISTS (SELECT FROM fence) THEN EXECUTE {}; UPDATE fence SET lifted = true; END IF; \
             END $$",
            quote_literal(&fence_statement(database))
        );
        Ok(self.session.batch("setting the fence", &sql).await?)
    }
}
