//! Handles login event triggers, which PostgreSQL has since version 17. A trigger that writes would
//! refuse our read-only sessions on the peer, and would add its own rows to the copied ones here.

use super::datastore;
use super::maintenance::is_of_the_database;
use super::per_server::PerServer;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::config::Datastore;
use crate::domain::Side;
use tokio_postgres::error::SqlState;

/// The start-up option with which no event trigger fires. Servers before 17 refuse it, and so do
/// servers whose user may not set it.
/// set it.
const NO_EVENT_TRIGGERS: &str = " -c event_triggers=off";

/// Databases that usually have no login event trigger. In one of them the server is asked for its
/// version.
const VERSION_DATABASES: [&str; 2] = ["postgres", "template1"];

/// The servers that were asked, and whether each accepts the option.
static TAKEN: PerServer<bool> = PerServer::new();

/// Returns the start-up option for a session of that database, or nothing if the server would
/// refuse it. Fails if the session itself would fail.
pub(in crate::cluster) async fn silence(
    side: Side,
    to: &Datastore,
    database: &str,
) -> Result<&'static str, DatastoreError> {
    if VERSION_DATABASES.contains(&database) || database == crate::cluster::state_db::DATABASE {
        return Ok("");
    }
    if TAKEN.known(to).is_none() {
        for asked in VERSION_DATABASES {
            match ask(side, to, asked).await {
                Ok(taken) => {
                    TAKEN.remember(to, taken);
                    break;
                }
                Err(error) if is_of_the_database(&error) => {}
                Err(error) => {
                    return Err(DatastoreError {
                        doing: datastore::connecting(to, database),
                        ..error
                    });
                }
            }
        }
    }
    Ok(of(to))
}

/// Returns the same for a program of PostgreSQL's own; our own sessions have asked the server
/// before.
pub(in crate::cluster) fn of(to: &Datastore) -> &'static str {
    match TAKEN.known(to) {
        Some(true) => NO_EVENT_TRIGGERS,
        _ => "",
    }
}

/// Forgets the server's answer if it refuses an option: it is another server by now.
pub(in crate::cluster) fn mind(error: &DatastoreError, to: &Datastore) {
    if error.sql_state == Some(SqlState::UNDEFINED_OBJECT) {
        TAKEN.forget(to);
    }
}

async fn ask(side: Side, to: &Datastore, database: &str) -> Result<bool, DatastoreError> {
    let (client, _wire) = datastore::connect_to_ask(side, to, database).await?;
    let failed = |e| DatastoreError::of(side, &to.address(), "asking for the server's version", &e);
    let version = client
        .simple_query("SHOW server_version_num")
        .await
        .map_err(failed)?;
    let version = datastore::last_row(&version);
    let major = version.first().and_then(|text| text.parse::<u32>().ok());
    if major.unwrap_or_default() < 170_000 {
        return Ok(false);
    }
    let sql = "SELECT pg_catalog.has_parameter_privilege('event_triggers', 'SET')";
    let may = client.simple_query(sql).await.map_err(failed)?;
    Ok(datastore::last_row(&may)
        .first()
        .is_some_and(|text| text == "t"))
}
