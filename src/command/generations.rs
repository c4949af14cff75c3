//! `generations`: lists the replaced databases that are kept, or drops one. Exit code 4: the name
//! is not a generation, or the generation is pinned.

use super::{exit, show};
use crate::cluster::{LocalCluster, StateDb, StateError};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::{Kept, ReplicationError, drop_kept, kept_generations};
use bytesize::ByteSize;
use clap::Subcommand;
use serde_json::{Value, json};

#[derive(Subcommand)]
pub(super) enum Generations {
    /// Lists the generations, the latest first: time of the replacement, size, and reason for a
    /// pin.
    List,
    /// Drops one generation for good.
    Drop {
        /// Name of the generation, as `generations list` prints it.
        name: String,
        /// Drops the generation even if it is pinned: the last one before a promotion, or the
        /// database of a returned primary.
        #[arg(long)]
        pinned: bool,
    },
}

pub(super) async fn run(config: &Config, verb: &Generations, as_json: bool) -> u8 {
    let done = match verb {
        Generations::List => list(config, as_json).await,
        Generations::Drop { name, pinned } => drop_one(config, name, *pinned, as_json).await,
    };
    match done {
        Ok(()) => exit::DONE,
        Err(error) => show::failure(&error, as_json),
    }
}

async fn state(config: &Config) -> Result<Option<StateDb>, StateError> {
    LocalCluster::of(config).existing_state().await
}

async fn list(config: &Config, as_json: bool) -> Result<(), ReplicationError> {
    let kept = match state(config).await? {
        Some(state) => kept_generations(&state).await?,
        None => Vec::new(),
    };
    if as_json {
        let generations: Vec<Value> = kept.iter().map(document).collect();
        show::json(&json!({ "format": 1, "generations": generations }));
        return Ok(());
    }
    for one in &kept {
        let pinned = match (one.pinned, one.why.as_str()) {
            (false, _) => String::new(),
            (true, "") => ", pinned".into(),
            (true, why) => format!(", pinned: {why}"),
        };
        let created = one.created.format("%Y-%m-%d %H:%M:%S UTC");
        say!(
            "{}: {}, replaced {created}{pinned}",
            one.name,
            ByteSize(one.bytes)
        );
    }
    say!("{}.", show::count(kept.len() as u64, "generation"));
    Ok(())
}

async fn drop_one(
    config: &Config,
    name: &str,
    pinned: bool,
    as_json: bool,
) -> Result<(), ReplicationError> {
    let Some(state) = state(config).await? else {
        return Err(ReplicationError::Refused {
            rule: ErrorCode::NoGeneration,
            text: "the local cluster has no database warm_spare, so it keeps no generation".into(),
            next_step: "check local.datastore".into(),
        });
    };
    let dropped = drop_kept(config, &state, name, pinned).await?;
    if as_json {
        show::json(&json!({ "format": 1, "dropped": document(&dropped) }));
    } else {
        say!("Dropped: {name} ({}).", ByteSize(dropped.bytes));
    }
    Ok(())
}

fn document(kept: &Kept) -> Value {
    json!({
        "name": kept.name,
        "created": kept.created.to_rfc3339(),
        "pinned": kept.pinned,
        "why": (!kept.why.is_empty()).then_some(&kept.why),
        "bytes": kept.bytes,
    })
}
