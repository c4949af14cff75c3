//! Database `warm_spare` of each older format: it is opened, nothing of it is lost, and its tables are those of a new one.

use support::{Result, Site, site};
use tokio_postgres::Client;
use warm_spare::cluster::{LocalCluster, StateError};
use warm_spare::config;
use warm_spare::domain::Role;

/// The tables as the programs of these formats made them, from the history of this repository.
const FORMATS: [(i32, &str); 7] = [
    (1, include_str!("state_formats/format_1.sql")),
    (2, include_str!("state_formats/format_2.sql")),
    (3, include_str!("state_formats/format_3.sql")),
    (4, include_str!("state_formats/format_4.sql")),
    (5, include_str!("state_formats/format_5.sql")),
    (6, include_str!("state_formats/format_6.sql")),
    (7, include_str!("state_formats/format_7.sql")),
];

/// Rows of every table that format 1 has.
const ROWS: &str = "
    UPDATE cluster SET id = 'abcd1234', role = 'spare', epoch = 3;
    INSERT INTO artifact VALUES ('k', 'c', 7, 'e', 'good', now());
    INSERT INTO event (kind, text, change) VALUES ('baseline', 'copied', 'CHG-1');
    INSERT INTO copied (lsn, commit_time, system_id, timeline, transactions, server_started, sequences)
        VALUES ('0/10', now(), '77', 2, '1:2:', 's', 'q');
    INSERT INTO content VALUES ('public.origins', 4, 'h');
    INSERT INTO generation (name) VALUES ('postgres');
    INSERT INTO replacement (key, old_checksum, new_checksum) VALUES ('k', 'a', 'b');
    INSERT INTO vanished (packages, artifacts) VALUES (5, 6);
    INSERT INTO confirmation VALUES (now(), 0.5);
    INSERT INTO verification (time, deep, differences, lsn) VALUES (now(), true, 2, '0/10')";

/// Every column, key, index and privilege of the tables, as text.
const FORM: &str = "
    SELECT string_agg(line, E'\\n' ORDER BY line) FROM (
        SELECT format('%s.%s %s %s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull,
            pg_get_expr(adbin, adrelid))
        FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid LEFT JOIN pg_attrdef d ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
        UNION ALL SELECT format('%s %s', conrelid::regclass, pg_get_constraintdef(oid)) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT format('%s may %s', relname, (SELECT string_agg(x::text, ',' ORDER BY x::text) FROM unnest(relacl) x))
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
        UNION ALL SELECT format('schema %s', (SELECT string_agg(x::text, ',' ORDER BY x::text) FROM unnest(nspacl) x))
        FROM pg_namespace WHERE nspname = 'public') lines (line)";

async fn text(client: &Client, sql: &str) -> Result<String> {
    Ok(client.query_one(sql, &[]).await?.get(0))
}

async fn new_database(site: &Site) -> Result<Client> {
    let postgres = site.spare.pg.conn("postgres").await?;
    postgres
        .batch_execute("DROP DATABASE IF EXISTS warm_spare")
        .await?;
    postgres
        .batch_execute("CREATE DATABASE warm_spare TEMPLATE template0")
        .await?;
    site.spare.pg.conn("warm_spare").await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_older_format_is_migrated_without_loss() -> Result<()> {
    let site = site("state_formats").await;
    let config = config::load(&site.write_config(""))?;
    let cluster = LocalCluster::of(&config);
    drop(cluster.state().await?);
    let client = site.spare.pg.conn("warm_spare").await?;
    let (expected, newest) = (
        text(&client, FORM).await?,
        text(&client, "SELECT format::text FROM meta").await?,
    );
    drop(client);

    let both = FORMATS
        .iter()
        .flat_map(|known| [(*known, false), (*known, true)]);
    for ((format, tables), is_early) in both {
        let client = new_database(&site).await?;
        client.batch_execute(tables).await?;
        client.batch_execute(ROWS).await?;
        // Builds from before the last one of this format made less.
        let early = match format {
            1 => "DROP TABLE confirmation, verification",
            3 => "ALTER TABLE cluster DROP COLUMN fence_begun",
            4 => "DROP TABLE compared, absent; ALTER TABLE generation DROP COLUMN unproven",
            _ => "",
        };
        if is_early {
            client.batch_execute(early).await?;
        }
        assert_eq!(
            text(&client, "SELECT format::text FROM meta").await?,
            format.to_string()
        );
        // Several processes meet the older format at once.
        let opened = tokio::join!(cluster.state(), cluster.state(), cluster.existing_state());
        let state = opened.0?;
        drop((opened.1?, opened.2?.expect("the database is there")));

        assert_eq!(text(&client, FORM).await?, expected, "format {format}");
        assert_eq!(
            text(&client, "SELECT format::text FROM meta").await?,
            newest
        );
        let cluster = state.cluster().await?;
        assert_eq!(
            (cluster.id.as_str(), cluster.role, cluster.epoch),
            ("abcd1234", Some(Role::Spare), 3)
        );
        let point = state.recovery_point().await?.expect("a recovery point");
        assert_eq!((point.lsn.as_str(), point.timeline), ("0/10", 2));
        assert_eq!(state.events(10).await?[0].text, "copied");
        assert_eq!(state.generations().await?[0].name, "postgres");
        let kept = !(format == 1 && is_early);
        let verification = state.last_verification().await?;
        assert_eq!(
            verification.map(|found| found.differences),
            kept.then_some(2)
        );
        assert_eq!(state.confirmation().await?.is_some(), kept);
        let counts = "SELECT concat((SELECT count(*) FROM artifact), (SELECT count(*) FROM content), \
                        (SELECT count(*) FROM replacement), (SELECT sum(packages) FROM vanished))";
        assert_eq!(text(&client, counts).await?, "1115");
    }
    Ok(())
}

/// A kill between two statements of a migration leaves the older format, whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_fails_changes_nothing() -> Result<()> {
    let site = site("state_migration_fails").await;
    let config = config::load(&site.write_config(""))?;
    let client = new_database(&site).await?;
    client.batch_execute(FORMATS[1].1).await?;
    // Format 3 adds columns to this table, after it has changed another one.
    client
        .batch_execute("DROP TABLE transition; CREATE VIEW transition AS SELECT 1 AS one")
        .await?;
    let before = text(&client, FORM).await?;
    let error = match LocalCluster::of(&config).state().await {
        Ok(_) => panic!("a view is where a table must be, and the migration passed"),
        Err(error) => error.to_string(),
    };
    assert!(
        error.contains("migrating database warm_spare to format"),
        "{error}"
    );
    assert_eq!(text(&client, FORM).await?, before);
    assert_eq!(text(&client, "SELECT format::text FROM meta").await?, "2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_format_is_refused_by_its_number() -> Result<()> {
    let site = site("state_newer").await;
    let config = config::load(&site.write_config(""))?;
    drop(LocalCluster::of(&config).state().await?);
    let client = site.spare.pg.conn("warm_spare").await?;
    client.batch_execute("UPDATE meta SET format = 99").await?;
    match LocalCluster::of(&config).state().await {
        Err(StateError::Newer { found: 99, .. }) => Ok(()),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("format 99 was opened"),
    }
}
