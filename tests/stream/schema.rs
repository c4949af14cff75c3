//! A migration on the primary arrives without an operator, and Builder's harmless DDL at its start makes no work.

use support::follow::{
    audit, copies, prepared, tamper, until_closed, until_copied, until_equal, until_following,
};
use support::service::SOON;
use support::{Factory, Result, Service, Site, wait_until};
use warm_spare::cluster::PeerCluster;

/// What a later Builder's migration may do, in parts of which each must be noticed by itself.
const MIGRATIONS: [(&str, &str); 4] = [
    (
        "new tables, with a key and without",
        "CREATE TABLE extra_keyed (id int8 PRIMARY KEY, note text); INSERT INTO extra_keyed VALUES (1, 'one'), (2, NULL);
         CREATE TABLE extra_plain (note text); INSERT INTO extra_plain VALUES ('twice'), ('twice')",
    ),
    (
        "a new column, and a value of it at once",
        "ALTER TABLE origin_packages ADD COLUMN extra int8 NOT NULL DEFAULT 7; UPDATE origin_packages SET extra = 8;
         INSERT INTO extra_plain VALUES ('twice')",
    ),
    (
        "a dropped key, and changes without it",
        "ALTER TABLE extra_keyed DROP CONSTRAINT extra_keyed_pkey; INSERT INTO extra_keyed VALUES (1, 'one')",
    ),
    (
        "a changed function, and a dropped table",
        "CREATE FUNCTION extra() RETURNS int LANGUAGE sql AS 'SELECT 2'; DROP TABLE extra_plain",
    ),
];

/// The form of what is in Builder's schema, as text.
async fn form(cluster: &support::Cluster) -> Result<String> {
    let sql = "SELECT string_agg(line, E'\\n' ORDER BY line) FROM (
        SELECT concat_ws(' ', c.oid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull)
          FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
        UNION ALL SELECT concat_ws(' ', proname, prosrc) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT concat_ws(' ', enumtypid::regtype, enumlabel) FROM pg_enum
        UNION ALL SELECT concat_ws(' ', conrelid::regclass, pg_get_constraintdef(oid)) FROM pg_constraint
          WHERE connamespace = 'public'::regnamespace) l (line)";
    Ok(cluster.conn().await?.query_one(sql, &[]).await?.get(0))
}

/// Forms that no table shows, and that a promoted spare would miss.
const UNSEEN_FORMS: [&str; 16] = [
    "CREATE OR REPLACE FUNCTION atomic() RETURNS int BEGIN ATOMIC SELECT 2; END",
    "ALTER FUNCTION atomic() SET search_path = pg_catalog",
    "CREATE OR REPLACE FUNCTION given(a int DEFAULT 2) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER DOMAIN few SET DEFAULT 3",
    "ALTER DOMAIN few ADD CONSTRAINT small CHECK (VALUE < 9)",
    "ALTER TYPE twofold ADD ATTRIBUTE c int",
    "ALTER TABLE accounts ENABLE ROW LEVEL SECURITY",
    "CREATE POLICY mine ON accounts USING (true)",
    "ALTER POLICY mine ON accounts TO hab",
    "CREATE RULE quiet AS ON DELETE TO secure DO INSTEAD NOTHING",
    "CREATE AGGREGATE total(int) (SFUNC = int4pl, STYPE = int, INITCOND = '0')",
    "CREATE OR REPLACE AGGREGATE total(int) (SFUNC = int4pl, STYPE = int, INITCOND = '1')",
    "CREATE CAST (twofold AS text) WITH INOUT AS ASSIGNMENT",
    "CREATE TABLE younger () INHERITS (secure)",
    "CREATE COLLATION ours (provider = libc, locale = 'C')",
    "SELECT lo_create(0)",
];

async fn until_same_form(site: &Site) -> Result<()> {
    let expected = form(&site.primary).await?;
    wait_until("the primary's form", SOON, || async {
        let found = form(&site.spare).await?;
        (found == expected).then_some(()).ok_or("another".into())
    })
    .await;
    Ok(())
}

/// The service has looked at the primary after now, and claims to be complete.
async fn until_looked(service: &Service<'_>) -> Result<()> {
    let sql = "SELECT now()";
    let client = service.site.primary.conn().await?;
    let now: std::time::SystemTime = client.query_one(sql, &[]).await?.get(0);
    let now: chrono::DateTime<chrono::Utc> = now.into();
    service
        .until("a later look", |status| {
            let confirmed = status["lag"]["confirmed"].as_str();
            let time = confirmed.and_then(|text| chrono::DateTime::parse_from_rfc3339(text).ok());
            time.is_some_and(|time| time > now)
        })
        .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_arrives_without_an_operator() -> Result<()> {
    let site = prepared("schema").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let client = site.primary.conn().await?;
    for (what, migration) in MIGRATIONS {
        let before = copies(&service).await?;
        client.batch_execute(migration).await?;
        println!("{what}");
        until_same_form(&site).await?;
        until_equal(&site).await?;
        until_following(&service).await;
        until_copied(&service, before).await;
    }
    // A value that the type has not had, used at once.
    client
        .batch_execute("ALTER TYPE job_exec_state ADD VALUE 'extra'")
        .await?;
    client
        .batch_execute("CREATE TABLE extra_state (id int PRIMARY KEY, state job_exec_state); INSERT INTO extra_state VALUES (1, 'extra')")
        .await?;
    until_same_form(&site).await?;
    until_equal(&site).await?;
    until_following(&service).await;
    client
        .batch_execute("ALTER TYPE job_exec_state ADD VALUE 'extra_2'")
        .await?;
    client
        .batch_execute("UPDATE extra_state SET state = 'extra_2'")
        .await?;
    until_same_form(&site).await?;
    until_equal(&site).await?;
    audit(&site, "after all").await?;
    until_equal(&site).await
}

#[tokio::test(flavor = "multi_thread")]
async fn ddl_that_changes_nothing_makes_no_baseline() -> Result<()> {
    let site = prepared("harmless").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let client = site.primary.conn().await?;
    let harmless = "CREATE OR REPLACE FUNCTION harmless(of_origin text) RETURNS int8 LANGUAGE sql STABLE AS
            $$ SELECT count(*) FROM public.origin_packages WHERE origin = of_origin $$;
        CREATE TABLE IF NOT EXISTS __diesel_schema_migrations (version varchar(50) PRIMARY KEY, run_on timestamp);
        CREATE INDEX IF NOT EXISTS harmless_idx ON origin_packages (origin, name)";
    client.batch_execute(harmless).await?;
    site.warm_spare(&["prepare"]).await.ok();
    let service = Service::start(&site, "");
    until_following(&service).await;
    let before = copies(&service).await?;
    client.batch_execute(harmless).await?;
    client
        .batch_execute("ANALYZE; REINDEX TABLE origin_packages; CLUSTER origin_packages USING origin_packages_pkey")
        .await?;
    audit(&site, "after it").await?;
    until_equal(&site).await?;
    until_looked(&service).await?;
    assert_eq!(copies(&service).await?, before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_that_no_table_shows_are_noticed_too() -> Result<()> {
    let site = prepared("unseen").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let client = site.primary.conn().await?;
    let before = "CREATE FUNCTION atomic() RETURNS int BEGIN ATOMIC SELECT 1; END;
        CREATE FUNCTION given(a int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT 1';
        CREATE DOMAIN few AS int DEFAULT 2; CREATE TYPE twofold AS (a int, b text); CREATE TABLE secure (a int PRIMARY KEY)";
    client.batch_execute(before).await?;
    site.warm_spare(&["prepare"]).await.ok();
    let service = Service::start(&site, "");
    until_following(&service).await;
    let body = "CREATE OR REPLACE FUNCTION atomic() RETURNS int BEGIN ATOMIC SELECT 3; END";
    client.batch_execute(body).await?;
    until_copied(&service, 1).await;
    service.stop().await.ok();

    let config = warm_spare::config::load(&site.config_file())?;
    let mut last = fingerprint(&config).await?;
    for form in UNSEEN_FORMS {
        client.batch_execute(form).await?;
        let now = fingerprint(&config).await?;
        assert_ne!(now, last, "{form}");
        last = now;
    }
    // What makes no difference to any row makes none here.
    client
        .batch_execute("GRANT SELECT ON accounts TO PUBLIC; ANALYZE")
        .await?;
    assert_eq!(fingerprint(&config).await?, last);
    Ok(())
}

/// As the service reads it.
async fn fingerprint(config: &warm_spare::config::Config) -> Result<String> {
    let peer = PeerCluster::of(config).builder().await?;
    Ok(peer.fingerprint("none").await?)
}

/// The texts of definitions depend on it, and what they mean does not.
#[tokio::test(flavor = "multi_thread")]
async fn another_search_path_of_our_user_makes_no_baseline() -> Result<()> {
    let site = prepared("search_path").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let client = site.primary.conn().await?;
    client
        .batch_execute("ALTER ROLE hab SET search_path = pg_catalog")
        .await?;
    until_looked(&service).await?;
    until_looked(&service).await?;
    assert_eq!(copies(&service).await?, 1, "no new baseline");
    Ok(())
}

/// Decoding skips what a rewrite writes, and the table's form stays as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_that_changes_no_form_is_noticed() -> Result<()> {
    let site = prepared("rewrite").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 1).await?;
    let service = Service::start(&site, "");
    until_following(&service).await;
    let client = site.primary.conn().await?;
    // What is not rewritten with other rows makes no work.
    for harmless in [
        "VACUUM FULL accounts",
        "TRUNCATE audit_package",
        "CLUSTER origin_packages USING origin_packages_pkey",
    ] {
        client.batch_execute(harmless).await?;
    }
    audit(&site, "after it").await?;
    until_equal(&site).await?;
    until_looked(&service).await?;
    assert_eq!(copies(&service).await?, 1);
    let rewrite = "ALTER TABLE accounts ALTER COLUMN email TYPE text USING upper(email)";
    client.batch_execute(rewrite).await?;
    until_copied(&service, 1).await;
    until_equal(&site).await?;
    until_following(&service).await;
    // And while nobody looks.
    let again = service.stop().await;
    again.ok();
    client
        .batch_execute("ALTER TABLE accounts ALTER COLUMN email TYPE text USING lower(email)")
        .await?;
    let service = Service::start(&site, "");
    until_copied(&service, 0).await;
    until_equal(&site).await
}

/// A row that was changed past the fence: no question shows it, and nobody waits for the night.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_differs_is_found_by_the_rolling_comparison() -> Result<()> {
    let site = prepared("rolling").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = Service::start(&site, "[verify]\nrolling = 100\n");
    until_following(&service).await;
    let compared = service
        .until("every table was compared", |status| {
            status["replication"]["compared"].is_string()
        })
        .await;
    let first = compared["replication"]["compared"].clone();
    service
        .until("and again", |status| {
            status["replication"]["compared"] != first
        })
        .await;
    assert_eq!(copies(&service).await?, 1);
    tamper(&site, "UPDATE accounts SET email = 'another'").await?;
    until_closed(&service, "accounts are on one side only", 1).await?;
    // Once a day is enough: what stays different then is told, and the stream goes on.
    tamper(&site, "UPDATE accounts SET email = 'again'").await?;
    wait_until("it is told", SOON, || async {
        let lines = service.running.stderr();
        let told = lines.iter().any(|line| line.contains("again after a copy"));
        told.then_some(()).ok_or("not yet".into())
    })
    .await;
    audit(&site, "after it").await?;
    service.until_level().await;
    assert_eq!(copies(&service).await?, 2);
    Ok(())
}
