//! The service: keeps a spare at its primary's present for as long as it runs, and says at every moment how it stands.
//!
//! Nothing that either side does ends it: every failure is a hold with a reason, or is tried again calmly. It ends when
//! it is told to, and may be ended at any instruction, as a pass may.

mod complaint;
mod configuration;
mod desk;
mod duties;
mod guard;
mod plan;
mod primary;
mod sight;
mod tenure;
mod web;
mod witness;

pub use configuration::{Configuration, address_file};
pub use desk::Desk;

use crate::config::Config;
use crate::observe::Clock;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// What the outside gives to a service.
pub struct Start {
    /// The rendered configuration.
    pub config: PathBuf,
    /// What is to outlast a restart: the last good configuration, and where we listen.
    pub data: PathBuf,
    pub clock: Clock,
    /// One message for each wish that the configuration be read again.
    pub reload: mpsc::Receiver<()>,
}

/// Configurations in force, one after the other; None as long as there was no good one.
type Configs = watch::Receiver<Option<Arc<Config>>>;

/// Waits for the next one; for ever, if nobody is left who could give it.
async fn next(configs: &mut Configs) {
    if configs.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Works until it is dropped.
pub async fn run(start: Start) -> Infallible {
    let desk = Desk::new(start.clock);
    let (configuration, configs) =
        Configuration::begin(start.config.clone(), start.data.clone(), &desk);
    let web = web::keep_open(&desk, configs.clone(), &start.config, &start.data);
    let reloading = configuration.keep_reading(start.reload, &desk);
    let data = Arc::from(start.data.as_path());
    let looking = sight::keep_looking(&desk, configs.clone());
    let working = tenure::work(&desk, configs, &data);
    tokio::select! {
        never = web => never,
        never = reloading => never,
        never = looking => never,
        never = working => never,
    }
}
