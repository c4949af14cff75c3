//! Handles the parts of a transaction other than its rows: unavailable artifacts, removed packages,
//! bytes that change under a key, and the fuse.

use super::apply::keys;
use super::error::Gap;
use super::gate::Admission;
use crate::cluster::{BuilderDb, Lock, SpareDb, StateDb, Unavailable, WriteSession};
use crate::config::Config;
use crate::domain::Lsn;
use crate::package::{PackageRow, package_of_key};
use crate::replication::artifact::carrier::Carrier;
use crate::replication::artifact::recording::Recording;
use crate::replication::artifact::replacements;
use crate::replication::artifact::round::Swap;
use crate::replication::error::ReplicationError;
use crate::replication::fuse::{self, Shrinkage};
use std::collections::HashSet;

pub(super) struct TransactionEffects<'a> {
    config: &'a Config,
    state: &'a StateDb,
    lock: Lock,
    carrier: &'a Carrier,
    /// Keys recorded as unavailable, with the checksum of each.
    unavailable: HashSet<(String, String)>,
    /// Number of package rows; None: not counted yet. Counting takes longer the more rows there
    /// are.
    packages: Option<u64>,
    /// Another task may record unavailable artifacts too. `records_seen` belongs to it.
    recording: Recording,
    records_seen: u64,
    /// True: the list of unavailable artifacts has changed since it was last asked for.
    changed: bool,
    /// True: Builder does not see this database yet, so changes of bytes under its keys wait for
    /// the switch.
    incoming: bool,
    /// Changes of bytes under a key, collected for the switch.
    pub swaps: Vec<Swap>,
    /// Vanished packages and artifacts, collected for the switch.
    pub shrinkage: Shrinkage,
}

/// The parts of a transaction that are judged, and recorded in the same transaction as the rows.
pub(super) struct Verdict<'a> {
    pub removed: &'a [PackageRow],
    /// Keys whose artifacts are here.
    pub here: &'a [String],
    pub outcomes: &'a [Admission],
    pub inserted: u64,
    /// Number of deleted package rows, even if their package was added again.
    pub deleted: u64,
    pub end: Lsn,
    /// True: it holds several transactions of the primary.
    pub several: bool,
}

impl<'a> TransactionEffects<'a> {
    pub(super) async fn open(
        config: &'a Config,
        (state, lock): (&'a StateDb, Lock),
        carrier: &'a Carrier,
        session: &WriteSession,
        recording: Recording,
        incoming: bool,
    ) -> Result<TransactionEffects<'a>, ReplicationError> {
        let mut records_seen = 0;
        recording.is_news(&mut records_seen);
        let unavailable = SpareDb::of(session).unavailable_bytes().await?;
        Ok(TransactionEffects {
            config,
            state,
            lock,
            carrier,
            unavailable,
            packages: None,
            recording,
            records_seen,
            changed: false,
            incoming,
            swaps: Vec::new(),
            shrinkage: Shrinkage::default(),
        })
    }

    /// Reads the list of unavailable artifacts again, if another task may have added to it. The rows
    /// of the open transaction are changed already: such a task waits for them, or was before them.
    pub(super) async fn look_beside(
        &mut self,
        session: &WriteSession,
    ) -> Result<(), ReplicationError> {
        if self.recording.is_news(&mut self.records_seen) {
            self.unavailable = SpareDb::of(session).unavailable_bytes().await?;
        }
        Ok(())
    }

    /// Returns whether any artifact is recorded as unavailable.
    pub(super) fn has_unavailable(&self) -> bool {
        !self.unavailable.is_empty()
    }

    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Asks the fuse about the open transaction, and records its effects in it.
    pub(super) async fn judge(
        &mut self,
        session: &WriteSession,
        verdict: Verdict<'_>,
    ) -> Result<(), Gap> {
        let is_unavailable = |outcome: &Admission| matches!(outcome, Admission::Unavailable { .. });
        if self.has_unavailable() && verdict.outcomes.iter().any(is_unavailable) {
            // An artifact that was copied in the meantime may have become unavailable again.
            self.unavailable = SpareDb::of(session).unavailable_bytes().await?;
        }
        let newly: Vec<String> = verdict
            .outcomes
            .iter()
            .filter_map(|outcome| match outcome {
                Admission::Unavailable {
                    key,
                    checksum,
                    quiet: false,
                    ..
                } if !self.unavailable.contains(&(key.clone(), checksum.clone())) => {
                    Some(key.clone())
                }
                _ => None,
            })
            .collect();
        let removed: Vec<String> = verdict
            .removed
            .iter()
            .map(|named| format!("{} {}", named.ident, named.target))
            .collect();
        if !removed.is_empty() || !newly.is_empty() {
            let before = self.packages_before(session, &verdict).await?;
            self.packages = Some(before);
            let change = Shrinkage {
                packages: removed,
                packages_before: before,
                artifacts: newly,
                artifacts_before: before,
                ..Shrinkage::default()
            };
            self.ask_the_fuse(session, change, &verdict).await?;
        }
        self.note_unavailable(session, &verdict).await?;
        let after = |before: u64| (before + verdict.inserted).saturating_sub(verdict.deleted);
        self.packages = self.packages.map(after);
        Ok(())
    }

    /// Returns the number of package rows before the open transaction. The first time they are
    /// counted within it, because all its rows are written by then.
    async fn packages_before(
        &self,
        session: &WriteSession,
        verdict: &Verdict<'_>,
    ) -> Result<u64, ReplicationError> {
        if let Some(known) = self.packages {
            return Ok(known);
        }
        let now = BuilderDb::of(session).count_packages().await?;
        Ok((now + verdict.deleted).saturating_sub(verdict.inserted))
    }

    async fn ask_the_fuse(
        &mut self,
        session: &WriteSession,
        change: Shrinkage,
        verdict: &Verdict<'_>,
    ) -> Result<(), Gap> {
        let removed: Vec<(String, &str)> = keys(verdict.removed)
            .into_iter()
            .zip(verdict.removed.iter().map(|named| named.checksum.as_str()))
            .collect();
        if self.incoming {
            // The switch is judged as a whole, against the database that Builder sees.
            self.shrinkage.artifacts.extend(change.artifacts);
            return self.retire(&removed).await;
        }
        let counted = (change.packages.clone(), change.artifacts.clone());
        let end = verdict.end.to_string();
        let asked = fuse::ask_again(self.config, self.state, change, &end, session).await;
        let approved = match asked {
            Ok(approved) => approved,
            // The transactions are applied one by one to find the one that the fuse means.
            Err(ReplicationError::Refused { .. }) if verdict.several => return Err(Gap::Careful),
            Err(error) => return Err(error.into()),
        };
        self.state
            .vanished(
                &counted.0,
                &counted.1,
                &end,
                approved,
                self.config.fuse.window,
            )
            .await?;
        self.retire(&removed).await
    }

    /// Records the artifacts of removed rows, although the transaction may not be committed: an
    /// artifact that a row still names is not deleted. Objects of a provider are not ours to
    /// delete.
    async fn retire(&self, removed: &[(String, &str)]) -> Result<(), Gap> {
        if self.carrier.courier().is_some() {
            self.state.retire(removed).await?;
        }
        Ok(())
    }

    async fn note_unavailable(
        &mut self,
        session: &WriteSession,
        verdict: &Verdict<'_>,
    ) -> Result<(), ReplicationError> {
        let gone = keys(verdict.removed);
        let recorded: HashSet<&str> = self.unavailable.iter().map(|(key, _)| &**key).collect();
        let over: Vec<String> = gone
            .iter()
            .chain(verdict.here)
            .filter(|key| recorded.contains(key.as_str()))
            .cloned()
            .collect();
        if !over.is_empty() {
            let over: Vec<&str> = over.iter().map(String::as_str).collect();
            let forgotten = SpareDb::of(session).forget_unavailable(&over).await?;
            self.changed |= forgotten > 0;
            self.unavailable
                .retain(|(key, _)| !over.contains(&key.as_str()));
        }
        // A row that the same transaction deletes or renames needs no artifact. A row that names no
        // possible artifact has no checksum.
        for outcome in verdict.outcomes {
            let Admission::Unavailable {
                key,
                checksum,
                reason,
                quiet,
            } = outcome
            else {
                continue;
            };
            let (ident, target) = package_named(key);
            let item = Unavailable {
                key: key.clone(),
                checksum: checksum.clone(),
                reason: *reason,
            };
            if !SpareDb::of(session)
                .record_unavailable_if_named(&item, (&ident, &target))
                .await?
            {
                continue;
            }
            self.changed = true;
            self.unavailable.insert((key.clone(), checksum.clone()));
            if !quiet {
                log::warn!("peer: {key} is {reason}; its row is applied without it");
            }
        }
        Ok(())
    }

    /// Exchanges the bytes under keys. This comes just before the commit of the transaction whose
    /// row names the new bytes, and after the commit of the transaction that removed the old row.
    pub(super) async fn swap(&mut self, swaps: &[Swap], end: Lsn) -> Result<(), ReplicationError> {
        if swaps.is_empty() {
            return Ok(());
        }
        if self.incoming {
            for swap in swaps {
                self.swaps.retain(|other| other.key != swap.key);
                self.swaps.push(swap.clone());
            }
            return Ok(());
        }
        let Some(courier) = self.carrier.courier() else {
            return Ok(());
        };
        let owner = (self.state, self.lock);
        replacements::carry_out(swaps, owner, courier, Some(end), None).await
    }

    /// Undoes the exchange, because the transaction was not committed.
    pub(super) async fn unswap(&self, reached: Lsn) -> Result<(), ReplicationError> {
        if let Some(courier) = self.carrier.courier().filter(|_| !self.incoming) {
            replacements::undo((self.state, self.lock), courier, Some(reached)).await?;
        }
        Ok(())
    }

    /// Finishes the exchange, because the transaction is committed.
    pub(super) async fn swapped(&self, swaps: &[Swap]) -> Result<(), ReplicationError> {
        let Some(courier) = self.carrier.courier().filter(|_| !self.incoming) else {
            return Ok(());
        };
        self.state.forget_replacements().await?;
        replacements::clear_staged((self.state, self.lock), courier, swaps).await
    }
}

/// Returns the package of a key. A row that names no possible artifact is known by its own name.
fn package_named(key: &str) -> (String, String) {
    match package_of_key(key) {
        Some((ident, target)) => (ident.to_string(), target.to_string()),
        None => {
            let (ident, target) = key.rsplit_once(' ').unwrap_or((key, ""));
            (ident.to_string(), target.to_string())
        }
    }
}
