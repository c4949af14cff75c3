//! The history of a cluster: events, confirmations, verifications. It is limited in number, in the
//! state database.

use super::state::{StateDb, StateError};
use crate::domain::EventKind;
use chrono::{DateTime, Utc};

const EVENTS_KEPT: i64 = 1000;
const VERIFICATIONS_KEPT: i64 = 400;

/// The last time at which no change waited on the primary, and by how much its clock was ahead of
/// ours at that time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Confirmation {
    /// By the primary's clock.
    pub time: DateTime<Utc>,
    pub clock_offset_seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub time: DateTime<Utc>,
    pub kind: String,
    pub text: String,
    pub change: String,
}

/// The result of a verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerificationRecord {
    pub time: DateTime<Utc>,
    pub deep: bool,
    pub differences: i64,
    /// The recovery point that was compared.
    pub lsn: String,
}

/// The duration of a rehearsed takeover, on a clone.
#[derive(Debug, Clone, PartialEq)]
pub struct DrillRecord {
    pub time: DateTime<Utc>,
    pub ok: bool,
    pub text: String,
    /// Seconds to the first SQL write, and to the first answer of the command.
    pub write_seconds: Option<f64>,
    pub answer_seconds: Option<f64>,
}

impl StateDb {
    pub async fn record_drill(&self, drill: &DrillRecord) -> Result<(), StateError> {
        let sql = "INSERT INTO drill (time, ok, text, write_seconds, answer_seconds) VALUES ($1, $2, $3, $4, $5)";
        let d = drill;
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
            [&d.time, &d.ok, &d.text, &d.write_seconds, &d.answer_seconds];
        self.session()
            .execute("recording the drill", sql, &values)
            .await?;
        Ok(())
    }

    pub async fn last_drill(&self) -> Result<Option<DrillRecord>, StateError> {
        let sql = "SELECT time, ok, text, write_seconds, answer_seconds FROM drill ORDER BY id DESC LIMIT 1";
        let doing = "reading the last drill";
        let rows = self.session().query(doing, sql, &[]).await?;
        Ok(rows.first().map(|row| DrillRecord {
            time: row.get(0),
            ok: row.get(1),
            text: row.get(2),
            write_seconds: row.get(3),
            answer_seconds: row.get(4),
        }))
    }

    pub async fn event(&self, kind: EventKind, text: &str, change: &str) -> Result<(), StateError> {
        self.record_event(&Event {
            time: Utc::now(),
            kind: kind.to_string(),
            text: text.to_string(),
            change: change.to_string(),
        })
        .await
    }

    /// Records an event, unless it only repeats a refusal of the fuse within an hour: a refusal
    /// that lasts is one event.
    pub async fn record_event(&self, event: &Event) -> Result<(), StateError> {
        let sql = "INSERT INTO event (time, kind, text, change) SELECT $1::timestamptz, $2::text, $3::text, $4::text WHERE NOT EXISTS ( \
                     SELECT 1 FROM (SELECT * FROM event WHERE kind = $2 ORDER BY id DESC LIMIT 1) last \
                     WHERE kind = 'fuse' AND text = $3 AND change = $4 AND time > $1::timestamptz - interval '1 hour')";
        let (kind, text, change) = (&event.kind, &event.text, &event.change);
        self.session()
            .execute(
                "recording an event",
                sql,
                &[&event.time, kind, text, change],
            )
            .await?;
        let sql = "DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - $1";
        self.session()
            .execute("dropping old events", sql, &[&EVENTS_KEPT])
            .await?;
        Ok(())
    }

    /// Returns the latest events, oldest first.
    pub async fn events(&self, limit: i64) -> Result<Vec<Event>, StateError> {
        let sql = "SELECT time, kind, text, change FROM event ORDER BY id DESC LIMIT $1";
        let rows = self
            .session()
            .query("reading the events", sql, &[&limit])
            .await?;
        let events = rows.iter().rev().map(|row| Event {
            time: row.get(0),
            kind: row.get(1),
            text: row.get(2),
            change: row.get(3),
        });
        Ok(events.collect())
    }

    /// Records the confirmation, so that lag is right after a restart too, even if the primary is
    /// gone by then.
    pub async fn confirm(&self, confirmation: Confirmation) -> Result<(), StateError> {
        let sql = "WITH old AS (DELETE FROM confirmation) \
                   INSERT INTO confirmation (time, clock_offset) VALUES ($1, $2)";
        self.session()
            .execute(
                "recording the confirmation",
                sql,
                &[&confirmation.time, &confirmation.clock_offset_seconds],
            )
            .await?;
        Ok(())
    }

    pub async fn confirmation(&self) -> Result<Option<Confirmation>, StateError> {
        let sql = "SELECT time, clock_offset FROM confirmation";
        let rows = self
            .session()
            .query("reading the last confirmation", sql, &[])
            .await?;
        Ok(rows.first().map(|row| Confirmation {
            time: row.get(0),
            clock_offset_seconds: row.get(1),
        }))
    }

    pub async fn record_verification(&self, found: &VerificationRecord) -> Result<(), StateError> {
        let sql = "INSERT INTO verification (time, deep, differences, lsn) VALUES ($1, $2, $3, $4)";
        self.session()
            .execute(
                "recording the verification",
                sql,
                &[&found.time, &found.deep, &found.differences, &found.lsn],
            )
            .await?;
        let sql = "DELETE FROM verification WHERE id <= (SELECT max(id) FROM verification) - $1";
        self.session()
            .execute("dropping old verifications", sql, &[&VERIFICATIONS_KEPT])
            .await?;
        Ok(())
    }

    pub async fn last_verification(&self) -> Result<Option<VerificationRecord>, StateError> {
        let sql = "SELECT time, deep, differences, lsn FROM verification ORDER BY id DESC LIMIT 1";
        let rows = self
            .session()
            .query("reading the last verification", sql, &[])
            .await?;
        Ok(rows.first().map(|row| VerificationRecord {
            time: row.get(0),
            deep: row.get(1),
            differences: row.get(2),
            lsn: row.get(3),
        }))
    }
}
