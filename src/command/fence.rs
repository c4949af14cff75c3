//! `fence`: shows whether a cluster's database takes writes, and who fenced it; or lifts a fence that
//! nobody needs any more. Exit code 0: it takes writes; of the peer: no fence is set. 1: it is
//! read-only. 4: the fence is needed.

use super::{exit, show};
use crate::config::Config;
use crate::domain::{Role, Side};
use crate::role::{FenceView, lift_fence, view_fence};
use serde_json::json;

pub(super) async fn run(config: &Config, side: Side, lift: bool, as_json: bool) -> u8 {
    if lift {
        return self::lift(config, as_json).await;
    }
    let view = match view_fence(config, side).await {
        Ok(view) => view,
        Err(error) => return show::failure(&error, as_json),
    };
    if as_json {
        show::json(&json!({
            "format": 1,
            "side": view.side.to_string(),
            "database": view.database,
            "fenced": view.fenced,
            "read_only": view.read_only,
            "exempt_role": view.exempt,
            "role": view.role.map(<&str>::from),
            "epoch": view.epoch,
            "by": view.record.as_ref().map(|record| json!({
                "cluster": record.by_cluster,
                "epoch": record.epoch,
                "since": record.since.to_rfc3339(),
                "final": record.settled,
                "was_lifted": record.lifted,
            })),
        }));
    } else {
        print(&view);
    }
    match view.fenced || view.read_only == Some(true) {
        true => exit::NO,
        false => exit::DONE,
    }
}

fn print(view: &FenceView) {
    let state = match (view.fenced, view.read_only) {
        (true, Some(false)) => {
            "fenced, but our own user can write: a setting of that role goes before the fence"
        }
        (true, _) => "read-only",
        (false, Some(true)) => {
            "read-only, but not by a fence: the server is in recovery, or default_transaction_read_only is set for all of it"
        }
        (false, Some(false)) => "not fenced: clients can write",
        (false, None) => "no fence is set",
    };
    say!("{} database {}: {state}.", view.side, view.database);
    if let (true, Some(role)) = (view.fenced, &view.exempt) {
        say!("The fence does not hold role {role}, which has a setting of its own.");
    }
    match (view.role, view.epoch) {
        (Some(role), Some(epoch)) => say!("Role on record: {role}, epoch {epoch}."),
        _ => say!("Role on record: none."),
    }
    match &view.record {
        Some(record) => {
            let kind = match record.settled {
                true => "for good",
                false => "for a takeover that is not finished",
            };
            say!(
                "Fenced by cluster {} under epoch {}, {kind}, since {}.",
                record.by_cluster,
                record.epoch,
                record.since.format("%Y-%m-%d %H:%M:%S UTC")
            );
            if record.lifted || !view.fenced {
                say!("Somebody has lifted this fence: rows written meanwhile are nowhere else.");
            }
        }
        None if view.fenced && view.role == Some(Role::Spare) => {
            say!("This is the fence of every spare.");
        }
        None if view.fenced => {
            say!("warm-spare has no record of this fence: somebody set it by hand.")
        }
        None => {}
    }
}

async fn lift(config: &Config, as_json: bool) -> u8 {
    let lifted = match lift_fence(config).await {
        Ok(lifted) => lifted,
        Err(error) => return show::failure(&error, as_json),
    };
    let database = &config.local.datastore.database;
    if as_json {
        show::json(&json!({ "format": 1, "database": database, "lifted": lifted }));
    } else if lifted {
        say!(
            "The fence is lifted: new sessions can write in database {database}. Sessions from before stay read-only: start their services anew."
        );
    } else {
        say!("Database {database} was not fenced.");
    }
    exit::DONE
}
