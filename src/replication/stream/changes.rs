//! Collects the row changes of the open transaction table by table, and sends many at a time.
//!
//! Tables do not wait for each other, because neither triggers nor foreign keys are active here.
//! Within a table the order is kept.

use super::error::Gap;
use super::pgoutput::{Identity, Old, Relation, Truncate, Value};
use super::runs::Run;
use super::target::{Found, Target, Types};
use crate::cluster::{ApplySession, RawRow, Statement, TextValue, TextValues};
use crate::package::PackageRow;
use crate::replication::error::ReplicationError;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

mod flush;

/// Maximum cost and maximum bytes of the changes that are sent together.
const MAX_COST: usize = 20_000;
const MAX_BYTES: usize = 2 << 20;
/// Cost of a change whose row is found by its key, or need not be found; and of a change whose row
/// is found by all its values. The more of the latter are sent at once, the less often their table
/// is read.
const COST_BY_KEY: usize = 10;
const COST_BY_ROW: usize = 1;
/// Maximum number of prepared statements that are kept: there is one for each set of columns, and
/// of NULLs.
const MAX_STATEMENTS: usize = 1000;

pub(super) enum Change {
    Insert(Vec<Value>),
    Update { old: Option<Old>, new: Vec<Value> },
    Delete(Old),
}

/// Changes of package rows in the open transaction.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub removed: Vec<PackageRow>,
    /// Rows that name other bytes, or another package, than before.
    pub renamed: Vec<PackageRow>,
    pub inserted: u64,
}

pub(super) struct Changes {
    session: ApplySession,
    /// The token of the working lock.
    token: i64,
    /// True: the session's transaction is begun.
    open: bool,
    types: Types,
    targets: HashMap<u32, Arc<Target>>,
    statements: HashMap<String, Statement>,
    queued: BTreeMap<u32, Vec<Change>>,
    number: usize,
    bytes: usize,
    pub effects: Effects,
}

impl Changes {
    /// Collects for transactions that it begins itself, as the holder of this token.
    pub(super) fn new(session: ApplySession, token: i64) -> Self {
        Changes {
            session,
            token,
            open: false,
            types: Types::new(),
            targets: HashMap::new(),
            statements: HashMap::new(),
            queued: BTreeMap::new(),
            number: 0,
            bytes: 0,
            effects: Effects::default(),
        }
    }

    /// Collects for a transaction that the session has begun, and that is not committed.
    pub(super) fn within_transaction(session: ApplySession) -> Self {
        Changes {
            open: true,
            ..Changes::new(session, 0)
        }
    }

    pub(super) fn session(&self) -> &ApplySession {
        &self.session
    }

    pub(super) fn name_type(&mut self, id: u32, schema: String, name: String) {
        self.types.insert(id, (schema, name));
    }

    /// Takes the stream's description of a table, and compares it with the spare's table before a
    /// row of it is written.
    pub(super) async fn relation(&mut self, relation: &Relation) -> Result<(), Gap> {
        let found = Target::find(&self.session, relation, &self.types).await?;
        let target = found.map_err(Gap::Schema)?;
        // Queued rows were sent under the old description.
        let same = |old: &Arc<Target>| old.identity == target.identity && old.keys == target.keys;
        let differs = self.targets.get(&relation.id).is_some_and(|old| !same(old));
        if differs && self.queued.contains_key(&relation.id) {
            self.flush().await?;
        }
        self.targets.insert(relation.id, Arc::new(target));
        Ok(())
    }

    pub(super) fn target(&self, relation: u32) -> Result<Arc<Target>, Gap> {
        let known = self.targets.get(&relation).cloned();
        known.ok_or_else(|| {
            Gap::Decoding(format!(
                "a row of relation {relation}, which was not described"
            ))
        })
    }

    pub(super) async fn add(
        &mut self,
        relation: u32,
        change: Change,
        bytes: usize,
    ) -> Result<(), Gap> {
        let target = self.target(relation)?;
        let by_row =
            matches!(target.identity, Identity::Full) && !matches!(change, Change::Insert(_));
        self.queued.entry(relation).or_default().push(change);
        self.number += if by_row { COST_BY_ROW } else { COST_BY_KEY };
        self.bytes += bytes;
        if self.number >= MAX_COST || self.bytes >= MAX_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    pub(super) async fn truncate(&mut self, truncate: &Truncate) -> Result<(), Gap> {
        self.flush().await?;
        let mut names = Vec::new();
        for relation in &truncate.relations {
            let target = self.target(*relation)?;
            if let Some(sql) = target.packages() {
                let rows = self
                    .session
                    .query("reading the rows that are removed", &sql, &[])
                    .await?;
                self.effects
                    .removed
                    .extend(rows.iter().map(|row| named(row, 0)));
            }
            names.push(target.only().to_string());
        }
        let options = [
            (truncate.restart_identity, " RESTART IDENTITY"),
            (truncate.cascade, " CASCADE"),
        ];
        let mut sql = format!("TRUNCATE {}", names.join(", "));
        for (wanted, text) in options {
            sql.push_str(if wanted { text } else { "" });
        }
        self.session.batch("emptying tables", &sql).await?;
        Ok(())
    }

    /// Returns whether the open transaction may remove a package row, or rename one.
    pub(super) fn may_remove_packages(&self) -> bool {
        let may = |(relation, changes): (&u32, &Vec<Change>)| {
            let target = self.targets.get(relation);
            target.is_none_or(|target| target.package.is_some())
                && !changes.iter().all(|c| matches!(c, Change::Insert(_)))
        };
        !self.effects.removed.is_empty()
            || !self.effects.renamed.is_empty()
            || self.queued.iter().any(may)
    }
}

/// A statement with its values, and the number of rows that it must change.
pub(super) struct Call {
    pub sql: String,
    pub kind: Kind,
    pub values: Values,
    pub rows: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Insert,
    Update,
    Delete,
}

pub(super) enum Values {
    Single(Vec<TextValue>),
    /// One array for each column.
    Arrays(Vec<TextValues>),
}

impl Effects {
    fn note(&mut self, target: &Target, call: &Call, rows: &[RawRow]) {
        if target.package.is_none() {
            return;
        }
        if call.kind == Kind::Insert {
            self.inserted += call.rows;
        }
        for row in rows {
            if call.kind == Kind::Delete {
                self.removed.push(named(row, 0));
                continue;
            }
            let (now, was) = (named(row, 0), named(row, 3));
            if now != was {
                self.removed.push(was);
                self.renamed.push(now);
                self.inserted += 1;
            }
        }
    }
}

/// Returns the package that a row names. NULL is read as an empty text, which no valid package has.
pub(super) fn named(row: &RawRow, from: usize) -> PackageRow {
    let text = |n| row.get::<_, Option<String>>(from + n).unwrap_or_default();
    PackageRow {
        ident: text(0),
        target: text(1),
        checksum: text(2),
    }
}

fn calls_for(target: &Target, changes: Vec<Change>) -> Result<Vec<Call>, Gap> {
    let mut calls = Vec::new();
    let mut inserts: Vec<Vec<Value>> = Vec::new();
    let (mut run, runs) = (Run::default(), Run::takes(target));
    for change in changes {
        match change {
            Change::Insert(new) => {
                run.end(target, &mut calls);
                inserts.push(sized(target, new)?);
                continue;
            }
            Change::Update {
                old: Some(Old::Full(old)),
                new,
            } if runs => {
                insert_all(target, &mut inserts, &mut calls)?;
                run.update(target, old, sized(target, new)?, &mut calls)?;
            }
            Change::Delete(Old::Full(old)) if runs => {
                insert_all(target, &mut inserts, &mut calls)?;
                run.delete(target, old, &mut calls)?;
            }
            Change::Update { old, new } => {
                run.end(target, &mut calls);
                insert_all(target, &mut inserts, &mut calls)?;
                calls.extend(update(target, old, sized(target, new)?)?);
            }
            Change::Delete(old) => {
                run.end(target, &mut calls);
                insert_all(target, &mut inserts, &mut calls)?;
                calls.push(delete(target, old)?);
            }
        }
    }
    run.end(target, &mut calls);
    insert_all(target, &mut inserts, &mut calls)?;
    Ok(calls)
}

pub(super) fn sized(target: &Target, values: Vec<Value>) -> Result<Vec<Value>, Gap> {
    if values.len() == target.columns.len() {
        // The columns that name a package are read as text. The others may be any bytes.
        for column in target.package.iter().flatten() {
            if let Value::Text(text) = &values[*column]
                && std::str::from_utf8(text).is_err()
            {
                let name = &target.name;
                return Err(Gap::Decoding(format!("a value of {name} is not UTF-8")));
            }
        }
        return Ok(values);
    }
    Err(Gap::Decoding(format!(
        "a row of {} with {} values for {} columns",
        target.name,
        values.len(),
        target.columns.len()
    )))
}

fn insert_all(
    target: &Target,
    inserts: &mut Vec<Vec<Value>>,
    calls: &mut Vec<Call>,
) -> Result<(), Gap> {
    let rows = std::mem::take(inserts);
    if target.columns.is_empty() {
        calls.extend(rows.iter().map(|_| Call {
            sql: target.insert(),
            kind: Kind::Insert,
            values: Values::Single(Vec::new()),
            rows: 1,
        }));
        return Ok(());
    }
    if rows.is_empty() {
        return Ok(());
    }
    let number = rows.len() as u64;
    let mut arrays = vec![TextValues::default(); target.columns.len()];
    for row in rows {
        for (array, value) in arrays.iter_mut().zip(row) {
            array.0.push(text_of(target, &value)?);
        }
    }
    calls.push(Call {
        sql: target.insert(),
        kind: Kind::Insert,
        values: Values::Arrays(arrays),
        rows: number,
    });
    Ok(())
}

/// Returns the text of a value. None: NULL.
pub(super) fn text_of(target: &Target, value: &Value) -> Result<Option<Bytes>, Gap> {
    match value {
        Value::Null => Ok(None),
        Value::Text(text) => Ok(Some(text.clone())),
        Value::Unchanged => Err(unsent(target)),
    }
}

pub(super) fn unsent(target: &Target) -> Gap {
    Gap::Decoding(format!(
        "a row of {} has no value for a column that the change needs",
        target.name
    ))
}

/// Fails if the primary's server itself gave a row a new value (`SET id = DEFAULT`): the spare
/// cannot set this value, and its server would give another one.
pub(super) fn given_anew(target: &Target, before: &[Value], new: &[Value]) -> Result<(), Gap> {
    for (column, (was, is)) in before.iter().zip(new).enumerate() {
        let known = |value: &Value| matches!(value, Value::Text(_));
        if !target.settable(column) && known(was) && known(is) && was != is {
            return Err(Gap::Decoding(format!(
                "the primary set a new value in an identity column of {} that is GENERATED ALWAYS, which cannot be repeated here",
                target.name
            )));
        }
    }
    Ok(())
}

/// Returns the statement for an update. None: no column is to be set.
fn update(target: &Target, old: Option<Old>, new: Vec<Value>) -> Result<Option<Call>, Gap> {
    let moved = matches!(old, Some(Old::Key(_)));
    if let Some(Old::Key(before) | Old::Full(before)) = &old {
        given_anew(target, before, &new)?;
    }
    let by_row = matches!(target.identity, Identity::Full);
    let set: Vec<usize> = (0..new.len())
        .filter(|n| target.settable(*n) && new[*n] != Value::Unchanged)
        .filter(|n| by_row || moved || !target.keys.contains(n))
        .collect();
    if set.is_empty() {
        return Ok(None);
    }
    let mut values: Vec<TextValue> = Vec::new();
    for column in &set {
        values.push(text(target, &new[*column])?);
    }
    let old = match old {
        Some(old) => old,
        None => Old::Key(new),
    };
    let found = find(target, old, &mut values)?;
    Ok(Some(Call {
        sql: target.update(&set, &found),
        kind: Kind::Update,
        values: Values::Single(values),
        rows: 1,
    }))
}

fn delete(target: &Target, old: Old) -> Result<Call, Gap> {
    let mut values = Vec::new();
    let found = find(target, old, &mut values)?;
    Ok(Call {
        sql: target.delete(&found),
        kind: Kind::Delete,
        values: Values::Single(values),
        rows: 1,
    })
}

fn find(target: &Target, old: Old, values: &mut Vec<TextValue>) -> Result<Found, Gap> {
    match old {
        Old::Key(row) if !target.keys.is_empty() && !matches!(target.identity, Identity::Full) => {
            let row = sized(target, row)?;
            for column in &target.keys {
                values.push(text(target, &row[*column])?);
            }
            Ok(Found::ByKey)
        }
        Old::Key(_) => Err(Gap::Decoding(format!(
            "a change of {} names no row: the table has neither key nor REPLICA IDENTITY FULL on the primary",
            target.name
        ))),
        Old::Full(row) => {
            let row = sized(target, row)?;
            let nulls: Vec<bool> = row.iter().map(|value| *value == Value::Null).collect();
            for value in row.iter().filter(|value| **value != Value::Null) {
                values.push(text(target, value)?);
            }
            Ok(Found::ByRow { nulls })
        }
    }
}

fn text(target: &Target, value: &Value) -> Result<TextValue, Gap> {
    text_of(target, value).map(TextValue)
}

impl From<crate::cluster::DatastoreError> for Gap {
    fn from(error: crate::cluster::DatastoreError) -> Self {
        Gap::Failed(ReplicationError::from(error))
    }
}
