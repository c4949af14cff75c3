//! The configuration in force. A bad configuration is refused, and the last good one stays in
//! force, also over a restart. Without any good one the service stays up and reports it.

use super::{Configs, StatusWriter};
use crate::cluster::on_record;
use crate::config::{self, Accepted, Config, ConfigError, Datastore};
use crate::domain::{EventKind, HoldReason};
use crate::observe::Settings;
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

const ADDRESS_FILE: &str = "http";
/// Interval of the looks at the local record while no peer is named, and their time limit.
const RECORD_INTERVAL: Duration = Duration::from_secs(5);
const RECORD_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns the file into which a running service writes its address.
pub fn address_file(data: &Path) -> PathBuf {
    data.join(ADDRESS_FILE)
}

pub struct Configuration {
    path: PathBuf,
    data: PathBuf,
    in_force: watch::Sender<Option<Arc<Config>>>,
    /// False: the last configuration could not be kept. This is logged once.
    kept: Cell<bool>,
    /// Binds that are absent now. Each is logged once.
    remembered: RefCell<Vec<String>>,
    /// The local datastore, while no peer was ever named.
    waiting: RefCell<Option<Datastore>>,
}

impl Configuration {
    /// Reads the rendered configuration, or otherwise the last good one.
    pub fn begin(path: PathBuf, data: PathBuf, writer: &StatusWriter) -> (Self, Configs) {
        let (in_force, configs) = watch::channel(None);
        let configuration = Configuration {
            path,
            data,
            in_force,
            kept: Cell::new(true),
            remembered: RefCell::default(),
            waiting: RefCell::default(),
        };
        configuration.read(writer);
        (configuration, configs)
    }

    pub async fn keep_reading(
        self,
        mut reload: mpsc::Receiver<()>,
        writer: &StatusWriter,
    ) -> Infallible {
        loop {
            let waiting = self.waiting.borrow().clone();
            let asked = tokio::select! {
                asked = reload.recv() => asked,
                never = look_for_a_record(waiting, writer) => match never {},
            };
            if asked.is_none() {
                // No sender is left that could ask for it.
                std::future::pending::<()>().await;
            }
            self.read(writer);
        }
    }

    fn read(&self, writer: &StatusWriter) {
        let error = match config::load_text(&self.path) {
            Ok((config, accepted)) => return self.accept(config, &accepted, writer),
            Err(error) => error,
        };
        let nothing_in_force = self.in_force.borrow().is_none();
        let kept = nothing_in_force.then(|| config::load_kept(&self.data));
        self.waiting.replace(None);
        if let (ConfigError::PeerUnset { alone }, Some(Ok(None))) = (&error, &kept) {
            self.waiting.replace(Some(alone.local.datastore.clone()));
            writer.update(|state| state.config.error = None);
            return wait_for_a_peer(writer);
        }
        self.refuse(&error, writer);
        if let Some(kept) = kept {
            self.fall_back(kept, &error, writer);
        }
    }

    fn accept(&self, config: Config, accepted: &Accepted, writer: &StatusWriter) {
        let kept = accepted.keep(&self.data);
        let warned = !self.kept.replace(kept.is_ok());
        if let Err(error) = kept
            && !warned
        {
            // The service works without the copy; only a restart with a bad configuration needs it.
            log::warn!(
                "configuration: cannot be kept in {}: {error}; a restart with a bad configuration would find no good one",
                self.data.display()
            );
        }
        self.log_binds(&accepted.remembered);
        for bind in &accepted.moved {
            log::warn!("configuration: a bind has a new address: {bind}");
        }
        self.waiting.replace(None);
        let was_bad = writer.read(|state| state.config.error.is_some());
        self.put_in_force(config, None, writer);
        if was_bad {
            log::info!("configuration: {} is good again", self.path.display());
            writer.note(EventKind::Config, "the configuration is good again");
        }
    }

    fn log_binds(&self, remembered: &[String]) {
        let before = self.remembered.replace(remembered.to_vec());
        for bind in remembered.iter().filter(|bind| !before.contains(bind)) {
            log::warn!(
                "configuration: bind {bind} has no live member; its last known address stays in force"
            );
        }
        for bind in before.iter().filter(|bind| !remembered.contains(bind)) {
            log::info!("configuration: bind {bind} has a live member again");
        }
    }

    fn put_in_force(&self, config: Config, error: Option<String>, writer: &StatusWriter) {
        log::set_max_level(config.log_level);
        writer.throttle.set(config.replication.bandwidth_limit);
        let old = self.in_force.borrow().clone();
        if let Some(why) = &config.builder_unread
            && old
                .as_ref()
                .is_none_or(|old| old.builder_unread != config.builder_unread)
        {
            log::warn!("configuration: {why}; the file is not needed");
        }
        let changed = old.as_ref().is_none_or(|old| **old != config);
        let now = writer.now();
        writer.update(|state| {
            if state.config.error != error || changed {
                state.config.since = now;
            }
            state.config.error = error;
            state.settings = Settings::of(&config);
        });
        writer.release(|hold| matches!(hold.reason, HoldReason::Config | HoldReason::PeerUnset));
        if let Some(old) = &old
            && changed
        {
            log::info!("configuration: the new configuration is in force");
            writer.note(EventKind::Config, "a new configuration is in force");
            if (old.http != config.http) || (old.log_format != config.log_format) {
                log::warn!("configuration: [http] and log_format take effect at the next restart");
            }
        }
        // During a hold an equal configuration is passed on too: an operator who has it read again
        // wants another try.
        if changed || writer.read(|state| state.hold.is_some()) {
            self.in_force.send_replace(Some(Arc::new(config)));
        }
    }

    fn refuse(&self, error: &ConfigError, writer: &StatusWriter) {
        let text = error.to_string();
        if writer.read(|state| state.config.error.as_ref() == Some(&text)) {
            return;
        }
        log::warn!("configuration refused: {text}");
        writer.note(EventKind::Config, &format!("configuration refused: {text}"));
        let now = writer.now();
        writer.update(|state| {
            state.config.error = Some(text);
            state.config.since = now;
        });
        if self.in_force.borrow().is_some() {
            log::warn!("configuration: the last good configuration stays in force");
        }
    }

    /// Puts the last good configuration in force after a start with a bad one. If none was ever
    /// good, the service does nothing.
    fn fall_back(
        &self,
        kept: Result<Option<Config>, ConfigError>,
        error: &ConfigError,
        writer: &StatusWriter,
    ) {
        let error = error.to_string();
        let data = self.data.display();
        match kept {
            Ok(Some(kept)) => {
                log::warn!(
                    "configuration: the last good configuration, kept in {data}, is in force"
                );
                return self.put_in_force(kept, Some(error), writer);
            }
            Ok(None) => log::warn!(
                "configuration: no good configuration exists yet, so the service does nothing; SIGHUP reads the file again"
            ),
            Err(kept) => log::warn!(
                "configuration: the last good configuration, kept in {data}, cannot be used either: {kept}"
            ),
        }
        writer.hold(
            HoldReason::Config,
            &error,
            "correct that key; docs/reference.md describes every key",
            false,
        );
    }
}

/// Shows that the operator has not named the other cluster yet. This is how a service begins that
/// was loaded before its configuration was written, so nothing is wrong.
fn wait_for_a_peer(writer: &StatusWriter) {
    writer.hold(
        HoldReason::PeerUnset,
        "the configuration names no peer, so nothing is done",
        "set peer.datastore.host and peer.s3.endpoint in user.toml: they name the other cluster",
        false,
    );
}

/// Looks whether this cluster has a role or a fence on record while no peer is named. Then a service
/// that does nothing is no beginning, but a failure: nobody follows, and nobody keeps the fence.
async fn look_for_a_record(waiting: Option<Datastore>, writer: &StatusWriter) -> Infallible {
    let Some(local) = waiting else {
        return std::future::pending().await;
    };
    loop {
        let look = tokio::time::timeout(RECORD_TIMEOUT, on_record(&local)).await;
        match look {
            Ok(Ok(Some(what))) => writer.hold(
                HoldReason::Config,
                &format!("the configuration names no peer, so nothing is done; but {what}"),
                "set peer.datastore.host and peer.s3.endpoint in user.toml: they name the other cluster",
                false,
            ),
            Ok(Ok(None)) => wait_for_a_peer(writer),
            Ok(Err(error)) => log::debug!("{error}"),
            Err(_) => log::debug!("local: the datastore did not answer in time"),
        }
        tokio::time::sleep(RECORD_INTERVAL).await;
    }
}
