//! Databases in which others keep things of their own: each thing is copied, followed and handed over, or refused by name.

use support::follow::{
    copies, followed, gaps, logical, prepare, prepared, tamper, until_closed, until_copied,
    until_equal, verified,
};
use support::pair::{PROMOTE, until_primary, write};
use support::service::SOON;
use support::{Cluster, Factory, Result, Site, wait_until};

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
    CREATE SEQUENCE downwards INCREMENT -3 MINVALUE -10 MAXVALUE -1;
    CREATE SEQUENCE nearly_out AS smallint MAXVALUE 5;
    CREATE SEQUENCE at_its_end INCREMENT -1;
    SELECT nextval('downwards'), setval('nearly_out', 5), setval('at_its_end', -9223372036854775808);
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
    client
        .batch_execute("CREATE TABLE one_more (a int)")
        .await?;
    until_closed(&service, "form", 1).await?;
    write(&site.primary, "after the second copy").await?;
    until_equal(&site).await?;
    assert_eq!(copies(&service).await?, 2);
    verified(&site).await?;
    assert_eq!(texts(&site.spare, PLACE).await?, ["big builder_owner"]);
    site.warm_spare(&["drill"]).await.ok();
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
    let site = Site::builder("no_postgres")
        .primary(logical())
        .start()
        .await?;
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
    assert_eq!(
        admin.query(sql, &[]).await?.len(),
        2,
        "and the replaced one"
    );
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
    let site = Site::builder("sql_ascii")
        .primary(logical())
        .start()
        .await?;
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

/// Each as somebody has reported that it breaks a copy or a stream elsewhere.
const REPORTED: &str = r#"
    -- dimitri/pgcopydb 844, 941; xataio/pgstream 753
    CREATE TABLE metrics ("SerialNumber" int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);
    CREATE TABLE keyless_metrics ("SerialNumber" int GENERATED ALWAYS AS IDENTITY, name text);
    -- 2ndQuadrant/pglogical 335
    CREATE TABLE made (a int, b int GENERATED ALWAYS AS (a * 2) STORED, c text);
    -- dimitri/pgcopydb 33, 537; bucardo/bucardo 90
    CREATE TABLE animals (id int PRIMARY KEY, name text);
    CREATE TABLE dogs (breed text, PRIMARY KEY (id)) INHERITS (animals);
    CREATE TABLE notes (a int, b text);
    CREATE TABLE more_notes (c text) INHERITS (notes);
    -- debezium/debezium 7668
    CREATE TYPE level AS ENUM ('low', 'high');
    CREATE TABLE levels (id int PRIMARY KEY, level level, levels level[]);
    -- 2ndQuadrant/pglogical 438; reorg/pg_repack 209
    CREATE TABLE places (id int PRIMARY KEY, place int, UNIQUE (place) DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE deferred_key (id int, v text, PRIMARY KEY (id) DEFERRABLE);
    -- dimitri/pgcopydb 498
    CREATE TABLE employees (id int PRIMARY KEY, name text);
    INSERT INTO employees VALUES (1, 'abc');
    ALTER TABLE employees ADD CONSTRAINT no_abc CHECK (name !~ 'abc') NOT VALID;
    -- Archmonger/django-dbbackup 496
    CREATE ROLE reader;
    CREATE TABLE secrets (id int PRIMARY KEY, whose text);
    ALTER TABLE secrets ENABLE ROW LEVEL SECURITY;
    ALTER TABLE secrets FORCE ROW LEVEL SECURITY;
    CREATE POLICY own ON secrets TO reader USING (whose = current_user);
    -- 2ndQuadrant/pglogical 94; ClickHouse/ClickHouse 107423
    CREATE SCHEMA "My Schema";
    CREATE TABLE "My Schema"."order.by" (gone int, "group" int PRIMARY KEY, "Select" text, too int, "default" text);
    ALTER TABLE "My Schema"."order.by" DROP COLUMN gone, DROP COLUMN too;
    -- skaiworldwide-oss/agensgraph 834, and what follows from such a collation
    CREATE COLLATION either_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    CREATE TABLE cases (word text COLLATE either_case, n int);
    CREATE TABLE case_keys (word text COLLATE either_case PRIMARY KEY, n int);
"#;

const ROWS: &str = r#"
    INSERT INTO metrics (name) VALUES ('a'), ('b');
    INSERT INTO keyless_metrics (name) VALUES ('a'), ('b');
    INSERT INTO made (a, c) VALUES (1, 'x'), (2, 'y'), (2, 'y');
    INSERT INTO animals VALUES (1, 'generic'), (2, 'any');
    INSERT INTO dogs VALUES (1, 'rex', 'lab'), (2, 'fido', 'pug');
    INSERT INTO notes VALUES (1, 'same'), (1, 'same');
    INSERT INTO more_notes VALUES (1, 'same', NULL), (1, 'same', NULL);
    INSERT INTO levels VALUES (1, 'low', '{high}');
    INSERT INTO places VALUES (1, 1), (2, 2);
    INSERT INTO deferred_key VALUES (1, 'a'), (2, 'b');
    INSERT INTO secrets VALUES (1, 'hab'), (2, 'reader');
    INSERT INTO "My Schema"."order.by" VALUES (1, 'a', 'b');
    INSERT INTO cases VALUES ('word', 1), ('WORD', 1), ('Word', 1);
    INSERT INTO case_keys VALUES ('key', 1);
"#;

const CHANGES: &str = r#"
    UPDATE metrics SET name = name || '!';
    UPDATE keyless_metrics SET name = name || '!';
    UPDATE made SET a = a + 1 WHERE a = 1;
    DELETE FROM made WHERE ctid = (SELECT min(ctid) FROM made WHERE a = 2);
    UPDATE ONLY animals SET name = 'parent alone' WHERE id = 1;
    DELETE FROM ONLY animals WHERE id = 2;
    UPDATE dogs SET breed = 'mixed' WHERE id = 1;
    UPDATE ONLY notes SET b = 'parent alone';
    DELETE FROM more_notes WHERE ctid = (SELECT min(ctid) FROM more_notes);
    BEGIN; UPDATE places SET place = 2 WHERE id = 1; UPDATE places SET place = 1 WHERE id = 2; COMMIT;
    UPDATE deferred_key SET id = 3 - id;
    INSERT INTO employees VALUES (2, 'good'); UPDATE employees SET name = 'better' WHERE id = 1;
    UPDATE secrets SET whose = 'nobody'; DELETE FROM secrets WHERE id = 2;
    UPDATE "My Schema"."order.by" SET "Select" = "default", "group" = 7;
    DELETE FROM cases WHERE ctid = (SELECT min(ctid) FROM cases WHERE word COLLATE "C" = 'WORD');
    UPDATE cases SET n = 2 WHERE word COLLATE "C" = 'Word';
    UPDATE case_keys SET word = 'KEY';
    TRUNCATE ONLY notes;
"#;

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_others_is_copied_and_followed() -> Result<()> {
    let site = Site::builder("reported").primary(logical()).start().await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let client = site.primary.conn().await?;
    client.batch_execute(REPORTED).await?;
    client.batch_execute(ROWS).await?;
    prepare(&site).await;
    let refused = site.warm_spare(&["sync"]).await;
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    for word in ["roles", "reader", "CREATE ROLE"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    let admin = site.spare.pg.conn("postgres").await?;
    admin.batch_execute("CREATE ROLE reader").await?;
    let service = followed(&site, "").await?;
    until_equal(&site).await?;
    client.batch_execute(CHANGES).await?;
    until_equal(&site).await?;
    verified(&site).await?;
    let status = service.status().await?;
    assert_eq!(gaps(&status), Vec::<String>::new());
    assert_eq!(copies(&service).await?, 1);
    // What the stream does not speak of costs a copy, and is right after it.
    let sql = "ALTER TYPE level ADD VALUE 'middle' BEFORE 'high'";
    client.batch_execute(sql).await?;
    let sql = "INSERT INTO levels VALUES (2, 'middle', '{middle}')";
    client.batch_execute(sql).await?;
    until_copied(&service, 1).await;
    until_equal(&site).await?;
    let again = copies(&service).await?;
    let sql = "UPDATE metrics SET \"SerialNumber\" = DEFAULT";
    client.batch_execute(sql).await?;
    until_closed(&service, "GENERATED ALWAYS", again).await?;
    verified(&site).await?;
    service.stop().await.ok();
    // dimitri/pgcopydb 264: PostgreSQL restores no such table either.
    let sql = "CREATE TABLE words (word text);
        CREATE FUNCTION is_word(text) RETURNS bool LANGUAGE sql STABLE AS 'SELECT EXISTS (SELECT FROM words WHERE word = $1)';
        INSERT INTO words VALUES ('a');
        CREATE TABLE texts (word text CHECK (is_word(word)));
        INSERT INTO texts VALUES ('a')";
    client.batch_execute(sql).await?;
    let refused = site.warm_spare(&["sync", "--baseline"]).await;
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    for word in ["public.texts", "words", "does not exist"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    Ok(())
}

/// As an address does that moves with the primary, and is a moment early.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_at_the_peers_address_is_told_wherever_it_is_met() -> Result<()> {
    let site = prepared("foreign_standby").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    site.warm_spare(&["sync"]).await.ok();
    let standby = site.primary.pg.standby().await?;
    tamper(&site, "UPDATE accounts SET email = 'another'").await?;
    site.write_config(&format!("peer.datastore.port = {}", standby.port()));
    for verb in ["verify", "sync", "prepare"] {
        let refused = site.warm_spare(&[verb]).await;
        let told = refused.stderr.contains("physical standby");
        assert!(told, "{verb}: {}", refused.stderr);
    }
    Ok(())
}
