//! Makes the incoming database the visible one: both renames and all of our records about it in one
//! transaction.

use super::content_hash::ContentHash;
use crate::cluster::{
    CopiedPoint, DatastoreError, LocalSession, Lock, NOTE_VANISHED, State, StateError,
    end_sessions, quote_ident, quote_literal, record_lineage,
};
use crate::config::Config;
use crate::killpoint;
use crate::replication::descent::PrimaryLine;
use crate::replication::error::PassError;
use std::collections::BTreeMap;
use std::time::Duration;

/// Maximum number of tries. The server itself waits 5 s for sessions to end, each time.
const MAX_TRIES: usize = 12;

/// The properties of the replaced database that are not copied with its rows.
#[derive(Debug, Default)]
pub(crate) struct Properties {
    pub owner: Option<String>,
    /// Its tablespace; None: the server's default.
    tablespace: Option<String>,
    statements: Vec<String>,
}

impl Properties {
    /// Returns the option of `CREATE DATABASE`.
    pub(crate) fn tablespace_option(&self) -> String {
        let tablespace = self.tablespace.as_ref();
        tablespace.map_or(String::new(), |name| {
            format!(" TABLESPACE {}", quote_ident(name))
        })
    }
}

/// Settings whose value is a list, and would become one element if it were quoted as a whole.
const LISTS: [&str; 6] = [
    "search_path",
    "temp_tablespaces",
    "session_preload_libraries",
    "shared_preload_libraries",
    "local_preload_libraries",
    "unix_socket_directories",
];

/// Reads owner, tablespace, privileges, settings, connection limit and comment of `from`, as
/// statements for `to`. The fence's own setting is left out, for any role: the incoming database
/// gets its own.
pub(crate) async fn properties(
    local: &LocalSession,
    from: &str,
    to: &str,
) -> Result<Properties, PassError> {
    let sql = "SELECT pg_get_userbyid(datdba)::text, datconnlimit, shobj_description(oid, 'pg_database'), datacl IS NOT NULL, oid, \
                 (SELECT spcname::text FROM pg_tablespace t WHERE t.oid = dattablespace AND spcname <> 'pg_default') \
               FROM pg_database WHERE datname = $1";
    let rows = local
        .query("reading the replaced database's properties", sql, &[&from])
        .await?;
    let Some(row) = rows.first() else {
        return Ok(Properties::default());
    };
    let (owner, limit, comment, has_acl, oid): (String, i32, Option<String>, bool, u32) =
        (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
    let database = quote_ident(to);
    let mut statements = vec![
        format!("ALTER DATABASE {database} OWNER TO {}", quote_ident(&owner)),
        format!("ALTER DATABASE {database} CONNECTION LIMIT {limit}"),
    ];
    if let Some(comment) = comment {
        statements.push(format!(
            "COMMENT ON DATABASE {database} IS {}",
            quote_literal(&comment)
        ));
    }
    if has_acl {
        statements.push(format!("REVOKE ALL ON DATABASE {database} FROM PUBLIC"));
        let sql = "SELECT coalesce(r.rolname::text, ''), a.privilege_type, a.is_grantable \
                   FROM pg_database d, aclexplode(d.datacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee WHERE d.oid = $1";
        for row in local
            .query("reading the replaced database's privileges", sql, &[&oid])
            .await?
        {
            let (grantee, privilege, grantable): (String, String, bool) =
                (row.get(0), row.get(1), row.get(2));
            let grantee = if grantee.is_empty() {
                "PUBLIC".into()
            } else {
                quote_ident(&grantee)
            };
            let option = if grantable { " WITH GRANT OPTION" } else { "" };
            statements.push(format!(
                "GRANT {privilege} ON DATABASE {database} TO {grantee}{option}"
            ));
        }
    }
    let sql = "SELECT coalesce(r.rolname::text, ''), unnest(s.setconfig) FROM pg_db_role_setting s \
               LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = $1";
    for row in local
        .query("reading the replaced database's settings", sql, &[&oid])
        .await?
    {
        let (role, setting): (String, String) = (row.get(0), row.get(1));
        let Some((name, value)) = setting.split_once('=') else {
            continue;
        };
        if name == "default_transaction_read_only" {
            continue;
        }
        let value = if LISTS.contains(&name) {
            value.to_string()
        } else {
            quote_literal(value)
        };
        let whom = if role.is_empty() {
            format!("DATABASE {database}")
        } else {
            format!("ROLE {} IN DATABASE {database}", quote_ident(&role))
        };
        statements.push(format!("ALTER {whom} SET {} TO {value}", quote_ident(name)));
    }
    Ok(Properties {
        owner: Some(owner),
        tablespace: row.get(5),
        statements,
    })
}

pub(crate) async fn apply(local: &LocalSession, properties: &Properties) -> Result<(), PassError> {
    for statement in &properties.statements {
        local
            .batch(
                "giving the new database the old one's properties",
                statement,
            )
            .await?;
    }
    Ok(())
}

/// The facts about the new visible database.
pub(crate) struct Arrival<'a> {
    pub incoming: &'a str,
    /// Name under which the replaced database is kept; None: there is none.
    pub generation: Option<String>,
    pub point: &'a CopiedPoint,
    /// The primary of the new database.
    pub line: &'a PrimaryLine,
    pub contents: &'a BTreeMap<String, ContentHash>,
    /// The primary's file of each table at the snapshot.
    pub files: &'a BTreeMap<String, i64>,
    pub vanished_packages: &'a [String],
    pub vanished_artifacts: &'a [String],
    /// An operator has seen and approved this change, and with it the earlier ones: the fuse starts
    /// counting again.
    pub approved: bool,
    /// Nothing has proven that the primary's history continues the replaced database's.
    pub unproven: bool,
    pub event: String,
}

/// Renames, while a second session ends all sessions that block it: the rename itself keeps new
/// ones out.
pub(crate) async fn switch(
    config: &Config,
    state: &State,
    lock: Lock,
    arrival: &Arrival<'_>,
) -> Result<(), PassError> {
    let visible = &config.local.datastore.database;
    let usher = LocalSession::open(&config.local.datastore, crate::cluster::STATE_DATABASE).await?;
    let mut tries = 0;
    loop {
        tries += 1;
        let ushering = async {
            loop {
                for database in [visible.as_str(), arrival.incoming] {
                    if let Err(error) = end_sessions(&usher, database).await {
                        return PassError::from(error);
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let renamed = tokio::select! {
            renamed = rename(config, state, lock, arrival) => renamed,
            error = ushering => Err(error),
        };
        // The second session's running statement would also end a session that is opened from now
        // on.
        let _ = usher
            .batch("waiting for the session terminator", "SELECT 1")
            .await;
        let Err(error) = renamed else { return Ok(()) };
        let _ = state
            .session()
            .batch("giving the rename up", "ROLLBACK")
            .await;
        match &error {
            // A session could not be ended in time; the next try ends it earlier.
            PassError::Datastore(e) if in_use(e) && tries < MAX_TRIES => {}
            _ => return Err(error),
        }
    }
}

async fn rename(
    config: &Config,
    state: &State,
    lock: Lock,
    arrival: &Arrival<'_>,
) -> Result<(), PassError> {
    let session = state.session();
    let visible = quote_ident(&config.local.datastore.database);
    session.batch("beginning the rename", "BEGIN").await?;
    let held = session
        .query_one(
            "checking our token",
            "SELECT token FROM meta FOR UPDATE",
            &[],
        )
        .await?;
    if held.get::<_, i64>(0) != lock.token {
        return Err(StateError::Superseded.into());
    }
    if let Some(generation) = &arrival.generation {
        // A spare that came back replaces its database as a primary. An operator may have given
        // newer rows up.
        let sql = "SELECT coming_back OR approved <> '' FROM cluster";
        let pinned = session
            .query_one("reading our role", sql, &[])
            .await?
            .get::<_, bool>(0);
        let sql = format!(
            "ALTER DATABASE {visible} RENAME TO {}",
            quote_ident(generation)
        );
        session
            .batch("renaming the replaced database", &sql)
            .await?;
        let sql =
            "INSERT INTO generation (name, pinned, unproven) VALUES ($1, $2 OR $3, $3 AND NOT $2)";
        session
            .execute(
                "remembering the generation",
                sql,
                &[generation, &pinned, &arrival.unproven],
            )
            .await?;
        // Pinned databases must not accumulate. The oldest is from before any copy of a primary
        // that was set back; the newest has the rows that the last such copy replaced.
        let sql = "UPDATE generation SET pinned = false, unproven = false WHERE unproven AND created NOT IN \
                     (SELECT unnest(ARRAY[min(created), max(created)]) FROM generation WHERE unproven)";
        let doing = "unpinning the generations in between";
        session.execute(doing, sql, &[]).await?;
    }
    let sql = format!(
        "ALTER DATABASE {} RENAME TO {visible}",
        quote_ident(arrival.incoming)
    );
    session
        .batch("renaming the incoming database", &sql)
        .await?;
    remember(config, session, arrival).await?;
    killpoint::reach("switch.before_commit");
    session.batch("committing the rename", "COMMIT").await?;
    killpoint::reach("switch.after_commit");
    Ok(())
}

async fn remember(
    config: &Config,
    session: &LocalSession,
    arrival: &Arrival<'_>,
) -> Result<(), PassError> {
    session
        .batch(
            "forgetting the old recovery point",
            "DELETE FROM copied; DELETE FROM content; DELETE FROM compared; DELETE FROM replacement",
        )
        .await?;
    let p = arrival.point;
    let sql = "INSERT INTO copied (lsn, commit_time, system_id, timeline, transactions, server_started, sequences, schema, slot, peer_cluster) \
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
    session
        .execute(
            "remembering the recovery point",
            sql,
            &[
                &p.lsn,
                &p.commit_time,
                &p.system_id,
                &p.timeline,
                &p.transactions,
                &p.server_started,
                &p.sequences,
                &p.schema,
                &p.slot,
                &p.peer_cluster,
            ],
        )
        .await?;
    let tables: Vec<&str> = arrival.contents.keys().map(String::as_str).collect();
    let rows: Vec<i64> = arrival.contents.values().map(|c| c.rows() as i64).collect();
    let hashes: Vec<String> = arrival
        .contents
        .values()
        .map(ContentHash::to_string)
        .collect();
    let sql = "INSERT INTO content (table_name, rows, hash) SELECT * FROM unnest($1::text[], $2::int8[], $3::text[])";
    session
        .execute(
            "remembering the tables' hashes",
            sql,
            &[&tables, &rows, &hashes],
        )
        .await?;
    let tables: Vec<&str> = arrival.files.keys().map(String::as_str).collect();
    let files: Vec<i64> = arrival.files.values().copied().collect();
    let sql =
        "INSERT INTO compared (table_name, file) SELECT * FROM unnest($1::text[], $2::int8[])";
    session
        .execute("remembering the tables' files", sql, &[&tables, &files])
        .await?;
    if arrival.approved {
        session
            .batch("resetting the fuse's count", "DELETE FROM vanished")
            .await?;
    } else if !(arrival.vanished_packages.is_empty() && arrival.vanished_artifacts.is_empty()) {
        let (packages, artifacts) = (arrival.vanished_packages, arrival.vanished_artifacts);
        let doing = "recording vanished packages";
        session
            .execute(doing, NOTE_VANISHED, &[&packages, &artifacts, &""])
            .await?;
    }
    // Somebody may have made this cluster the primary during the copy.
    let PrimaryLine { epoch, .. } = arrival.line;
    let approved = arrival.line.approved.is_some();
    let sql = "UPDATE cluster SET role = 'spare', epoch = CASE WHEN $2 THEN $1 ELSE greatest(epoch, $1) END, \
                 coming_back = false, fence_begun = false, approved = '', \
                 since = CASE WHEN role = 'spare' THEN since ELSE now() END \
               WHERE coalesce(role, 'spare') = 'spare'";
    let changed = session
        .execute("remembering our role", sql, &[epoch, &approved])
        .await?;
    if changed != 1 {
        return Err(StateError::Superseded.into());
    }
    record_lineage(session, &arrival.line.lineage, None).await?;
    let sql = "INSERT INTO event (kind, text, change) VALUES ('baseline', $1, $2)";
    session
        .execute(
            "recording the event",
            sql,
            &[&arrival.event, &config.change],
        )
        .await?;
    Ok(())
}

/// Drops replaced databases beyond the number to be kept; pinned ones stay.
pub(crate) async fn prune(config: &Config, state: &State) -> Result<Vec<String>, PassError> {
    let keep = config.replication.artifact_retention.as_secs_f64();
    let sql = "UPDATE generation SET pinned = false, unproven = false \
               WHERE unproven AND created <= now() - $1 * interval '1 second'";
    let doing = "unpinning expired generations";
    state.session().execute(doing, sql, &[&keep]).await?;
    let generations = state.generations().await?;
    let surplus: Vec<String> = generations
        .into_iter()
        .filter(|generation| !generation.pinned)
        .skip(config.replication.keep_generations)
        .map(|generation| generation.name)
        .collect();
    for name in &surplus {
        drop_generation(state, name).await?;
    }
    Ok(surplus)
}

/// Drops a replaced database, and its record.
pub(crate) async fn drop_generation(state: &State, name: &str) -> Result<(), PassError> {
    drop_database(state.session(), name).await?;
    let sql = "DELETE FROM generation WHERE name = $1";
    state
        .session()
        .execute("forgetting a generation", sql, &[&name])
        .await?;
    Ok(())
}

/// Returns whether a session on the database could not be ended in time.
fn in_use(error: &DatastoreError) -> bool {
    error.sql_state == Some(crate::cluster::SqlState::OBJECT_IN_USE)
}

/// Ends the database's sessions and drops it. The database need not exist.
pub(crate) async fn drop_database(session: &LocalSession, name: &str) -> Result<(), PassError> {
    let sql = format!("DROP DATABASE IF EXISTS {}", quote_ident(name));
    for _ in 0..MAX_TRIES {
        end_sessions(session, name).await?;
        match session.long("dropping a database", &sql).await {
            Err(e) if in_use(&e) => {}
            other => return Ok(other?),
        }
    }
    Ok(session.long("dropping a database", &sql).await?)
}
