//! The capability to fence the peer, and to withdraw the fence. Apart from preparation, it is the
//! only way to write on the peer.

use super::setting::{Waived, end_sessions_from_before, enforce_fence, fenced, is_fenced};
use crate::cluster::identity::system_id;
use crate::cluster::postgres::session::{WriteSession, quote_ident};
use crate::cluster::state_db::state::StateDb;
use crate::cluster::{DatastoreError, FenceError, StateError};
use crate::config::Datastore;
use crate::domain::{Lsn, Side};
use crate::killpoint;
use tokio_postgres::types::PgLsn;

/// A session in the peer's own database `warm_spare`, which is created if it does not exist.
pub struct PeerFence {
    state: StateDb,
    to: Datastore,
}

impl PeerFence {
    /// Opens the session. None: that address leads to another server than the intended one.
    pub(in crate::cluster) async fn open(
        to: &Datastore,
        system_id: &str,
    ) -> Result<Option<PeerFence>, StateError> {
        let before = WriteSession::open_for_maintenance_on(Side::Peer, to).await?;
        if self::system_id(&before).await? != system_id {
            return Ok(None);
        }
        let state = StateDb::open_from(&before, to).await?;
        // Each connection may lead to another server, and this one is used for writing.
        if self::system_id(&state.session).await? != system_id {
            return Ok(None);
        }
        Ok(Some(PeerFence {
            state,
            to: to.clone(),
        }))
    }

    /// Sets fence and record in one transaction. Then every older session is ended, and a plain one
    /// must fail to write.
    pub async fn raise(&self, epoch: i64, by: &str, settled: bool) -> Result<Waived, RaiseError> {
        let database = &self.to.database;
        self.state
            .record_fence(database, epoch, by, settled)
            .await?;
        killpoint::reach("fence.recorded");
        let session = &self.state.session;
        Ok(enforce_fence(session, &self.to, database).await?)
    }

    /// Returns whether our fence of that epoch is set there, and was never lifted.
    pub async fn stands(&self, epoch: i64, by: &str) -> Result<bool, StateError> {
        let record = self.state.fence_record().await?;
        let ours = record
            .is_some_and(|fence| fence.epoch == epoch && fence.by_cluster == by && !fence.lifted);
        Ok(ours && is_fenced(&self.state.session, &self.to.database).await?)
    }

    /// Makes the fence final: its epoch is committed, so there is nothing to withdraw any more.
    pub async fn settle(&self, epoch: i64, by: &str) -> Result<(), StateError> {
        // If the fence is unchanged, only the word is added: the age of the setting shows which
        // changes came after it.
        let sql = concat!(
            "WITH final AS (UPDATE fence SET settled = true \
               WHERE epoch = $1 AND by_cluster = $2 AND NOT settled RETURNING 1) \
             SELECT ",
            fenced!("$3"),
            " AND (EXISTS (SELECT FROM final) OR EXISTS (SELECT FROM fence WHERE epoch = $1 AND by_cluster = $2 AND settled))"
        );
        let database = &self.to.database;
        let doing = "making the fence final";
        let session = &self.state.session;
        let row = session
            .query_one(doing, sql, &[&epoch, &by, database])
            .await?;
        if row.get(0) {
            return Ok(());
        }
        self.state
            .record_fence(&self.to.database, epoch, by, true)
            .await
    }

    /// Withdraws the fence. False: there was no such fence of ours.
    pub async fn withdraw(&self, epoch: i64, by: &str) -> Result<bool, StateError> {
        self.state
            .withdraw_fence(&self.to.database, epoch, by)
            .await
    }

    /// Ends the sessions that began under the fence. They are read-only for as long as they live,
    /// so a connection pool must connect again. A provider's session may stay: it writes nothing of
    /// Builder's.
    pub async fn refresh(&self) -> Result<(), FenceError> {
        let ended = end_sessions_from_before(&self.state.session, &self.to.database).await;
        ended.map(drop)
    }

    /// Writes a message of ours in the fenced database, and returns its position: everything that
    /// was committed before has a lower position. The end of the log would not do: an idle server
    /// may flush, and so send, the rest much later.
    pub async fn mark(&self, epoch: i64) -> Result<Lsn, DatastoreError> {
        let session = WriteSession::open_on(Side::Peer, &self.to, &self.to.database).await?;
        let text = format!("epoch {epoch}");
        let sql = "SELECT pg_logical_emit_message(true, 'warm_spare', $1)";
        let doing = "writing the last message";
        let row = session.query_one(doing, sql, &[&text]).await?;
        Ok(Lsn(row.get::<_, PgLsn>(0).into()))
    }

    pub async fn drop_publication(&self, name: &str) -> Result<(), DatastoreError> {
        let session = WriteSession::open_on(Side::Peer, &self.to, &self.to.database).await?;
        let sql = format!("DROP PUBLICATION IF EXISTS {}", quote_ident(name));
        session.batch("dropping our publication", &sql).await
    }
}

/// Raising the fence has both kinds of failure.
#[derive(Debug, thiserror::Error)]
pub enum RaiseError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Fence(#[from] FenceError),
}
