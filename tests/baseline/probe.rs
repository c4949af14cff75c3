//! The cheap test of the primary: it may take for changed what is not, and never the other way round.

use rand::seq::{IndexedMutRandom, IndexedRandom};
use rand::{Rng, SeedableRng};
use support::postgres::Postgres;
use support::{Factory, Result, Site, seed};
use tokio_postgres::Client;
use warm_spare::cluster::{LocalCluster, RecoveryPoint};
use warm_spare::config::{self, Config};
use warm_spare::observe::{Clock, Progress, Silent};
use warm_spare::replication::{ChangeProbe, Options, probe, sync};

/// A spare that stands at its primary's present, and the point it stands at.
async fn level(config: &Config) -> Result<RecoveryPoint> {
    let progress = Progress::new(std::sync::Arc::new(Silent));
    sync(config, Options::default(), &progress).await?;
    let state = LocalCluster::of(config).existing_state().await?;
    let point = state.expect("it was copied").recovery_point().await?;
    Ok(point.expect("it was copied"))
}

async fn ask(config: &Config, point: &RecoveryPoint) -> Result<ChangeProbe> {
    Ok(probe(config, Some(point), &Clock::real()).await?)
}

/// Every way to change something that Builder or an administrator has. Each is run on a level pair.
const CHANGES: [&str; 26] = [
    "INSERT INTO accounts (id, name, email) VALUES (nextval('accounts_id_seq'), 'new', 'a@b')",
    "UPDATE accounts SET email = email",
    "DELETE FROM account_tokens; DELETE FROM accounts WHERE name = 'new'",
    "TRUNCATE license_keys",
    "SELECT nextval('accounts_id_seq')",
    "SELECT setval('accounts_id_seq', 4711)",
    "CREATE TABLE added (id int PRIMARY KEY, t text)",
    "ALTER TABLE added ADD COLUMN more int DEFAULT 7",
    "ALTER TABLE added ALTER COLUMN more TYPE bigint",
    "INSERT INTO added VALUES (1, repeat('x', 100000), 1)",
    "UPDATE added SET more = 2",
    "ALTER TABLE added RENAME COLUMN more TO other",
    "CREATE INDEX ON added (other)",
    "COMMENT ON TABLE added IS 'a remark'",
    "CREATE UNLOGGED TABLE unlogged (id int); INSERT INTO unlogged VALUES (1)",
    "INSERT INTO unlogged VALUES (2)",
    "CREATE SEQUENCE counted CACHE 100",
    "SELECT nextval('counted')",
    "ALTER SEQUENCE counted INCREMENT 5",
    "CREATE VIEW seen AS SELECT * FROM added",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER TYPE job_exec_state ADD VALUE IF NOT EXISTS 'brand_new'",
    "DROP TABLE unlogged",
    "BEGIN; SAVEPOINT a; INSERT INTO added VALUES (2, 'b', 2); ROLLBACK TO a; INSERT INTO added VALUES (3, 'c', 3); COMMIT",
    "DO $$ BEGIN INSERT INTO added VALUES (4, 'd', 4); BEGIN PERFORM 1 / 0; EXCEPTION WHEN OTHERS THEN NULL; END; END $$",
    "SET synchronous_commit = off; INSERT INTO added VALUES (5, 'e', 5); RESET synchronous_commit",
];

const NO_CHANGES: [&str; 4] = [
    "SELECT count(*) FROM origin_packages",
    "BEGIN TRANSACTION READ ONLY; SELECT * FROM origins; COMMIT",
    "SELECT pg_advisory_lock(1), pg_advisory_unlock(1)",
    "CHECKPOINT",
];

#[tokio::test(flavor = "multi_thread")]
async fn no_kind_of_change_is_missed() -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let site = two_phase_site("kinds").await?;
    Factory::seeded().fill(&site.primary, 3).await?;
    let config = config::load(&site.write_config("log_level = \"error\""))?;
    let client = site.primary.conn().await?;
    let mut point = level(&config).await?;
    for statement in NO_CHANGES {
        client.batch_execute(statement).await?;
        let found = ask(&config, &point).await?;
        assert_eq!(found.changed, None, "{statement}");
        assert!(found.lag_bytes.is_some());
    }
    for statement in CHANGES {
        assert_eq!(
            ask(&config, &point).await?.changed,
            None,
            "before {statement}"
        );
        client
            .batch_execute(statement)
            .await
            .map_err(|error| format!("{statement}: {error:?}"))?;
        let found = ask(&config, &point).await?;
        assert!(found.changed.is_some(), "missed: {statement}");
        point = level(&config).await?;
    }

    // Begun before the copy, and committed after it: the copy has not seen it.
    for end in ["COMMIT", "COMMIT PREPARED 'late'"] {
        client.batch_execute("BEGIN; INSERT INTO license_keys (account_id, license_key, expiration_date) SELECT id, 'k', '2030-01-01' FROM accounts LIMIT 1").await?;
        if end != "COMMIT" {
            client.batch_execute("PREPARE TRANSACTION 'late'").await?;
        }
        point = level(&config).await?;
        assert_eq!(
            ask(&config, &point).await?.changed,
            None,
            "open before {end}"
        );
        client.batch_execute(end).await?;
        assert!(
            ask(&config, &point).await?.changed.is_some(),
            "missed: {end}"
        );
        client.batch_execute("DELETE FROM license_keys").await?;
        point = level(&config).await?;
    }

    // A start of the server may have forgotten numbers; a copy that somebody exchanged is no copy of ours.
    site.primary.pg.kill9();
    site.primary.pg.start_again().await?;
    assert_eq!(
        ask(&config, &point).await?.changed,
        Some("its server was restarted")
    );
    point = level(&config).await?;
    assert_eq!(ask(&config, &point).await?.changed, None);
    let spare = site.spare.pg.conn("postgres").await?;
    spare
        .batch_execute("ALTER DATABASE builder RENAME TO elsewhere")
        .await?;
    spare.batch_execute("CREATE DATABASE builder").await?;
    assert!(
        ask(&config, &point).await?.changed.is_some(),
        "another database under the name"
    );
    spare.batch_execute("DROP DATABASE builder").await?;
    assert!(ask(&config, &point).await?.changed.is_some(), "none at all");
    Ok(())
}

async fn two_phase_site(name: &str) -> Result<Site> {
    let primary = Postgres::builder().setting("max_prepared_transactions", "5");
    Site::builder(name).primary(primary).start().await
}

/// What the primary holds, in one text: rows of every table, and sequences.
async fn content(client: &Client) -> Result<String> {
    let sql =
        "SELECT format('%I', tablename) FROM pg_tables WHERE schemaname = 'public' ORDER BY 1";
    let mut all = String::new();
    for row in client.query(sql, &[]).await? {
        let table: String = row.get(0);
        let sql = format!(
            "SELECT coalesce(md5(string_agg(t::text, '' ORDER BY t::text)), '') FROM {table} t"
        );
        all += &client.query_one(&sql, &[]).await?.get::<_, String>(0);
    }
    let sql = "SELECT coalesce(string_agg(format('%s %s', sequencename, last_value), ',' ORDER BY sequencename), '') FROM pg_sequences";
    all += &client.query_one(sql, &[]).await?.get::<_, String>(0);
    Ok(all)
}

/// Several connections at random: whenever the primary's content is not what was copied, the test says so.
#[tokio::test(flavor = "multi_thread")]
async fn no_interleaving_hides_a_change() -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let site = two_phase_site("interleaved").await?;
    Factory::seeded().fill(&site.primary, 2).await?;
    let config = config::load(&site.write_config("log_level = \"error\""))?;
    let mut random = rand::rngs::StdRng::seed_from_u64(seed());
    let oracle = site.primary.conn().await?;
    let mut writers = Vec::new();
    for _ in 0..4 {
        writers.push((site.primary.conn().await?, false));
    }
    let statements = [
        "INSERT INTO accounts (name, email) VALUES (md5(random()::text), '')",
        "UPDATE accounts SET email = md5(random()::text) WHERE id = (SELECT id FROM accounts ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED)",
        "SELECT nextval('accounts_id_seq')",
        "SELECT 1",
        "SAVEPOINT s; INSERT INTO accounts (name, email) VALUES (md5(random()::text), ''); ROLLBACK TO s",
    ];
    let (mut changed, mut quiet) = (0, 0);
    for round in 0..12 {
        let point = level(&config).await?;
        let copied = content(&site.spare.conn().await?).await?;
        for step in 0..25 {
            let (client, open) = writers.choose_mut(&mut random).expect("four");
            match (*open, random.random_range(0..10)) {
                (false, 0..2) => {
                    client.batch_execute("BEGIN").await?;
                    *open = true;
                }
                (true, 0..3) => {
                    let end = if random.random_bool(0.6) {
                        "COMMIT"
                    } else {
                        "ROLLBACK"
                    };
                    client.batch_execute(end).await?;
                    *open = false;
                }
                (open, _) => {
                    let statement = statements.choose(&mut random).expect("some");
                    if open || !statement.starts_with("SAVEPOINT") {
                        client.batch_execute(statement).await?;
                    }
                }
            }
            let now = content(&oracle).await?;
            let found = ask(&config, &point).await?.changed;
            if now == copied {
                quiet += usize::from(found.is_none());
            } else {
                changed += 1;
                assert!(found.is_some(), "missed in round {round}, step {step}");
                break;
            }
        }
    }
    assert!(
        changed >= 6 && quiet >= 6,
        "{changed} changes, {quiet} times quiet"
    );
    Ok(())
}
