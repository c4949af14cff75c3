//! Reads the slot from the recovery point to its end. It never confirms what it has read, so a
//! process that is stopped in the middle can read it again.

use crate::cluster::{
    Arrived, DivergedRow, DivergenceBook, FoundDivergence, LocalCluster, Promotion, WalStream,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Lsn};
use crate::replication::ReplicationError;
use crate::replication::stream::pgoutput::{
    DecodeError, Message, Old, Relation, Truncate, Value, decode,
};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use std::collections::HashMap;
use std::time::Duration;

/// Interval between keepalive requests to the server, which ends a silent session.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Time limit for silence of the server, which is silent while it decodes a large transaction.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(300);
const PREFIX: &str = "warm_spare";

/// Types whose text is a JSON number: int8, int2, int4.
const NUMBERS: [u32; 3] = [20, 21, 23];
const BOOL: u32 = 16;

pub(super) async fn read(
    config: &Config,
    promotion: &Promotion,
    from: Lsn,
    book: &mut DivergenceBook,
) -> Result<FoundDivergence, ReplicationError> {
    let mark = mark_the_end(config, promotion.epoch).await?;
    // The stream starts at the slot's position: transactions that the successor has are read too,
    // because the server may have been replaced by an older copy.
    let mut stream = LocalCluster::of(config)
        .replication()
        .await?
        .start(&promotion.slot, &promotion.publication, Lsn(0))
        .await?;
    let mut reading = Reading {
        from,
        mark,
        book,
        relations: HashMap::new(),
        skipped: false,
        changed: false,
        begun: None,
        last_skipped: None,
        at_the_point: None,
        transactions: 0,
    };
    let end = reading.run(&mut stream).await?;
    let other = reading.at_the_point.or(reading.last_skipped);
    if let (Some(here), Some(there)) = (other, promotion.commit_time)
        && (here > there || reading.at_the_point.is_some_and(|time| time != there))
    {
        return Err(ReplicationError::Precondition {
            check: ErrorCode::SetBack,
            text: format!(
                "this server was set back to an older copy and has grown since: the last transaction before {from} was committed at {here} here, and the new primary has one of {there} at that place"
            ),
            next_step: String::new(),
        });
    }
    reading.book.flush().await?;
    Ok(FoundDivergence {
        exact: true,
        reason: format!("every change that slot {} holds", promotion.slot),
        to: end.to_string(),
        transactions: reading.transactions,
    })
}

/// Writes a message into the log and returns its text. When the message arrives, everything
/// committed before it has arrived. Positions alone do not show that, because an idle server may
/// have written a little more than it sends. The message has a transaction of its own, which is
/// flushed at once.
async fn mark_the_end(config: &Config, epoch: i64) -> Result<String, ReplicationError> {
    let session = LocalCluster::of(config).builder().await?;
    let now = chrono::Utc::now().timestamp_nanos_opt().unwrap_or_default();
    let mark = format!("divergence {epoch} {} {now}", std::process::id());
    session.emit_message(PREFIX, &mark).await?;
    Ok(mark)
}

struct Reading<'a> {
    from: Lsn,
    mark: String,
    book: &'a mut DivergenceBook,
    relations: HashMap<u32, Relation>,
    /// True: the successor has the open transaction.
    skipped: bool,
    /// True: the open transaction has changed a row.
    changed: bool,
    /// Commit time of the open transaction.
    begun: Option<DateTime<Utc>>,
    /// Commit time of the last transaction that changed a row and that the successor has.
    last_skipped: Option<DateTime<Utc>>,
    /// Commit time of such a transaction that ends exactly at the successor's position.
    at_the_point: Option<DateTime<Utc>>,
    transactions: i64,
}

impl Reading<'_> {
    /// Reads up to the mark, and returns its position.
    async fn run(&mut self, stream: &mut WalStream) -> Result<Lsn, ReplicationError> {
        let mut ask = tokio::time::interval(KEEPALIVE_INTERVAL);
        let mut received = self.from;
        loop {
            let arrived = tokio::select! {
                arrived = stream.next() => arrived?,
                _ = ask.tick() => {
                    stream.judge_silence(RECEIVE_TIMEOUT).await?;
                    stream.answer(received, Lsn(0), true).await?;
                    continue;
                }
            };
            match arrived {
                Arrived::Data { bytes, end } => {
                    received = received.max(end);
                    if let Some(end) = self.take(bytes).await? {
                        return Ok(end);
                    }
                }
                Arrived::Keepalive { end, reply } => {
                    received = received.max(end);
                    if reply {
                        stream.answer(received, Lsn(0), false).await?;
                    }
                }
            }
        }
    }

    /// Takes a message. Some: the message was the mark.
    async fn take(&mut self, frame: Bytes) -> Result<Option<Lsn>, ReplicationError> {
        match decode(frame).map_err(|error: DecodeError| undecoded(error.to_string()))? {
            Message::Begin(begin) => {
                // The commit record begins before the recovery point, so it ends at the recovery
                // point or before it.
                self.skipped = begin.final_lsn < self.from;
                self.changed = false;
                self.begun = Some(begin.time);
            }
            Message::Commit(commit) => {
                self.transactions += i64::from(self.changed);
                if self.skipped && commit.end == self.from && self.last_skipped == self.begun {
                    self.at_the_point = self.begun;
                }
            }
            Message::Relation(relation) => {
                self.relations.insert(relation.id, relation);
            }
            Message::Logical(message) => {
                let is_mark = message.prefix == PREFIX && message.content == self.mark.as_bytes();
                return Ok(is_mark.then_some(message.lsn));
            }
            Message::Type(_) | Message::Origin(_) => {}
            change if !self.skipped => self.change(change).await?,
            _ => self.last_skipped = self.begun,
        }
        Ok(None)
    }

    async fn change(&mut self, message: Message) -> Result<(), ReplicationError> {
        self.changed = true;
        let (id, kind, old, new) = match message {
            Message::Insert(insert) => (insert.relation, "insert", None, Some(insert.new)),
            Message::Update(update) => (update.relation, "update", update.old, Some(update.new)),
            Message::Delete(delete) => (delete.relation, "delete", Some(delete.old), None),
            Message::Truncate(truncate) => return self.truncate(&truncate).await,
            _ => return Ok(()),
        };
        let relation = self.relation(id)?;
        let old = match &old {
            None => None,
            Some(Old::Key(values)) => Some(document(relation, values, true)?),
            Some(Old::Full(values)) => Some(document(relation, values, false)?),
        };
        let new = new
            .map(|values| document(relation, &values, false))
            .transpose()?;
        let table = full_name(relation);
        Ok(self
            .book
            .add(DivergedRow {
                table,
                kind,
                old,
                new,
            })
            .await?)
    }

    async fn truncate(&mut self, truncate: &Truncate) -> Result<(), ReplicationError> {
        for id in &truncate.relations {
            let change = DivergedRow {
                table: full_name(self.relation(*id)?),
                kind: "truncate",
                old: None,
                new: None,
            };
            self.book.add(change).await?;
        }
        Ok(())
    }

    fn relation(&self, id: u32) -> Result<&Relation, ReplicationError> {
        let known = self.relations.get(&id);
        known.ok_or_else(|| undecoded(format!("a row of relation {id}, which was not described")))
    }
}

fn full_name(relation: &Relation) -> String {
    format!("{}.{}", relation.schema, relation.name)
}

fn undecoded(text: String) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::Undecoded,
        text,
        next_step: "use the newest warm-spare".into(),
    }
}

/// Returns the row as JSON, by column; values that were not sent are left out.
fn document(relation: &Relation, values: &[Value], keys: bool) -> Result<String, ReplicationError> {
    if values.len() != relation.columns.len() {
        let (name, sent) = (full_name(relation), values.len());
        let known = relation.columns.len();
        return Err(undecoded(format!(
            "a row of {name} with {sent} values for {known} columns"
        )));
    }
    let mut row = serde_json::Map::new();
    for (column, value) in relation.columns.iter().zip(values) {
        if keys && !column.key {
            continue;
        }
        let value = match value {
            Value::Unchanged => continue,
            Value::Null => serde_json::Value::Null,
            Value::Text(text) => json(column.type_oid, &String::from_utf8_lossy(text)),
        };
        row.insert(column.name.clone(), value);
    }
    Ok(serde_json::Value::Object(row).to_string())
}

/// Returns the value as the server's `to_jsonb` does where that is simple, and otherwise as text.
fn json(type_oid: u32, text: &str) -> serde_json::Value {
    match (type_oid, text.parse::<i64>()) {
        (BOOL, _) => (text == "t").into(),
        (oid, Ok(number)) if NUMBERS.contains(&oid) => number.into(),
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::stream::pgoutput::{Column, Identity};

    fn relation() -> Relation {
        let column = |key, name: &str, type_oid| Column {
            key,
            name: name.into(),
            type_oid,
            modifier: -1,
        };
        Relation {
            id: 1,
            schema: "public".into(),
            name: "t".into(),
            identity: Identity::Default,
            columns: vec![
                column(true, "id", 20),
                column(false, "hidden", BOOL),
                column(false, "text", 25),
            ],
        }
    }

    #[test]
    fn a_row_is_told_by_column_and_what_was_not_sent_is_left_out() {
        let text = |text: &'static str| Value::Text(Bytes::from_static(text.as_bytes()));
        let row = |values: &[Value], keys| document(&relation(), values, keys).expect("a row");
        assert_eq!(
            row(&[text("9223372036854775807"), text("t"), text("7")], false),
            r#"{"hidden":true,"id":9223372036854775807,"text":"7"}"#
        );
        assert_eq!(
            row(&[text("1"), Value::Null, Value::Unchanged], false),
            r#"{"hidden":null,"id":1}"#
        );
        assert_eq!(
            row(&[text("1"), Value::Null, Value::Null], true),
            r#"{"id":1}"#
        );
        assert!(document(&relation(), &[Value::Null], false).is_err());
    }
}
