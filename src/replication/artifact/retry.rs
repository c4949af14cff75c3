//! Tries again to copy artifacts that the primary did not have or had damaged: they may have been
//! uploaded again.

use super::courier::{Courier, Delivery};
use super::inventory::{UNREADABLE, UNSOUND, UNSTORABLE};
use crate::cluster::{Artifact, Expected, LocalSession, Lock, State};
use crate::config::Config;
use crate::package::Checksum;
use crate::replication::error::PassError;

/// Returns how many are here now. The visible database names these bytes under these keys, so they
/// are stored in place. `claim` reserves a key in the meantime; None: another task works on the
/// key.
pub async fn retry_unavailable<C>(
    config: &Config,
    lock: Lock,
    courier: &Courier,
    claim: impl Fn(&str) -> Option<C>,
) -> Result<usize, PassError> {
    let local = &config.local.datastore;
    let state = State::open(local).await?;
    let session = LocalSession::open(local, &local.database).await?;
    let (mut brought, mut failed) = (0, None);
    for item in recorded(&session, None).await? {
        let Some(_claim) = claim(&item.key) else {
            continue;
        };
        // Before the key was reserved, its row may have been removed, or changed to name other
        // bytes.
        if !recorded(&session, Some(&item.key)).await?.contains(&item) {
            continue;
        }
        let present = courier.local.reading().head(&item.key).await?;
        let expected = Expected::as_found(present.as_ref());
        state.still_ours(lock).await?;
        let fetched = courier.fetch_as_found(&item.key, &item.key, &item.checksum, &expected);
        let stored = match fetched.await {
            Ok(Delivery::Done(stored)) => stored,
            Ok(_) => continue,
            // An object that is recorded as refused is still refused; others may be available
            // again.
            Err(error) if error.may_be_of_the_object() && item.refused => continue,
            // An object that always fails does not keep the others waiting.
            Err(error) => {
                failed.get_or_insert(error);
                continue;
            }
        };
        state.still_ours(lock).await?;
        state
            .record_artifacts(&[Artifact {
                key: item.key.clone(),
                checksum: item.checksum.to_string(),
                bytes: stored.bytes,
                etag: stored.etag,
            }])
            .await?;
        let sql = "DELETE FROM warm_spare.unavailable WHERE key = $1 AND checksum = $2";
        let checksum = item.checksum.to_string();
        session
            .execute(
                "forgetting an unavailable artifact",
                sql,
                &[&item.key, &checksum],
            )
            .await?;
        brought += 1;
    }
    match failed {
        Some(error) if brought == 0 => Err(error.into()),
        Some(error) => {
            log::warn!("copying an unavailable artifact failed, and is tried again later: {error}");
            Ok(brought)
        }
        None => Ok(brought),
    }
}

#[derive(PartialEq, Eq)]
struct Recorded {
    key: String,
    checksum: Checksum,
    /// True: a store refused to give it out or to take it.
    refused: bool,
}

/// Returns all recorded artifacts, or the one with that key.
async fn recorded(session: &LocalSession, key: Option<&str>) -> Result<Vec<Recorded>, PassError> {
    let sql = "SELECT key, checksum, reason FROM warm_spare.unavailable \
               WHERE reason <> $1 AND ($2::text IS NULL OR key = $2) ORDER BY key";
    let rows = session
        .query("reading the unavailable artifacts", sql, &[&UNSOUND, &key])
        .await?;
    // A row without a valid checksum is recorded as unsound.
    let items = rows.iter().filter_map(|row| {
        Some(Recorded {
            key: row.get(0),
            checksum: row.get::<_, String>(1).parse::<Checksum>().ok()?,
            refused: [UNREADABLE, UNSTORABLE].contains(&row.get(2)),
        })
    });
    Ok(items.collect())
}
