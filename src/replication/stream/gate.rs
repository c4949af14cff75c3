//! The gate of the stream: every package row that is read ahead of time requests its artifact, and
//! its transaction is admitted when all its requests are decided. One job at a time works on a key,
//! in the order of the stream.

use super::StreamObserver;
use crate::cluster::{DatastoreError, LocalCluster, WriteSession};
use crate::config::Config;
use crate::domain::{Lsn, MissingReason};
use crate::package::{Checksum, PackageRow};
use crate::replication::artifact::carrier::Carrier;
use crate::replication::artifact::round::Swap;
use crate::replication::error::ReplicationError;
use admission::visible;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;

mod admission;
mod missing;
mod order;
mod ticket;

pub(super) use ticket::{Ticket, Waiters};

/// Maximum number of requests that are made ahead of time; later rows are scanned when they are
/// applied.
const MAX_REQUESTS: usize = 4096;
/// Maximum number of deletions that are remembered for rows that were not scanned.
const MAX_DELETIONS: usize = 100_000;
const MIN_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(5);

pub(super) type RequestId = u64;

/// A handle of the gate. The jobs end with the last handle.
#[derive(Clone)]
pub(super) struct Gate {
    shared: Arc<Shared>,
    jobs: Arc<Mutex<JoinSet<()>>>,
}

struct Shared {
    carrier: Carrier,
    grace: Duration,
    most: usize,
    copies: Semaphore,
    /// Sessions on the database that Builder sees, if there is one; on the database whose rows are
    /// written; and on the state database.
    visible: Option<WriteSession>,
    rows: WriteSession,
    state: WriteSession,
    observer: Arc<dyn StreamObserver>,
    /// True: the primary's history is proven to continue the spare's. Before that nothing is
    /// copied.
    proven: watch::Receiver<bool>,
    table: Mutex<Table>,
    changed: Notify,
    /// A later change in the stream deletes the row of some job.
    released: Notify,
}

#[derive(Default)]
struct Table {
    next: RequestId,
    wants: HashMap<RequestId, ArtifactRequest>,
    /// The requests for each key; the first one is being worked on.
    keys: HashMap<String, VecDeque<RequestId>>,
    rows: HashMap<Vec<u8>, Vec<RequestId>>,
    /// Keys of the open transaction whose requests are decided and removed.
    named: HashSet<String>,
    /// True: a waiting row was not scanned. `deleted` has the rows whose deletion was seen since,
    /// which may be such rows.
    overlooked: bool,
    deleted: HashSet<Vec<u8>>,
    /// A fault, with the request that had it first: the success of another request does not end it.
    trouble: Option<(RequestId, Arc<ReplicationError>)>,
}

struct ArtifactRequest {
    /// None: the row names no possible artifact.
    item: Option<Item>,
    row: Vec<u8>,
    /// Commit position of its transaction.
    tx: Option<Lsn>,
    begun: bool,
    /// True: the row is deleted later in the stream.
    released: bool,
    settled: Option<Admission>,
}

#[derive(Clone)]
struct Item {
    key: String,
    checksum: Checksum,
    ident: String,
    target: String,
}

/// The result of a request.
#[derive(Debug, Clone)]
pub(super) enum Admission {
    Here,
    /// Other bytes are under the key; the new ones are stored beside them.
    Staged(Swap),
    /// The row is admitted without its artifact; `quiet`: because it is deleted again at once.
    Unavailable {
        key: String,
        checksum: String,
        reason: MissingReason,
        quiet: bool,
    },
    /// The fault is not transient: it must be reported.
    Failed(Arc<ReplicationError>),
}

impl Gate {
    pub(super) async fn open(
        config: &Config,
        carrier: Carrier,
        database: &str,
        observer: Arc<dyn StreamObserver>,
        proven: watch::Receiver<bool>,
    ) -> Result<Gate, ReplicationError> {
        let state = LocalCluster::of(config).state_session().await?;
        // A record that is lost when the server is killed only means that an object is read once
        // more.
        state.commit_lazily().await?;
        let visible = visible(config).await?;
        let rows = LocalCluster::of(config).database(database).await?;
        let shared = Shared {
            carrier,
            grace: config.replication.gate_grace,
            most: config.replication.copies,
            copies: Semaphore::new(config.replication.copies),
            visible,
            rows,
            state,
            observer,
            proven,
            table: Mutex::default(),
            changed: Notify::new(),
            released: Notify::new(),
        };
        Ok(Gate {
            shared: Arc::new(shared),
            jobs: Arc::default(),
        })
    }

    /// Waits until one of its sessions has ended. Without it nothing can be decided any more, and
    /// every request waits.
    pub(super) fn ended(&self) -> impl Future<Output = DatastoreError> + Send + 'static {
        let shared = &self.shared;
        let visible = shared.visible.as_ref().map(|session| session.ended());
        let (rows, state) = (shared.rows.ended(), shared.state.ended());
        async move {
            let visible = async {
                match visible {
                    Some(ended) => ended.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                error = visible => error,
                error = rows => error,
                error = state => error,
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table()
    }

    pub(super) fn has_room(&self) -> bool {
        self.table().wants.len() < MAX_REQUESTS
    }

    /// Requests the artifact of a row. `row` identifies the row among all others, as its deletion
    /// does. `tx` is the position of its transaction's commit; None: it belongs to the transaction
    /// that is being applied, and goes before all others.
    pub(super) fn want(&self, named: &PackageRow, row: Vec<u8>, tx: Option<Lsn>) -> RequestId {
        let item = item_of(named);
        let late = item.as_ref().map(|item| item.key.clone());
        let mut table = self.table();
        table.next += 1;
        let id = table.next;
        let first = match (&item, tx) {
            (Some(item), Some(_)) => {
                let queue = table.keys.entry(item.key.clone()).or_default();
                queue.push_back(id);
                queue.front() == Some(&id)
            }
            (Some(item), None) => table.queue_late(&item.key, id),
            (None, _) => false,
        };
        let settled = item.is_none().then(|| Admission::Unavailable {
            key: key_of(named),
            checksum: String::new(),
            reason: MissingReason::Unsound,
            quiet: false,
        });
        let released = tx.is_none() && table.deleted.remove(&row);
        table.rows.entry(row.clone()).or_default().push(id);
        table.wants.insert(
            id,
            ArtifactRequest {
                item,
                row,
                tx,
                begun: false,
                released,
                settled,
            },
        );
        if let (true, Some(key), None) = (first, &late, tx) {
            table.late_ones_first(key);
        }
        drop(table);
        if first {
            self.begin(id);
        }
        id
    }

    /// Notes that the row is deleted later in the stream: a request for its artifact need not wait
    /// for long.
    pub(super) fn release(&self, row: &[u8]) {
        let mut table = self.table();
        let ids = table.rows.get(row).cloned().unwrap_or_default();
        if ids.is_empty() && table.overlooked && table.deleted.len() < MAX_DELETIONS {
            table.deleted.insert(row.to_vec());
        }
        for id in ids {
            if let Some(want) = table.wants.get_mut(&id) {
                want.released = true;
            }
        }
        drop(table);
        self.shared.released.notify_waiters();
    }

    /// Notes that a row has arrived that is not scanned before it is applied.
    pub(super) fn overlooked(&self) {
        self.table().overlooked = true;
    }

    /// Forgets the deletions, because no transaction waits any more.
    fn forget_deletions(&self) {
        let mut table = self.table();
        table.overlooked = false;
        table.deleted.clear();
    }

    /// Returns the results of these requests. None: one of them is not decided yet.
    fn settled(&self, ids: &[RequestId]) -> Option<Vec<Admission>> {
        let table = self.table();
        ids.iter()
            .map(|id| table.wants.get(id)?.settled.clone())
            .collect()
    }

    /// Returns the keys of those requests whose artifacts are here.
    fn keys_here(&self, ids: &[RequestId]) -> Vec<String> {
        let table = self.table();
        let wants = ids.iter().filter_map(|id| table.wants.get(id));
        wants
            .filter(|want| matches!(want.settled, Some(Admission::Here)))
            .filter_map(|want| Some(want.item.as_ref()?.key.clone()))
            .collect()
    }

    /// Waits for all of them. `on_trouble` is called with a fault that keeps them waiting, and at
    /// the end of it.
    async fn wait(
        &self,
        ids: &[RequestId],
        mut on_trouble: impl FnMut(Option<&Arc<ReplicationError>>),
    ) -> Vec<Admission> {
        let mut told_of: Option<Arc<ReplicationError>> = None;
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(outcomes) = self.settled(ids) {
                if told_of.is_some() {
                    on_trouble(None);
                }
                return outcomes;
            }
            let trouble = self.table().trouble.clone().map(|(_, error)| error);
            match (&trouble, &told_of) {
                (Some(new), Some(old)) if Arc::ptr_eq(new, old) => {}
                (None, None) => {}
                _ => on_trouble(trouble.as_ref()),
            }
            told_of = trouble;
            changed.await;
        }
    }

    /// Removes these requests after their transaction was committed, and starts the next request
    /// queued for each key.
    fn forget(&self, ids: &[RequestId]) {
        let mut next = Vec::new();
        let mut table = self.table();
        for id in ids {
            let Some(want) = table.wants.remove(id) else {
                continue;
            };
            if let Some(rows) = table.rows.get_mut(&want.row) {
                rows.retain(|other| other != id);
                if rows.is_empty() {
                    table.rows.remove(&want.row);
                }
            }
            let Some(item) = want.item else { continue };
            let Some(queue) = table.keys.get_mut(&item.key) else {
                continue;
            };
            let was_first = queue.front() == Some(id);
            queue.retain(|other| other != id);
            match queue.front() {
                Some(first) if was_first => next.push(*first),
                Some(_) => {}
                None => {
                    table.keys.remove(&item.key);
                }
            }
        }
        drop(table);
        next.into_iter().for_each(|id| self.begin(id));
    }

    /// Removes these requests before their transaction is committed, because they are decided. Only
    /// their keys stay named.
    fn shrink(&self, ids: &[RequestId]) {
        let mut table = self.table();
        for id in ids {
            let item = table.wants.get(id).and_then(|want| want.item.clone());
            table.named.extend(item.map(|item| item.key));
        }
        drop(table);
        self.forget(ids);
    }

    /// Forgets these keys, because their transaction is committed.
    fn forget_shrunk(&self) {
        self.table().named.clear();
    }

    /// Claims a key that no row in the stream names now. Until the claim is dropped, new requests
    /// for the key wait.
    pub(super) fn claim(&self, key: &str) -> Option<Claim> {
        let mut table = self.table();
        if table.keys.contains_key(key) || table.named.contains(key) {
            return None;
        }
        table.next += 1;
        let id = table.next;
        table.keys.insert(key.to_string(), VecDeque::from([id]));
        Some(Claim {
            gate: self.clone(),
            key: key.to_string(),
            id,
        })
    }

    fn begin(&self, id: RequestId) {
        let item = self.table().wants.get_mut(&id).and_then(|want| {
            let first = !std::mem::replace(&mut want.begun, true);
            want.item.clone().filter(|_| first)
        });
        let Some(item) = item else { return };
        let shared = self.shared.clone();
        let mut jobs = self.jobs.lock().expect("no holder panics");
        while jobs.try_join_next().is_some() {}
        jobs.spawn(async move {
            let mut turn = Some((id, item));
            // The same transaction may name the key again and again, and waits for all of these
            // requests.
            while let Some((id, item)) = turn {
                let (outcome, checked) = shared.work(id, &item).await;
                turn = shared.decided(id, outcome);
                shared.changed.notify_waiters();
                if let Some(checked) = checked {
                    shared.record(checked).await;
                }
            }
        });
    }
}

/// A key that is reserved for the holder of this claim.
pub(super) struct Claim {
    gate: Gate,
    key: String,
    id: RequestId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.gate.table();
        if let Some(queue) = table.keys.get_mut(&self.key) {
            queue.retain(|other| *other != self.id);
        }
        table.late_ones_first(&self.key);
        let next = table.keys.get(&self.key);
        let next = next.and_then(|queue| queue.front().copied());
        if next.is_none() {
            table.keys.remove(&self.key);
        }
        drop(table);
        if let Some(id) = next {
            self.gate.begin(id);
        }
    }
}

fn item_of(named: &PackageRow) -> Option<Item> {
    let (key, checksum) = named.artifact()?;
    Some(Item {
        key,
        checksum,
        ident: named.ident.clone(),
        target: named.target.clone(),
    })
}

/// Returns the key that a row names, or else the row's own name, as in `unavailable`.
pub(super) fn key_of(named: &PackageRow) -> String {
    match named.artifact() {
        Some((key, _)) => key,
        None => named.name(),
    }
}
