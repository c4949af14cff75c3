//! The part of the preparation that is done in a provider's console, and the rights that an
//! administrator grants to a limited role.

use super::facts::Prepared;
use super::step::{How, Step};
use crate::cluster::{Provider, Replicates, quote_ident};

/// The extension that Builder's database uses.
const EXTENSION: &str = "intarray";

/// Returns how `wal_level = logical` is set in the provider's console.
pub fn set_wal_level(provider: Provider) -> &'static str {
    match provider {
        Provider::Amazon => {
            "set rds.logical_replication = 1 in the primary's parameter group (Aurora: in the cluster's), and reboot it"
        }
        Provider::Google => {
            "set the flag cloudsql.logical_decoding = on of the primary, which restarts it"
        }
        Provider::Azure => "set the primary's server parameter wal_level = logical, and restart it",
    }
}

/// Returns how the log that is held for slots is bounded there. `bound`: the value, such as
/// `7630MB`.
pub fn set_bound(provider: Provider, bound: &str) -> String {
    let mib = bound.trim_end_matches("MB");
    let accept = "accept it with replication.wal_unbounded = true, and watch the primary's disk";
    match provider {
        Provider::Amazon => format!(
            "set max_slot_wal_keep_size = {mib} (MB) in the primary's parameter group; if it has no such parameter, {accept}"
        ),
        Provider::Google => format!("Cloud SQL has no such flag: {accept}"),
        Provider::Azure => {
            format!("set the primary's server parameter max_slot_wal_keep_size = {mib} (MB)")
        }
    }
}

/// Returns a note on an extension that the provider must allow. None: nothing is to be done.
pub(super) fn extension(prepared: &Prepared) -> Option<String> {
    let allowed = prepared.allowed_extensions.as_ref()?;
    let there = allowed.iter().any(|name| name == EXTENSION);
    (!there).then(|| {
        let name = match prepared.provider {
            Some(Provider::Amazon) => "rds.allowed_extensions",
            _ => "azure.extensions",
        };
        format!(
            "{name} does not list {EXTENSION}, which Builder's database uses: add it in the provider's console, on the server of either side, else no copy can be made there"
        )
    })
}

/// Returns the grants that our user does not have. Only an administrator can make them, so they are
/// printed and never carried out.
pub(super) fn grants(prepared: &Prepared) -> Vec<Step> {
    let rights = &prepared.rights;
    if rights.superuser {
        return Vec::new();
    }
    let user = quote_ident(&prepared.user);
    let mut grants = Vec::new();
    let mut grant = |what: &str, reason: &str, sql: String| {
        grants.push(Step::new(How::Alone, what.into(), reason, vec![sql]));
    };
    if rights.replicates == Replicates::Denied {
        let sql = match prepared.provider {
            Some(Provider::Amazon) => format!("GRANT rds_replication TO {user}"),
            _ => format!("ALTER ROLE {user} REPLICATION"),
        };
        grant("the right to replicate", "the stream needs it", sql);
    }
    if !rights.monitor {
        grant(
            "membership in pg_monitor",
            "without it our user sees neither where settings come from nor when other sessions began",
            format!("GRANT pg_monitor TO {user}"),
        );
    }
    if !rights.signal {
        grant(
            "membership in pg_signal_backend",
            "a takeover fences this server, and ends other users' sessions for it; leave it out if our user shall only follow",
            format!("GRANT pg_signal_backend TO {user}"),
        );
    }
    grants
}
