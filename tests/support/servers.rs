//! The servers of two clusters.

use std::sync::Arc;

use tokio::sync::OnceCell;

use super::{Minio, Postgres, Result, postgres};

pub struct Servers {
    pub primary_pg: Arc<Postgres>,
    pub spare_pg: Arc<Postgres>,
    pub primary_s3: Arc<Minio>,
    pub spare_s3: Arc<Minio>,
}

impl Servers {
    /// Starts servers for a test that stops, kills or freezes them.
    pub async fn start() -> Result<Self> {
        Self::start_with(Postgres::builder(), Postgres::builder()).await
    }

    pub async fn start_with(primary: postgres::Builder, spare: postgres::Builder) -> Result<Self> {
        let (primary_pg, spare_pg, primary_s3, spare_s3) = tokio::try_join!(
            primary.start(),
            spare.start(),
            Minio::start(),
            Minio::start()
        )?;
        Ok(Self {
            primary_pg: Arc::new(primary_pg),
            spare_pg: Arc::new(spare_pg),
            primary_s3: Arc::new(primary_s3),
            spare_s3: Arc::new(spare_s3),
        })
    }
}

/// Returns one of each server for all tests of this binary. They start when they are first
/// requested, and end with the process.
pub async fn servers() -> &'static Servers {
    static SERVERS: OnceCell<Servers> = OnceCell::const_new();
    let start = async || Servers::start().await.expect("the servers start");
    SERVERS.get_or_init(start).await
}

/// Returns the artifact stores that all tests of this binary share, each with its own buckets:
/// (primary's, spare's).
pub(super) async fn shared_stores() -> Result<(Arc<Minio>, Arc<Minio>)> {
    static STORES: OnceCell<(Arc<Minio>, Arc<Minio>)> = OnceCell::const_new();
    let start = async || {
        let (primary, spare) = tokio::try_join!(Minio::start(), Minio::start())?;
        Result::Ok((Arc::new(primary), Arc::new(spare)))
    };
    STORES.get_or_try_init(start).await.cloned()
}
