//! The service: keeps a spare up to date with its primary for as long as it runs, and reports its
//! state at every moment.
//!
//! No failure of either side ends the service: every failure is a hold with a reason, or is retried
//! calmly. The service ends on a signal. Like a pass, it may be ended at any instruction.

mod archivist;
mod configuration;
mod failure_tracker;
mod guard;
mod leadership;
mod lease_keeper;
mod load_state;
mod pair;
mod plan;
mod primary;
mod sight;
mod spare_worker;
mod standby;
mod status_writer;
mod supervise;
mod web;
mod witness;

pub use configuration::{Configuration, address_file};
pub use status_writer::StatusWriter;
pub use witness::{remember_promotion, witnessed_epoch};

use crate::config::Config;
use crate::observe::Clock;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// The inputs of a service.
pub struct Start {
    /// The rendered configuration.
    pub config: PathBuf,
    /// The directory of files that outlast a restart: the last good configuration, and our address.
    pub data: PathBuf,
    pub clock: Clock,
    /// One message for each request to read the configuration again.
    pub reload: mpsc::Receiver<()>,
}

/// The configuration in force; None until there was a good one.
type Configs = watch::Receiver<Option<Arc<Config>>>;

/// Waits for the next configuration. Waits for ever if no sender is left.
async fn next(configs: &mut Configs) {
    if configs.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Runs the service until it is dropped.
pub async fn run(start: Start) -> Infallible {
    let writer = StatusWriter::new(start.clock);
    let (configuration, configs) =
        Configuration::begin(start.config.clone(), start.data.clone(), &writer);
    let web = web::keep_open(&writer, configs.clone(), &start.config, &start.data);
    let data = Arc::from(start.data.as_path());
    let archiving = archivist::keep_archiving(&writer, configuration.local(), &data);
    let archiving = Box::pin(archiving);
    let reloading = configuration.keep_reading(start.reload, &writer);
    let looking = Box::pin(sight::keep_looking(&writer, configs.clone()));
    let working = supervise::work(&writer, configs, &data);
    tokio::select! {
        never = web => never,
        never = reloading => never,
        never = looking => never,
        never = archiving => never,
        never = working => never,
    }
}
