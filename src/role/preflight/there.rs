//! Facts of the peer.

use super::here::Remembered;
use crate::cluster::preparation::Names;
use crate::cluster::{LocalSession, PeerSession, Record, Side, Store, peers_record};
use crate::config::Config;
use crate::observe::Clock;
use crate::replication::stream::{Seen, ask};
use crate::replication::{
    PassError, Rights, decide, lacking_extensions, major, rights, two_servers,
};
use std::time::Duration;

/// What of ours there is asked for.
pub struct Asked {
    names: Names,
    /// A copy is there, and no slot goes on from it: why?
    snapshots: bool,
}

impl Asked {
    pub fn of(config: &Config, remembered: Option<&Remembered>) -> Asked {
        let id = remembered.map_or("", |state| &state.cluster.id);
        let point = remembered.and_then(|state| state.point.as_ref());
        let mut names = Names::of(id, &config.replication);
        if let Some(point) = point.filter(|point| !point.slot.is_empty()) {
            names.slot = point.slot.clone();
        }
        Asked {
            snapshots: point.is_some_and(|point| point.slot.is_empty()),
            names,
        }
    }
}

pub struct There {
    pub seen: Seen,
    /// What it says of itself; None: it keeps no state of ours.
    pub record: Option<Record>,
    pub server: PeerServer,
}

pub struct PeerServer {
    pub major: u32,
    pub rights: Rights,
    /// Whether it is another server than our own.
    pub two: Result<(), PassError>,
    /// Extensions of its database that our server has no files for.
    pub lacking_extensions: Vec<String>,
    /// Why it is not followed by the stream, and what would change that.
    pub why_snapshots: Option<String>,
    /// Why a fence would not stand there.
    pub unfenceable: Option<String>,
}

pub async fn look(config: &Config, asked: &Asked) -> Result<There, PassError> {
    let (slot, publication) = (&asked.names.slot, &asked.names.publication);
    let clock = Clock::real();
    let record = async { Ok(peers_record(&config.peer.datastore).await?) };
    let (seen, record, server) = tokio::try_join!(
        Box::pin(ask(config, slot, publication, &clock)),
        record,
        Box::pin(server(config, asked)),
    )?;
    Ok(There {
        seen,
        record,
        server,
    })
}

async fn server(config: &Config, asked: &Asked) -> Result<PeerServer, PassError> {
    let (local, peer) = tokio::try_join!(
        LocalSession::open(&config.local.datastore, "postgres"),
        PeerSession::open(&config.peer.datastore),
    )?;
    let why_snapshots = match asked.snapshots {
        true => Some(match decide(config, &asked.names.id, &local, &peer).await {
            Ok(chosen) => chosen.reason,
            Err(error) => error.to_string(),
        }),
        false => None,
    };
    Ok(PeerServer {
        major: major(&peer).await?,
        rights: rights(&peer, &config.peer.datastore.database).await?,
        two: two_servers(config, &local, &peer).await,
        lacking_extensions: lacking_extensions(&local, &peer).await?,
        why_snapshots,
        unfenceable: unfenceable(&peer, &config.peer.datastore.database).await?,
    })
}

/// What would keep a fence there from standing: better found now than behind it.
async fn unfenceable(peer: &PeerSession, database: &str) -> Result<Option<String>, PassError> {
    let sql = "SELECT (SELECT count(*) FROM pg_prepared_xacts WHERE database = $1), \
                 (SELECT min(r.rolname)::text FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole \
                   WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = $1)) \
                     AND 'default_transaction_read_only=off' = ANY (s.setconfig))";
    let doing = "looking for what a fence does not hold";
    let row = peer.query_one(doing, sql, &[&database]).await?;
    let (prepared, exempt): (i64, Option<String>) = (row.get(0), row.get(1));
    Ok(match exempt {
        Some(role) => Some(format!(
            "role {role} has a default_transaction_read_only of its own there"
        )),
        None if prepared > 0 => Some(format!("{prepared} prepared transactions are open there")),
        None => None,
    })
}

/// Whether its bucket can be read: a drain may have artifacts to bring.
pub async fn bucket(config: &Config, patience: Duration) -> Result<(), PassError> {
    let store = Store::open(Side::Peer, &config.peer.s3)?.with_limits(patience, 1);
    Ok(store.check_bucket().await?)
}
