//! Looks ahead at transactions that are read but not yet applied, so that their artifacts are being
//! copied long before the gate needs them, and the applier knows which transactions it may commit
//! together.

use super::gate::{Gate, RequestId};
use super::pgoutput::{Message, Old, Relation, Value, decode};
use crate::domain::Lsn;
use crate::package::PackageRow;
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// Maximum size of a transaction that is waited for completely; a larger one is applied while it
/// arrives.
const SMALL_TX_BYTES: usize = 4 << 20;
/// Maximum number of listed transactions. In a longer backlog the others are scanned when they are
/// applied.
const MAX_LISTED: usize = 50_000;

/// The facts about a transaction that are known before it is applied.
#[derive(Debug, Clone, Default)]
pub(super) struct TxSummary {
    pub final_lsn: Lsn,
    /// True: its commit has arrived.
    pub complete: bool,
    pub wants: Vec<RequestId>,
    /// True: it removes package rows, or all rows of a table.
    pub deletes_packages: bool,
    /// True: not all of its package rows were scanned.
    pub partially_scanned: bool,
    /// True: the stream ended within it, so its commit will not arrive.
    pub truncated: bool,
    bytes: usize,
}

impl TxSummary {
    /// Returns whether it is applied while it arrives.
    pub(super) fn is_large(&self) -> bool {
        self.bytes > SMALL_TX_BYTES
    }
}

#[derive(Clone, Default)]
pub(super) struct Ahead(Arc<Shared>);

#[derive(Default)]
struct Shared {
    infos: Mutex<VecDeque<TxSummary>>,
    changed: Notify,
    ended: AtomicBool,
}

impl Ahead {
    fn infos(&self) -> MutexGuard<'_, VecDeque<TxSummary>> {
        self.0.infos.lock().expect("no holder panics")
    }

    /// Returns the number of transactions that have arrived completely and are not applied.
    pub(super) fn waiting(&self) -> u64 {
        self.infos().iter().filter(|info| info.complete).count() as u64
    }

    pub(super) fn is_empty(&self) -> bool {
        self.infos().is_empty()
    }

    /// Returns the transaction with this commit position, as soon as it has arrived completely, or
    /// is too large to be waited for.
    pub(super) async fn known(&self, final_lsn: Lsn) -> TxSummary {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut infos = self.infos();
                while infos.front().is_some_and(|info| info.final_lsn < final_lsn) {
                    infos.pop_front();
                }
                match infos.front() {
                    Some(info) if info.final_lsn == final_lsn => {
                        let cut = !info.complete && self.0.ended.load(Ordering::Acquire);
                        if info.complete || info.bytes > SMALL_TX_BYTES || cut {
                            return TxSummary {
                                truncated: cut,
                                ..info.clone()
                            };
                        }
                    }
                    // A transaction is listed before it is handed on, or never.
                    _ => {
                        return TxSummary {
                            final_lsn,
                            partially_scanned: true,
                            ..TxSummary::default()
                        };
                    }
                }
            }
            changed.await;
        }
    }

    /// Returns how many of its package rows were scanned. No row that has arrived will be scanned
    /// later.
    pub(super) fn looked_at(&self, final_lsn: Lsn) -> usize {
        let infos = self.infos();
        let info = infos.iter().find(|info| info.final_lsn == final_lsn);
        info.map_or(0, |info| info.wants.len())
    }

    /// Removes an applied transaction from the list, and returns it with any requests added since
    /// `known`.
    pub(super) fn take(&self, final_lsn: Lsn) -> Option<TxSummary> {
        let mut infos = self.infos();
        infos
            .front()
            .is_some_and(|info| info.final_lsn == final_lsn)
            .then(|| infos.pop_front())?
    }
}

/// The half that sees every message as it arrives.
pub(super) struct Lookahead {
    gate: Gate,
    ahead: Ahead,
    packages: HashMap<u32, Columns>,
    /// True: the transaction that is arriving is in the list.
    listed: bool,
    /// The commit position of a transaction that is applied already.
    known: Option<Lsn>,
}

#[derive(Clone)]
struct Columns {
    named: [usize; 3],
    keys: Vec<usize>,
}

impl Lookahead {
    pub(super) fn new(gate: Gate, ahead: Ahead, known: Option<Lsn>) -> Self {
        Lookahead {
            gate,
            ahead,
            packages: HashMap::new(),
            listed: false,
            known,
        }
    }

    /// Scans a frame. A frame that cannot be read here causes an error where it is applied.
    pub(super) fn see(&mut self, frame: &Bytes) {
        let Some(kind) = frame.first() else { return };
        match kind {
            b'B' | b'C' | b'R' | b'T' => {
                if let Ok(message) = decode(frame.clone()) {
                    self.structure(message, frame.len());
                }
            }
            // Most rows are of other tables: their messages are not decoded.
            b'I' | b'D' if self.of_a_package(frame) => {
                if let Ok(message) = decode(frame.clone()) {
                    self.row(message, frame.len());
                }
            }
            _ => self.count(frame.len()),
        }
    }

    fn of_a_package(&self, frame: &Bytes) -> bool {
        let id = frame.get(1..5).and_then(|bytes| bytes.try_into().ok());
        id.is_some_and(|bytes| self.packages.contains_key(&u32::from_be_bytes(bytes)))
    }

    fn structure(&mut self, message: Message, bytes: usize) {
        match message {
            Message::Begin(begin) => {
                let mut infos = self.ahead.infos();
                self.listed = infos.len() < MAX_LISTED && self.known != Some(begin.final_lsn);
                if self.listed {
                    infos.push_back(TxSummary {
                        final_lsn: begin.final_lsn,
                        bytes,
                        ..TxSummary::default()
                    });
                }
            }
            Message::Commit(_) => {
                self.change(|info| info.complete = true);
                self.listed = false;
                self.ahead.0.changed.notify_waiters();
            }
            Message::Relation(relation) => self.relation(&relation),
            Message::Truncate(truncate) => {
                let packages = |id: &u32| self.packages.contains_key(id);
                if truncate.relations.iter().any(packages) {
                    self.change(|info| info.deletes_packages = true);
                }
            }
            _ => {}
        }
    }

    fn relation(&mut self, relation: &Relation) {
        if (relation.schema.as_str(), relation.name.as_str()) != ("public", "origin_packages") {
            return;
        }
        let at = |name: &str| relation.columns.iter().position(|c| c.name == name);
        let (Some(ident), Some(target), Some(checksum)) =
            (at("ident"), at("target"), at("checksum"))
        else {
            return;
        };
        let columns = relation.columns.iter().enumerate();
        let keys = columns.filter(|(_, c)| c.key).map(|(n, _)| n).collect();
        self.packages.insert(
            relation.id,
            Columns {
                named: [ident, target, checksum],
                keys,
            },
        );
    }

    fn row(&mut self, message: Message, bytes: usize) {
        match message {
            Message::Insert(insert) => {
                let Some(columns) = self.packages.get(&insert.relation) else {
                    return;
                };
                let last = self.listed.then(|| {
                    let infos = self.ahead.infos();
                    infos
                        .back()
                        .map(|info| (info.final_lsn, info.partially_scanned))
                });
                // Only the first rows of a transaction are scanned, and none after a row that was
                // not: so their number says which.
                match last.flatten() {
                    Some((tx, false)) if self.gate.has_room() => {
                        let named = named(&insert.new, columns.named);
                        let row = key(&insert.new, &columns.keys);
                        let want = self.gate.want(&named, row, Some(tx));
                        self.change(|info| info.wants.push(want));
                    }
                    _ => {
                        self.change(|info| info.partially_scanned = true);
                        self.gate.overlooked();
                    }
                }
            }
            Message::Delete(delete) => {
                let (Old::Key(old) | Old::Full(old)) = &delete.old;
                if let Some(columns) = self.packages.get(&delete.relation) {
                    self.gate.release(&key(old, &columns.keys));
                }
                self.change(|info| info.deletes_packages = true);
            }
            _ => {}
        }
        self.count(bytes);
    }

    fn change(&self, change: impl FnOnce(&mut TxSummary)) {
        if self.listed
            && let Some(info) = self.ahead.infos().back_mut()
        {
            change(info);
        }
    }

    fn count(&mut self, bytes: usize) {
        let mut large = false;
        self.change(|info| {
            large = info.bytes <= SMALL_TX_BYTES && info.bytes + bytes > SMALL_TX_BYTES;
            info.bytes += bytes;
        });
        if large {
            self.ahead.0.changed.notify_waiters();
        }
    }
}

impl Drop for Lookahead {
    fn drop(&mut self) {
        self.ahead.0.ended.store(true, Ordering::Release);
        self.ahead.0.changed.notify_waiters();
    }
}

/// Returns the package that a new row names. A value that was not sent is read as empty.
pub(super) fn named(row: &[Value], columns: [usize; 3]) -> PackageRow {
    let text = |column: usize| match row.get(column) {
        Some(Value::Text(text)) => String::from_utf8_lossy(text).into_owned(),
        _ => String::new(),
    };
    let [ident, target, checksum] = columns.map(text);
    PackageRow {
        ident,
        target,
        checksum,
    }
}

/// Returns the values that identify a row, joined into one.
pub(super) fn key(row: &[Value], columns: &[usize]) -> Vec<u8> {
    let mut key = Vec::new();
    for column in columns {
        if let Some(Value::Text(text)) = row.get(*column) {
            key.extend_from_slice(&(text.len() as u32).to_be_bytes());
            key.extend_from_slice(text);
        }
    }
    key
}
