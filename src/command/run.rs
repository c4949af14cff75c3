//! `run`: the service. It ends when it is told to, with 0; nothing that a server does ends it.

use crate::config;
use crate::observe::Clock;
use crate::service::{self, Start};
use std::path::Path;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::{exit, log_lines};

/// From the first signal to the end, should anything be stuck; the Supervisor would kill after 8 s.
const LAST_WAIT: std::time::Duration = std::time::Duration::from_millis(1500);

pub async fn run(path: &Path) -> u8 {
    // First of all: until then SIGHUP would end the process.
    let signals = [
        SignalKind::hangup(),
        SignalKind::terminate(),
        SignalKind::interrupt(),
    ]
    .map(signal);
    let [Ok(hangup), Ok(mut terminate), Ok(mut interrupt)] = signals else {
        eprintln!("error: this system has no signals");
        return exit::UNFINISHED;
    };
    // At their most talkative; the configuration says what is let through, and may change that.
    log_lines::start(log::LevelFilter::Trace, form_of(path));
    log::set_max_level(log::LevelFilter::Info);
    log::info!(
        "warm-spare {} started with {}",
        env!("CARGO_PKG_VERSION"),
        path.display()
    );
    let (wish, reload) = mpsc::channel(1);
    let start = Start {
        config: path.to_path_buf(),
        data: config::data_dir(path),
        clock: Clock::real(),
        reload,
    };
    let (told, stop) = oneshot::channel();
    // In a task of its own: what we do may be stuck in a file that a dead server ought to send.
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        let _ = told.send(());
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(LAST_WAIT) => {}
        }
        std::process::exit(i32::from(exit::DONE));
    });
    // Everything may be dropped at any instruction, as if the process were killed; so there is nothing to wait for.
    tokio::select! {
        never = service::run(start) => match never {},
        never = pass_on(hangup, wish) => match never {},
        _ = stop => {}
    }
    log::info!("stopped");
    exit::DONE
}

/// Several wishes at once are one.
async fn pass_on(mut hangup: Signal, wish: mpsc::Sender<()>) -> std::convert::Infallible {
    loop {
        hangup.recv().await;
        let _ = wish.try_send(());
    }
}

/// The log's form is settled before the configuration is in force, and stays.
fn form_of(path: &Path) -> config::LogFormat {
    let kept = || config::load_kept(&config::data_dir(path)).ok().flatten();
    let config = config::load(path).ok().or_else(kept);
    config.map_or(config::LogFormat::Text, |config| config.log_format)
}
