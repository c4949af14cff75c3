//! A primary that is not what it should be: by the hand of its owner, by damage, or because somebody else answers at its
//! address. The spare takes data from it, and nothing else: no statement, no length, no number without bounds.

use std::time::{Duration, Instant};

use support::follow::{audit, followed, tamper, until_equal, until_following};
use support::hostile::{
    Hostile, Trick, announced, authentication, done, login, message, prepared, ready, row,
};
use support::pair::{PROMOTE, Pair, forced, until_asked, until_primary, write};
use support::service::{SOON, approval};
use support::{Cluster, Factory, Result, Service, wait_until};

/// Longest time for a verb to give a peer up that answers and says nothing of use.
const GIVES_UP: Duration = Duration::from_secs(60);

/// Name, and what the server does.
fn tricks() -> Vec<(&'static str, Trick)> {
    use Trick::{Answers, Closes, OfTls, Repeats, Says};
    let scram = |rounds: &str| {
        let offered = authentication(10, b"SCRAM-SHA-256\0\0");
        let text = format!("r=x,s=c2FsdA==,i={rounds}");
        [offered, authentication(11, text.as_bytes())].concat()
    };
    let answer = |parts: &[Vec<u8>]| Answers(parts.concat());
    let (text, int8, bool_) = (25, 20, 16);
    vec![
        ("closes", Closes),
        (
            "garbage",
            Says(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ),
        ("zeroes", Says(vec![0; 64])),
        ("a message of 4 GiB", Says(announced(b'E', u32::MAX, b"S"))),
        (
            "a message of 1 GiB before login",
            Says(announced(b'N', 1 << 30, b"S")),
        ),
        ("a message of no length", Says(announced(b'E', 0, b""))),
        ("a message of length 3", Says(announced(b'R', 3, b""))),
        (
            "an authentication without a code",
            Says(message(b'R', b"\0\0")),
        ),
        ("an unknown authentication", Says(authentication(77, b""))),
        ("Kerberos", Says(authentication(2, b""))),
        ("md5 without a salt", Says(authentication(5, b""))),
        (
            "no mechanism that is known",
            Says(authentication(10, b"X-OWN\0\0")),
        ),
        (
            "a mechanism without end",
            Says(authentication(10, b"SCRAM")),
        ),
        ("a nonce that is not ours", Says(scram("4096"))),
        ("four thousand million rounds", Says(scram("4294967295"))),
        ("no number of rounds", Says(scram("many"))),
        ("SCRAM out of order", Says(authentication(11, b"r=x"))),
        (
            "a proof without a question",
            Says(authentication(12, b"v=x")),
        ),
        (
            "notices without end",
            Repeats(message(b'N', b"SNOTICE\0M..\0\0")),
        ),
        (
            "TLS that is none",
            OfTls(b"S\x15\x03\x01\0\x02\x02\x28".to_vec()),
        ),
        (
            "TLS, and a statement in clear behind it",
            OfTls([b"N".as_slice(), &login()].concat()),
        ),
        ("an error without fields", Says(message(b'E', b""))),
        (
            "an error with escape sequences",
            Says(message(
                b'E',
                b"SFATAL\0C08P01\0M\x1b[2Jall is well\nOK: primary\0\0",
            )),
        ),
        (
            "a copy nobody asked for",
            answer(&[message(b'H', b"\0\0\0")]),
        ),
        (
            "no columns",
            answer(&[prepared(0, &[]), ready(), row(&[]), done(), ready()]),
        ),
        (
            "columns of another type",
            answer(&[
                prepared(0, &[text]),
                ready(),
                message(b'2', b""),
                row(&[Some(b"yes")]),
                done(),
                ready(),
            ]),
        ),
        (
            "a NULL where none can be",
            answer(&[
                prepared(0, &[bool_]),
                ready(),
                message(b'2', b""),
                row(&[None]),
                done(),
                ready(),
            ]),
        ),
        (
            "a number of 3 bytes",
            answer(&[
                prepared(0, &[int8]),
                ready(),
                message(b'2', b""),
                row(&[Some(b"abc")]),
                done(),
                ready(),
            ]),
        ),
        (
            "more parameters than there are",
            answer(&[prepared(9, &[text]), ready()]),
        ),
        (
            "a row longer than its message",
            answer(&[
                prepared(0, &[text]),
                ready(),
                message(b'2', b""),
                message(b'D', b"\0\x01\x7f\xff\xff\xffx"),
                done(),
                ready(),
            ]),
        ),
        (
            "an unknown type",
            answer(&[prepared(0, &[4_000_000_000]), ready()]),
        ),
        ("ready, and nothing else", answer(&[ready(), ready()])),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_answers_at_the_primarys_address_gets_an_error_and_nothing_else() -> Result<()> {
    let site = support::site("hostile_wire").await;
    let tricks = tricks();
    assert!(tricks.len() >= 30, "{}", tricks.len());
    for (name, trick) in tricks {
        let hostile = Hostile::start(trick).await?;
        site.write_config(&hostile.as_peer(""));
        let began = Instant::now();
        let output = site.warm_spare(&["check-config", "--connect"]).await;
        assert_eq!(output.code, Some(3), "{name}: {output}");
        assert!(output.stderr.contains("peer datastore"), "{name}: {output}");
        assert!(!output.stderr.contains("panicked"), "{name}: {output}");
        // What the peer writes makes no line of its own, and moves no cursor.
        assert!(!output.stderr.contains('\u{1b}'), "{name}: {output}");
        assert!(!output.stderr.contains("\nOK"), "{name}: {output}");
        assert!(began.elapsed() < GIVES_UP, "{name}: {:?}", began.elapsed());
    }
    Ok(())
}

async fn sql(cluster: &Cluster, database: &str, statements: &str) -> Result<()> {
    let client = cluster.pg.conn(database).await?;
    Ok(client.batch_execute(statements).await?)
}

async fn superusers(cluster: &Cluster) -> Result<Vec<String>> {
    let sql = "SELECT rolname::text FROM pg_roles WHERE rolsuper ORDER BY 1";
    let rows = cluster.pg.conn("postgres").await?.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A function of the owner's that takes the place of one of the server's, and makes a superuser where it is run.
fn evil(signature: &str, returns: &str, result: &str) -> String {
    format!(
        "CREATE OR REPLACE FUNCTION evil.{signature} RETURNS {returns} LANGUAGE plpgsql AS $evil$ BEGIN \
           IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'owned') THEN \
             BEGIN CREATE ROLE owned SUPERUSER; EXCEPTION WHEN OTHERS THEN NULL; END; \
           END IF; RETURN {result}; END $evil$;"
    )
}

/// The one that the review of 7cb844e took the spare over with.
const ONE_FUNCTION: &str = "one function in the search path";

/// What the owner of the primary's database does there, and how it is undone.
fn in_builder() -> Vec<(&'static str, String, &'static str)> {
    let functions = [
        evil(
            "format(text, text, bigint, boolean)",
            "text",
            "'CREATE ROLE owned SUPERUSER LOGIN'",
        ),
        evil("now()", "timestamptz", "'2020-01-01'::timestamptz"),
        evil(
            "clock_timestamp()",
            "timestamptz",
            "'2020-01-01'::timestamptz",
        ),
        evil("pg_current_wal_lsn()", "pg_lsn", "'0/1'::pg_lsn"),
        evil("md5(text)", "text", "'x'"),
        evil("pg_is_in_recovery()", "boolean", "false"),
        evil("current_setting(text)", "text", "'x'"),
        evil("has_table_privilege(oid, text)", "boolean", "true"),
        evil("to_regclass(text)", "regclass", "NULL"),
        evil("quote_ident(text)", "text", "'x'"),
    ]
    .concat();
    let one = "CREATE SCHEMA evil; CREATE FUNCTION evil.format(text, text, bigint, boolean) RETURNS text LANGUAGE sql
        AS $$ SELECT 'CREATE ROLE owned SUPERUSER LOGIN' $$;";
    let path = "ALTER DATABASE builder SET search_path = evil, pg_catalog, public";
    let undo_path = "ALTER DATABASE builder RESET search_path";
    let settings = "ALTER DATABASE builder SET DateStyle = 'SQL, DMY'; ALTER DATABASE builder SET IntervalStyle = 'iso_8601';
        ALTER DATABASE builder SET extra_float_digits = 0; ALTER DATABASE builder SET bytea_output = 'escape';
        ALTER DATABASE builder SET TimeZone = 'Asia/Kathmandu'; ALTER DATABASE builder SET statement_timeout = '1ms';
        ALTER DATABASE builder SET synchronous_commit = off; ALTER DATABASE builder SET row_security = on;
        ALTER DATABASE builder SET standard_conforming_strings = off; ALTER DATABASE builder SET client_encoding = 'LATIN1'";
    vec![
        (ONE_FUNCTION, format!("{one} {path}"), "ALTER DATABASE builder RESET search_path; DROP SCHEMA evil CASCADE"),
        ("functions in the search path", format!("CREATE SCHEMA evil; {functions} {path}"), undo_path),
        ("the same for the role", "ALTER ROLE hab SET search_path = evil, pg_catalog, public".into(), "ALTER ROLE hab RESET search_path; DROP SCHEMA evil CASCADE"),
        ("settings", settings.into(), "ALTER DATABASE builder RESET ALL"),
        ("a sequence with a statement for a name", "CREATE SEQUENCE public.\"x'); CREATE ROLE owned SUPERUSER; --\"".into(), "DROP SEQUENCE public.\"x'); CREATE ROLE owned SUPERUSER; --\""),
        ("a sequence at its end", "CREATE SEQUENCE public.last; SELECT setval('public.last', 9223372036854775807)".into(), "DROP SEQUENCE public.last"),
        ("a table with a statement for a name", "CREATE TABLE public.\"t\"\"; CREATE ROLE owned SUPERUSER; --\\\" (\"a'\"\"b\\\" text PRIMARY KEY)".into(), "DROP TABLE public.\"t\"\"; CREATE ROLE owned SUPERUSER; --\\\""),
    ]
}

/// What is on record of the primary, spoilt.
const ON_RECORD: [(&str, &str); 12] = [
    ("an epoch below zero", "UPDATE cluster SET epoch = -5"),
    (
        "an epoch out of all bounds",
        "UPDATE cluster SET epoch = 9223372036854775807",
    ),
    ("a role that is none", "UPDATE cluster SET role = 'emperor'"),
    (
        "an epoch that is text",
        "ALTER TABLE cluster ALTER epoch TYPE text",
    ),
    (
        "a role that is a number",
        "ALTER TABLE cluster ALTER role TYPE int USING 1",
    ),
    ("no cluster at all", "DELETE FROM cluster"),
    ("two clusters", "INSERT INTO cluster SELECT * FROM cluster"),
    (
        "a time without end",
        "INSERT INTO confirmation VALUES ('infinity', 0)",
    ),
    (
        "a promotion of NULLs",
        "DROP TABLE promotion; CREATE TABLE promotion AS SELECT NULL::int8 epoch, NULL::text kind, NULL::timestamptz \"time\", NULL::text lsn, NULL::timestamptz commit_time, NULL::text system_id, NULL::int timeline, NULL::text peer_cluster, NULL::text slot, NULL::text publication, NULL::bool peer_fenced, NULL::bool settled",
    ),
    (
        "a line without an order",
        "INSERT INTO lineage (id, epoch, parent, cluster, system_id) VALUES ('a', 7, 'nobody', '', ''), ('b', 7, 'a', '', '')",
    ),
    (
        "a line without end",
        "INSERT INTO lineage (id, epoch, parent, cluster, system_id) SELECT 'p' || i, i + 1, 'p' || i - 1, '', '' FROM generate_series(1, 50000) i",
    ),
    ("no table of ours", "DROP TABLE fence"),
];

/// It is asked everything once more.
async fn cut_stream(primary: &Cluster) -> Result<()> {
    let cut = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active";
    sql(primary, "postgres", cut).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owner_of_the_primarys_database_gets_nothing_run_on_either_side() -> Result<()> {
    let site = support::follow::prepared("hostile_owner").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let service = followed(&site, "").await?;
    let pid = service.running.pid();
    for (name, does, undoes) in in_builder() {
        println!("{name}");
        sql(&site.primary, "builder", &does).await?;
        cut_stream(&site.primary).await?;
        audit(&site, name).await.ok();
        wait_until(name, SOON, || async {
            let text = format!("SELECT FROM audit_package WHERE package_ident = '{name}'");
            let rows = site.spare.conn().await?.query(&text, &[]).await?;
            let status = service.status().await?;
            match !rows.is_empty() || !status["hold"].is_null() {
                true => Ok(()),
                false => Err("nothing came of it".into()),
            }
        })
        .await;
        if name == ONE_FUNCTION {
            // Another question has been asked, and what follows from its answer was done.
            let confirmed = |status: &serde_json::Value| status["lag"]["confirmed"].clone();
            let before = confirmed(&service.status().await?);
            let moved = "SELECT nextval(oid::regclass) FROM pg_class WHERE relkind = 'S'";
            sql(&site.primary, "builder", moved).await?;
            service
                .until("it was asked again", |status| {
                    confirmed(status) != before && status["lag"]["bytes"] == 0
                })
                .await;
        }
        for cluster in [&site.primary, &site.spare] {
            assert_eq!(superusers(cluster).await?, ["hab"], "{name}");
        }
        sql(&site.primary, "builder", undoes).await?;
    }
    until_following(&service).await;
    until_equal(&site).await?;
    assert_eq!(service.running.pid(), pid, "it lived through all of it");
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_record_of_the_primary_ends_the_service_or_keeps_it_from_taking_over() -> Result<()> {
    let pair = Pair::start("hostile_record").await?;
    let site = &pair.there;
    let declared = Service::start(&pair.back, PROMOTE);
    until_primary(&declared, 1).await;
    let service = followed(site, "").await?;
    declared.stop().await.ok();
    let pg = &site.primary.pg;
    let keep = "CREATE DATABASE kept TEMPLATE warm_spare";
    sql(&site.primary, "postgres", keep).await?;
    for (name, does) in ON_RECORD {
        println!("{name}");
        sql(&site.primary, "warm_spare", does).await?;
        cut_stream(&site.primary).await?;
        service
            .until(name, |status| {
                !status["hold"].is_null() || status["state"] == "following"
            })
            .await;
        let again = [
            "DROP DATABASE warm_spare WITH (FORCE)",
            "CREATE DATABASE warm_spare TEMPLATE kept",
        ];
        for statement in again {
            sql(&site.primary, "postgres", statement).await?;
        }
        until_following(&service).await;
    }
    // On the day that it is needed, too: it costs one word more, for such a primary may live.
    sql(&site.primary, "warm_spare", ON_RECORD[3].1).await?;
    service.reconfigure(&forced(2));
    let word = approval(&until_asked(&service).await);
    service.reconfigure(&format!("{}\n{word}", forced(2)));
    until_primary(&service, 2).await;
    write(&site.spare, "taken over").await?;
    assert!(pg.pid() > 0);
    service.stop().await.ok();
    Ok(())
}

/// The values of sequences reach the spare as numbers, and past no bound.
#[tokio::test(flavor = "multi_thread")]
async fn a_holder_without_its_token_sets_no_sequence() -> Result<()> {
    let site = support::follow::prepared("hostile_sequence").await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let service = followed(&site, "").await?;
    sql(&site.primary, "builder", "CREATE SEQUENCE counted").await?;
    until_following(&service).await;
    sql(&site.primary, "builder", "SELECT setval('counted', 4711)").await?;
    let last = async || -> Result<i64> {
        let row = site.spare.conn().await?;
        Ok(row
            .query_one("SELECT last_value FROM counted", &[])
            .await?
            .get(0))
    };
    wait_until("its value is here", SOON, || async {
        match last().await? {
            4711 => Ok(()),
            other => Err(format!("{other}").into()),
        }
    })
    .await;
    // Somebody else has taken over.
    tamper(
        &site,
        "UPDATE warm_spare.recovery_point SET token = token + 1000000",
    )
    .await?;
    sql(&site.primary, "builder", "SELECT setval('counted', 5000)").await?;
    service
        .until("it finds that out", |status| {
            let events = status["events"].to_string();
            events.contains("superseded")
                || events.contains("taken over")
                || status["state"] != "following"
        })
        .await;
    assert_eq!(last().await?, 4711);
    service.stop().await.ok();
    Ok(())
}
