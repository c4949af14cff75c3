//! Same key, other bytes: a package deleted and uploaded anew. The one stated exception to invariant 1.
//!
//! Journalled before the first byte changes; the rename's transaction empties the journal. A journal found at the start
//! of a pass means that the rename did not happen, and everything is put back.

use super::courier::{Courier, Delivery};
use super::round::{RETIRED, STAGED, Swap};
use crate::cluster::{Artifact, Expected, Lock, Replacement, State, Stored};
use crate::domain::{ErrorCode, Lsn};
use crate::killpoint;
use crate::observe::Step;
use crate::package::Checksum;
use crate::replication::error::PassError;
use std::str::FromStr;

/// Keeps the old bytes aside and puts the staged ones in place. `end`: for the transaction of the stream that ends there.
pub async fn carry_out(
    swaps: &[Swap],
    (state, lock): (&State, Lock),
    courier: &Courier,
    end: Option<Lsn>,
    step: Option<&Step>,
) -> Result<(), PassError> {
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
    // Old bytes first, all of them: nothing has changed until the last one is safe.
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

/// Puts back what was begun to be replaced. What stands at or before `reached`, the recovery point, is not put back: its
/// transaction was committed, and the journal alone was not emptied any more.
pub async fn undo(
    (state, lock): (&State, Lock),
    courier: &Courier,
    reached: Option<Lsn>,
) -> Result<usize, PassError> {
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
            // Nothing lay there before.
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

/// The bytes that waited are in place.
pub async fn clear_staged(
    (state, lock): (&State, Lock),
    courier: &Courier,
    swaps: &[Swap],
) -> Result<(), PassError> {
    for swap in swaps {
        let staged = format!("{STAGED}{}", swap.new);
        state.still_ours(lock).await?;
        courier.local.delete(&staged).await?;
    }
    Ok(())
}

/// After the rename: staged bytes are in place, or of a plan that was given up.
pub async fn clear_all_staged(
    (state, lock): (&State, Lock),
    courier: &Courier,
) -> Result<(), PassError> {
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
    (state, lock): (&State, Lock),
    from: &str,
    to: &str,
    checksum: &Checksum,
    expected: &Expected,
) -> Result<(), PassError> {
    state.still_ours(lock).await?;
    let moved = courier.move_within(from, to, checksum, expected);
    let stored: Stored = match moved.await? {
        Delivery::Done(stored) => stored,
        other => {
            return Err(PassError::Unfit {
                check: ErrorCode::Replacement,
                text: format!(
                    "{from} in the local bucket should have checksum {checksum}, found: {other:?}"
                ),
                next_step:
                    "look who else writes in the local bucket, then run `warm-spare verify --deep`"
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
