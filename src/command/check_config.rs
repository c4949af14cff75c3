//! `check-config`: 0 the configuration is good, 2 a key is wrong and is named. With `--connect`
//! also 3 and 4, with the meaning that they have for a pass; no pass is made.

use super::{exit, show};
use crate::cluster::LocalCluster;
use crate::config::{Config, Side};
use crate::domain::{self, ErrorCode};
use crate::replication::{Ends, Facts, Here, ReplicationError, check, may_work};
use bytesize::ByteSize;
use serde_json::json;
use std::path::Path;

pub(super) async fn run(config: &Config, path: &Path, connect: bool, as_json: bool) -> u8 {
    let found = if connect {
        match look(config).await {
            Ok(found) => Some(found),
            Err(error) => return show::failure(&error, as_json),
        }
    } else {
        None
    };
    if as_json {
        show::json(&document(config, found.as_ref()));
    } else {
        print(config, path, found.as_ref());
    }
    exit::DONE
}

/// The two sides, as they were found.
struct Found {
    facts: Facts,
    /// True: no role is on record, and the configuration asks for none.
    role_unset: bool,
}

async fn look(config: &Config) -> Result<Found, ReplicationError> {
    // An operator looks at both sides before he says which one is the spare.
    let role_unset = match may_work(config).await {
        Err(ReplicationError::Refused {
            rule: ErrorCode::RoleUnset,
            ..
        }) => true,
        checked => {
            checked?;
            false
        }
    };
    let (id, here) = match LocalCluster::of(config).existing_state().await? {
        Some(state) => (state.cluster().await?.id, Here::read(config, &state).await?),
        None => Default::default(),
    };
    let facts = check(config, &Ends::open(config).await?, &id, false, &here).await?;
    let (local, peer) = (&config.local.datastore, &config.peer.datastore);
    let clients = &facts.clients;
    clients
        .try_out(domain::Side::Peer, peer, &peer.database)
        .await?;
    clients
        .try_out(domain::Side::Local, local, "postgres")
        .await?;
    Ok(Found { facts, role_unset })
}

fn print(config: &Config, path: &Path, found: Option<&Found>) {
    say!("{}: good.", path.display());
    if let Some(why) = &config.builder_unread {
        say!(
            "warning: {why}; the file is not needed, because your own configuration names the local servers"
        );
    }
    for (name, side) in [("local", &config.local), ("peer", &config.peer)] {
        say!(
            "{name} datastore: {} (from {})",
            datastore(side),
            side.datastore.source
        );
        say!(
            "{name} artifact store: {}{} (from {})",
            bucket(side),
            proxy(name, side)
                .map_or_else(String::new, |proxy| format!(" through the proxy {proxy}")),
            side.s3.source
        );
    }
    let Some(Found { facts, role_unset }) = found else {
        say!("No server was contacted. Use --connect to test the connections.");
        return;
    };
    say!("Both sides answer, and they are different servers.");
    say!(
        "The primary has {} in {}; the schema is copied with {}/pg_dump (PostgreSQL {}).",
        show::count(facts.packages, "package"),
        ByteSize(facts.database_bytes as u64),
        facts.clients.directory.display(),
        facts.clients.major
    );
    match role_unset {
        true => say!(
            "A copy is possible. The role of this cluster is not set yet: role = \"spare\" has the local database overwritten."
        ),
        false => say!("A copy is possible. Run `warm-spare sync`, or the service."),
    }
}

fn datastore(side: &Side) -> String {
    let to = &side.datastore;
    format!(
        "{}@{}:{}/{} (ssl_mode {})",
        to.user,
        to.host,
        to.port,
        to.database,
        to.ssl_mode.as_str()
    )
}

fn bucket(side: &Side) -> String {
    format!("{} bucket {}", side.s3.endpoint, side.s3.bucket_name)
}

/// Returns the proxy's URL without user and password. The proxy was read and found good before.
fn proxy(name: &str, side: &Side) -> Option<String> {
    let proxy = side.s3.read_proxy(&format!("{name}.s3.proxy"));
    Some(proxy.ok()??.address())
}

fn document(config: &Config, found: Option<&Found>) -> serde_json::Value {
    let side = |name: &str, side: &Side| {
        json!({
            "datastore": { "address": datastore(side), "source": side.datastore.source },
            "s3": { "address": bucket(side), "source": side.s3.source, "proxy": proxy(name, side) },
        })
    };
    json!({
        "format": 1,
        "valid": true,
        "builder_unread": config.builder_unread,
        "local": side("local", &config.local),
        "peer": side("peer", &config.peer),
        "connected": found.map(|Found { facts, role_unset }| json!({
            "packages": facts.packages,
            "database_bytes": facts.database_bytes,
            "client_major": facts.clients.major,
            "role_unset": role_unset,
        })),
    })
}
