//! `promote`: makes this cluster the primary without the service. Exit code 4: it was refused, and
//! nothing was changed.

use super::{exit, show};
use crate::config::{self, Config};
use crate::role::{ByHand, promote_by_hand};
use crate::service::{remember_promotion, witnessed_epoch};
use serde_json::json;
use std::path::Path;

pub(super) async fn run(config: &Config, path: &Path, epoch: u64, as_json: bool) -> u8 {
    let witnessed = witnessed_epoch(config, &config::data_dir(path)).await;
    let promoted = match promote_by_hand(config, epoch, witnessed).await {
        Ok(promoted) => promoted,
        Err(error) => return show::failure(&error, as_json),
    };
    remember_promotion(config, &config::data_dir(path)).await;
    let epoch = promoted.epoch;
    if as_json {
        let (outcome, point) = match &promoted.outcome {
            ByHand::AtPoint(point) => ("promoted", Some(point)),
            ByHand::TakenBack => ("taken_back", None),
            ByHand::Finished => ("finished", None),
        };
        show::json(&json!({
            "format": 1,
            "epoch": epoch,
            "outcome": outcome,
            "lsn": point.map(|point| &point.lsn),
            "commit_time": point.map(|point| point.commit_time.to_rfc3339()),
        }));
        return exit::DONE;
    }
    match &promoted.outcome {
        ByHand::AtPoint(point) => {
            say!(
                "This cluster is the primary of epoch {epoch}, at {}, commit time {}.",
                point.lsn,
                point.commit_time
            );
            say!(
                "The old primary is not fenced. Keep its Builder stopped until warm-spare runs here again and fences it."
            );
        }
        ByHand::TakenBack => {
            say!(
                "This cluster is the primary of epoch {epoch}, with the rows that it had: it was at no recovery point."
            );
            say!(
                "Nothing fences the other cluster from here. Stop its Builder. It gives way when its own warm-spare sees this cluster."
            );
        }
        ByHand::Finished => say!(
            "This cluster was the primary of epoch {epoch} already. Its sessions from before are ended."
        ),
    }
    exit::DONE
}
