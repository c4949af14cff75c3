//! The lineage of a primary: one entry for each promotion, the oldest first.
//!
//! A number alone proves nothing: a restored backup, a staging pair and a foreign cluster all have
//! an epoch. The id of each promotion is random, so two clusters that know the same id have a
//! common lineage.

use super::state::{StateDb, StateError};
use super::working_lock::Lock;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::rows::Row;
use crate::cluster::postgres::session::WriteSession;

/// One promotion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descent {
    pub epoch: i64,
    pub id: String,
    /// The id of the promotion before it; empty: none is known.
    pub parent: String,
    /// The cluster that was promoted, by its id; empty: it keeps no state of ours.
    pub cluster: String,
    /// Its PostgreSQL server.
    pub system_id: String,
}

/// All promotions of a lineage that a cluster knows; empty: it knows none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lineage(Vec<Descent>);

/// Maximum number of promotions in a lineage.
const LENGTH_MAX: usize = 10_000;
/// Maximum number of characters of an id.
const ID_MAX: usize = 100;

impl Lineage {
    /// Returns the lineage of a primary that nobody promoted. Both clusters make the same one
    /// independently.
    pub fn root(system_id: &str) -> Lineage {
        Lineage(vec![Descent {
            epoch: 1,
            id: format!("root-{system_id}"),
            parent: String::new(),
            cluster: String::new(),
            system_id: system_id.to_string(),
        }])
    }

    /// Returns the lineage of these promotions. None: no cluster can have such a lineage.
    pub fn of(entries: Vec<Descent>) -> Option<Lineage> {
        let short = |text: &str| text.len() <= ID_MAX;
        let sound = entries.len() <= LENGTH_MAX
            && entries.iter().all(|entry| {
                entry.epoch > 0
                    && !entry.id.is_empty()
                    && [&entry.id, &entry.parent, &entry.cluster, &entry.system_id]
                        .iter()
                        .all(|text| short(text))
            })
            && entries
                .windows(2)
                .all(|pair| pair[0].epoch < pair[1].epoch && pair[1].parent == pair[0].id);
        sound.then_some(Lineage(entries))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn entries(&self) -> &[Descent] {
        &self.0
    }

    /// Returns the newest promotion.
    pub fn head(&self) -> Option<&Descent> {
        self.0.last()
    }

    fn has(&self, id: &str) -> bool {
        self.0.iter().any(|entry| entry.id == id)
    }

    /// Returns whether both have a promotion in common.
    pub fn shares_with(&self, other: &Lineage) -> bool {
        self.0.iter().any(|entry| other.has(&entry.id))
    }

    /// Returns whether it has the other's newest promotion. Every lineage continues an empty one.
    pub fn goes_on_from(&self, other: &Lineage) -> bool {
        other.head().is_none_or(|head| self.has(&head.id))
    }
}

impl StateDb {
    pub async fn lineage(&self) -> Result<Lineage, StateError> {
        let rows = self
            .session
            .rows("reading the lineage", LINEAGE, &[])
            .await?;
        Ok(Lineage(rows.iter().map(descent).collect::<Result<_, _>>()?))
    }

    /// Returns an id that no other promotion has.
    pub async fn new_promotion_id(&self) -> Result<String, StateError> {
        let sql = "SELECT md5(random()::text || clock_timestamp()::text || pg_backend_pid() || (SELECT id FROM cluster))";
        let row = self
            .session
            .row("making an id of the promotion", sql, &[])
            .await?;
        Ok(row.get(0)?)
    }

    /// Adopts the primary's lineage, as the holder of the lock.
    pub async fn adopt_lineage(&self, lock: Lock, lineage: &Lineage) -> Result<(), StateError> {
        Ok(record_lineage(&self.session, lineage, Some(lock)).await?)
    }
}

/// Replaces the recorded lineage. `session` is a session on the state database. None: its
/// transaction has checked the token.
pub async fn record_lineage(
    session: &WriteSession,
    lineage: &Lineage,
    lock: Option<Lock>,
) -> Result<(), DatastoreError> {
    let token = lock.map(|lock| lock.token);
    let (mut epochs, mut ids, mut parents) = (Vec::new(), Vec::new(), Vec::new());
    let (mut clusters, mut servers) = (Vec::new(), Vec::new());
    for entry in &lineage.0 {
        epochs.push(entry.epoch);
        ids.push(entry.id.as_str());
        parents.push(entry.parent.as_str());
        clusters.push(entry.cluster.as_str());
        servers.push(entry.system_id.as_str());
    }
    let sql = "WITH ours AS (SELECT 1 WHERE $6::int8 IS NULL OR EXISTS (SELECT 1 FROM meta WHERE token = $6)), \
               new AS (SELECT * FROM unnest($1::int8[], $2::text[], $3::text[], $4::text[], $5::text[]) \
                 u(epoch, id, parent, cluster, system_id)), \
               gone AS (DELETE FROM lineage WHERE id NOT IN (SELECT id FROM new) AND EXISTS (SELECT 1 FROM ours)) \
               INSERT INTO lineage (epoch, id, parent, cluster, system_id) SELECT new.* FROM new, ours \
               ON CONFLICT (id) DO NOTHING";
    session
        .execute(
            "recording the lineage",
            sql,
            &[&epochs, &ids, &parents, &clusters, &servers, &token],
        )
        .await?;
    Ok(())
}

pub(in crate::cluster) const LINEAGE: &str =
    "SELECT epoch, id, parent, cluster, system_id FROM public.lineage ORDER BY epoch LIMIT 10001";

pub(in crate::cluster) fn descent(row: &Row) -> Result<Descent, DatastoreError> {
    Ok(Descent {
        epoch: row.get(0)?,
        id: row.get(1)?,
        parent: row.get(2)?,
        cluster: row.get(3)?,
        system_id: row.get(4)?,
    })
}

#[cfg(test)]
impl Lineage {
    /// Returns a lineage of these promotions: epoch and id of each, the oldest first.
    pub(crate) fn of_promotions(promotions: &[(i64, &str)]) -> Lineage {
        let mut parent = String::new();
        let entries = promotions.iter().map(|(epoch, id)| Descent {
            epoch: *epoch,
            id: id.to_string(),
            parent: std::mem::replace(&mut parent, id.to_string()),
            cluster: String::new(),
            system_id: "7".into(),
        });
        Lineage::of(entries.collect()).expect("a sound line")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promoted(before: &Lineage, epoch: i64, id: &str) -> Lineage {
        let mut entries = before.entries().to_vec();
        entries.push(Descent {
            epoch,
            id: id.into(),
            parent: before.head().map_or_else(String::new, |h| h.id.clone()),
            cluster: "aaaaaaaa".into(),
            system_id: "7".into(),
        });
        Lineage::of(entries).expect("a sound line")
    }

    #[test]
    fn a_line_goes_on_from_what_it_has_the_newest_promotion_of() {
        let root = Lineage::root("1");
        let second = promoted(&root, 2, "x");
        let fork = promoted(&root, 2, "y");
        assert!(second.goes_on_from(&root) && second.goes_on_from(&second));
        assert!(!root.goes_on_from(&second) && !fork.goes_on_from(&second));
        assert!(fork.shares_with(&second));
        assert!(!Lineage::root("2").shares_with(&second));
        let unknown = Lineage::default();
        assert!(second.goes_on_from(&unknown) && !unknown.shares_with(&second));
    }

    #[test]
    fn what_no_cluster_can_have_is_no_line() {
        let good = promoted(&Lineage::root("1"), 2, "x").entries().to_vec();
        let spoilt = |spoil: fn(&mut Vec<Descent>)| {
            let mut entries = good.clone();
            spoil(&mut entries);
            Lineage::of(entries)
        };
        assert!(spoilt(|_| ()).is_some());
        assert!(spoilt(|e| e[1].epoch = 1).is_none());
        assert!(spoilt(|e| e[0].epoch = -1).is_none());
        assert!(spoilt(|e| e[1].parent = "z".into()).is_none());
        assert!(spoilt(|e| e[1].id = String::new()).is_none());
        assert!(spoilt(|e| e[1].cluster = "c".repeat(101)).is_none());
    }
}
