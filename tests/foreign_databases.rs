//! Databases in which others keep things of their own: each thing is copied, followed and handed over, or refused by name.

mod support;

use support::follow::{copies, followed, logical, prepare, until_closed, until_equal};
use support::pair::{PROMOTE, until_primary, write};
use support::service::SOON;
use support::{Cluster, Factory, Result, Site, wait_until};

async fn verified(site: &Site) -> Result<()> {
    let found = site.warm_spare(&["verify", "--json"]).await.ok().json();
    assert_eq!(found["differences"], serde_json::json!([]), "{found:#}");
    Ok(())
}

/// In the server's own directory, where its user may write.
async fn tablespace(cluster: &Cluster, name: &str) -> Result<()> {
    let admin = cluster.pg.conn("postgres").await?;
    admin
        .batch_execute("SET allow_in_place_tablespaces = on")
        .await?;
    let sql = format!("CREATE TABLESPACE {name} LOCATION ''");
    Ok(admin.batch_execute(&sql).await?)
}

async fn texts(cluster: &Cluster, sql: &str) -> Result<Vec<String>> {
    let rows = cluster.conn().await?.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A table in a tablespace of its own, an extension that only a superuser makes, triggers and rules that are at work
/// whoever writes, and an event trigger that keeps a log.
const FOREIGN: &str = "
    ALTER TABLE audit_package SET TABLESPACE fast;
    CREATE SCHEMA tools;
    CREATE EXTENSION pg_stat_statements SCHEMA tools;
    COMMENT ON EXTENSION pg_stat_statements IS 'somebody measures here';
    CREATE TABLE ddl_log (tag text, at timestamptz DEFAULT now());
    CREATE FUNCTION logs_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO public.ddl_log (tag) VALUES (tg_tag); END $$;
    CREATE EVENT TRIGGER logs_ddl ON ddl_command_end EXECUTE FUNCTION logs_ddl();
    ALTER EVENT TRIGGER logs_ddl ENABLE ALWAYS;
    CREATE TABLE keyless_log (name text);
    CREATE TABLE keyed_log (name text PRIMARY KEY, how text);
    CREATE TABLE ruled_log (name text);
    CREATE FUNCTION logs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.keyless_log VALUES (NEW.name);
        INSERT INTO public.keyed_log VALUES (NEW.name, TG_NAME);
        RETURN NEW; END $$;
    CREATE TRIGGER \"Logs it\" AFTER INSERT ON accounts FOR EACH ROW EXECUTE FUNCTION logs();
    ALTER TABLE accounts ENABLE ALWAYS TRIGGER \"Logs it\";
    CREATE TRIGGER replicas_only BEFORE INSERT ON accounts FOR EACH ROW EXECUTE FUNCTION logs();
    ALTER TABLE accounts ENABLE REPLICA TRIGGER replicas_only;
    CREATE RULE ruled AS ON INSERT TO keyed_log DO ALSO INSERT INTO ruled_log VALUES (NEW.name);
    ALTER TABLE keyed_log ENABLE ALWAYS RULE ruled;";

const STATES: &str = "
    SELECT concat(tgname, ' ', tgenabled) AS state FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT concat(rulename, ' ', ev_enabled) FROM pg_rewrite WHERE rulename <> '_RETURN'
    UNION ALL SELECT concat(evtname, ' ', evtenabled) FROM pg_event_trigger ORDER BY 1";

const PLACE: &str = "
    SELECT spcname || ' ' || pg_get_userbyid(datdba) FROM pg_database d JOIN pg_tablespace t ON t.oid = dattablespace
    WHERE datname = 'builder'";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_others_own_is_kept_silent_on_the_spare_and_at_work_again_after_a_promotion()
-> Result<()> {
    let site = Site::builder("foreign")
        .primary(logical())
        .spare(logical())
        .spare_database()
        .start()
        .await?;
    Factory::seeded().fill(&site.primary, 3).await?;
    let client = site.primary.conn().await?;
    tablespace(&site.primary, "fast").await?;
    client.batch_execute(FOREIGN).await?;
    let states = texts(&site.primary, STATES).await?;
    tablespace(&site.spare, "big").await?;
    let admin = site.spare.pg.conn("postgres").await?;
    for sql in [
        "CREATE ROLE builder_owner",
        "ALTER DATABASE builder OWNER TO builder_owner",
        "ALTER DATABASE builder SET TABLESPACE big",
    ] {
        admin.batch_execute(sql).await?;
    }
    prepare(&site).await;
    let service = followed(&site, "").await?;
    for number in 0..3 {
        write(&site.primary, &format!("somebody-{number}")).await?;
    }
    until_equal(&site).await?;
    let logged = "SELECT name FROM keyless_log";
    assert_eq!(texts(&site.spare, logged).await?.len(), 3, "each once");
    assert_eq!(copies(&service).await?, 1, "no change is refused");
    // The second copy replaces one of ours, and a stream begins anew.
    client.batch_execute("CREATE TABLE one_more (a int)").await?;
    until_closed(&service, "form", 1).await?;
    write(&site.primary, "after the second copy").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, 2);
    verified(&site).await?;
    assert_eq!(texts(&site.spare, PLACE).await?, ["big builder_owner"]);
    let drill = site.warm_spare(&["drill", "--json"]).await;
    println!("{}\n{}", drill.stdout, drill.stderr);
    service.reconfigure(PROMOTE);
    until_primary(&service, 2).await;
    assert_eq!(texts(&site.spare, STATES).await?, states);
    write(&site.spare, "the new one").await?;
    assert_eq!(texts(&site.spare, logged).await?.len(), 5, "at work again");
    service.stop().await.ok();
    Ok(())
}

/// Until the first copy and while following, whatever database lets us in.
#[tokio::test(flavor = "multi_thread")]
async fn no_database_postgres_is_needed_and_any_name_serves() -> Result<()> {
    let long = "a_rather_long_name_for_the_database_of_the_builder_of_this_site";
    assert_eq!(long.len(), 63);
    let site = Site::builder("no_postgres").primary(logical()).start().await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    for cluster in [&site.primary, &site.spare] {
        let admin = cluster.pg.conn("template1").await?;
        admin.batch_execute("DROP DATABASE postgres").await?;
    }
    let named = format!("local.datastore.database = \"{long}\"\n");
    site.write_config(&named);
    site.warm_spare(&["prepare"]).await.ok();
    for _ in 0..2 {
        site.warm_spare(&["sync", "--baseline"]).await.ok();
    }
    let admin = site.spare.pg.conn("template1").await?;
    let sql = "SELECT datname::text FROM pg_database WHERE datname LIKE 'a_rather%'";
    assert_eq!(admin.query(sql, &[]).await?.len(), 2, "and the replaced one");
    let kept = site.warm_spare(&["generations", "list", "--json"]).await;
    let kept = kept.ok().json();
    let names = admin.query(sql, &[]).await?;
    let names: Vec<String> = names.iter().map(|row| row.get(0)).collect();
    let kept = kept["generations"][0]["name"].as_str().unwrap_or_default();
    assert!(names.iter().any(|name| name == kept), "{kept} of {names:?}");
    Ok(())
}

/// Bytes that are no UTF-8, in rows, keys and definitions.
const BYTES: &str = r"
    SET client_encoding TO sql_ascii;
    UPDATE origin_packages SET manifest = E'caf\xe9';
    CREATE TABLE keyed (id text PRIMARY KEY, word text DEFAULT E'na\xefve');
    CREATE TABLE keyless (a text, b text[]);
    COMMENT ON TABLE keyed IS E'\xa1Hola!';
    INSERT INTO keyed VALUES (E'\xe9t\xe9'), ('plain');
    INSERT INTO keyless VALUES (E'\xff', ARRAY[E'\xfe']), ('plain', NULL);
    ALTER TABLE keyless REPLICA IDENTITY FULL";

const MORE_BYTES: &str = r"
    SET client_encoding TO sql_ascii;
    INSERT INTO keyed SELECT n || E'\xe8' FROM generate_series(1, 50) n;
    UPDATE keyed SET id = E'\xe0t\xe0' WHERE id = E'\xe9t\xe9';
    DELETE FROM keyed WHERE id = E'7\xe8';
    UPDATE keyless SET a = E'\xfd' WHERE a = E'\xff';
    DELETE FROM keyless WHERE a = 'plain';
    UPDATE origin_packages SET manifest = manifest || E'\xc3'";

const SUMS: &str = "
    SELECT md5(string_agg(t::text, '' ORDER BY t::text)) FROM origin_packages t
    UNION ALL SELECT md5(string_agg(t::text, '' ORDER BY t::text)) FROM keyed t
    UNION ALL SELECT md5(string_agg(t::text, '' ORDER BY t::text)) FROM keyless t
    UNION ALL SELECT md5(obj_description('keyed'::regclass))
    UNION ALL SELECT pg_encoding_to_char(encoding)::text FROM pg_database WHERE datname = 'builder'";

async fn until_same_sums(site: &Site) -> Result<()> {
    let expected = texts(&site.primary, SUMS).await?;
    wait_until("the same bytes", SOON, || async {
        let found = texts(&site.spare, SUMS).await?;
        let told = || format!("{found:?} instead of {expected:?}").into();
        (found == expected).then_some(()).ok_or_else(told)
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_no_encoding_come_as_they_are() -> Result<()> {
    let site = Site::builder("sql_ascii").primary(logical()).start().await?;
    let admin = site.primary.pg.conn("postgres").await?;
    admin.batch_execute("DROP DATABASE builder").await?;
    let sql = "CREATE DATABASE builder TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'";
    admin.batch_execute(sql).await?;
    site.primary.make_builders_tables().await?;
    Factory::seeded().fill(&site.primary, 3).await?;
    let client = site.primary.conn().await?;
    client.batch_execute(BYTES).await?;
    prepare(&site).await;
    let service = followed(&site, "").await?;
    until_same_sums(&site).await?;
    client.batch_execute(MORE_BYTES).await?;
    until_same_sums(&site).await?;
    assert_eq!(copies(&service).await?, 1);
    verified(&site).await?;
    service.stop().await.ok();
    // A start of the primary's server has its rows looked at before the next copy.
    site.primary.pg.stop_fast().await?;
    site.primary.pg.start_again().await?;
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    until_same_sums(&site).await?;
    verified(&site).await?;
    site.warm_spare(&["drill"]).await.ok();
    Ok(())
}

/// No server takes such bytes as text: they were written past its checks, and its own dump could not be restored.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_no_text_can_hold_are_named() -> Result<()> {
    let site = Site::builder("not_quite_utf8").start().await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let client = site.primary.conn().await?;
    // As old versions and broken extensions have left them.
    let sql = r"CREATE CAST (bytea AS text) WITHOUT FUNCTION; INSERT INTO odd VALUES (1, 'good'), (2, '\x636166e9'::bytea::text)";
    let made = "CREATE TABLE odd (id int, word text)";
    client.batch_execute(made).await?;
    client.batch_execute(sql).await?;
    client.batch_execute("DROP CAST (bytea AS text)").await?;
    let refused = site.warm_spare(&["sync"]).await;
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    for word in ["encoding", "public.odd", "line 2", "UPDATE"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    Ok(())
}
