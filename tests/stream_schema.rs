//! A migration on the primary arrives without an operator, and Builder's harmless DDL at its start makes no work.

mod support;

use support::follow::{audit, copies, prepared, until_copied, until_equal, until_following};
use support::service::SOON;
use support::{Factory, Result, Service, Site, wait_until};

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
