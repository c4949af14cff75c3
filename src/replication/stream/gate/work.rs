//! The work of the gate on one artifact: is it here, may it be copied, is it missing?

use super::{Item, MAX_PAUSE, MIN_PAUSE, Outcome, Shared, Table, WantId};
use crate::cluster::{Artifact, LocalSession, ToSql};
use crate::config::Config;
use crate::package::Checksum;
use crate::replication::artifact::inventory::{Todo, reason_of};
use crate::replication::artifact::round::{Settled, Swap, settle};
use crate::replication::baseline::visible::open_visible;
use crate::replication::error::{PassError, Policy};
use std::str::FromStr;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

impl Shared {
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder panics")
    }

    /// Records the result. Returns the next request for the same key in the same transaction, which
    /// waits for no commit.
    pub(super) fn settle(&self, id: WantId, outcome: Outcome) -> Option<(WantId, Item)> {
        let mut table = self.table();
        let want = table.wants.get_mut(&id)?;
        want.settled = Some(outcome);
        let (tx, key) = (want.tx, want.item.as_ref()?.key.clone());
        if let Some(late) = table.next_late(&key) {
            let want = table.wants.get_mut(&late)?;
            want.begun = true;
            return Some((late, want.item.clone()?));
        }
        let queue = table.keys.get(&key)?;
        let at = queue.iter().position(|other| *other == id)?;
        let next = *queue.get(at + 1)?;
        let next_want = table.wants.get_mut(&next)?;
        if next_want.tx != tx || std::mem::replace(&mut next_want.begun, true) {
            return None;
        }
        Some((next, next_want.item.clone()?))
    }

    pub(super) fn is_released(&self, id: WantId) -> bool {
        self.table().wants.get(&id).is_none_or(|want| want.released)
    }

    pub(super) fn trouble(&self, id: WantId, trouble: Option<PassError>) {
        let mut table = self.table();
        if table
            .trouble
            .as_ref()
            .is_some_and(|(other, _)| *other != id)
        {
            return;
        }
        let news = trouble.is_some() || table.trouble.is_some();
        table.trouble = trouble.map(|error| (id, Arc::new(error)));
        drop(table);
        if news {
            self.changed.notify_waiters();
        }
    }

    pub(super) async fn work(&self, id: WantId, item: &Item) -> Outcome {
        if self
            .proven
            .clone()
            .wait_for(|proven| *proven)
            .await
            .is_err()
        {
            // The run has ended.
            return std::future::pending().await;
        }
        let mut lacking_since: Option<Instant> = None;
        let mut found: Option<&'static str> = None;
        // True: the object was asked for once more after the bucket had proved to be the right one.
        let mut doubted = false;
        let mut pause = MIN_PAUSE;
        loop {
            let tried = {
                let _copying = self.copies.acquire_many(self.share()).await;
                self.try_once(item).await
            };
            let reason = match tried {
                Ok(Tried::Here) => {
                    self.trouble(id, None);
                    return Outcome::Here;
                }
                Ok(Tried::Staged(swap)) => {
                    self.trouble(id, None);
                    return Outcome::Staged(swap);
                }
                Ok(Tried::Lacking(reason)) => {
                    self.trouble(id, None);
                    Some(reason)
                }
                Err(error) if error.policy() == Policy::Retry => {
                    self.trouble(id, Some(error));
                    None
                }
                Err(PassError::Store(error)) if self.is_of_the_object(&error).await => {
                    self.trouble(id, None);
                    let reason = reason_of(&error);
                    if found != Some(reason) {
                        log::warn!("{error}; no other artifact waits for it");
                    }
                    Some(reason)
                }
                Err(error) => return Outcome::Failed(Arc::new(error)),
            };
            // A reason that comes and goes is not a property of the object.
            if reason.is_none() || reason != found {
                (lacking_since, doubted) = (None, false);
            }
            found = reason;
            if let Some(reason) = reason {
                let since = *lacking_since.get_or_insert_with(Instant::now);
                let released = self.is_released(id);
                if released || doubted {
                    return Outcome::Lacking {
                        key: item.key.clone(),
                        checksum: item.checksum.to_string(),
                        reason,
                        quiet: released,
                    };
                }
                if since.elapsed() >= self.grace {
                    match self.believe().await {
                        // Several servers may answer behind one address. So the object is asked for
                        // once more after the bucket has proved to be the right one.
                        Ok(()) => {
                            doubted = true;
                            continue;
                        }
                        Err(error) => self.trouble(id, Some(error)),
                    }
                }
            }
            let released = self.released.notified();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = released => {}
            }
            pause = (pause * 2).min(MAX_PAUSE).min(self.grace.max(MIN_PAUSE));
        }
    }

    /// Returns the number of copy permits that one copy takes: more while a store asks for fewer
    /// copies at once.
    pub(super) fn share(&self) -> u32 {
        (self.most / self.courier.at_once(self.most)) as u32
    }

    pub(super) async fn try_once(&self, item: &Item) -> Result<Tried, PassError> {
        let todo = self.look(item).await?;
        let stored = match settle(&self.courier, &todo).await? {
            Settled::Copied(stored) => {
                self.told.copied(stored.bytes);
                stored
            }
            Settled::Verified(stored) => stored,
            Settled::Staged(swap) => return Ok(Tried::Staged(swap)),
            Settled::Missing => return Ok(Tried::Lacking("missing")),
            Settled::Damaged(_) => return Ok(Tried::Lacking("damaged")),
            Settled::Refused(error) | Settled::Failed(error) => return Err(error.into()),
        };
        if todo.known != Some(item.checksum) || todo.present.as_ref() != Some(&stored) {
            let artifact = Artifact {
                key: item.key.clone(),
                checksum: item.checksum.to_string(),
                bytes: stored.bytes,
                etag: stored.etag,
            };
            crate::cluster::record_artifacts(&self.state, &[artifact]).await?;
        }
        Ok(Tried::Here)
    }

    /// Returns the known facts about the key: in the local bucket, in our records, and in the rows
    /// that Builder sees.
    pub(super) async fn look(&self, item: &Item) -> Result<Todo, PassError> {
        let doing = "looking for an artifact";
        let recorded =
            "SELECT checksum, bytes, etag FROM artifact WHERE key = $1 AND state = 'good'";
        let named = "SELECT checksum FROM public.origin_packages WHERE ident = $1 AND target = $2";
        let (key, package): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 2]) =
            ([&item.key], [&item.ident, &item.target]);
        let (present, recorded, named) = tokio::join!(
            self.courier.local.reading().head(&item.key),
            self.state.query(doing, recorded, &key),
            async {
                match &self.visible {
                    Some(visible) => visible.query(doing, named, &package).await,
                    None => Ok(Vec::new()),
                }
            },
        );
        let (present, recorded, named) = (present?, recorded?, named?);
        let known = recorded.first().and_then(|row| {
            let same = present.as_ref().is_some_and(|stored| {
                stored.bytes as i64 == row.get::<_, i64>(1)
                    && stored.etag == row.get::<_, String>(2)
            });
            same.then(|| Checksum::from_str(&row.get::<_, String>(0)).ok())?
        });
        let visible = named.first().and_then(|row| {
            let checksum: Option<String> = row.get(0);
            Checksum::from_str(&checksum?).ok()
        });
        Ok(Todo {
            key: item.key.clone(),
            checksum: item.checksum,
            present,
            known,
            visible,
        })
    }
}

/// Opens a session on the database that Builder sees, if that database exists and is Builder's.
pub(super) async fn visible(config: &Config) -> Result<Option<LocalSession>, PassError> {
    let Some(session) = open_visible(config).await? else {
        return Ok(None);
    };
    let sql = "SELECT to_regclass('public.origin_packages') IS NOT NULL";
    let row = session.query_one("looking for packages", sql, &[]).await?;
    Ok(row.get::<_, bool>(0).then_some(session))
}

pub(super) enum Tried {
    Here,
    Staged(Swap),
    Lacking(&'static str),
}
