//! Artifacts that the primary lacked or had damaged are tried again: they may have been uploaded anew.

use super::courier::{Courier, Delivery};
use super::inventory::{UNREADABLE, UNSOUND, UNSTORABLE};
use crate::cluster::{Artifact, Expected, LocalSession, Lock, State};
use crate::config::Config;
use crate::package::Checksum;
use crate::replication::error::PassError;

/// Returns how many are there now. The visible database names these bytes under these keys, so they go in place. `claim`
/// keeps others off a key meanwhile; None: one of them is at it.
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
        // Before the key was ours its row may have gone, or come to name other bytes.
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
            // Recorded as what the store refuses, it is refused still; others may be there again.
            Err(error) if error.may_be_of_the_object() && item.refused => continue,
            // One that always fails keeps no other one waiting.
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
            .execute("forgetting what is there now", sql, &[&item.key, &checksum])
            .await?;
        brought += 1;
    }
    match failed {
        Some(error) if brought == 0 => Err(error.into()),
        Some(error) => {
            log::warn!("{error}; it is tried again later");
            Ok(brought)
        }
        None => Ok(brought),
    }
}

#[derive(PartialEq, Eq)]
struct Recorded {
    key: String,
    checksum: Checksum,
    /// A store did not give it out, or not take it.
    refused: bool,
}

/// All of them, or the one of that key.
async fn recorded(session: &LocalSession, key: Option<&str>) -> Result<Vec<Recorded>, PassError> {
    let sql = "SELECT key, checksum, reason FROM warm_spare.unavailable \
               WHERE reason <> $1 AND ($2::text IS NULL OR key = $2) ORDER BY key";
    let rows = session
        .query("reading what the primary lacks", sql, &[&UNSOUND, &key])
        .await?;
    // A row whose checksum is none is unsound, and says so.
    let items = rows.iter().filter_map(|row| {
        Some(Recorded {
            key: row.get(0),
            checksum: row.get::<_, String>(1).parse::<Checksum>().ok()?,
            refused: [UNREADABLE, UNSTORABLE].contains(&row.get(2)),
        })
    });
    Ok(items.collect())
}
