//! The replaced databases that are kept: their size, the reason why each stays, and dropping one by
//! hand.

use super::switch::drop_generation;
use crate::cluster::{KeptDatabase, StateDb};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::error::ReplicationError;
use chrono::{DateTime, Utc};

/// A replaced database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub name: String,
    pub created: DateTime<Utc>,
    pub pinned: bool,
    /// The reason why it is pinned; empty: it is not pinned, or no reason was recorded.
    pub why: String,
    pub bytes: u64,
}

/// Returns the kept databases, the latest first.
pub async fn kept_generations(state: &StateDb) -> Result<Vec<Kept>, ReplicationError> {
    let databases = state.kept_databases().await?;
    let kept = |kept: KeptDatabase| Kept {
        why: match (kept.pinned, kept.diverged, kept.promoted) {
            _ if kept.pinned && kept.unproven => UNPROVEN.into(),
            (true, Some(epoch), _) => why_diverged(epoch),
            (true, None, Some(epoch)) => why_promoted(epoch),
            _ => String::new(),
        },
        name: kept.name,
        created: kept.created,
        pinned: kept.pinned,
        bytes: kept.bytes,
    };
    Ok(databases.into_iter().map(kept).collect())
}

const UNPROVEN: &str = "for a time: nothing proved that the primary's history went on from it";

fn why_diverged(epoch: i64) -> String {
    format!("the database with which this cluster came back to the primary of epoch {epoch}")
}

fn why_promoted(epoch: i64) -> String {
    format!("the last from before the promotion to epoch {epoch}")
}

/// Drops a recorded database; a pinned one only with `pinned_too`.
pub async fn drop_kept(
    config: &Config,
    state: &StateDb,
    name: &str,
    pinned_too: bool,
) -> Result<Kept, ReplicationError> {
    let refused = |rule, text: String, next_step: &str| ReplicationError::Refused {
        rule,
        text,
        next_step: next_step.into(),
    };
    if name == config.local.datastore.database {
        let text = format!("{name} is the current database, and not a replaced one");
        return Err(refused(
            ErrorCode::CurrentDatabase,
            text,
            "leave it where it is",
        ));
    }
    let kept = kept_generations(state).await?;
    let Some(found) = kept.into_iter().find(|kept| kept.name == name) else {
        let text = format!("{name} is none of the replaced databases that warm-spare keeps");
        let next_step = "`warm-spare generations list` names them";
        return Err(refused(ErrorCode::NoGeneration, text, next_step));
    };
    if found.pinned && !pinned_too {
        let why = match found.why.as_str() {
            "" => String::new(),
            why => format!(": it is {why}"),
        };
        let text = format!("{name} is pinned{why}");
        let next_step = "give --pinned as well, if nobody needs it any more";
        return Err(refused(ErrorCode::Pinned, text, next_step));
    }
    drop_generation(state, name).await?;
    Ok(found)
}
