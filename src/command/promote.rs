//! `promote`: makes this cluster the primary without the service. Exit code 4: it was refused, and
//! nothing was changed.

use super::{exit, show};
use crate::config::{self, Config};
use crate::role::promote_by_hand;
use crate::service::witnessed_epoch;
use serde_json::json;
use std::path::Path;

pub(super) async fn run(config: &Config, path: &Path, epoch: u64, as_json: bool) -> u8 {
    let witnessed = witnessed_epoch(config, &config::data_dir(path)).await;
    let promoted = match promote_by_hand(config, epoch, witnessed).await {
        Ok(promoted) => promoted,
        Err(error) => return show::failure(&error, as_json),
    };
    let point = promoted.point.as_ref();
    if as_json {
        show::json(&json!({
            "format": 1,
            "epoch": promoted.epoch,
            "lsn": point.map(|point| &point.lsn),
            "commit_time": point.map(|point| point.commit_time.to_rfc3339()),
        }));
        return exit::DONE;
    }
    match point {
        Some(point) => say!(
            "This cluster is the primary of epoch {}, at {}, commit time {}.",
            promoted.epoch,
            point.lsn,
            point.commit_time
        ),
        None => say!(
            "This cluster is the primary of epoch {}, with the rows that it had: it was at no recovery point.",
            promoted.epoch
        ),
    }
    say!(
        "The old primary is not fenced. Keep its Builder stopped until warm-spare runs here again and fences it."
    );
    exit::DONE
}
