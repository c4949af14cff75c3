//! A primary for tests of pure functions: unprepared, or prepared for cluster 0123abcd.

use super::*;
use crate::cluster::Provider;

pub fn table(name: &str, keyed: bool, identity: char) -> CopiedTable {
    CopiedTable {
        oid: name.bytes().map(u32::from).sum(),
        schema: "public".into(),
        name: name.into(),
        identity,
        keyed,
        indexed: false,
        unlogged: false,
        owned: true,
        in_other_publication: false,
    }
}

pub fn setting(value: &str, source: &str, in_auto_conf: AutoConf) -> Setting {
    Setting {
        value: value.into(),
        source: source.into(),
        file: None,
        pending_restart: false,
        in_auto_conf,
    }
}

pub fn slot(name: &str) -> Slot {
    Slot {
        name: name.into(),
        logical: true,
        plugin: Some("pgoutput".into()),
        database: Some("builder".into()),
        temporary: false,
        active: false,
        wal_status: Some("reserved".into()),
        lost_for: None,
        restart_lsn: None,
        confirmed_flush_lsn: None,
        held_bytes: Some(1 << 20),
    }
}

pub fn publication(tables: &[CopiedTable]) -> Publication {
    let tables = tables.iter().map(|table| PublishedTable {
        schema: table.schema.clone(),
        name: table.name.clone(),
        row_filter: false,
        column_list: false,
    });
    Publication {
        tables: tables.collect(),
        owned: true,
        ..Publication::default()
    }
}

pub fn stock() -> Prepared {
    Prepared {
        names: Names::of_cluster("0123abcd"),
        user: "hab".into(),
        database: "builder".into(),
        major: 15,
        provider: None,
        allowed_extensions: None,
        config_file: Some("/hab/svc/builder-datastore/config/postgresql.conf".into()),
        wal_level: setting("replica", "configuration file", AutoConf::Absent),
        wal_bound: setting("-1", "default", AutoConf::Absent),
        rights: Rights {
            superuser: true,
            replicates: crate::cluster::Replicates::Yes,
            copies_slots: true,
            monitor: true,
            signal: true,
            create: true,
            alter_system: true,
            reload: true,
        },
        tables: vec![
            table("accounts", true, 'd'),
            table("audit_package", false, 'd'),
        ],
        publication: None,
        slot: None,
        other_slots: Vec::new(),
        foreign_slots: Vec::new(),
        other_publications: Vec::new(),
        free_slots: 20,
        free_senders: 20,
    }
}

/// A server of a provider, as its administrator sees it: prepared, but for the settings.
pub fn managed(provider: Provider) -> Prepared {
    let mut managed = ready();
    managed.provider = Some(provider);
    managed.config_file = Some("/provider/postgresql.conf".into());
    managed.rights = Rights {
        superuser: false,
        alter_system: false,
        reload: false,
        ..managed.rights
    };
    managed.wal_level = setting("replica", "configuration file", AutoConf::Absent);
    managed.wal_bound = setting("-1", "default", AutoConf::Absent);
    managed
}

pub fn ready() -> Prepared {
    let held = |value: &str| AutoConf::Holds(value.into());
    let mut ready = stock();
    ready.tables[1].identity = 'f';
    ready.wal_level = setting("logical", "configuration file", held("logical"));
    ready.wal_bound = setting("7630", "configuration file", held("7630MB"));
    ready.publication = Some(publication(&ready.tables));
    ready
}

pub const WANTED: Wanted = Wanted {
    wal_hold_limit: 4_000_000_000,
    wal_unbounded: false,
};
