//! Finds many rows by all their values in one statement. One statement reads the table once for a
//! whole run of rows, while one statement for each row would read it for each.

use super::changes::{Call, Kind, Values, given_anew, sized, text_of, unsent};
use super::error::Gap;
use super::pgoutput::Value;
use super::target::Target;
use crate::cluster::TextValues;
use bytes::Bytes;
use std::collections::HashSet;

type Text = Option<Bytes>;

/// Consecutive deletes, or updates of the same columns.
#[derive(Default)]
pub(super) struct Run {
    kind: Option<Kind>,
    /// Columns that the updates set.
    set: Vec<usize>,
    /// One array for each column that finds a row, then one for each that is set.
    arrays: Vec<Vec<Text>>,
    rows: u64,
    /// Rows after their update: a row of these must not be found in the same statement.
    left: HashSet<Vec<Text>>,
}

impl Run {
    /// Returns whether rows of this table are changed in runs. Package rows are changed one by one.
    pub(super) fn takes(target: &Target) -> bool {
        target.package.is_none() && !target.columns.is_empty()
    }

    pub(super) fn delete(
        &mut self,
        target: &Target,
        old: Vec<Value>,
        calls: &mut Vec<Call>,
    ) -> Result<(), Gap> {
        let old = texts(target, sized(target, old)?)?;
        if self.kind != Some(Kind::Delete) {
            self.end(target, calls);
        }
        self.add(Kind::Delete, Vec::new(), old);
        Ok(())
    }

    pub(super) fn update(
        &mut self,
        target: &Target,
        old: Vec<Value>,
        new: Vec<Value>,
        calls: &mut Vec<Call>,
    ) -> Result<(), Gap> {
        given_anew(target, &old, &new)?;
        let old = texts(target, sized(target, old)?)?;
        let sent: Vec<usize> = (0..new.len())
            .filter(|n| target.settable(*n) && new[*n] != Value::Unchanged)
            .collect();
        if sent.is_empty() {
            return Ok(());
        }
        let mut left = old.clone();
        for (column, value) in new.into_iter().enumerate() {
            if value != Value::Unchanged {
                left[column] = text_of(target, &value)?;
            }
        }
        let same = self.kind == Some(Kind::Update) && self.set == sent;
        if !same || self.left.contains(&old) {
            self.end(target, calls);
        }
        let mut values = old;
        values.extend(sent.iter().map(|column| left[*column].clone()));
        self.left.insert(left);
        self.add(Kind::Update, sent, values);
        Ok(())
    }

    fn add(&mut self, kind: Kind, set: Vec<usize>, values: Vec<Text>) {
        if self.rows == 0 {
            (self.kind, self.set) = (Some(kind), set);
            self.arrays = vec![Vec::new(); values.len()];
        }
        for (array, value) in self.arrays.iter_mut().zip(values) {
            array.push(value);
        }
        self.rows += 1;
    }

    /// Turns the collected rows into one statement.
    pub(super) fn end(&mut self, target: &Target, calls: &mut Vec<Call>) {
        let run = std::mem::take(self);
        let Some(kind) = run.kind else { return };
        calls.push(Call {
            sql: target.of_rows(kind, &run.set),
            kind,
            values: Values::Arrays(run.arrays.into_iter().map(TextValues).collect()),
            rows: run.rows,
        });
    }
}

fn texts(target: &Target, row: Vec<Value>) -> Result<Vec<Text>, Gap> {
    let texts = row.iter().map(|value| match value {
        Value::Unchanged => Err(unsent(target)),
        value => text_of(target, value),
    });
    texts.collect()
}
