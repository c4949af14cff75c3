//! Artifacts of a shared bucket that a listing has shown, and that nobody has read and hashed since.
//! They are in table `artifact`, in state `unproven`.

use super::state::{StateDb, StateError};
use crate::cluster::s3::store::object::Stored;
use std::collections::HashSet;

/// An artifact that was not hashed yet, as its row names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unproven {
    pub key: String,
    pub checksum: String,
}

impl StateDb {
    /// Counts them. Among them may be some whose rows were removed since.
    pub async fn count_unproven(&self) -> Result<u64, StateError> {
        let sql = "SELECT count(*) FROM artifact WHERE state = 'unproven'";
        let doing = "counting the artifacts that were not hashed";
        let row = self.session().query_one(doing, sql, &[]).await?;
        Ok(row.get::<_, i64>(0).unsigned_abs())
    }

    /// Returns the next ones after a key, in the order of keys.
    pub async fn unproven_after(
        &self,
        after: &str,
        number: i64,
    ) -> Result<Vec<Unproven>, StateError> {
        let sql = "SELECT key, checksum FROM artifact WHERE state = 'unproven' AND key > $1 \
                   ORDER BY key LIMIT $2";
        let doing = "reading which artifacts were not hashed";
        let rows = self.session().query(doing, sql, &[&after, &number]).await?;
        let item = |row: &tokio_postgres::Row| Unproven {
            key: row.get(0),
            checksum: row.get(1),
        };
        Ok(rows.iter().map(item).collect())
    }

    /// Returns those of these keys whose artifacts were not hashed.
    pub async fn unproven_among(&self, keys: &[String]) -> Result<HashSet<String>, StateError> {
        let sql = "SELECT key FROM artifact WHERE state = 'unproven' AND key = ANY ($1)";
        let doing = "reading which artifacts were not hashed";
        let rows = self.session().query(doing, sql, &[&keys]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Records that the object was hashed and has the wanted bytes. The stream may have recorded
    /// other bytes in the meantime: then nothing is changed.
    pub async fn prove(&self, item: &Unproven, stored: &Stored) -> Result<(), StateError> {
        let sql = "UPDATE artifact SET state = 'good', bytes = $3, etag = $4, verified_at = now() \
                   WHERE key = $1 AND checksum = $2 AND state = 'unproven'";
        let bytes = stored.bytes as i64;
        let doing = "recording a hashed artifact";
        self.session()
            .execute(
                doing,
                sql,
                &[&item.key, &item.checksum, &bytes, &stored.etag],
            )
            .await?;
        Ok(())
    }

    /// Removes the record of one, because no row names it, or because it is recorded as
    /// unavailable.
    pub async fn forget_unproven(&self, item: &Unproven) -> Result<(), StateError> {
        let sql = "DELETE FROM artifact WHERE key = $1 AND checksum = $2 AND state = 'unproven'";
        let doing = "forgetting an artifact that was not hashed";
        self.session()
            .execute(doing, sql, &[&item.key, &item.checksum])
            .await?;
        Ok(())
    }
}
