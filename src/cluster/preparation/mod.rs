//! Our permanent objects on the peer: anybody may read them, only [`Preparation`] makes and removes
//! them.
//!
//! Decide, then act: [`inspect`] only reads, [`plan_to_prepare`] and [`plan_to_release`] are pure,
//! and the same SQL is either carried out or printed for a database administrator.

mod carry_out;
mod console;
mod facts;
mod plan;
mod publication;
mod release;
#[cfg(test)]
pub mod samples;
mod setting;
mod step;
#[cfg(test)]
mod tests;

pub use carry_out::{Preparation, PreparationError};
pub use console::{set_bound, set_wal_level};
pub use facts::{COPIED_TABLES, CopiedTable, Prepared, Rights, Slot, inspect, why_lost};
pub use plan::{Obstacle, Plan, Wanted, extension, plan_to_prepare};
pub use publication::{Publication, PublicationState, PublishedTable};
pub use release::plan_to_release;
pub use setting::{AutoConf, Setting};
pub use step::{How, Step};

use crate::config::Replication;

/// Oldest major version whose stream can be followed.
pub const OLDEST_STREAM: i32 = 14;

/// The names of our objects on the peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Id of the cluster, 8 hex digits.
    pub id: String,
    pub slot: String,
    pub publication: String,
    /// True: a database administrator made it. It is used, and neither changed nor removed.
    pub slot_is_premade: bool,
    pub publication_is_premade: bool,
}

impl Names {
    pub fn of(id: &str, replication: &Replication) -> Self {
        let ours = format!("warm_spare_{id}");
        Names {
            id: id.to_string(),
            slot: replication.slot.clone().unwrap_or_else(|| ours.clone()),
            publication: replication.publication.clone().unwrap_or(ours),
            slot_is_premade: replication.slot.is_some(),
            publication_is_premade: replication.publication.is_some(),
        }
    }

    /// Returns the names of a cluster without any configuration, such as a cluster that is gone.
    pub fn of_cluster(id: &str) -> Self {
        let ours = format!("warm_spare_{id}");
        Names {
            id: id.to_string(),
            slot: ours.clone(),
            publication: ours,
            slot_is_premade: false,
            publication_is_premade: false,
        }
    }

    /// Returns whether a slot or publication of this name belongs to this cluster, and was made by
    /// it.
    pub(super) fn made(&self, name: &str) -> bool {
        id_of(name) == Some(&self.id)
    }
}

/// Returns the cluster to which our name belongs: `warm_spare_0123abcd`, or the same with more
/// after an underscore.
pub(super) fn id_of(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("warm_spare_")?;
    let (id, more) = rest.split_at_checked(8)?;
    (is_cluster_id(id) && (more.is_empty() || more.starts_with('_'))).then_some(id)
}

pub fn is_cluster_id(text: &str) -> bool {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.len() == 8 && text.bytes().all(digit)
}
