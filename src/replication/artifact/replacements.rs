//! Replaces bytes under an unchanged key: a package was deleted and uploaded again. This is the one
//! documented exception to invariant 1.
//!
//! The journal is written before the first byte changes, and the rename's transaction empties it. A
//! journal found at the start of a run means that the rename did not happen; then everything is
//! undone.

use super::courier::{Courier, Delivery};
use super::round::{RETIRED, STAGED, Swap};
use crate::cluster::{Artifact, Expected, Lock, Replacement, StateDb, Stored};
use crate::domain::{ErrorCode, Lsn};
use crate::killpoint;
use crate::observe::Step;
use crate::package::Checksum;
use crate::replication::error::ReplicationError;
use std::str::FromStr;

/// Stores the old bytes under another key and puts the staged ones in their place. `end`: for the
/// transaction of the stream that ends there.
pub(crate) async fn carry_out(
    swaps: &[Swap],
    (state, lock): (&StateDb, Lock),
    courier: &Courier,
    end: Option<Lsn>,
    step: Option<&Step>,
) -> Result<(), ReplicationError> {
    killpoint::reach("swap.staging");
    let planned: Vec<Replacement> = swaps
        .iter()
        .map(|swap| Replacement {
            key: swap.key.clone(),
            old_checksum: swap.old.map(|old| old.to_string()).unwrap_or_default(),
            new_checksum: swap.new.to_string(),
            lsn: end.map(|lsn| lsn.to_string()).unwrap_or_default(),
        })
        .collect();
    // All old bytes are stored first: nothing has changed until the last of them is safe.
    let mut found = Vec::new();
    for swap in swaps {
        found.push(courier.local.reading().head(&swap.key).await?);
        if let Some(old) = &swap.old {
            let retired = format!("{RETIRED}{old}");
            let (from, to) = (&swap.key, &retired);
            place(courier, (state, lock), from, to, old, &Expected::Anything).await?;
        }
    }
    let laid_aside: Vec<(String, &str)> = planned
        .iter()
        .filter(|replacement| !replacement.old_checksum.is_empty())
        .map(|replacement| (replacement.key.clone(), replacement.old_checksum.as_str()))
        .collect();
    state.retire(&laid_aside).await?;
    state.plan_replacements(&planned).await?;
    killpoint::reach("swap.journalled");
    for (swap, found) in swaps.iter().zip(&found) {
        let staged = format!("{STAGED}{}", swap.new);
        let expected = Expected::as_found(found.as_ref());
        let (from, to) = (&staged, &swap.key);
        place(courier, (state, lock), from, to, &swap.new, &expected).await?;
        killpoint::reach("swap.half");
        if let Some(step) = step {
            step.add(1);
        }
    }
    Ok(())
}

/// Undoes replacements that were begun. A replacement at or before `reached`, the recovery point,
/// is not undone: its transaction was committed, and only the journal was not emptied.
pub(crate) async fn undo(
    (state, lock): (&StateDb, Lock),
    courier: &Courier,
    reached: Option<Lsn>,
) -> Result<usize, ReplicationError> {
    let mut begun = state.replacements().await?;
    begun.retain(
        |replacement| match (replacement.lsn.parse::<Lsn>(), reached) {
            (Ok(end), Some(reached)) => end > reached,
            _ => true,
        },
    );
    for replacement in &begun {
        let found = courier.local.reading().head(&replacement.key).await?;
        let expected = Expected::as_found(found.as_ref());
        let Ok(old) = Checksum::from_str(&replacement.old_checksum) else {
            // There was no object under the key before.
            state.still_ours(lock).await?;
            courier
                .local
                .delete_as_found(&replacement.key, &expected)
                .await?;
            continue;
        };
        let retired = format!("{RETIRED}{old}");
        let (from, to) = (&retired, &replacement.key);
        place(courier, (state, lock), from, to, &old, &expected).await?;
    }
    state.still_ours(lock).await?;
    state.forget_replacements().await?;
    Ok(begun.len())
}

/// Deletes staged bytes that are in place.
pub(crate) async fn clear_staged(
    (state, lock): (&StateDb, Lock),
    courier: &Courier,
    swaps: &[Swap],
) -> Result<(), ReplicationError> {
    for swap in swaps {
        let staged = format!("{STAGED}{}", swap.new);
        state.still_ours(lock).await?;
        courier.local.delete(&staged).await?;
    }
    Ok(())
}

/// Deletes all staged bytes after the rename: they are in place, or belong to a plan that was given
/// up.
pub(crate) async fn clear_all_staged(
    (state, lock): (&StateDb, Lock),
    courier: &Courier,
) -> Result<(), ReplicationError> {
    let mut staged = Vec::new();
    courier
        .local
        .reading()
        .list(STAGED, async |page| {
            staged.extend(page.into_iter().map(|listed| listed.key));
            Ok(())
        })
        .await?;
    for key in staged {
        state.still_ours(lock).await?;
        courier.local.delete(&key).await?;
    }
    Ok(())
}

async fn place(
    courier: &Courier,
    (state, lock): (&StateDb, Lock),
    from: &str,
    to: &str,
    checksum: &Checksum,
    expected: &Expected,
) -> Result<(), ReplicationError> {
    state.still_ours(lock).await?;
    let moved = courier.move_within(from, to, checksum, expected);
    let stored: Stored = match moved.await? {
        Delivery::Done(stored) => stored,
        other => {
            return Err(ReplicationError::Precondition {
                check: ErrorCode::Replacement,
                text: format!(
                    "{from} in the local bucket should have checksum {checksum}, found: {other:?}"
                ),
                next_step:
                    "find out who else writes into the local bucket, then run `warm-spare verify --deep`"
                        .into(),
            });
        }
    };
    let artifact = Artifact {
        key: to.to_string(),
        checksum: checksum.to_string(),
        bytes: stored.bytes,
        etag: stored.etag,
    };
    state.record_artifacts(&[artifact]).await?;
    Ok(())
}
