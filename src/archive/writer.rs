//! The one writer of an archive.
//!
//! Two locks exclude others. An advisory lock on the local server keeps processes of one cluster
//! apart. The file `writer.json` names the one cluster that writes; another cluster of the same line
//! writes only after a promotion, or when an operator says so.

use super::error::refused;
use super::format::{FORMAT, Head, Writer, write};
use super::identity::Identity;
use super::layout;
use super::place::{Place, Stored, Tag};
use crate::cluster::{LocalCluster, StateDb, WriteSession};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::ReplicationError;
use chrono::Utc;
use sha2::{Digest, Sha256};

/// The right to write into a place, for as long as this value lives.
pub(super) struct Turn {
    /// Holds the advisory lock.
    session: WriteSession,
    tag: Option<Tag>,
    pub identity: Identity,
}

impl Turn {
    /// Takes the lock of this cluster's only writer.
    pub(super) async fn take(
        config: &Config,
        state: Option<&StateDb>,
        place: &Place,
    ) -> Result<Turn, ReplicationError> {
        let local = LocalCluster::of(config);
        let session = match state {
            Some(_) => local.state_session().await?,
            None => local.maintenance().await?,
        };
        if !session.lock_archive(number_of(&place.address())).await? {
            return Err(refused(
                ErrorCode::Locked,
                format!(
                    "another process of this cluster is at work in archive {}",
                    place.name()
                ),
                "let it finish, or stop it: one works at a time".into(),
            ));
        }
        let identity = Identity::read(config, state, &session).await?;
        Ok(Turn {
            session,
            tag: None,
            identity,
        })
    }

    /// Makes the archive if it is new, and makes this cluster its writer. `by_hand`: an operator
    /// says that this cluster writes from now on.
    pub(super) async fn claim(
        &mut self,
        config: &Config,
        place: &Place,
        by_hand: bool,
    ) -> Result<(), ReplicationError> {
        self.make_head(place).await?;
        let found = place.tagged::<Writer>(layout::WRITER).await?;
        let tag = match found {
            Some((writer, tag)) if writer.cluster == self.identity.cluster => {
                self.tag = Some(tag);
                return Ok(());
            }
            Some((writer, tag)) => {
                if !by_hand && writer.epoch >= self.identity.epoch {
                    return Err(foreign(place, &writer));
                }
                Some(tag)
            }
            None => None,
        };
        let ours = Writer {
            format: FORMAT,
            cluster: self.identity.cluster.clone(),
            site: config.site.clone(),
            epoch: self.identity.epoch,
            since: Utc::now(),
        };
        place.overwrite(layout::WRITER, &ours, tag.as_ref()).await?;
        // Two clusters may have tried; and an answer may have been lost.
        match place.tagged::<Writer>(layout::WRITER).await? {
            Some((writer, tag)) if writer == ours => self.tag = Some(tag),
            Some((writer, _)) => return Err(foreign(place, &writer)),
            None => {
                return Err(super::error::damaged(
                    place.name(),
                    layout::WRITER,
                    "it is not there",
                ));
            }
        }
        Ok(())
    }

    async fn make_head(&self, place: &Place) -> Result<(), ReplicationError> {
        if let Some(head) = place.json::<Head>(layout::HEAD).await? {
            let known = head
                .lineage
                .iter()
                .any(|id| self.identity.lineage.contains(id));
            return match known {
                true => Ok(()),
                false => self.identity.continues(place.name(), &head.lineage),
            };
        }
        if !place.list(layout::GENERATIONS).await?.is_empty() {
            let text = "it is not there, and generations are";
            return Err(super::error::damaged(place.name(), layout::HEAD, text));
        }
        place
            .put(layout::README, super::readme::TEXT.into())
            .await?;
        let head = Head {
            format: FORMAT,
            created: Utc::now(),
            made_by: super::made_by(),
            lineage: self.identity.lineage.clone(),
        };
        match place.put(layout::HEAD, write(&head)).await? {
            Stored::New => Ok(()),
            // Another cluster has just begun the same archive.
            Stored::Occupied => Box::pin(self.make_head(place)).await,
        }
    }

    /// Fails if this process may write no more: its lock is gone, another cluster writes, or role,
    /// epoch or lineage have changed.
    pub(super) async fn still_ours(
        &self,
        config: &Config,
        state: Option<&StateDb>,
        place: &Place,
    ) -> Result<(), ReplicationError> {
        let now = Identity::read(config, state, &self.session).await?;
        if now != self.identity {
            return Err(refused(
                ErrorCode::Role,
                format!(
                    "role, epoch or lineage of this cluster changed while the generation was made: {} of epoch {} is {} of epoch {} now",
                    self.identity.role_word(),
                    self.identity.epoch,
                    now.role_word(),
                    now.epoch
                ),
                "run it again".into(),
            ));
        }
        match place.tagged::<Writer>(layout::WRITER).await? {
            Some((_, tag)) if Some(&tag) == self.tag.as_ref() => Ok(()),
            Some((writer, _)) => Err(foreign(place, &writer)),
            None => Err(super::error::damaged(
                place.name(),
                layout::WRITER,
                "it is not there any more",
            )),
        }
    }
}

fn foreign(place: &Place, writer: &Writer) -> ReplicationError {
    let site = match writer.site.as_str() {
        "" => String::new(),
        site => format!(" ({site})"),
    };
    refused(
        ErrorCode::ArchiveForeign,
        format!(
            "cluster {}{site} of epoch {} writes into archive {} since {}",
            writer.cluster,
            writer.epoch,
            place.name(),
            writer.since.format("%Y-%m-%d %H:%M:%S UTC")
        ),
        "if that cluster writes there no more, run `warm-spare archive create --take-over`; otherwise give this cluster another place".into(),
    )
}

/// Returns the number of the lock of a place.
fn number_of(address: &str) -> i64 {
    let hash = Sha256::digest(address.as_bytes());
    let mut number = [0; 8];
    number.copy_from_slice(&hash[..8]);
    i64::from_be_bytes(number)
}
