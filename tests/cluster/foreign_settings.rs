//! Settings of servers, databases and roles that change what SQL or values mean, and triggers that fire at each login.

use support::follow::{
    audit, copies, followed, gaps, logical, prepare, prepared, until_equal, verified,
};
use support::postgres::other_version;
use support::{Cluster, Factory, Result, Site};

/// On the role that our sessions have, too.
const ODD: [&str; 8] = [
    "array_nulls = off",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_deferrable = on",
    "standard_conforming_strings = off",
    "xmloption = document",
    "quote_all_identifiers = on",
    "transform_null_equals = on",
    "default_toast_compression = pglz",
];

async fn set(cluster: &Cluster, settings: &[&str]) -> Result<()> {
    let admin = cluster.pg.conn("postgres").await?;
    for setting in settings {
        let sql = format!("ALTER ROLE hab SET {setting}");
        admin.batch_execute(&sql).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_role_has_set_changes_no_value_and_stops_nothing() -> Result<()> {
    let site = prepared("odd_role").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let writer = site.primary.conn().await?;
    let values = r#"
        CREATE TABLE lists (id int PRIMARY KEY, list text[], document xml, path text);
        INSERT INTO lists VALUES (1, '{a,NULL,"NULL"}', 'no document', E'a\\b')"#;
    writer.batch_execute(values).await?;
    set(&site.primary, &ODD).await?;
    set(&site.spare, &ODD).await?;
    let service = followed(&site, "").await?;
    let streamed = r#"INSERT INTO lists VALUES (2, '{b,NULL,"NULL"}', 'none either', E'c\\d')"#;
    writer.batch_execute(streamed).await?;
    audit(&site, "streamed").await?;
    until_equal(&site).await?;
    verified(&site).await?;
    let status = service.status().await?;
    assert_eq!(gaps(&status), Vec::<String>::new());
    assert_eq!(copies(&service).await?, 1);
    service.stop().await.ok();
    for cluster in [&site.primary, &site.spare] {
        let admin = cluster.pg.conn("postgres").await?;
        let another = "CREATE ROLE app; ALTER ROLE hab SET role = app";
        admin.batch_execute(another).await?;
    }
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    Ok(())
}

/// A name that a program of PostgreSQL's takes for a connection string, or for an option.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_may_have_any_name() -> Result<()> {
    for name in ["a=b", "-Fc", "it's"] {
        let site = Site::builder("odd_name").primary(logical()).start().await?;
        Factory::seeded().fill(&site.primary, 1).await?;
        let admin = site.primary.pg.conn("postgres").await?;
        let sql = format!("ALTER DATABASE builder RENAME TO \"{name}\"");
        admin.batch_execute(&sql).await?;
        site.write_config(&format!(
            "peer.datastore.database = {name:?}\nlocal.datastore.database = {name:?}"
        ));
        site.warm_spare(&["sync"]).await.ok();
        site.warm_spare(&["sync", "--baseline"]).await.ok();
        let rows = site.spare.pg.conn(name).await?;
        let sql = "SELECT count(*) FROM origin_packages";
        assert_eq!(rows.query_one(sql, &[]).await?.get::<_, i64>(0), 1);
    }
    Ok(())
}

/// As PostgreSQL's own documentation has one, and as it would be without care for read-only sessions.
const LOGINS: &str = "
    CREATE TABLE logins (who text, at timestamptz DEFAULT now());
    CREATE FUNCTION notes_login() RETURNS event_trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO public.logins (who) VALUES (session_user); END $$;
    CREATE EVENT TRIGGER notes_login ON login EXECUTE FUNCTION notes_login();
    ALTER EVENT TRIGGER notes_login ENABLE ALWAYS;";

#[tokio::test(flavor = "multi_thread")]
async fn no_login_of_ours_fires_a_trigger() -> Result<()> {
    let Some(programs) = other_version(18) else {
        support::skip("no PostgreSQL 18 here (scripts/setup: pip)");
        return Ok(());
    };
    let mut site = Site::builder("logins")
        .primary(logical().programs(&programs))
        .spare(logical().programs(&programs))
        .start()
        .await?;
    site.environment = vec![(
        "WARM_SPARE_PG_CLIENTS".into(),
        programs.display().to_string(),
    )];
    Factory::seeded().fill(&site.primary, 1).await?;
    site.primary.conn().await?.batch_execute(LOGINS).await?;
    prepare(&site).await;
    let service = followed(&site, "").await?;
    until_same_logins(&site).await?;
    // Another copy, over a database that has the trigger already.
    service.stop().await.ok();
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    let service = followed(&site, "").await?;
    until_same_logins(&site).await?;
    verified(&site).await?;
    let status = service.status().await?;
    assert_eq!(gaps(&status), Vec::<String>::new());
    // The test's own login is the only new one.
    let sql = "SELECT count(*) FROM logins";
    let before = site.primary.conn().await?.query_one(sql, &[]).await?;
    site.warm_spare(&["preflight"]).await;
    let after = site.primary.conn().await?.query_one(sql, &[]).await?;
    assert_eq!(after.get::<_, i64>(0), before.get::<_, i64>(0) + 1);
    Ok(())
}

/// Each look of the test is a login of its own on the primary, and fires there.
async fn until_same_logins(site: &Site) -> Result<()> {
    let there = site.primary.conn().await?;
    let sql = "SELECT count(*) FROM logins";
    support::wait_until("the same logins", support::service::SOON, || async {
        let there: i64 = there.query_one(sql, &[]).await?.get(0);
        let here: i64 = site.spare.conn().await?.query_one(sql, &[]).await?.get(0);
        (here == there)
            .then_some(())
            .ok_or_else(|| format!("{here} of {there}").into())
    })
    .await;
    Ok(())
}
