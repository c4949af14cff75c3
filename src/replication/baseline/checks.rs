//! Checks the conditions before a run begins. Everything here only reads, except for a probe object
//! that is put into the local bucket and deleted again; a refusal leaves both sides as they were.

use crate::cluster::timeline;
use crate::cluster::{
    ClientPrograms, InstalledClients, LocalSession, PeerSession, Session, differ_in_bucket,
    differ_in_server, fenced, peers_record, system_id,
};
use crate::config::Config;
use crate::domain::ErrorCode;
use crate::replication::baseline::disk::{enough_disk, lz4};
use crate::replication::baseline::ends::Ends;
use crate::replication::descent::{Here, PrimaryLine, There, doubt, left_at};
use crate::replication::error::PassError;
use crate::replication::mode::rights::rights;
use crate::replication::mode::select::{self, Chosen};

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
    /// The peer's own cluster id; empty: it keeps no state of ours.
    pub peer_cluster: String,
    /// The peer was promoted over this very server.
    pub was_primary: bool,
    pub timeline: i32,
    pub database_bytes: i64,
    pub packages: i64,
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
) -> Result<Facts, PassError> {
    let (local, peer) = (&ends.local, &ends.peer);
    let visible = has_database(local, &config.local.datastore.database).await?;
    two_ends(config, ends).await?;
    is_builder(peer).await?;
    is_primary(peer, fenced_by_us).await?;
    let record = peers_record(&config.peer.datastore).await?;
    let (local_major, peer_major) = (major(local).await?, major(peer).await?);
    versions_fit(peer_major, local_major)?;
    let clients = InstalledClients::look()
        .await
        .fitting(peer_major, local_major)?;
    extensions(local, peer).await?;
    roles(local, peer).await?;
    local_privileges(config, local).await?;
    peer_privileges(peer).await?;
    nothing_uncopied(peer).await?;
    let row = peer
        .row(
            "reading the primary's facts",
            concat!(
                "SELECT pg_database_size(current_database()), (SELECT system_identifier::text FROM pg_control_system()), ",
                timeline!(),
                ", (SELECT count(*) FROM public.origin_packages), to_jsonb(d)::text, pg_encoding_to_char(d.encoding), \
                   CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_lsn()::text END, txid_current_snapshot()::text \
             FROM pg_database d WHERE d.datname = current_database()"
            ),
            &[],
        )
        .await?;
    let Some(timeline) = row.get::<Option<i32>>(2)? else {
        return Err(PassError::standby());
    };
    let database_bytes: i64 = row.get(0)?;
    let peers_id: String = row.get(1)?;
    let there = There {
        record: record.as_ref(),
        system_id: &peers_id,
        timeline,
        wal: row
            .get::<Option<String>>(6)?
            .and_then(|wal| wal.parse().ok()),
        transactions: row.get(7)?,
        left_at: left_at(config, here.point.as_ref(), timeline).await?,
    };
    let approved = match doubt(here, &there) {
        Some(doubt) => Some(doubt.ask(config)?),
        None => None,
    };
    let line = PrimaryLine::of(record.as_ref(), &peers_id, approved);
    let record = record.unwrap_or_default();
    enough_disk(config, local, database_bytes).await?;
    let packages: i64 = row.get(3)?;
    let here = match (packages, visible) {
        (0, true) => packages_of_ours(config).await?,
        _ => 0,
    };
    if here > 0 {
        return Err(PassError::Refused {
            rule: ErrorCode::EmptyPrimary,
            text: format!(
                "the primary's database has no package at all, and the spare's has {here}; a copy of it would be an empty spare"
            ),
            next_step: "check that peer.datastore names the primary".into(),
        });
    }
    let encoding: String = row.get(5)?;
    Ok(Facts {
        clients: clients.for_encoding(&encoding),
        lz4: lz4(local).await?,
        visible,
        locale: locale_options(&row.get::<String>(4)?, &encoding, local_major),
        system_id: peers_id,
        line,
        peer_cluster: record.cluster_id,
        was_primary: match record.promotion {
            Some(promotion) => promotion.system_id == system_id(local).await?,
            None => false,
        },
        timeline,
        database_bytes,
        packages,
        chosen: select::decide(config, cluster_id, local, peer).await?,
    })
}

pub(in crate::replication) fn unfit(
    check: ErrorCode,
    text: String,
    next_step: String,
) -> PassError {
    PassError::Unfit {
        check,
        text,
        next_step,
    }
}

pub async fn has_database(local: &LocalSession, name: &str) -> Result<bool, PassError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = $1)";
    Ok(local
        .row("looking for our database", sql, &[&name])
        .await?
        .get(0)?)
}

/// Counts the packages in the database that Builder on the spare sees.
async fn packages_of_ours(config: &Config) -> Result<i64, PassError> {
    let local = &config.local.datastore;
    let inside = LocalSession::open(local, &local.database).await?;
    let doing = "counting our own packages";
    let sql = "SELECT to_regclass('public.origin_packages') IS NOT NULL";
    if !inside.row(doing, sql, &[]).await?.get(0)? {
        return Ok(0);
    }
    let sql = "SELECT count(*) FROM public.origin_packages";
    Ok(inside.row(doing, sql, &[]).await?.get(0)?)
}

async fn two_ends(config: &Config, ends: &Ends) -> Result<(), PassError> {
    let (local_store, peer_store) = (&ends.local_store, &ends.peer_store);
    two_servers(config, &ends.local, &ends.peer).await?;
    local_store.reading().check_bucket().await?;
    peer_store.check_bucket().await?;
    differ_in_bucket(local_store, peer_store).await?;
    Ok(())
}

/// Checks, before the peer is asked anything else, that both ends are two servers.
pub async fn two_servers(
    config: &Config,
    local: &LocalSession,
    peer: &PeerSession,
) -> Result<(), PassError> {
    let visible = has_database(local, &config.local.datastore.database).await?;
    let same_name = &config.peer.datastore.database;
    let namesake = has_database(local, same_name).await?;
    if visible || namesake {
        let name = if namesake {
            same_name
        } else {
            &config.local.datastore.database
        };
        let inside = LocalSession::open(&config.local.datastore, name).await?;
        differ_in_server(&inside, peer).await?;
    } else {
        differ_in_server(local, peer).await?;
    }
    Ok(())
}

pub(in crate::replication) async fn is_builder(peer: &PeerSession) -> Result<(), PassError> {
    let sql = "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('public.origin_packages') \
               AND attname IN ('ident', 'target', 'checksum') AND NOT attisdropped";
    let columns: i64 = peer
        .row("looking for Builder's tables", sql, &[])
        .await?
        .get(0)?;
    if columns == 3 {
        return Ok(());
    }
    Err(unfit(
        ErrorCode::NotBuilder,
        "the peer's database has no table origin_packages with ident, target and checksum: it is empty or not Builder's".into(),
        "check peer.datastore.host and peer.datastore.database".into(),
    ))
}

/// Checks the versions: data are copied only from an older server to a newer one.
fn versions_fit(primary: u32, spare: u32) -> Result<(), PassError> {
    for (side, found) in [("primary", primary), ("spare", spare)] {
        if found < OLDEST_MAJOR {
            return Err(unfit(
                ErrorCode::Version,
                format!("the {side}'s PostgreSQL is {found}, older than {OLDEST_MAJOR}"),
                format!("upgrade the {side}'s datastore"),
            ));
        }
    }
    if spare < primary {
        return Err(unfit(
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
    peer: &PeerSession,
    fenced_by_us: bool,
) -> Result<(), PassError> {
    let sql = concat!(
        "SELECT pg_is_in_recovery(), ",
        fenced!("current_database()")
    );
    let row = peer
        .row("checking that the peer is a primary", sql, &[])
        .await?;
    if row.get(0)? {
        return Err(PassError::standby());
    }
    if row.get(1)? && !fenced_by_us {
        return Err(PassError::Refused {
            rule: ErrorCode::PeerIsFenced,
            text: "the peer's database is read-only, as a spare's is: local and peer may be exchanged".into(),
            next_step: "check that peer.datastore names the primary and that role = \"spare\" is set only on the spare".into(),
        });
    }
    Ok(())
}

pub async fn major(server: &Session) -> Result<u32, PassError> {
    let sql = "SELECT current_setting('server_version_num')::int4 / 10000";
    let row = server.row("reading the version", sql, &[]).await?;
    Ok(row.get::<i32>(0)? as u32)
}

async fn extensions(local: &LocalSession, peer: &PeerSession) -> Result<(), PassError> {
    let names = lacking_extensions(local, peer).await?;
    if names.is_empty() {
        return Ok(());
    }
    Err(unfit(
        ErrorCode::Extension,
        format!(
            "the spare's PostgreSQL has no extension {}, which the primary's database uses",
            names.join(", ")
        ),
        "install PostgreSQL's contrib modules on the spare".into(),
    ))
}

/// Returns the extensions of the database of `of` for which the server of `on` has no files.
pub async fn lacking_extensions(on: &Session, of: &Session) -> Result<Vec<String>, PassError> {
    let used = "SELECT extname::text FROM pg_extension ORDER BY 1";
    let known = "SELECT name FROM pg_available_extensions";
    lacking(on, of, "extensions", used, known).await
}

/// Returns the items that one server uses and the other does not know.
async fn lacking(
    on: &Session,
    of: &Session,
    what: &str,
    used: &str,
    known: &str,
) -> Result<Vec<String>, PassError> {
    let used = of.rows(&format!("reading the {what}"), used, &[]).await?;
    let wanted: Vec<String> = used
        .iter()
        .map(|row| row.get(0))
        .collect::<Result<_, _>>()?;
    let sql = format!("SELECT w FROM unnest($1::text[]) w WHERE w NOT IN ({known}) ORDER BY 1");
    let doing = format!("looking for the {what}");
    let lacking = on.rows(&doing, &sql, &[&wanted]).await?;
    let names = lacking.iter().map(|row| row.get(0));
    Ok(names.collect::<Result<_, _>>()?)
}

/// Checks roles, because they are not copied, and an object that names a missing role cannot be
/// created.
async fn roles(local: &LocalSession, peer: &PeerSession) -> Result<(), PassError> {
    let used = "SELECT pg_get_userbyid(role)::text FROM pg_policy CROSS JOIN unnest(polroles) role WHERE role <> 0 \
                UNION SELECT usename::text FROM pg_user_mappings WHERE umuser <> 0 ORDER BY 1";
    let known = "SELECT rolname::text FROM pg_roles";
    let lacking = lacking(local, peer, "roles", used, known).await?;
    if lacking.is_empty() {
        return Ok(());
    }
    Err(unfit(
        ErrorCode::Roles,
        format!(
            "row security policies or user mappings of the primary's database name roles that the spare's server does not have: {}",
            lacking.join(", ")
        ),
        "create them on the spare (CREATE ROLE …)".into(),
    ))
}

async fn local_privileges(config: &Config, local: &LocalSession) -> Result<(), PassError> {
    let database = &config.local.datastore.database;
    let lacking = rights(local, database).await?.lacking(database, true);
    if lacking.is_empty() {
        return Ok(());
    }
    Err(unfit(
        ErrorCode::Privilege,
        format!(
            "the local datastore's user {} {}",
            config.local.datastore.user,
            lacking.join(" and ")
        ),
        "use Builder's own user hab as local.datastore.user, or grant the missing rights".into(),
    ))
}

async fn peer_privileges(peer: &PeerSession) -> Result<(), PassError> {
    let sql = "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE c.relkind IN ('r', 'S') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' \
                 AND n.nspname <> 'warm_spare' \
                 AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')) \
               ORDER BY 1";
    let rows = peer.rows("reading the privileges", sql, &[]).await?;
    if rows.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = rows
        .iter()
        .take(5)
        .map(|row| row.get(0))
        .collect::<Result<_, _>>()?;
    Err(unfit(
        ErrorCode::Privilege,
        format!(
            "the peer's user may not read {} of its tables and sequences ({})",
            rows.len(),
            names.join(", ")
        ),
        "grant it SELECT on them, or use Builder's own user hab as peer.datastore.user".into(),
    ))
}

/// Checks for objects that are not copied, so that they are not lost silently. Builder has none of
/// them.
async fn nothing_uncopied(peer: &PeerSession) -> Result<(), PassError> {
    let sql = "SELECT (SELECT count(*) FROM pg_largeobject_metadata), \
                 (SELECT count(*) FROM pg_class WHERE relkind IN ('p', 'f', 'm') AND relnamespace <> 'information_schema'::regnamespace)";
    let row = peer
        .row("looking for objects that are not copied", sql, &[])
        .await?;
    let (objects, tables): (i64, i64) = (row.get(0)?, row.get(1)?);
    if objects == 0 && tables == 0 {
        return Ok(());
    }
    Err(unfit(
        ErrorCode::Unsupported,
        format!(
            "the primary's database has {objects} large objects and {tables} partitioned or foreign tables or materialized views, which warm-spare does not copy"
        ),
        "move them to another database; Builder uses none".into(),
    ))
}

/// Returns the options for encoding and locale. The catalog's columns differ from version to
/// version, so they are read as JSON.
pub(in crate::replication) fn locale_options(
    database: &str,
    encoding: &str,
    local_major: u32,
) -> String {
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
