//! Checks the conditions before a run begins. Everything here only reads, except for a probe object
//! that is put into the local bucket and deleted again; a refusal leaves both sides as they were.

use crate::cluster::{
    self, BuilderDb, ClientPrograms, InstalledClients, LocalCluster, PeerCluster, ReadSession,
    SeenLease, WriteSession, differ_by_reading, differ_in_bucket, differ_in_server, rights,
    system_id,
};
use crate::config::{ArtifactsMode, Config};
use crate::domain::ErrorCode;
use crate::package::PackageRow;
use crate::replication::baseline::disk::enough_disk;
use crate::replication::baseline::ends::Ends;
use crate::replication::descent::{Here, PrimaryLine, There, doubt, left_at};
use crate::replication::error::ReplicationError;
use crate::replication::mode::select::{self, Chosen};

/// Number of times the lease is read through both addresses, because its holder renews it.
const LEASE_LOOKS: usize = 5;
/// Oldest major version whose catalogs have the columns that we read.
const OLDEST_MAJOR: u32 = 12;

/// Facts about both sides that the copy needs.
#[derive(Debug, Clone)]
pub struct Facts {
    pub clients: ClientPrograms,
    /// True: the local server compresses large values with lz4.
    pub lz4: bool,
    /// True: `local.datastore.database` exists.
    pub visible: bool,
    /// `CREATE DATABASE`'s options for the primary's encoding and locale.
    pub locale: String,
    pub system_id: String,
    pub line: PrimaryLine,
    /// The peer's own cluster id. None: it keeps no state of ours.
    pub peer_cluster: Option<String>,
    /// The peer was promoted over this very server.
    pub was_primary: bool,
    pub timeline: i32,
    pub database_bytes: i64,
    pub packages: u64,
    pub chosen: Chosen,
}

/// Checks everything, starting with the cheap and meaningful checks. `fenced_by_us`: the peer is
/// read-only because of us, and is read to its end.
pub async fn check(
    config: &Config,
    ends: &Ends,
    cluster_id: &str,
    fenced_by_us: bool,
    here: &Here,
) -> Result<Facts, ReplicationError> {
    let (local, peer) = (&ends.local, &ends.peer);
    let visible = has_database(local, &config.local.datastore.database).await?;
    two_ends(config, ends).await?;
    is_builder(peer).await?;
    is_primary(peer, fenced_by_us).await?;
    let record = PeerCluster::of(config).record().await?;
    let (local_major, peer_major) = (local.major().await?, peer.major().await?);
    versions_fit(peer_major, local_major)?;
    let clients = InstalledClients::look()
        .await
        .fitting(peer_major, local_major)?;
    extensions(local, peer).await?;
    roles(local, peer).await?;
    local_privileges(config, local).await?;
    peer_privileges(peer).await?;
    nothing_uncopied(peer).await?;
    let state = peer.server_state("reading the primary's facts").await?;
    let Some(timeline) = state.timeline else {
        return Err(ReplicationError::standby());
    };
    let database = peer.database_facts().await?;
    let there = There {
        record: record.as_ref(),
        system_id: &state.system_id,
        timeline,
        wal: state.wal,
        transactions: state.transactions.clone(),
        left_at: left_at(config, here.point.as_ref(), timeline).await?,
    };
    let approved = match doubt(here, &there) {
        Some(doubt) => Some(doubt.ask(config)?),
        None => None,
    };
    let line = PrimaryLine::of(record.as_ref(), &state.system_id, approved);
    let record = record.unwrap_or_default();
    enough_disk(config, local, database.bytes).await?;
    let packages = BuilderDb::of(peer).count_packages().await?;
    let here = match (packages, visible) {
        (0, true) => packages_of_ours(config).await?,
        _ => 0,
    };
    if here > 0 {
        return Err(ReplicationError::Refused {
            rule: ErrorCode::EmptyPrimary,
            text: format!(
                "the primary's database has no package at all, and the spare's has {here}; a copy of it would be an empty spare"
            ),
            next_step: "check that peer.datastore names the primary".into(),
        });
    }
    Ok(Facts {
        clients: clients.for_encoding(&database.encoding),
        lz4: local.has_lz4().await?,
        visible,
        locale: locale_options(&database.properties, &database.encoding, local_major),
        system_id: state.system_id,
        line,
        peer_cluster: Some(record.cluster_id).filter(|id| !id.is_empty()),
        was_primary: match record.promotion {
            Some(promotion) => promotion.system_id == system_id(local).await?,
            None => false,
        },
        timeline,
        database_bytes: database.bytes,
        packages,
        chosen: select::decide(config, cluster_id, local, peer).await?,
    })
}

pub async fn has_database(local: &WriteSession, name: &str) -> Result<bool, ReplicationError> {
    Ok(cluster::has_database(local, name, "looking for our database").await?)
}

/// Counts the packages in the database that Builder on the spare sees.
async fn packages_of_ours(config: &Config) -> Result<u64, ReplicationError> {
    let inside = LocalCluster::of(config).builder().await?;
    let builder = BuilderDb::of(&inside);
    if !builder.has_packages().await? {
        return Ok(0);
    }
    Ok(builder.count_packages().await?)
}

async fn two_ends(config: &Config, ends: &Ends) -> Result<(), ReplicationError> {
    let (local_store, peer_store) = (&ends.local_store, &ends.peer_store);
    two_servers(config, &ends.local, &ends.peer).await?;
    local_store.check_bucket().await?;
    peer_store.check_bucket().await?;
    match (
        LocalCluster::of(config).mark_store()?,
        config.artifacts.mode,
    ) {
        (Some(own), _) => differ_in_bucket(&own, peer_store).await?,
        // Before a takeover the artifacts are read from the peer's store itself.
        (None, ArtifactsMode::Shared) if config.artifacts.are_detached() => {}
        (None, ArtifactsMode::Shared) => one_bucket(config).await?,
        (None, _) => {
            let keys = Box::pin(some_keys(&ends.peer)).await?;
            Box::pin(differ_by_reading(local_store, peer_store, &keys)).await?;
        }
    }
    Ok(())
}

/// Checks that both addresses lead to one bucket: the lease, which the primary writes, is the same
/// object there. With a lease elsewhere, the addresses and the names must be equal.
pub async fn one_bucket(config: &Config) -> Result<(), ReplicationError> {
    let (local, peer) = (&config.local.s3, &config.peer.s3);
    let two = |text: String| {
        Err(ReplicationError::unfit(
            ErrorCode::TwoBuckets,
            format!("artifacts.mode is shared, but local.s3 and peer.s3 are two buckets: {text}"),
            "let both name the one bucket; or set artifacts.mode = \"replicate\" for a bucket at each site".into(),
        ))
    };
    if config.artifacts.lease.store.is_some() {
        let same = local.endpoint == peer.endpoint && local.bucket_name == peer.bucket_name;
        return match same {
            true => Ok(()),
            false => two(format!(
                "{} at {}, and {} at {}",
                local.bucket_name, local.endpoint, peer.bucket_name, peer.endpoint
            )),
        };
    }
    let Some(lease) = LocalCluster::of(config).lease_store()? else {
        return Ok(());
    };
    let there = PeerCluster::of(config).store()?;
    for _ in 0..LEASE_LOOKS {
        let before = lease.read().await?;
        let theirs = lease.read_at(&there).await?;
        match (&before, &theirs) {
            (SeenLease::Absent, SeenLease::Absent) => {
                return Err(ReplicationError::unfit(
                    ErrorCode::NoLease,
                    format!("there is no lease yet ({})", lease.address()),
                    "load warm-spare at the primary too, with artifacts.mode = \"shared\" and role = \"primary\": it makes the lease".into(),
                ));
            }
            (SeenLease::Garbage(why, _), _) | (_, SeenLease::Garbage(why, _)) => {
                return Err(ReplicationError::unfit(
                    ErrorCode::NoLease,
                    format!("{} is no lease: {why}", lease.address()),
                    "find out who writes that object, and delete it; the acting primary then needs takeover.force_lease, as docs/topologies/shared-bucket.md says".into(),
                ));
            }
            _ if before == theirs => {
                return match lease.is_copy_at(&there).await? || lease.is_copy().await? {
                    false => Ok(()),
                    true => two(
                        "the lease in one of them is a copy by the provider's replication".into(),
                    ),
                };
            }
            // It may have been renewed between the two looks.
            _ if lease.read().await? != before => {}
            _ => return two("the lease is another object in each".into()),
        }
    }
    two("the lease was never the same object in both".into())
}

/// Returns the keys of a few artifacts of the primary. None: the peer is not Builder's, which is
/// checked later.
async fn some_keys(peer: &ReadSession) -> Result<Vec<String>, ReplicationError> {
    let builder = BuilderDb::of(peer);
    if !builder.has_package_columns().await? {
        return Ok(Vec::new());
    }
    let rows = builder.some_packages().await?;
    let keys = rows.iter().filter_map(PackageRow::artifact);
    Ok(keys.map(|(key, _)| key).take(5).collect())
}

/// Checks, before the peer is asked anything else, that both ends are two servers.
pub async fn two_servers(
    config: &Config,
    local: &WriteSession,
    peer: &ReadSession,
) -> Result<(), ReplicationError> {
    let visible = has_database(local, &config.local.datastore.database).await?;
    let same_name = &config.peer.datastore.database;
    let namesake = has_database(local, same_name).await?;
    if visible || namesake {
        let name = if namesake {
            same_name
        } else {
            &config.local.datastore.database
        };
        let inside = LocalCluster::of(config).database(name).await?;
        differ_in_server(&inside, peer).await?;
    } else {
        differ_in_server(local, peer).await?;
    }
    Ok(())
}

pub(in crate::replication) async fn is_builder(peer: &ReadSession) -> Result<(), ReplicationError> {
    if BuilderDb::of(peer).has_package_columns().await? {
        return Ok(());
    }
    Err(ReplicationError::unfit(
        ErrorCode::NotBuilder,
        "the peer's database has no table origin_packages with ident, target and checksum: it is empty or not Builder's".into(),
        "check peer.datastore.host and peer.datastore.database".into(),
    ))
}

/// Checks the versions: data are copied only from an older server to a newer one.
fn versions_fit(primary: u32, spare: u32) -> Result<(), ReplicationError> {
    for (side, found) in [("primary", primary), ("spare", spare)] {
        if found < OLDEST_MAJOR {
            return Err(ReplicationError::unfit(
                ErrorCode::Version,
                format!("the {side}'s PostgreSQL is {found}, older than {OLDEST_MAJOR}"),
                format!("upgrade the {side}'s datastore"),
            ));
        }
    }
    if spare < primary {
        return Err(ReplicationError::unfit(
            ErrorCode::Version,
            format!(
                "the spare's PostgreSQL is {spare}, the primary's is {primary}: an older one cannot take a newer one's data"
            ),
            format!("upgrade the spare's datastore to PostgreSQL {primary} or newer first"),
        ));
    }
    Ok(())
}

/// Checks that the peer is a primary: a spare's database is fenced, and exchanged ends would make a
/// copy of a copy, or of an old primary.
pub(in crate::replication) async fn is_primary(
    peer: &ReadSession,
    fenced_by_us: bool,
) -> Result<(), ReplicationError> {
    let doing = "checking that the peer is a primary";
    let state = peer.server_state(doing).await?;
    if state.is_standby() {
        return Err(ReplicationError::standby());
    }
    if state.fenced && !fenced_by_us {
        return Err(ReplicationError::Refused {
            rule: ErrorCode::PeerIsFenced,
            text: "the peer's database is read-only, as a spare's is: local and peer may be exchanged".into(),
            next_step: "check that peer.datastore names the primary and that role = \"spare\" is set only on the spare".into(),
        });
    }
    Ok(())
}

async fn extensions(local: &WriteSession, peer: &ReadSession) -> Result<(), ReplicationError> {
    let names = peer.extensions_missing_on(local).await?;
    if names.is_empty() {
        return allowed_extensions(local, peer).await;
    }
    Err(ReplicationError::unfit(
        ErrorCode::Extension,
        format!(
            "the spare's PostgreSQL has no extension {}, which the primary's database uses",
            names.join(", ")
        ),
        "install PostgreSQL's contrib modules on the spare".into(),
    ))
}

/// Checks the list of a provider, which offers more extensions than it lets its users create.
async fn allowed_extensions(
    local: &WriteSession,
    peer: &ReadSession,
) -> Result<(), ReplicationError> {
    let Some(allowed) = local.allowed_extensions().await? else {
        return Ok(());
    };
    let mut refused = peer.extensions().await?;
    refused.retain(|name| !allowed.contains(&name.to_lowercase()));
    if refused.is_empty() {
        return Ok(());
    }
    Err(ReplicationError::unfit(
        ErrorCode::Extension,
        format!(
            "the provider of the spare's server does not allow extension {}, which the primary's database uses",
            refused.join(", ")
        ),
        "add it to azure.extensions (Azure) or rds.allowed_extensions (Amazon RDS) in the provider's console".into(),
    ))
}

/// Checks roles, because they are not copied, and an object that names a missing role cannot be
/// created.
async fn roles(local: &WriteSession, peer: &ReadSession) -> Result<(), ReplicationError> {
    let missing = peer.roles_missing_on(local).await?;
    if missing.is_empty() {
        return Ok(());
    }
    Err(ReplicationError::unfit(
        ErrorCode::Roles,
        format!(
            "row security policies or user mappings of the primary's database name roles that the spare's server does not have: {}",
            missing.join(", ")
        ),
        "create them on the spare (CREATE ROLE …)".into(),
    ))
}

async fn local_privileges(config: &Config, local: &WriteSession) -> Result<(), ReplicationError> {
    let database = &config.local.datastore.database;
    let missing = rights(local, database).await?.missing(database, true);
    if missing.is_empty() {
        return Ok(());
    }
    Err(ReplicationError::unfit(
        ErrorCode::Privilege,
        format!(
            "the local datastore's user {} {}",
            config.local.datastore.user,
            missing.join(" and ")
        ),
        "use Builder's own user hab as local.datastore.user, or grant the missing rights".into(),
    ))
}

async fn peer_privileges(peer: &ReadSession) -> Result<(), ReplicationError> {
    let unreadable = peer.unreadable_tables().await?;
    if unreadable.is_empty() {
        return Ok(());
    }
    let names = &unreadable[..unreadable.len().min(5)];
    Err(ReplicationError::unfit(
        ErrorCode::Privilege,
        format!(
            "the peer's user may not read {} of its tables and sequences ({})",
            unreadable.len(),
            names.join(", ")
        ),
        "grant it SELECT on them, or use Builder's own user hab as peer.datastore.user".into(),
    ))
}

/// Checks for objects that are not copied, so that they are not lost silently. Builder has none of
/// them.
async fn nothing_uncopied(peer: &ReadSession) -> Result<(), ReplicationError> {
    let (objects, tables) = peer.uncopied_objects().await?;
    if objects == 0 && tables == 0 {
        return Ok(());
    }
    Err(ReplicationError::unfit(
        ErrorCode::Unsupported,
        format!(
            "the primary's database has {objects} large objects and {tables} partitioned or foreign tables or materialized views, which warm-spare does not copy"
        ),
        "move them to another database; Builder uses none".into(),
    ))
}

/// Returns the options for encoding and locale. The catalog's columns differ from version to
/// version, so they are read as JSON.
pub(crate) fn locale_options(database: &str, encoding: &str, local_major: u32) -> String {
    let json: serde_json::Value = serde_json::from_str(database).unwrap_or_default();
    let text = |name: &str| {
        json.get(name)
            .and_then(|value| value.as_str())
            .map(crate::cluster::quote_literal)
    };
    let mut options = format!("ENCODING {}", crate::cluster::quote_literal(encoding));
    for (option, column) in [("LC_COLLATE", "datcollate"), ("LC_CTYPE", "datctype")] {
        if let Some(value) = text(column) {
            options.push_str(&format!(" {option} {value}"));
        }
    }
    let locale = text("datlocale").or_else(|| text("daticulocale"));
    let provider = json
        .get("datlocprovider")
        .and_then(|value| value.as_str())
        .unwrap_or("c");
    match (provider, locale) {
        ("i", Some(locale)) => {
            options.push_str(&format!(" LOCALE_PROVIDER icu ICU_LOCALE {locale}"))
        }
        ("b", Some(locale)) => {
            options.push_str(&format!(" LOCALE_PROVIDER builtin BUILTIN_LOCALE {locale}"))
        }
        _ if local_major >= 15 => options.push_str(" LOCALE_PROVIDER libc"),
        _ => {}
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_go_to_the_same_or_a_newer_major_only() {
        assert!(versions_fit(15, 15).is_ok() && versions_fit(12, 17).is_ok());
        let older = versions_fit(17, 15).expect_err("an older spare");
        assert!(
            older
                .to_string()
                .contains("the spare's PostgreSQL is 15, the primary's is 17")
        );
        assert!(older.next_step().contains("PostgreSQL 17"));
        assert!(versions_fit(11, 15).is_err() && versions_fit(11, 11).is_err());
    }

    #[test]
    fn a_locale_is_named_as_the_spare_understands_it() {
        let old = r#"{"datcollate": "C.UTF-8", "datctype": "C.UTF-8"}"#;
        assert_eq!(
            locale_options(old, "UTF8", 14),
            "ENCODING 'UTF8' LC_COLLATE 'C.UTF-8' LC_CTYPE 'C.UTF-8'"
        );
        assert!(locale_options(old, "UTF8", 17).ends_with("LOCALE_PROVIDER libc"));
        let icu = r#"{"datcollate": "C", "datctype": "C", "datlocprovider": "i", "daticulocale": "de-DE"}"#;
        assert!(
            locale_options(icu, "UTF8", 16).ends_with("LOCALE_PROVIDER icu ICU_LOCALE 'de-DE'")
        );
        let builtin = r#"{"datcollate": "C", "datctype": "C", "datlocprovider": "b", "datlocale": "C.UTF-8"}"#;
        assert!(
            locale_options(builtin, "UTF8", 17)
                .ends_with("LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'")
        );
    }
}
