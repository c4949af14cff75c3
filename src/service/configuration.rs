//! The configuration in force. A bad one is refused and the last good one stays, also over a restart; with none at all
//! the service stays up and says so.

use super::{Configs, Desk};
use crate::config::{self, Accepted, Config, ConfigError};
use crate::domain::EventKind;
use crate::domain::HoldReason;
use crate::observe::Settings;
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

const ADDRESS_FILE: &str = "http";

/// Where a running service writes the address on which it can be asked.
pub fn address_file(data: &Path) -> PathBuf {
    data.join(ADDRESS_FILE)
}

pub struct Configuration {
    path: PathBuf,
    data: PathBuf,
    in_force: watch::Sender<Option<Arc<Config>>>,
    /// Whether the last one could be kept: told once.
    kept: Cell<bool>,
    /// Binds that are not there at present: told once.
    remembered: RefCell<Vec<String>>,
}

impl Configuration {
    /// Reads the rendered configuration, or else the last good one.
    pub fn begin(path: PathBuf, data: PathBuf, desk: &Desk) -> (Self, Configs) {
        let (in_force, configs) = watch::channel(None);
        let configuration = Configuration {
            path,
            data,
            in_force,
            kept: Cell::new(true),
            remembered: RefCell::default(),
        };
        configuration.read(desk);
        if configuration.in_force.borrow().is_none() {
            configuration.fall_back(desk);
        }
        (configuration, configs)
    }

    pub async fn keep_reading(self, mut reload: mpsc::Receiver<()>, desk: &Desk) -> Infallible {
        loop {
            if reload.recv().await.is_none() {
                // Nobody is left who could ask for it.
                std::future::pending::<()>().await;
            }
            self.read(desk);
            if self.in_force.borrow().is_none() {
                self.fall_back(desk);
            }
        }
    }

    fn read(&self, desk: &Desk) {
        match config::load_text(&self.path) {
            Ok((config, accepted)) => self.accept(config, &accepted, desk),
            Err(error) => self.refuse(&error, desk),
        }
    }

    fn accept(&self, config: Config, accepted: &Accepted, desk: &Desk) {
        let kept = accepted.keep(&self.data);
        let told = !self.kept.replace(kept.is_ok());
        if let Err(error) = kept
            && !told
        {
            // The service works without; only a restart with a bad configuration would miss it.
            log::warn!(
                "configuration: cannot be kept in {}: {error}; a restart with a bad one would find none",
                self.data.display()
            );
        }
        self.tell_of_binds(&accepted.remembered);
        for bind in &accepted.moved {
            log::warn!("configuration: the bind has another address: {bind}");
        }
        let was_bad = desk.read(|state| state.config.error.is_some());
        self.put_in_force(config, None, desk);
        if was_bad {
            log::info!("configuration: {} is good again", self.path.display());
            desk.note(EventKind::Config, "the configuration is good again");
        }
    }

    fn tell_of_binds(&self, remembered: &[String]) {
        let before = self.remembered.replace(remembered.to_vec());
        for bind in remembered.iter().filter(|bind| !before.contains(bind)) {
            log::warn!(
                "configuration: nobody is there for the bind {bind}; its last known address stays in force"
            );
        }
        for bind in before.iter().filter(|bind| !remembered.contains(bind)) {
            log::info!("configuration: the bind {bind} is there again");
        }
    }

    fn put_in_force(&self, config: Config, error: Option<String>, desk: &Desk) {
        log::set_max_level(config.log_level);
        desk.throttle.set(config.replication.bandwidth_limit);
        let old = self.in_force.borrow().clone();
        if let Some(why) = &config.builder_unread
            && old
                .as_ref()
                .is_none_or(|old| old.builder_unread != config.builder_unread)
        {
            log::warn!("configuration: {why}; nothing of it is needed");
        }
        let changed = old.as_ref().is_none_or(|old| **old != config);
        let now = desk.now();
        desk.update(|state| {
            if state.config.error != error || changed {
                state.config.since = now;
            }
            state.config.error = error;
            state.settings = Settings::of(&config);
        });
        desk.release(|hold| hold.reason == HoldReason::Config);
        if let Some(old) = &old
            && changed
        {
            log::info!("configuration: the new one is in force");
            desk.note(EventKind::Config, "a new configuration is in force");
            if (old.http != config.http) || (old.log_format != config.log_format) {
                log::warn!("configuration: [http] and log_format take effect at the next restart");
            }
        }
        // An equal one too, if something is held: whoever asks for it to be read wants another try.
        if changed || desk.read(|state| state.hold.is_some()) {
            self.in_force.send_replace(Some(Arc::new(config)));
        }
    }

    fn refuse(&self, error: &ConfigError, desk: &Desk) {
        let text = error.to_string();
        if desk.read(|state| state.config.error.as_ref() == Some(&text)) {
            return;
        }
        log::warn!("configuration refused: {text}");
        desk.note(EventKind::Config, &format!("configuration refused: {text}"));
        let now = desk.now();
        desk.update(|state| {
            state.config.error = Some(text);
            state.config.since = now;
        });
        if self.in_force.borrow().is_some() {
            log::warn!("configuration: the last good one stays in force");
        }
    }

    /// At a start with a bad configuration; with none that was ever good, nothing is done.
    fn fall_back(&self, desk: &Desk) {
        let error = desk.read(|state| state.config.error.clone());
        let data = self.data.display();
        match config::load_kept(&self.data) {
            Ok(Some(kept)) => {
                log::warn!("configuration: the last good one, kept in {data}, is in force");
                return self.put_in_force(kept, error, desk);
            }
            Ok(None) => log::warn!(
                "configuration: there is no good one yet, so nothing is done; SIGHUP reads it again"
            ),
            Err(kept) => log::warn!(
                "configuration: the last good one, kept in {data}, cannot be used either: {kept}"
            ),
        }
        desk.hold(
            HoldReason::Config,
            &error.unwrap_or_default(),
            "correct that key; docs/reference.md has them all",
            false,
        );
    }
}
