//! The bucket for which artifacts are recorded, and the one who brings them there.

use super::state::{StateDb, StateError};
use super::working_lock::Lock;
use crate::cluster::s3::store::object::{Listed, Stored};

/// The place of the artifacts, as it is recorded or configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactPlace {
    /// The value of `artifacts.mode`.
    pub mode: String,
    pub endpoint: String,
    pub bucket: String,
}

/// The records of a former place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormerRecords {
    /// It is the same bucket by its objects, and the same one brings artifacts there. A pass looks
    /// at all of them.
    Hold,
    /// They are of this place, which was not recorded before.
    Right,
    /// They are about objects of another bucket, or about objects that are not ours.
    Void,
}

/// Removes all records that are about objects of a bucket.
const FORGET: &str =
    "DELETE FROM artifact; DELETE FROM retirement; DELETE FROM replacement; DELETE FROM absent";

impl StateDb {
    /// Returns the recorded place, and whether a pass has proved its artifacts. None: a program
    /// before format 6 has recorded them, or nobody has.
    pub async fn artifact_place(&self) -> Result<Option<(ArtifactPlace, bool)>, StateError> {
        let sql = "SELECT mode, endpoint, bucket, proved FROM artifact_place";
        let doing = "reading the place of the artifacts";
        let rows = self.session().query(doing, sql, &[]).await?;
        Ok(rows.first().map(|row| {
            let place = ArtifactPlace {
                mode: row.get(0),
                endpoint: row.get(1),
                bucket: row.get(2),
            };
            (place, row.get(3))
        }))
    }

    /// Records another place. The session must be the caller's own, because it gets a transaction.
    /// Void records go in that transaction, and a pass must prove the artifacts again.
    pub async fn move_artifacts(
        &self,
        lock: Lock,
        to: &ArtifactPlace,
        records: FormerRecords,
    ) -> Result<(), StateError> {
        let session = self.session();
        let doing = "recording the place of the artifacts";
        session.begin(doing).await?;
        let moved = async {
            self.still_ours(lock).await?;
            if records == FormerRecords::Void {
                session.batch(doing, FORGET).await?;
            }
            session.batch(doing, "DELETE FROM artifact_place").await?;
            let sql = "INSERT INTO artifact_place (mode, endpoint, bucket, proved) VALUES ($1, $2, $3, $4)";
            let proved = records == FormerRecords::Right;
            session
                .execute(doing, sql, &[&to.mode, &to.endpoint, &to.bucket, &proved])
                .await?;
            Ok(session.commit(doing).await?)
        };
        let moved: Result<(), StateError> = moved.await;
        if moved.is_err() {
            let _ = session.roll_back(doing).await;
        }
        moved
    }

    /// Records that a pass has proved the artifact of each row in the recorded place.
    pub async fn artifacts_proved(&self) -> Result<(), StateError> {
        let sql = "UPDATE artifact_place SET proved = true WHERE NOT proved";
        self.session()
            .execute("recording the proof of the artifacts", sql, &[])
            .await?;
        Ok(())
    }

    /// Draws some objects of the bucket, as they were when they were hashed.
    pub async fn some_artifacts(&self, number: i64) -> Result<Vec<Listed>, StateError> {
        let sql =
            "SELECT key, bytes, etag FROM artifact WHERE state = 'good' ORDER BY random() LIMIT $1";
        let doing = "choosing known artifacts";
        let rows = self.session().query(doing, sql, &[&number]).await?;
        let listed = |row: &tokio_postgres::Row| Listed {
            key: row.get(0),
            stored: Stored {
                bytes: row.get::<_, i64>(1).unsigned_abs(),
                etag: row.get(2),
            },
        };
        Ok(rows.iter().map(listed).collect())
    }
}
