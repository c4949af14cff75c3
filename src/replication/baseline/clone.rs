//! Makes a second copy of the visible database on the same server, while the stream is being
//! applied to the first. `CREATE DATABASE … TEMPLATE` would require that nobody is connected to it.

use super::checks::{locale_options, major};
use super::copy::scratch;
use super::silenced;
use super::switch;
use crate::cluster::{InstalledClients, LocalSession, quote_ident};
use crate::config::Config;
use crate::replication::baseline::disk::enough_disk;
use crate::replication::error::PassError;

/// Makes database `name` with the rows that the snapshot sees, and the visible database's
/// properties except its fence. Returns the size of the visible database in bytes.
pub(crate) async fn clone_visible(
    config: &Config,
    session: &LocalSession,
    snapshot: &str,
    name: &str,
) -> Result<u64, PassError> {
    let local = &config.local.datastore;
    let sql = "SELECT to_jsonb(d)::text, pg_encoding_to_char(d.encoding), pg_database_size(d.oid) \
               FROM pg_database d WHERE d.datname = $1";
    let doing = "reading the visible database's properties";
    let row = session.query_one(doing, sql, &[&local.database]).await?;
    let bytes: i64 = row.get(2);
    enough_disk(config, session, bytes).await?;
    let server = major(session).await?;
    let clients = InstalledClients::look().await.fitting(server, server)?;
    let encoding: String = row.get(1);
    let clients = clients.for_encoding(&encoding);
    let properties = switch::properties(session, &local.database, name).await?;
    let owner = properties
        .owner
        .as_deref()
        .filter(|owner| *owner != local.user);
    let owned = owner.map(|owner| format!(" OWNER {}", quote_ident(owner)));
    let sql = format!(
        "CREATE DATABASE {} TEMPLATE template0 {}{}{}",
        quote_ident(name),
        locale_options(&row.get::<_, String>(0), &encoding, server),
        owned.unwrap_or_default(),
        properties.tablespace_option()
    );
    session.long("creating the clone", &sql).await?;
    let scratch = scratch()?;
    clients
        .copy_database(local, snapshot, name, scratch.path(), owner)
        .await?;
    let visible = LocalSession::open(local, &local.database).await?;
    let inside = LocalSession::open(local, name).await?;
    silenced::wake_as_in(&visible, &inside).await?;
    switch::apply(session, &properties).await?;
    Ok(bytes.unsigned_abs())
}
