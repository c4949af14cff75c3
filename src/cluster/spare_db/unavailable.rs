//! The list of artifacts that are not there: missing or damaged on the primary, or named by a row
//! that is not valid.

use super::SpareDb;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::rows::Row;
use crate::domain::MissingReason;
use crate::package::PackageRow;
use std::collections::HashSet;
use std::fmt::Display;

/// An artifact that is recorded as not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    pub key: String,
    /// As the row has it; empty: the row names no possible artifact.
    pub checksum: String,
    pub reason: MissingReason,
}

impl SpareDb<'_> {
    /// Returns the artifacts that are recorded as not there, by key.
    pub async fn unavailable(self) -> Result<Vec<Unavailable>, DatastoreError> {
        let sql = "SELECT key, checksum, reason FROM warm_spare.unavailable ORDER BY key";
        let doing = "reading the unavailable artifacts";
        let rows = self.0.rows(doing, sql, &[]).await?;
        rows.iter().map(unavailable).collect()
    }

    /// Returns the keys and the reasons of the artifacts that are recorded as not there.
    pub async fn unavailable_reasons(self) -> Result<Vec<(String, MissingReason)>, DatastoreError> {
        let all = self.unavailable().await?;
        Ok(all
            .into_iter()
            .map(|item| (item.key, item.reason))
            .collect())
    }

    /// Returns the keys and checksums of the artifacts that are recorded as not there.
    pub async fn unavailable_bytes(self) -> Result<HashSet<(String, String)>, DatastoreError> {
        let all = self.unavailable().await?;
        Ok(all
            .into_iter()
            .map(|item| (item.key, item.checksum))
            .collect())
    }

    /// Returns whether a row of Builder's still exists, and its artifact is not recorded as missing
    /// or damaged on the primary.
    pub async fn is_expected(self, row: &PackageRow, key: &str) -> Result<bool, DatastoreError> {
        let sql = "SELECT EXISTS (SELECT FROM public.origin_packages WHERE ident = $1 AND target = $2 AND checksum = $3) \
                     AND NOT EXISTS (SELECT FROM warm_spare.unavailable WHERE key = $4 AND reason <> $5)";
        let doing = "looking at a package again";
        let PackageRow {
            ident,
            target,
            checksum,
        } = row;
        let row = self
            .0
            .row(
                doing,
                sql,
                &[ident, target, checksum, &key, &MissingReason::Unsound],
            )
            .await?;
        row.get(0)
    }

    /// Counts those packages (`ident target`) that have no row of Builder's, without the excepted
    /// ones.
    pub async fn absent_packages(
        self,
        names: &[String],
        except: &[String],
    ) -> Result<u64, DatastoreError> {
        let sql = "SELECT count(*) FROM (SELECT unnest($1::text[]) EXCEPT SELECT unnest($2::text[])) v (named) \
                   WHERE NOT EXISTS (SELECT 1 FROM public.origin_packages p \
                     WHERE p.ident = substring(v.named FROM '^(.*) ') AND p.target = substring(v.named FROM ' ([^ ]*)$'))";
        self.count("counting vanished packages", sql, names, except)
            .await
    }

    /// Counts those artifacts that are recorded as unavailable, without the excepted ones.
    pub async fn unavailable_of(
        self,
        keys: &[String],
        except: &[String],
    ) -> Result<u64, DatastoreError> {
        let sql = "SELECT count(*) FROM (SELECT unnest($1::text[]) EXCEPT SELECT unnest($2::text[])) v (named) \
                   WHERE EXISTS (SELECT 1 FROM warm_spare.unavailable u WHERE u.key = v.named)";
        self.count("counting vanished artifacts", sql, keys, except)
            .await
    }

    async fn count(
        self,
        doing: &str,
        sql: &str,
        names: &[String],
        except: &[String],
    ) -> Result<u64, DatastoreError> {
        let row = self.0.row(doing, sql, &[&names, &except]).await?;
        Ok(row.get::<i64>(0)?.unsigned_abs())
    }

    /// Returns the record of one key.
    pub async fn unavailable_at(self, key: &str) -> Result<Option<Unavailable>, DatastoreError> {
        let sql = "SELECT key, checksum, reason FROM warm_spare.unavailable WHERE key = $1";
        let doing = "reading an unavailable artifact";
        let rows = self.0.rows(doing, sql, &[&key]).await?;
        rows.first().map(unavailable).transpose()
    }

    /// Records an artifact that is not there. The reason of one that is recorded already is
    /// replaced.
    pub async fn record_unavailable(
        self,
        key: &str,
        checksum: &impl Display,
        reason: MissingReason,
    ) -> Result<(), DatastoreError> {
        let sql = "INSERT INTO warm_spare.unavailable (key, checksum, reason) VALUES ($1, $2, $3) \
                   ON CONFLICT (key) DO UPDATE SET reason = excluded.reason";
        let checksum = checksum.to_string();
        let doing = "recording unavailable artifacts";
        self.0
            .execute(doing, sql, &[&key, &checksum, &reason])
            .await?;
        Ok(())
    }

    /// Does the same if the package of that ident and target still has a row with that checksum.
    /// Returns false if it has none.
    pub async fn record_unavailable_if_named(
        self,
        item: &Unavailable,
        (ident, target): (&str, &str),
    ) -> Result<bool, DatastoreError> {
        let sql = "INSERT INTO warm_spare.unavailable (key, checksum, reason) SELECT $1, $2::text, $3 \
                   WHERE EXISTS (SELECT FROM public.origin_packages \
                     WHERE ident = $4 AND target = $5 AND $2::text IN ('', lower(checksum))) \
                   ON CONFLICT (key) DO UPDATE SET checksum = excluded.checksum, reason = excluded.reason";
        let values: &[&(dyn tokio_postgres::types::ToSql + Sync)] =
            &[&item.key, &item.checksum, &item.reason, &ident, &target];
        let doing = "recording unavailable artifacts";
        Ok(self.0.execute(doing, sql, values).await? > 0)
    }

    /// Does the same beside the stream, for the holder of this token. The row is locked: a
    /// transaction that changes it comes before or after this record as a whole.
    pub async fn record_unavailable_beside(
        self,
        item: &Unavailable,
        (ident, target): (&str, &str),
        token: i64,
    ) -> Result<bool, DatastoreError> {
        let sql = "WITH named AS MATERIALIZED (SELECT 1 FROM public.origin_packages \
                     WHERE ident = $4 AND target = $5 AND lower(checksum) = $2::text FOR SHARE) \
                   INSERT INTO warm_spare.unavailable (key, checksum, reason) SELECT $1, $2::text, $3 \
                   WHERE EXISTS (SELECT FROM named) \
                     AND EXISTS (SELECT FROM warm_spare.recovery_point WHERE token <= $6) \
                   ON CONFLICT (key) DO UPDATE SET checksum = excluded.checksum, reason = excluded.reason";
        let values: &[&(dyn tokio_postgres::types::ToSql + Sync)] = &[
            &item.key,
            &item.checksum,
            &item.reason,
            &ident,
            &target,
            &token,
        ];
        let doing = "recording an unavailable artifact";
        Ok(self.0.execute(doing, sql, values).await? > 0)
    }

    /// Removes the records of these keys. Returns how many there were.
    pub async fn forget_unavailable(self, keys: &[&str]) -> Result<u64, DatastoreError> {
        let sql = "DELETE FROM warm_spare.unavailable WHERE key = ANY ($1)";
        let doing = "forgetting unavailable artifacts";
        self.0.execute(doing, sql, &[&keys]).await
    }

    /// Removes the record of one artifact, if it is about these bytes.
    pub async fn forget_unavailable_bytes(
        self,
        key: &str,
        checksum: &impl Display,
    ) -> Result<(), DatastoreError> {
        let sql = "DELETE FROM warm_spare.unavailable WHERE key = $1 AND checksum = $2";
        let doing = "forgetting an unavailable artifact";
        let checksum = checksum.to_string();
        self.0.execute(doing, sql, &[&key, &checksum]).await?;
        Ok(())
    }

    /// Removes all records but those of these keys, and those with this reason.
    pub async fn keep_unavailable(
        self,
        keys: &[&str],
        and_reason: MissingReason,
    ) -> Result<(), DatastoreError> {
        let sql = "DELETE FROM warm_spare.unavailable WHERE reason <> $2 AND key <> ALL ($1)";
        let doing = "forgetting artifacts that are available now";
        self.0.execute(doing, sql, &[&keys, &and_reason]).await?;
        Ok(())
    }
}

fn unavailable(row: &Row) -> Result<Unavailable, DatastoreError> {
    Ok(Unavailable {
        key: row.get(0)?,
        checksum: row.get(1)?,
        reason: row.get(2)?,
    })
}
