//! The cluster that makes a generation: its id, role, epoch and lineage.

use crate::cluster::{
    ClusterRecord, Lineage, LocalCluster, SpareDb, StateDb, WriteSession, system_id,
};
use crate::config::Config;
use crate::domain::{ErrorCode, Role};
use crate::replication::ReplicationError;

use super::error::refused;

/// The facts that must not change while a generation is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// Id of the cluster; for a cluster without our state, `server-` and the system id.
    pub cluster: String,
    /// None: the cluster has no role.
    pub role: Option<Role>,
    pub epoch: i64,
    /// Ids of the promotions, the oldest first.
    pub lineage: Vec<String>,
    /// System id of the local server.
    pub system_id: String,
}

impl Identity {
    /// Reads the facts. `session`: on any local database. Refuses a spare that has no copy.
    pub(super) async fn read(
        config: &Config,
        state: Option<&StateDb>,
        session: &WriteSession,
    ) -> Result<Identity, ReplicationError> {
        let system_id = system_id(session).await?;
        let Some(state) = state else {
            return Ok(Identity {
                cluster: format!("server-{system_id}"),
                role: None,
                // Its spare takes it for the primary of the first epoch.
                epoch: 1,
                lineage: ids(&Lineage::root(&system_id)),
                system_id,
            });
        };
        let ClusterRecord {
            id,
            role,
            epoch,
            coming_back,
            ..
        } = state.cluster().await?;
        if role == Some(Role::Spare) {
            let builder = LocalCluster::of(config).builder().await?;
            if coming_back || !SpareDb::of(&builder).exists().await? {
                return Err(ReplicationError::nothing_copied());
            }
        }
        let mut lineage = state.lineage().await?;
        if lineage.is_empty() && role != Some(Role::Spare) {
            lineage = Lineage::root(&system_id);
        }
        Ok(Identity {
            cluster: id,
            role,
            epoch,
            lineage: ids(&lineage),
            system_id,
        })
    }

    /// Returns the word of the role: `spare`, `primary` or `none`.
    pub(super) fn role_word(&self) -> &'static str {
        self.role.map_or("none", Into::into)
    }

    /// Refuses if a generation of another line is there, or of another branch of this line.
    pub(super) fn continues(&self, place: &str, line: &[String]) -> Result<(), ReplicationError> {
        let last = line.last();
        if last.is_none_or(|last| self.lineage.contains(last)) {
            return Ok(());
        }
        let shares = line.iter().any(|id| self.lineage.contains(id));
        let text = match shares {
            true => format!(
                "archive {place} has generations of a cluster that was promoted after this one: the line of this cluster ended at {}, the archive goes on to {}",
                self.lineage.last().map_or("its beginning", String::as_str),
                last.map_or("", String::as_str)
            ),
            false => format!(
                "archive {place} belongs to another Builder: its line began at {}, that of this cluster at {}",
                line.first().map_or("", String::as_str),
                self.lineage.first().map_or("", String::as_str)
            ),
        };
        Err(refused(
            ErrorCode::ArchiveForeign,
            text,
            "let the cluster that is in this line write there, or give this cluster another place"
                .into(),
        ))
    }
}

fn ids(lineage: &Lineage) -> Vec<String> {
    lineage
        .entries()
        .iter()
        .map(|entry| entry.id.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lineage: &[&str]) -> Identity {
        Identity {
            cluster: "0123abcd".into(),
            role: Some(Role::Spare),
            epoch: 1,
            lineage: lineage.iter().map(|id| id.to_string()).collect(),
            system_id: "7".into(),
        }
    }

    fn line(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|id| id.to_string()).collect()
    }

    #[test]
    fn only_the_cluster_that_continues_the_line_writes() {
        let promoted = of(&["root-1", "a"]);
        assert!(promoted.continues("x", &line(&["root-1"])).is_ok());
        assert!(promoted.continues("x", &line(&["root-1", "a"])).is_ok());
        assert!(promoted.continues("x", &[]).is_ok());
        let old = of(&["root-1"]).continues("x", &line(&["root-1", "a"]));
        assert!(
            old.unwrap_err()
                .to_string()
                .contains("promoted after this one")
        );
        let other = of(&["root-2"]).continues("x", &line(&["root-1"]));
        assert!(other.unwrap_err().to_string().contains("another Builder"));
    }
}
