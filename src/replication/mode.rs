//! Which of the two ways is gone: the stream, where everything that it needs is there, or snapshots.

use super::error::PassError;
use super::stream::Names;
use crate::cluster::{LocalSession, PeerSession};
use crate::config::{Config, Mode};

/// What was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// None: snapshots.
    pub stream: Option<Names>,
    /// Why, and what would change it.
    pub reason: String,
}

impl Chosen {
    pub fn name(&self) -> &'static str {
        match self.stream {
            Some(_) => "stream",
            None => "snapshot",
        }
    }
}

/// What the slot and the publication are called.
pub fn names(config: &Config, cluster_id: &str) -> Names {
    let ours = || format!("warm_spare_{cluster_id}");
    Names {
        slot: config.replication.slot.clone().unwrap_or_else(ours),
        publication: config.replication.publication.clone().unwrap_or_else(ours),
    }
}

/// Looks at both sides; changes nothing.
pub async fn choose(
    config: &Config,
    cluster_id: &str,
    local: &LocalSession,
    peer: &PeerSession,
) -> Result<Chosen, PassError> {
    let names = names(config, cluster_id);
    if config.replication.mode == Mode::Snapshot {
        return Ok(Chosen {
            stream: None,
            reason: "replication.mode = \"snapshot\"".into(),
        });
    }
    let sql = "SELECT current_setting('wal_level'), EXISTS (SELECT 1 FROM pg_publication WHERE pubname = $1)";
    let row = peer
        .query_one("INTERIM", sql, &[&names.publication])
        .await?;
    let _ = local;
    let stream = row.get::<_, String>(0) == "logical" && row.get(1);
    Ok(Chosen {
        stream: stream.then_some(names),
        reason: "interim".into(),
    })
}
