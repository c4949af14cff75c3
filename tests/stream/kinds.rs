//! Every kind of change, every kind of value, and a transaction that is larger than memory.

use support::packages::arrived;
use support::service::SOON;
use support::{Factory, Postgres, Result, Service, Site, wait_until};

async fn followed(name: &str) -> Result<Site> {
    let site = Site::builder(name)
        .primary(Postgres::builder().logical())
        .start()
        .await?;
    Factory::seeded().fill(&site.primary, 5).await?;
    site.write_config("");
    Ok(site)
}

async fn follow(site: &Site) -> Service<'_> {
    site.warm_spare(&["prepare"]).await.ok();
    let service = Service::start(site, "");
    service
        .until("following by the stream", |status| {
            status["replication"]["mode"] == "stream" && status["lag"]["bytes"] == 0
        })
        .await;
    service
}

async fn baselines(service: &Service<'_>) -> Result<Option<f64>> {
    service
        .metric("warm_spare_baselines_total{result=\"done\"}")
        .await
}

const ODD_TABLES: &str = r#"
CREATE TYPE mood AS ENUM ('sad', 'so "so"', 'happy');
CREATE DOMAIN short AS varchar(5);
CREATE DOMAIN shorter AS short CHECK (length(VALUE) < 5);
CREATE TYPE pair AS (a int, b text);
CREATE TABLE "Odd Names" ("Key With Space" int PRIMARY KEY, "quo""ted" text);
CREATE TABLE kinds (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    a_mood mood, moods mood[], a_short shorter, a_pair pair, n numeric(12, 4), f float8, r real, b bytea, j json,
    jb jsonb, x xml, t time, tz timestamptz, d date, i interval, u uuid, net inet, bits bit varying(8), "c" "char",
    ch char(4), p point, rng int4range, ts tsvector, l pg_lsn, arr int[][], big text,
    made int GENERATED ALWAYS AS (2) STORED);
CREATE TABLE keyless (a text, n numeric, j json, p point, arr int[]);
CREATE TABLE two_keys (a int, b text, v text, PRIMARY KEY (b, a));
CREATE TABLE by_index (a int NOT NULL, v text);
CREATE UNIQUE INDEX by_index_a ON by_index (a);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_a;
CREATE TABLE nothing ();
CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES "Odd Names" ON DELETE CASCADE);
"#;

const CHANGES: [&str; 14] = [
    r#"INSERT INTO "Odd Names" VALUES (1, E'a\tb\\N\nc'), (2, ''), (3, NULL), (4, '\N')"#,
    r#"INSERT INTO kinds (a_mood, moods, a_short, a_pair, n, f, r, b, j, jb, x, t, tz, d, i, u, net, bits, "c", ch, p, rng, ts, l, arr, big)
       VALUES ('so "so"', '{sad,NULL,"so \"so\""}', 'äöü', ROW(1, E'x"\\,y'), 1.50, 'NaN', 1e-7, '\x00ff', '{"a": "\u00e9\\"}', '{"b": [1, null]}',
         '<a>&amp;</a>', '23:59:59.999', '2024-02-29 12:00:00.123456+02', '0044-03-15 BC', '1 mon -3 days 04:05:06', gen_random_uuid(), '::1/64', B'101',
         'x', 'ab', '(1.5,-2)', '[1,5)', 'fat & cat'::text::tsvector, '16/B374D848', '{{1,2},{3,4}}', repeat('long ', 4000))"#,
    "INSERT INTO kinds (a_mood) VALUES (NULL)",
    // The large value is left alone, and is not sent.
    "UPDATE kinds SET n = 2.5 WHERE big IS NOT NULL",
    "UPDATE kinds SET big = big || 'more', a_mood = 'happy'",
    "INSERT INTO keyless VALUES ('twin', 1.0, '{}', '(0,0)', '{1}'), ('twin', 1.0, '{}', '(0,0)', '{1}'), ('other', 1.00, NULL, NULL, NULL), (NULL, NULL, NULL, NULL, NULL)",
    // One of two that are alike.
    "DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless WHERE a = 'twin')",
    "UPDATE keyless SET n = n + 0.00 WHERE a = 'other'",
    "DELETE FROM keyless WHERE a IS NULL",
    "INSERT INTO two_keys VALUES (1, 'x', 'v'), (2, 'x', 'w'); UPDATE two_keys SET a = a + 10; UPDATE two_keys SET v = NULL; DELETE FROM two_keys WHERE a = 11",
    "INSERT INTO by_index VALUES (1, 'a'), (2, 'b'); UPDATE by_index SET v = 'c' WHERE a = 1; UPDATE by_index SET a = 5 WHERE a = 2; DELETE FROM by_index WHERE a = 1",
    r#"INSERT INTO nothing DEFAULT VALUES; INSERT INTO child VALUES (1, 1), (2, 2); DELETE FROM "Odd Names" WHERE "Key With Space" = 1"#,
    "BEGIN; SAVEPOINT a; INSERT INTO two_keys VALUES (90, 'gone', ''); ROLLBACK TO a; INSERT INTO two_keys VALUES (91, 'stays', ''); COMMIT",
    "TRUNCATE child, two_keys RESTART IDENTITY; INSERT INTO two_keys VALUES (7, 'after', 'all'); SELECT pg_logical_emit_message(true, 'x', 'y')",
];

#[tokio::test]
async fn every_kind_of_change_and_value_arrives_as_it_was() -> Result<()> {
    let site = followed("kinds").await?;
    let client = site.primary.conn().await?;
    client.batch_execute(ODD_TABLES).await?;
    let service = follow(&site).await;
    let before = baselines(&service).await?;
    for change in CHANGES {
        client.batch_execute(change).await?;
        arrived(&site).await?;
    }
    assert_eq!(
        baselines(&service).await?,
        before,
        "none of it took a new baseline"
    );
    let verified = site.warm_spare(&["verify", "--json"]).await.ok().json();
    assert_eq!(
        verified["differences"].as_array().map(Vec::len),
        Some(0),
        "{verified:#}"
    );
    service.stop().await.ok();
    Ok(())
}

#[tokio::test]
async fn a_transaction_of_any_size_takes_bounded_memory() -> Result<()> {
    let site = followed("kinds_large").await?;
    let service = follow(&site).await;
    let before = baselines(&service).await?;
    let client = site.primary.conn().await?;
    client
        .batch_execute(
            "INSERT INTO audit_package (operation, trigger, requester_name, origin, channel, package_ident) \
             SELECT 'promote', 'hab_client', 'somebody', 'core', 'stable', 'core/x/1/' || n || repeat('.', 200) FROM generate_series(1, 500000) n",
        )
        .await?;
    let spare = site.spare.conn().await?;
    wait_until("half a million rows", SOON, || async {
        let sql = "SELECT count(*) FROM audit_package WHERE requester_name = 'somebody'";
        match spare.query_one(sql, &[]).await?.get::<_, i64>(0) {
            500_000 => Ok(()),
            0 => Err("none yet".into()),
            // All of them at once, or none.
            some => panic!("{some} of them are to be seen"),
        }
    })
    .await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", service.running.pid()))?;
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let most: u64 = most
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .ok_or("a size")?;
    println!("at most {most} KiB resident");
    assert!(most < 150 * 1024, "{most} KiB");
    assert_eq!(baselines(&service).await?, before);
    service.stop().await.ok();
    Ok(())
}

/// The tables that only grow have no key, and are the first to be trimmed: one statement of Builder's must not become one
/// reading of the table for each row.
#[tokio::test(flavor = "multi_thread")]
async fn many_rows_of_a_table_without_a_key_go_at_once() -> Result<()> {
    let site = followed("keyless_many").await?;
    let client = site.primary.conn().await?;
    // Some are alike, and some hold nothing where others hold a NULL.
    let rows = "CREATE TABLE plain (a int, b text, c numeric, d timestamptz DEFAULT now());
        INSERT INTO plain (a, b, c) SELECT n / 2, CASE n % 4 WHEN 0 THEN NULL WHEN 1 THEN '' ELSE repeat('x', n % 7) END, 1.50
        FROM generate_series(1, 60000) n";
    client.batch_execute(rows).await?;
    let service = follow(&site).await;
    let began = std::time::Instant::now();
    client
        .batch_execute("DELETE FROM plain WHERE a % 3 = 0")
        .await?;
    arrived(&site).await?;
    client
        .batch_execute("UPDATE plain SET a = a + 1 WHERE a % 2 = 0; UPDATE plain SET c = 1.5, b = 'one' WHERE a % 5 = 0")
        .await?;
    arrived(&site).await?;
    println!("{:?}", began.elapsed());
    assert!(began.elapsed() < std::time::Duration::from_secs(30));
    // Chains within one transaction, and twins that end differently.
    let chains = "BEGIN; UPDATE plain SET a = -1 WHERE a = 1; UPDATE plain SET a = -2 WHERE a = -1;
        UPDATE plain SET a = -1 WHERE ctid = (SELECT min(ctid) FROM plain WHERE a = -2);
        DELETE FROM plain WHERE a = -2; INSERT INTO plain (a) VALUES (-1), (-1), (-3);
        UPDATE plain SET b = 'twin' WHERE ctid = (SELECT max(ctid) FROM plain WHERE a = -1 AND b IS NULL);
        DELETE FROM plain WHERE a = -3; COMMIT";
    client.batch_execute(chains).await?;
    arrived(&site).await?;
    assert_eq!(baselines(&service).await?, Some(1.0), "no new baseline");
    Ok(())
}
