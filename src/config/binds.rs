//! Addresses that the Supervisor gives for the services that this one is bound to. They are in the
//! tables `[bind.NAME]`, which only the template of the package writes.
//!
//! A bind counts for less than builder-api's own configuration, because that file has the values
//! that really work on this node.

use std::net::Ipv6Addr;

use toml::{Table, Value};

use super::keys::Key;
use super::kind::Checked;
use super::values::{Source, Values};

const TABLE: &str = "bind";

/// The binds of one site, and the side of the configuration that they fill.
pub(super) struct Binds {
    side: &'static str,
    datastore: &'static str,
    minio: &'static str,
}

impl Binds {
    /// Returns the binds of this site.
    pub(super) fn near(side: &'static str) -> Binds {
        Binds {
            side,
            datastore: "datastore",
            minio: "minio",
        }
    }

    /// Returns the binds of the other site.
    pub(super) fn far(side: &'static str) -> Binds {
        Binds {
            side,
            datastore: "peer-datastore",
            minio: "peer-minio",
        }
    }

    /// Fills the values of the side that neither the configuration nor builder-api gives.
    pub(super) fn complete(&self, values: &mut Values) {
        if let Some((host, port)) = address(values, self.datastore)
            && self.is_open(values, "datastore.host")
        {
            self.put(values, "datastore.host", Checked::Text(host));
            // The port belongs to the host of the bind; a default port does not.
            if !self.is_configured(values, "datastore.port") {
                self.put(values, "datastore.port", Checked::Int(port.into()));
            }
        }
        let aws = values.text(&self.key("s3.backend")) == Some("aws");
        if let Some((host, port)) = address(values, self.minio)
            && self.is_open(values, "s3.endpoint")
            && !aws
        {
            let url = format!("http://{}", authority(&host, port.into()));
            self.put(values, "s3.endpoint", Checked::Text(url));
            // The bucket of the bind belongs to the server of the bind, and to no other server.
            let bucket = values.text(&bind_key(self.minio, "bucket_name"));
            if let Some(bucket) = bucket.map(String::from)
                && self.is_open(values, "s3.bucket_name")
            {
                self.put(values, "s3.bucket_name", Checked::Text(bucket));
            }
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.side)
    }

    fn is_open(&self, values: &Values, name: &str) -> bool {
        matches!(values.source(&self.key(name)), None | Some(Source::Default))
    }

    fn is_configured(&self, values: &Values, name: &str) -> bool {
        Key::find(&self.key(name)).is_some_and(|key| values.is_set(key))
    }

    fn put(&self, values: &mut Values, name: &str, checked: Checked) {
        if let Some(key) = Key::find(&self.key(name)) {
            values.put(key, checked, Source::Bind);
        }
    }
}

fn bind_key(bind: &str, name: &str) -> String {
    format!("{TABLE}.{bind}.{name}")
}

fn address(values: &Values, bind: &str) -> Option<(String, u16)> {
    let host = values.text(&bind_key(bind, "host"))?;
    let port = values.int(&bind_key(bind, "port")).ok()?;
    Some((host.to_string(), port))
}

/// Adds the binds that are in `kept` and not in `table`, and returns their names.
///
/// A bind vanishes when its Supervisor is gone for a moment, and nothing says whether the bind will
/// return. The last known address is better than a default, which would be another server.
pub(super) fn remember(table: &mut Table, kept: &Table) -> Vec<String> {
    let Some(kept) = binds(kept) else {
        return Vec::new();
    };
    let now = table
        .entry(TABLE)
        .or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(now) = now else {
        return Vec::new();
    };
    let gone = kept.iter().filter(|(name, _)| !now.contains_key(*name));
    let gone: Vec<(String, Value)> = gone.map(|(n, v)| (n.clone(), v.clone())).collect();
    let names = gone.iter().map(|(name, _)| name.clone()).collect();
    now.extend(gone);
    names
}

/// Returns the binds whose address differs between `kept` and `table`, as text for people.
pub(super) fn moved(table: &Table, kept: &Table) -> Vec<String> {
    let (Some(now), Some(before)) = (binds(table), binds(kept)) else {
        return Vec::new();
    };
    let both = now.iter().filter_map(|(name, now)| {
        Some((name, address_text(now)?, address_text(before.get(name)?)?))
    });
    both.filter(|(_, now, before)| now != before)
        .map(|(name, now, before)| format!("{name}: from {before} to {now}"))
        .collect()
}

fn binds(table: &Table) -> Option<&Table> {
    table.get(TABLE)?.as_table()
}

fn address_text(bind: &Value) -> Option<String> {
    let host = bind.get("host")?.as_str()?;
    let port = bind.get("port")?.as_integer()?;
    Some(authority(host, port))
}

fn authority(host: &str, port: i64) -> String {
    match host.parse::<Ipv6Addr>() {
        Ok(_) => format!("[{host}]:{port}"),
        Err(_) => format!("{host}:{port}"),
    }
}
