//! Sends the collected changes to the spare's server.

use super::{Call, Changes, Kind, MAX_STATEMENTS, Values, calls_for};
use crate::cluster::{ApplySession, RawRow, SpareDb, Statement, ToSql};
use crate::replication::stream::error::Gap;
use crate::replication::stream::target::Target;
use futures_util::future::{try_join_all, try_join3};
use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

type Sent<'a> = Pin<Box<dyn Future<Output = Result<Vec<RawRow>, Gap>> + Send + 'a>>;

impl Changes {
    /// Sends the collected changes, and BEGIN before them if no transaction is open.
    pub(in crate::replication::stream) async fn flush(&mut self) -> Result<(), Gap> {
        self.flush_with(async |_| Ok(())).await
    }

    /// Sends the collected changes and then `last`. Nothing waits for the answer to BEGIN or to
    /// another statement: all of them together take one round trip.
    pub(in crate::replication::stream) async fn flush_with(
        &mut self,
        last: impl AsyncFnOnce(&ApplySession) -> Result<(), Gap>,
    ) -> Result<(), Gap> {
        let calls = self.calls().await?;
        let session = &self.session;
        let begin = async {
            match self.open {
                true => Ok(()),
                false => Ok(SpareDb::of(session).begin_to_apply(self.token).await?),
            }
        };
        let sent = calls.iter().map(|(target, statement, call)| -> Sent<'_> {
            Box::pin(send(session, target, statement, call))
        });
        // Each is sent when it is polled first, which is in this order.
        let ((), done, ()) = try_join3(begin, try_join_all(sent), last(session)).await?;
        self.open = true;
        for ((target, _, call), rows) in calls.iter().zip(done) {
            self.effects.note(target, call, &rows);
        }
        Ok(())
    }

    /// Commits the open transaction.
    pub(in crate::replication::stream) async fn commit(&mut self) -> Result<(), Gap> {
        self.session.commit("committing what was applied").await?;
        self.open = false;
        Ok(())
    }

    /// Takes the collected changes as statements. Those that are new to the server are prepared
    /// together.
    async fn calls(&mut self) -> Result<Vec<(Arc<Target>, Statement, Call)>, Gap> {
        let queued = std::mem::take(&mut self.queued);
        (self.number, self.bytes) = (0, 0);
        let mut calls = Vec::new();
        for (relation, changes) in queued {
            let target = self.target(relation)?;
            let of_table = calls_for(&target, changes)?.into_iter();
            calls.extend(of_table.map(|call| (target.clone(), call)));
        }
        if self.statements.len() >= MAX_STATEMENTS {
            self.statements.clear();
        }
        let unknown = |sql: &&str| !self.statements.contains_key(*sql);
        let new = calls.iter().map(|(_, call)| call.sql.as_str());
        let new: BTreeSet<&str> = new.filter(unknown).collect();
        let session = &self.session;
        let made = new.iter().map(async |sql| {
            let made = session.prepare("preparing a change", sql).await?;
            Ok::<_, Gap>((sql.to_string(), made))
        });
        let made = try_join_all(made).await?;
        self.statements.extend(made);
        let statement = |sql: &str| self.statements[sql].clone();
        let calls = calls.into_iter();
        Ok(calls
            .map(|(target, call)| (target, statement(&call.sql), call))
            .collect())
    }
}

async fn send(
    session: &ApplySession,
    target: &Target,
    statement: &Statement,
    call: &Call,
) -> Result<Vec<RawRow>, Gap> {
    let values: Vec<&(dyn ToSql + Sync)> = match &call.values {
        Values::Single(values) => values.iter().map(|v| v as &(dyn ToSql + Sync)).collect(),
        Values::Arrays(arrays) => arrays.iter().map(|v| v as &(dyn ToSql + Sync)).collect(),
    };
    let doing = match call.kind {
        Kind::Insert => "applying an insert",
        Kind::Update => "applying an update",
        Kind::Delete => "applying a delete",
    };
    let (changed, rows) = if target.package.is_some() && call.kind != Kind::Insert {
        let rows = session.rows(doing, statement, &values).await;
        let rows = rows.map_err(|error| Gap::statement(&target.name, error))?;
        (rows.len() as u64, rows)
    } else {
        let changed = session.run(doing, statement, &values).await;
        let changed = changed.map_err(|error| Gap::statement(&target.name, error))?;
        (changed, Vec::new())
    };
    if changed != call.rows {
        return Err(Gap::Row {
            table: target.name.clone(),
            doing,
            changed,
        });
    }
    Ok(rows)
}
