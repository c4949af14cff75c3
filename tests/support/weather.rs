//! Records which server a fault of ours strikes, and when it last did, so that an error is
//! attributed to the fault or to the service.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::faults::Server;

/// Time after a fault in which its errors may still come: a session notices its end at its next
/// statement.
const AFTERWARDS: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, Default)]
struct Storm {
    active: u32,
    over: Option<Instant>,
}

#[derive(Default)]
pub struct Weather {
    storms: Mutex<HashMap<Server, Storm>>,
}

impl Weather {
    pub fn begin(&self, server: Server) {
        self.with(server, |storm| storm.active += 1);
    }

    pub fn end(&self, server: Server) {
        self.with(server, |storm| {
            storm.active -= 1;
            storm.over = Some(Instant::now());
        });
    }

    pub fn is_active(&self, server: Server) -> bool {
        self.with(server, |storm| storm.active > 0)
    }

    /// Returns whether an action that began then may have been hit.
    pub fn excuses(&self, server: Server, began: Instant) -> bool {
        self.with(server, |storm| {
            let lately = |over: Instant| over + AFTERWARDS >= began;
            storm.active > 0 || storm.over.is_some_and(lately)
        })
    }

    fn with<T>(&self, server: Server, act: impl FnOnce(&mut Storm) -> T) -> T {
        let mut storms = self.storms.lock().expect("the storms' lock");
        act(storms.entry(server).or_default())
    }
}
