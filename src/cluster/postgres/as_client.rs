//! Looks at the local server as any client does: a new connection, with the settings of the server,
//! the database and the role.

use super::datastore;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::config::Datastore;
use crate::domain::Side;

/// The state in which a client that connects now finds the local server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AsClient {
    /// True: its transactions cannot write, because of a fence, a server in recovery, or another
    /// setting.
    pub read_only: bool,
    /// The position that the database itself records; None: it is no database that was copied here.
    pub stands: Option<String>,
}

pub async fn as_client(to: &Datastore, database: &str) -> Result<AsClient, DatastoreError> {
    let (client, _wire) = datastore::connect_plainly(Side::Local, to, database).await?;
    let doing = "looking at our database as a client";
    let failed = |error: tokio_postgres::Error| {
        DatastoreError::of(Side::Local, &to.address(), doing, &error)
    };
    let sql = "SELECT pg_catalog.current_setting('transaction_read_only') = 'on', \
                 pg_catalog.to_regclass('warm_spare.recovery_point') IS NOT NULL";
    let row = client.query_one(sql, &[]).await.map_err(failed)?;
    let stands = match row.get(1) {
        true => {
            let sql = "SELECT lsn::text FROM warm_spare.recovery_point";
            client.query_opt(sql, &[]).await.map_err(failed)?
        }
        false => None,
    };
    Ok(AsClient {
        read_only: row.get(0),
        stands: stands.map(|row| row.get(0)),
    })
}
