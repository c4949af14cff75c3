//! The part of the configuration that the observer needs.

use crate::config::{Config, Direction, WantedRole};
use chrono::{DateTime, TimeDelta, Utc};

/// The part of the configuration that the observer needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub site: String,
    /// Number of the change request under which the operator works. It is kept with every event.
    pub change: String,
    pub wanted: WantedRole,
    pub direction: Direction,
    pub interval: TimeDelta,
    pub lag_warn: TimeDelta,
    pub rpo: TimeDelta,
    pub wal_hold_limit: u64,
    pub quiet_until: Option<DateTime<Utc>>,
    pub local: Addresses,
    pub peer: Addresses,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Addresses {
    pub datastore: String,
    pub datastore_source: &'static str,
    pub s3: String,
    pub s3_source: &'static str,
}

impl Settings {
    pub fn of(config: &Config) -> Self {
        let delta = |duration| TimeDelta::from_std(duration).unwrap_or(TimeDelta::MAX);
        let addresses = |side: &crate::config::Side| Addresses {
            datastore: format!("{}:{}", side.datastore.host, side.datastore.port),
            datastore_source: side.datastore.source,
            s3: format!("{}/{}", side.s3.endpoint, side.s3.bucket_name),
            s3_source: side.s3.source,
        };
        Settings {
            site: config.site.clone(),
            change: config.change.clone(),
            wanted: config.role,
            direction: config.replication.direction,
            interval: delta(config.replication.interval),
            lag_warn: delta(config.replication.lag_warn),
            rpo: delta(config.replication.rpo),
            wal_hold_limit: config.replication.wal_hold_limit,
            quiet_until: config.quiet_until,
            local: addresses(&config.local),
            peer: addresses(&config.peer),
        }
    }
}
