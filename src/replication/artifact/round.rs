//! Runs one round over the artifacts that are not known to be here: many at once, each checked,
//! each recorded.

use super::carrier::Carrier;
use super::courier::{Courier, Delivery};
use super::inventory::{Inventory, Todo};
use super::missing::reason_of;
use crate::cluster::{Artifact, Expected, StateDb, StoreError, Stored};
use crate::domain::MissingReason;
use crate::observe::Step;
use crate::package::Checksum;
use crate::replication::error::ReplicationError;
use tokio::task::JoinSet;

const PAGE_ROWS: i64 = 1000;
/// Number of checked artifacts recorded in one statement. An artifact that is not yet recorded when
/// we are killed is read once more.
const RECORD_BATCH: usize = 200;
/// Number of refused objects, with no other result, from which on the fault is not of single
/// objects.
const MANY_REFUSED: usize = 20;
/// Number of failed objects in a row, each of which was tried often, from which on the fault is not
/// of single objects.
const MANY_FAILED: usize = 3;

pub const STAGED: &str = ".warm-spare/staged/";
pub const RETIRED: &str = ".warm-spare/retired/";

/// The result of one round.
#[derive(Debug, Default)]
pub struct Round {
    pub copied: u64,
    pub copied_bytes: u64,
    /// Number of objects that were in the bucket already and were hashed for the first time.
    pub verified: u64,
    pub missing: Vec<Unavailable>,
    pub damaged: Vec<Unavailable>,
    /// Objects that the provider never brings.
    pub not_replicated: Vec<Unavailable>,
    /// Keys of objects that the provider has not brought yet.
    pub awaited: Vec<String>,
    /// Objects that the primary's store refused, while it may serve others; or whose key a store
    /// cannot hold.
    pub refused: Vec<(Unavailable, StoreError)>,
    /// Other bytes are under the key; the new ones wait beside them.
    pub staged: Vec<Swap>,
    /// The first error of a store that failed again and again while it served others; and the
    /// number of failures since it served one.
    failed: Option<StoreError>,
    in_a_row: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    pub key: String,
    pub checksum: Checksum,
}

/// A key whose bytes are to change from one checksum to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swap {
    pub key: String,
    /// None: there is no object now.
    pub old: Option<Checksum>,
    pub new: Checksum,
}

impl Round {
    pub fn absorb(&mut self, other: Round) {
        self.copied += other.copied;
        self.copied_bytes += other.copied_bytes;
        self.verified += other.verified;
        self.missing.extend(other.missing);
        self.damaged.extend(other.damaged);
        self.not_replicated.extend(other.not_replicated);
        self.awaited.extend(other.awaited);
        self.refused.extend(other.refused);
        self.staged.extend(other.staged);
    }

    /// Returns the errors that may be the store's fault as well as the object's.
    pub fn refusals(&self) -> impl Iterator<Item = &StoreError> {
        let errors = self.refused.iter().map(|(_, error)| error);
        errors.filter(|error| !error.is_of_the_key())
    }

    pub fn unavailable(&self) -> impl Iterator<Item = (&Unavailable, MissingReason)> {
        let missing = self
            .missing
            .iter()
            .map(|item| (item, MissingReason::Missing));
        let damaged = self
            .damaged
            .iter()
            .map(|item| (item, MissingReason::Damaged));
        let refused = self
            .refused
            .iter()
            .map(|(item, error)| (item, reason_of(error)));
        let not_replicated = self
            .not_replicated
            .iter()
            .map(|item| (item, MissingReason::NotReplicated));
        missing.chain(damaged).chain(not_replicated).chain(refused)
    }
}

/// The result for one artifact.
pub(crate) enum ArtifactOutcome {
    Copied(Stored),
    Verified(Stored),
    Staged(Swap),
    Missing,
    Damaged(Checksum),
    /// The provider has not brought it yet.
    Awaited,
    /// The provider never brings it.
    NotReplicated,
    /// A refusal; only other objects show whether it is this object's own fault.
    Refused(StoreError),
    /// A fault that should be transient, but lasted through all tries.
    Failed(StoreError),
}

/// Works through the inventory's plan with `copies` at once.
pub(crate) async fn round(
    inventory: &Inventory<'_>,
    state: &StateDb,
    carrier: &Carrier,
    copies: usize,
    step: &Step,
) -> Result<Round, ReplicationError> {
    let mut round = Round::default();
    let mut remembered = Vec::with_capacity(RECORD_BATCH);
    let mut busy: JoinSet<Result<(Todo, ArtifactOutcome), ReplicationError>> = JoinSet::new();
    let mut after = String::new();
    loop {
        let page = inventory.page(&after, PAGE_ROWS).await?;
        let Some(last) = page.last() else { break };
        after = last.key.clone();
        for todo in page {
            while busy.len() >= carrier.at_once(copies) {
                take(&mut busy, &mut round, &mut remembered, step).await?;
            }
            if remembered.len() >= RECORD_BATCH {
                remember(inventory, state, &mut remembered).await?;
            }
            let carrier = carrier.clone();
            busy.spawn(async move {
                match carrier.ensure(&todo).await {
                    Ok(settled) => Ok((todo, settled)),
                    Err(ReplicationError::Store(error)) if error.may_be_of_the_object() => {
                        Ok((todo, ArtifactOutcome::Refused(error)))
                    }
                    Err(ReplicationError::Store(error)) if error.is_transient() => {
                        Ok((todo, ArtifactOutcome::Failed(error)))
                    }
                    Err(error) => Err(error),
                }
            });
        }
    }
    while !busy.is_empty() {
        take(&mut busy, &mut round, &mut remembered, step).await?;
    }
    remember(inventory, state, &mut remembered).await?;
    match round.failed.take() {
        // All others are here; this one keeps the rows waiting.
        Some(error) => Err(error.into()),
        None => Ok(round),
    }
}

async fn take(
    busy: &mut JoinSet<Result<(Todo, ArtifactOutcome), ReplicationError>>,
    round: &mut Round,
    remembered: &mut Vec<Artifact>,
    step: &Step,
) -> Result<(), ReplicationError> {
    let Some(joined) = busy.join_next().await else {
        return Ok(());
    };
    // A panic in a copy is a bug; it must not count as a copied artifact.
    let (todo, settled) = joined.expect("a copy neither panics nor is cancelled")?;
    if !matches!(settled, ArtifactOutcome::Awaited) {
        step.add(1);
    }
    let mut good = |stored: Stored| {
        remembered.push(Artifact {
            key: todo.key.clone(),
            checksum: todo.checksum.to_string(),
            bytes: stored.bytes,
            etag: stored.etag,
        });
    };
    let unavailable = || Unavailable {
        key: todo.key.clone(),
        checksum: todo.checksum,
    };
    if !matches!(settled, ArtifactOutcome::Failed(_)) {
        round.in_a_row = 0;
    }
    match settled {
        ArtifactOutcome::Failed(error) => {
            round.in_a_row += 1;
            if round.in_a_row >= MANY_FAILED {
                return Err(error.into());
            }
            round.failed.get_or_insert(error);
        }
        ArtifactOutcome::Copied(stored) => {
            round.copied += 1;
            round.copied_bytes += stored.bytes;
            step.copied(stored.bytes);
            good(stored);
        }
        ArtifactOutcome::Verified(stored) => {
            round.verified += 1;
            good(stored);
        }
        ArtifactOutcome::Staged(swap) => round.staged.push(swap),
        ArtifactOutcome::Missing => round.missing.push(unavailable()),
        ArtifactOutcome::Awaited => round.awaited.push(todo.key.clone()),
        ArtifactOutcome::NotReplicated => round.not_replicated.push(unavailable()),
        ArtifactOutcome::Refused(error) => {
            // A store that refuses everything need not be asked for all objects.
            if round.refusals().count() >= MANY_REFUSED && round.copied + round.verified == 0 {
                return Err(error.into());
            }
            round.refused.push((unavailable(), error));
        }
        ArtifactOutcome::Damaged(found) => {
            log::debug!(
                "{} on the primary hashes to {found}, its row says {}",
                todo.key,
                todo.checksum
            );
            round.damaged.push(unavailable());
        }
    }
    Ok(())
}

async fn remember(
    inventory: &Inventory<'_>,
    state: &StateDb,
    artifacts: &mut Vec<Artifact>,
) -> Result<(), ReplicationError> {
    if !artifacts.is_empty() {
        state.record_artifacts(artifacts).await?;
        inventory.note_present(artifacts).await?;
        artifacts.clear();
    }
    Ok(())
}

/// Copies or verifies one artifact. If it must not be overwritten yet, the new bytes are staged.
pub(super) async fn ensure_artifact(
    courier: &Courier,
    todo: &Todo,
) -> Result<ArtifactOutcome, ReplicationError> {
    let lies_there = match (&todo.present, todo.known) {
        (None, _) => None,
        (Some(stored), Some(known)) => Some((known, stored.clone())),
        // Never hashed here, or written since then: it is read once.
        (Some(_), None) => courier.hash_local(&todo.key).await?,
    };
    if let Some((found, stored)) = &lies_there
        && *found == todo.checksum
    {
        return Ok(ArtifactOutcome::Verified(stored.clone()));
    }
    // The artifact is put in place at once if there is no object that a visible row could miss, or
    // if the bytes are wrong and the visible row names the very bytes that are being copied.
    let in_place = match todo.visible {
        None => lies_there.is_none(),
        Some(visible) => visible == todo.checksum,
    };
    if in_place {
        let expected = Expected::as_found(todo.present.as_ref());
        return deliver(courier, todo, &todo.key, &expected).await;
    }
    let swap = Swap {
        key: todo.key.clone(),
        old: lies_there.map(|(found, _)| found),
        new: todo.checksum,
    };
    let waiting = format!("{STAGED}{}", todo.checksum);
    if let Some((staged, _)) = courier.hash_local(&waiting).await?
        && staged == todo.checksum
    {
        return Ok(ArtifactOutcome::Staged(swap));
    }
    Ok(
        match deliver(courier, todo, &waiting, &Expected::Anything).await? {
            ArtifactOutcome::Copied(_) => ArtifactOutcome::Staged(swap),
            other => other,
        },
    )
}

/// Copies the artifact to that key.
pub(super) async fn deliver(
    courier: &Courier,
    todo: &Todo,
    to: &str,
    expected: &Expected,
) -> Result<ArtifactOutcome, ReplicationError> {
    let fetched = courier.fetch_as_found(&todo.key, to, &todo.checksum, expected);
    Ok(match fetched.await? {
        Delivery::Done(stored) => ArtifactOutcome::Copied(stored),
        Delivery::Missing => ArtifactOutcome::Missing,
        Delivery::Damaged(found) => ArtifactOutcome::Damaged(found),
    })
}
