//! Makes a second copy of the visible database on the same server, while the stream is being
//! applied to the first. `CREATE DATABASE … TEMPLATE` would require that nobody is connected to it.

use super::checks::locale_options;
use super::copy::scratch;
use crate::cluster::{InstalledClients, LocalCluster, WriteSession, wake_triggers_as_in};
use crate::config::Config;
use crate::replication::baseline::disk::enough_disk;
use crate::replication::error::ReplicationError;

/// Makes database `name` with the rows that the snapshot sees, and the visible database's
/// properties except its fence. Returns the size of the visible database in bytes.
pub(crate) async fn clone_visible(
    config: &Config,
    session: &WriteSession,
    snapshot: &str,
    name: &str,
) -> Result<u64, ReplicationError> {
    let local = &config.local.datastore;
    let facts = {
        let visible = LocalCluster::of(config).builder().await?;
        visible.database_facts().await?
    };
    enough_disk(config, session, facts.bytes).await?;
    let server = session.major().await?;
    let clients = InstalledClients::look().await.fitting(server, server)?;
    let clients = clients.for_encoding(&facts.encoding);
    let properties = session.database_properties(&local.database, name).await?;
    let owner = properties
        .owner
        .as_deref()
        .filter(|owner| *owner != local.user);
    let locale = locale_options(&facts.properties, &facts.encoding, server);
    session
        .create_database("creating the clone", name, &locale, owner, &properties)
        .await?;
    let scratch = scratch()?;
    clients
        .copy_database(local, snapshot, name, scratch.path(), owner)
        .await?;
    let visible = LocalCluster::of(config).builder().await?;
    let inside = LocalCluster::of(config).database(name).await?;
    wake_triggers_as_in(&visible, &inside).await?;
    session.give_properties(&properties).await?;
    Ok(facts.bytes.unsigned_abs())
}
