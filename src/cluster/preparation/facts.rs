//! Reads the objects and settings on the peer, and the rights of our user there. Everything here
//! only reads.

use super::publication::{self, Publication, PublicationState};
use super::setting::{AutoConf, Setting, settings};
use super::{Names, id_of};
use crate::cluster::{DatastoreError, Provider, Replicates, Row, Session, quote_ident};
use crate::domain::Lsn;
use std::collections::BTreeMap;

/// The condition for copied tables, in a query of `pg_class c` and its `pg_namespace n`.
pub const COPIED_TABLES: &str = "c.relkind = 'r' AND c.relpersistence <> 't'
  AND n.nspname NOT IN ('information_schema', 'warm_spare') AND n.nspname !~ '^pg_'
  AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')";

/// The facts about the primary on which the stream depends.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    pub names: Names,
    pub user: String,
    pub database: String,
    /// Such as 15.
    pub major: i32,
    /// The provider that manages the server.
    pub provider: Option<Provider>,
    /// The extensions that the provider allows, in lower case; None: all.
    pub allowed_extensions: Option<Vec<String>>,
    /// The server's own configuration file, if we may see it.
    pub config_file: Option<String>,
    pub wal_level: Setting,
    /// `max_slot_wal_keep_size`.
    pub wal_bound: Setting,
    pub rights: Rights,
    pub tables: Vec<CopiedTable>,
    pub publication: Option<Publication>,
    /// Our slot, or the one that was made for us.
    pub slot: Option<Slot>,
    /// Other logical slots, of any owner.
    pub other_slots: Vec<Slot>,
    /// Permanent slots that no `warm-spare` made, including physical ones.
    pub foreign_slots: Vec<Slot>,
    /// Other publications in this database that a `warm-spare` made.
    pub other_publications: Vec<String>,
    /// Number of slots and walsenders that are still free.
    pub free_slots: i64,
    pub free_senders: i64,
}

/// The rights of our user on the peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rights {
    pub superuser: bool,
    pub replicates: Replicates,
    /// True: a slot may be copied by `pg_copy_logical_replication_slot`.
    pub copies_slots: bool,
    /// True: it may see all settings, and when other users' sessions began.
    pub monitor: bool,
    /// True: it may end other users' sessions.
    pub signal: bool,
    /// True: it may make a publication in the database.
    pub create: bool,
    pub alter_system: bool,
    pub reload: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedTable {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// `pg_class.relreplident`: d, n, f, i.
    pub identity: char,
    /// True: the table has a primary key that can identify a row.
    pub keyed: bool,
    /// True: the table has the index that its identity names.
    pub indexed: bool,
    pub unlogged: bool,
    pub owned: bool,
    pub in_other_publication: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub name: String,
    pub logical: bool,
    pub plugin: Option<String>,
    pub database: Option<String>,
    pub temporary: bool,
    pub active: bool,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// The reason why it is lost, if the server gives one (version 17 or later).
    pub lost_for: Option<String>,
    pub restart_lsn: Option<Lsn>,
    pub confirmed_flush_lsn: Option<Lsn>,
    /// Bytes of write-ahead log that the server keeps for it.
    pub held_bytes: Option<u64>,
}

impl Prepared {
    pub fn publication_state(&self) -> PublicationState {
        let Some(publication) = &self.publication else {
            return PublicationState::Absent;
        };
        match publication.differences(&self.tables) {
            none if none.is_empty() => PublicationState::Exact,
            some => PublicationState::Differs(some),
        }
    }

    /// Returns whether the server counts as a builder-datastore, whose upgrade starts it without
    /// Builder's own configuration file. A server whose file we may not see counts as one, unless
    /// a provider manages it, or an administrator has made our slot.
    pub fn counts_as_builder_datastore(&self) -> bool {
        match &self.config_file {
            Some(file) => file.starts_with("/hab/"),
            None => self.provider.is_none() && !self.names.slot_is_premade,
        }
    }

    /// Returns the provider in whose console the server's settings are set; None: `ALTER SYSTEM`
    /// sets them.
    pub fn console(&self) -> Option<Provider> {
        self.provider.filter(|_| !self.rights.alter_system)
    }

    /// Returns the maximum bytes of log that the server keeps for any slot; None: without limit.
    pub fn bound_bytes(&self) -> Option<u64> {
        self.wal_bound.value.parse().ok().map(|mib: u64| mib << 20)
    }

    /// Returns whether the limit in `postgresql.auto.conf` is not in force yet, because `prepare`
    /// was stopped before the server was asked to read it.
    pub(super) fn bound_is_unread(&self) -> bool {
        let bound = &self.wal_bound;
        match &bound.in_auto_conf {
            AutoConf::Holds(value) => {
                bound.value == "-1" && value != "-1" && bound.source != "command line"
            }
            AutoConf::Absent => bound.is_from_auto_conf(),
            AutoConf::Unknown => false,
        }
    }

    /// Returns the tables whose published updates and deletions would fail.
    pub fn unidentified(&self) -> impl Iterator<Item = &CopiedTable> {
        self.tables.iter().filter(|table| !table.is_identified())
    }

    /// Returns this cluster's objects there, in words.
    pub fn ours(&self) -> Vec<String> {
        let made = |slot: &&Slot| self.names.made(&slot.name);
        let mut found: Vec<String> = self.slot.iter().map(Slot::describe).collect();
        found.extend(self.other_slots.iter().filter(made).map(Slot::describe));
        if self.publication.is_some() {
            found.push(format!("publication {}", self.names.publication));
        }
        found
    }

    /// Returns the objects of other clusters' `warm-spare` there: ids, with the objects in words.
    pub fn orphans(&self) -> BTreeMap<String, Vec<String>> {
        let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let slots = self.other_slots.iter().map(|s| (&s.name, s.describe()));
        let publications = self.other_publications.iter();
        let publications = publications.map(|name| (name, format!("publication {name}")));
        for (name, text) in slots.chain(publications) {
            if let Some(id) = id_of(name).filter(|id| *id != self.names.id) {
                found.entry(id.to_string()).or_default().push(text);
            }
        }
        found
    }
}

impl CopiedTable {
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    pub(super) fn quoted(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }

    /// Returns whether the old row of an update can be identified.
    pub fn is_identified(&self) -> bool {
        match self.identity {
            'f' => true,
            'd' => self.keyed,
            'i' => self.indexed,
            _ => false,
        }
    }
}

impl Slot {
    pub fn describe(&self) -> String {
        let held = self.held_bytes.map(bytesize::ByteSize);
        let held = held.map_or(String::new(), |size| format!(", which holds {size} of WAL"));
        format!("slot {}{held}", self.name)
    }

    /// Returns whether the server has removed log that the slot needs.
    pub fn is_lost(&self) -> bool {
        self.wal_status.as_deref() == Some("lost")
    }

    /// Returns the reason why it cannot give us the stream of this database.
    pub fn flaw(&self, database: &str) -> Option<String> {
        if !self.logical {
            return Some("it is a physical slot".into());
        }
        if self.plugin.as_deref() != Some("pgoutput") {
            let plugin = self.plugin.as_deref().unwrap_or("none");
            return Some(format!("its plugin is {plugin}, not pgoutput"));
        }
        if self.database.as_deref() != Some(database) {
            let other = self.database.as_deref().unwrap_or("none");
            return Some(format!("it is of database {other}"));
        }
        self.temporary.then(|| "it is a temporary slot".into())
    }
}

/// Returns the reason why a server has invalidated a slot, by its `invalidation_reason`. Servers
/// before 17 give none: they know only one limit.
pub fn why_lost(reason: Option<&str>) -> String {
    match reason {
        None | Some("wal_removed") => "it held more than max_slot_wal_keep_size".into(),
        Some("idle_timeout") => {
            "nobody read it for longer than idle_replication_slot_timeout".into()
        }
        Some("wal_level_insufficient") => "wal_level was no longer logical".into(),
        Some(other) => format!("the server's reason is {other}"),
    }
}

const SERVER: &str = "
SELECT current_user::text, current_database()::text, current_setting('server_version_num')::int4 / 10000,
       r.rolsuper,
       (SELECT setting FROM pg_settings WHERE name = 'config_file'),
       has_database_privilege(current_database(), 'CREATE'),
       has_function_privilege('pg_catalog.pg_reload_conf()', 'EXECUTE'),
       has_table_privilege('pg_catalog.pg_file_settings', 'SELECT')
         AND has_function_privilege('pg_catalog.pg_show_all_file_settings()', 'EXECUTE'),
       current_setting('max_replication_slots')::int8 - (SELECT count(*) FROM pg_replication_slots),
       current_setting('max_wal_senders')::int8 - (SELECT count(*) FROM pg_stat_replication),
       pg_has_role('pg_read_all_settings', 'USAGE') AND pg_has_role('pg_read_all_stats', 'USAGE'),
       pg_has_role('pg_signal_backend', 'USAGE'),
       r.rolreplication OR EXISTS (SELECT FROM pg_roles g WHERE g.rolname = 'rds_replication' AND pg_has_role(g.oid, 'USAGE'))
FROM pg_roles r WHERE r.rolname = current_user";

const TABLES: &str = "
WITH others AS MATERIALIZED (SELECT DISTINCT schemaname, tablename FROM pg_publication_tables WHERE pubname <> $1),
     keys AS MATERIALIZED (SELECT indrelid, bool_or(indisprimary) AS keyed, bool_or(indisreplident) AS indexed FROM pg_index
       WHERE indisvalid AND indisunique AND indimmediate AND indpred IS NULL GROUP BY indrelid)
SELECT c.oid, n.nspname::text, c.relname::text, c.relreplident::text, coalesce(k.keyed, false), coalesce(k.indexed, false),
       c.relpersistence = 'u', pg_has_role(c.relowner, 'USAGE'), o.tablename IS NOT NULL
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN keys k ON k.indrelid = c.oid
LEFT JOIN others o ON o.schemaname = n.nspname AND o.tablename = c.relname
WHERE ";

const SLOTS: &str = "
SELECT s.slot_name::text, s.slot_type = 'logical', s.plugin::text, s.database::text, s.temporary, s.active,
       to_jsonb(s) ->> 'wal_status', s.restart_lsn::text, s.confirmed_flush_lsn::text,
       CASE WHEN NOT pg_is_in_recovery() THEN greatest(0, pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn))::int8 END,
       to_jsonb(s) ->> 'invalidation_reason'
FROM pg_replication_slots s ORDER BY 1";

const PUBLICATIONS: &str = "
SELECT pubname::text FROM pg_publication WHERE pubname ~ '^warm_spare_[0-9a-f]{8}(_|$)' AND pubname <> $1 ORDER BY 1";

/// Reads everything. It changes nothing, and needs no right but to connect.
pub async fn inspect(session: &Session, names: &Names) -> Result<Prepared, DatastoreError> {
    let doing = "looking at the prepared objects";
    let server = session.row(doing, SERVER, &[]).await?;
    let (superuser, files): (bool, bool) = (server.get(3)?, server.get(7)?);
    let major: i32 = server.get(2)?;
    let (wal_level, wal_bound) = settings(session, files).await?;
    let mut all = slots(session).await?;
    let slot = all.iter().position(|slot| slot.name == names.slot);
    let slot = slot.map(|at| all.remove(at));
    let foreign = all
        .iter()
        .filter(|slot| !slot.temporary && id_of(&slot.name).is_none());
    let foreign_slots = foreign.cloned().collect();
    all.retain(|slot| slot.logical);
    // It comes after the free walsenders were counted: the try takes one.
    let tried = session.tried(server.get(12)?).await?;
    let others = session
        .rows(doing, PUBLICATIONS, &[&names.publication])
        .await?;
    Ok(Prepared {
        names: names.clone(),
        user: server.get(0)?,
        database: server.get(1)?,
        major,
        provider: session.provider().await?,
        allowed_extensions: session.allowed_extensions().await?,
        config_file: server.get(4)?,
        wal_level,
        wal_bound,
        rights: Rights {
            superuser,
            replicates: tried.replicates,
            copies_slots: tried.copies_slots,
            monitor: server.get(10)?,
            signal: server.get(11)?,
            create: server.get(5)?,
            reload: server.get(6)?,
            alter_system: superuser || may_alter_system(session, major).await?,
        },
        tables: tables(session, &names.publication).await?,
        publication: publication::read(session, &names.publication, major).await?,
        slot,
        other_slots: all,
        foreign_slots,
        other_publications: others
            .iter()
            .map(|row| row.get(0))
            .collect::<Result<_, _>>()?,
        free_slots: server.get(8)?,
        free_senders: server.get(9)?,
    })
}

/// Since version 15 it can be granted to users who are not superusers.
async fn may_alter_system(session: &Session, major: i32) -> Result<bool, DatastoreError> {
    if major < 15 {
        return Ok(false);
    }
    let sql = "SELECT has_parameter_privilege('wal_level', 'ALTER SYSTEM') \
                  AND has_parameter_privilege('max_slot_wal_keep_size', 'ALTER SYSTEM')";
    let row = session.row("reading our privileges", sql, &[]);
    row.await?.get(0)
}

async fn tables(session: &Session, publication: &str) -> Result<Vec<CopiedTable>, DatastoreError> {
    let sql = format!("{TABLES}{COPIED_TABLES} ORDER BY 2, 3");
    let rows = session
        .rows("reading the tables", &sql, &[&publication])
        .await?;
    let table = |row: &Row| {
        Ok(CopiedTable {
            oid: row.get(0)?,
            schema: row.get(1)?,
            name: row.get(2)?,
            identity: row.get::<String>(3)?.chars().next().unwrap_or('d'),
            keyed: row.get(4)?,
            indexed: row.get(5)?,
            unlogged: row.get(6)?,
            owned: row.get(7)?,
            in_other_publication: row.get(8)?,
        })
    };
    rows.iter().map(table).collect()
}

async fn slots(session: &Session) -> Result<Vec<Slot>, DatastoreError> {
    let rows = session.rows("reading the slots", SLOTS, &[]).await?;
    let lsn = |text: Option<String>| text.and_then(|text| text.parse().ok());
    let slot = |row: &Row| {
        Ok(Slot {
            name: row.get(0)?,
            logical: row.get(1)?,
            plugin: row.get(2)?,
            database: row.get(3)?,
            temporary: row.get(4)?,
            active: row.get(5)?,
            wal_status: row.get(6)?,
            restart_lsn: lsn(row.get(7)?),
            confirmed_flush_lsn: lsn(row.get(8)?),
            held_bytes: row.get::<Option<i64>>(9)?.map(i64::unsigned_abs),
            lost_for: row.get(10)?,
        })
    };
    rows.iter().map(slot).collect()
}
