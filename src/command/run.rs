//! `run`: the service. It ends with 0 on SIGTERM or SIGINT. No failure of a server ends it.

use crate::config;
use crate::observe::Clock;
use crate::service::{self, Start};
use std::path::Path;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::{exit, log_lines};

/// Time from the first signal to a forced exit if something hangs. The Supervisor kills after 8 s.
const FORCED_EXIT_AFTER: std::time::Duration = std::time::Duration::from_millis(1500);

pub(super) async fn run(path: &Path) -> u8 {
    // This comes first: without a handler, SIGHUP would end the process.
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
    // The logger itself passes every level. The configuration sets the level in force, and may
    // change it.
    log_lines::start(log::LevelFilter::Trace, form_of(path));
    log::set_max_level(log::LevelFilter::Info);
    log::info!(
        "warm-spare {} started with {}",
        env!("CARGO_PKG_VERSION"),
        path.display()
    );
    let (reload_request, reload) = mpsc::channel(1);
    let start = Start {
        config: path.to_path_buf(),
        data: config::data_dir(path),
        clock: Clock::real(),
        reload,
    };
    let (stop_request, stop) = oneshot::channel();
    // A task of its own: the main task may hang in a read of a file on a dead file server.
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        let _ = stop_request.send(());
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(FORCED_EXIT_AFTER) => {}
        }
        std::process::exit(i32::from(exit::DONE));
    });
    // Every future may be dropped at any point, as if the process were killed. So no shutdown is
    // needed.
    tokio::select! {
        never = service::run(start) => match never {},
        never = pass_on(hangup, reload_request) => match never {},
        _ = stop => {}
    }
    log::info!("stopped");
    exit::DONE
}

/// Passes SIGHUP on as a request to read the configuration again. Several requests at once count as
/// one.
async fn pass_on(mut hangup: Signal, reload_request: mpsc::Sender<()>) -> std::convert::Infallible {
    loop {
        hangup.recv().await;
        let _ = reload_request.try_send(());
    }
}

/// Returns the form of the log. It is chosen before the configuration is in force, and it does not
/// change later.
fn form_of(path: &Path) -> config::LogFormat {
    let kept = || config::load_kept(&config::data_dir(path)).ok().flatten();
    let config = config::load(path).ok().or_else(kept);
    config.map_or(config::LogFormat::Text, |config| config.log_format)
}
