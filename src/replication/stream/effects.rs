//! Handles the parts of a transaction other than its rows: unavailable artifacts, removed packages,
//! bytes that change under a key, and the fuse.

use super::apply::keys;
use super::changes::Named;
use super::error::Gap;
use super::gate::Outcome;
use crate::cluster::{LocalSession, Lock, State};
use crate::config::Config;
use crate::domain::Lsn;
use crate::package::package_of_key;
use crate::replication::artifact::courier::Courier;
use crate::replication::artifact::replacements;
use crate::replication::artifact::round::Swap;
use crate::replication::error::PassError;
use crate::replication::fuse::{self, Shrinkage};
use std::collections::HashSet;

pub(super) struct Settling<'a> {
    config: &'a Config,
    state: &'a State,
    lock: Lock,
    courier: &'a Courier,
    /// Keys recorded as unavailable, with the checksum of each.
    lacking: HashSet<(String, String)>,
    /// Number of package rows; None: not counted yet. Counting takes longer the more rows there
    /// are.
    packages: Option<u64>,
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
    pub removed: &'a [Named],
    /// Keys whose artifacts are here.
    pub here: &'a [String],
    pub outcomes: &'a [Outcome],
    pub inserted: u64,
    /// Number of deleted package rows, even if their package was added again.
    pub deleted: u64,
    pub end: Lsn,
    /// True: it holds several transactions of the primary.
    pub several: bool,
}

impl<'a> Settling<'a> {
    pub(super) async fn open(
        config: &'a Config,
        (state, lock): (&'a State, Lock),
        courier: &'a Courier,
        session: &LocalSession,
        incoming: bool,
    ) -> Result<Settling<'a>, PassError> {
        let lacking = recorded_as_lacking(session).await?;
        Ok(Settling {
            config,
            state,
            lock,
            courier,
            lacking,
            packages: None,
            changed: false,
            incoming,
            swaps: Vec::new(),
            shrinkage: Shrinkage::default(),
        })
    }

    /// Returns whether any artifact is recorded as unavailable.
    pub(super) fn lacks(&self) -> bool {
        !self.lacking.is_empty()
    }

    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Asks the fuse about the open transaction, and records its effects in it.
    pub(super) async fn judge(
        &mut self,
        session: &LocalSession,
        verdict: Verdict<'_>,
    ) -> Result<(), Gap> {
        let lacks = |outcome: &Outcome| matches!(outcome, Outcome::Lacking { .. });
        if self.lacks() && verdict.outcomes.iter().any(lacks) {
            // An artifact that was copied in the meantime may have become unavailable again.
            self.lacking = recorded_as_lacking(session).await?;
        }
        let newly: Vec<String> = verdict
            .outcomes
            .iter()
            .filter_map(|outcome| match outcome {
                Outcome::Lacking {
                    key,
                    checksum,
                    quiet: false,
                    ..
                } if !self.lacking.contains(&(key.clone(), checksum.clone())) => Some(key.clone()),
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
        self.note_lacking(session, &verdict).await?;
        let after = |before: u64| (before + verdict.inserted).saturating_sub(verdict.deleted);
        self.packages = self.packages.map(after);
        Ok(())
    }

    /// Returns the number of package rows before the open transaction. The first time they are
    /// counted within it, because all its rows are written by then.
    async fn packages_before(
        &self,
        session: &LocalSession,
        verdict: &Verdict<'_>,
    ) -> Result<u64, PassError> {
        if let Some(known) = self.packages {
            return Ok(known);
        }
        let sql = "SELECT count(*) FROM public.origin_packages";
        let row = session.query_one("counting packages", sql, &[]).await?;
        let now = row.get::<_, i64>(0).unsigned_abs();
        Ok((now + verdict.deleted).saturating_sub(verdict.inserted))
    }

    async fn ask_the_fuse(
        &mut self,
        session: &LocalSession,
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
            self.state.retire(&removed).await?;
            return Ok(());
        }
        let counted = (change.packages.clone(), change.artifacts.clone());
        let end = verdict.end.to_string();
        let asked = fuse::ask_again(self.config, self.state, change, &end, session).await;
        let approved = match asked {
            Ok(approved) => approved,
            // The transactions are applied one by one to find the one that the fuse means.
            Err(PassError::Refused { .. }) if verdict.several => return Err(Gap::Careful),
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
        // Recorded although the transaction may not be committed: an artifact that a row still
        // names is not deleted.
        self.state.retire(&removed).await?;
        Ok(())
    }

    async fn note_lacking(
        &mut self,
        session: &LocalSession,
        verdict: &Verdict<'_>,
    ) -> Result<(), PassError> {
        let gone = keys(verdict.removed);
        if self.lacks() && (!gone.is_empty() || !verdict.here.is_empty()) {
            let sql = "DELETE FROM warm_spare.unavailable WHERE key = ANY ($1)";
            let over: Vec<&str> = gone
                .iter()
                .chain(verdict.here)
                .map(String::as_str)
                .collect();
            let forgotten = session
                .execute("forgetting unavailable artifacts", sql, &[&over])
                .await?;
            self.changed |= forgotten > 0;
            self.lacking
                .retain(|(key, _)| !over.contains(&key.as_str()));
        }
        // A row that the same transaction deletes or renames needs no artifact. A row that names no
        // possible artifact has no checksum.
        let sql = "INSERT INTO warm_spare.unavailable (key, checksum, reason) SELECT $1, $2::text, $3 \
                   WHERE EXISTS (SELECT FROM public.origin_packages \
                     WHERE ident = $4 AND target = $5 AND $2::text IN ('', lower(checksum))) \
                   ON CONFLICT (key) DO UPDATE SET checksum = excluded.checksum, reason = excluded.reason";
        for outcome in verdict.outcomes {
            let Outcome::Lacking {
                key,
                checksum,
                reason,
                quiet,
            } = outcome
            else {
                continue;
            };
            let (ident, target) = package_named(key);
            let recorded = session
                .execute(
                    "recording unavailable artifacts",
                    sql,
                    &[key, checksum, reason, &ident, &target],
                )
                .await?;
            if recorded == 0 {
                continue;
            }
            self.changed = true;
            self.lacking.insert((key.clone(), checksum.clone()));
            if !quiet {
                log::warn!("peer: {key} is {reason}; its row is applied without it");
            }
        }
        Ok(())
    }

    /// Exchanges the bytes under keys. This comes just before the commit of the transaction whose
    /// row names the new bytes, and after the commit of the transaction that removed the old row.
    pub(super) async fn swap(&mut self, swaps: &[Swap], end: Lsn) -> Result<(), PassError> {
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
        let owner = (self.state, self.lock);
        replacements::carry_out(swaps, owner, self.courier, Some(end), None).await
    }

    /// Undoes the exchange, because the transaction was not committed.
    pub(super) async fn unswap(&self, reached: Lsn) -> Result<(), PassError> {
        if !self.incoming {
            replacements::undo((self.state, self.lock), self.courier, Some(reached)).await?;
        }
        Ok(())
    }

    /// Finishes the exchange, because the transaction is committed.
    pub(super) async fn swapped(&self, swaps: &[Swap]) -> Result<(), PassError> {
        if self.incoming {
            return Ok(());
        }
        self.state.forget_replacements().await?;
        replacements::clear_staged((self.state, self.lock), self.courier, swaps).await
    }
}

async fn recorded_as_lacking(
    session: &LocalSession,
) -> Result<HashSet<(String, String)>, PassError> {
    let sql = "SELECT key, checksum FROM warm_spare.unavailable";
    let rows = session
        .query("reading the unavailable artifacts", sql, &[])
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
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
