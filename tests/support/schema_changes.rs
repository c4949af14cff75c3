//! Changes of the primary's schema that a migration of a later Builder, or its API at every start,
//! may make.

use rand::Rng;
use rand::rngs::StdRng;
use tokio_postgres::Client;

use super::{Cluster, Result};

/// The change is made while no client is at work, as a migration is. Only the service's own
/// sessions can block it, and they must give way.
const PATIENCE: &str = "SET lock_timeout = '10s'";

/// The change that was made.
pub struct Change {
    pub statement: String,
    /// The table whose rows have other values, though its columns did not change.
    pub rewritten: Option<&'static str>,
}

/// Gives other values to all rows, and leaves the type as it was.
const REWRITE: (&str, &str) = (
    "audit_origin",
    "ALTER TABLE audit_origin ALTER COLUMN target_object TYPE text USING left(target_object || '+', 60)",
);

/// Makes one of the changes.
pub async fn one(primary: &Cluster, number: u32, rng: &mut StdRng) -> Result<Change> {
    let client = primary.conn().await?;
    client.batch_execute(PATIENCE).await?;
    let chosen = rng.random_range(0..16);
    let extra = extra_table(&client).await?;
    let mut rewritten = None;
    let statement = match (chosen, extra) {
        (0, _) => format!(
            "CREATE TABLE extra_{number} (id int8 PRIMARY KEY, note text); INSERT INTO extra_{number} VALUES (1, 'one'), (2, NULL)"
        ),
        (1, _) => format!(
            "CREATE TABLE extra_{number} (note text); INSERT INTO extra_{number} VALUES ('twice'), ('twice')"
        ),
        (2, _) => format!("ALTER TABLE audit_origin ADD COLUMN extra_{number} text DEFAULT 'was'"),
        (3, _) => format!(
            "ALTER TABLE origin_packages ADD COLUMN extra_{number} int8 NOT NULL DEFAULT {number}"
        ),
        (4, _) => match extra_column(&client).await? {
            Some((table, column)) => format!("ALTER TABLE {table} DROP COLUMN {column}"),
            None => harmless(),
        },
        (5, _) => format!("ALTER TYPE job_exec_state ADD VALUE 'state_{number}'"),
        (6, Some(table)) => {
            format!("ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {table}_pkey")
        }
        (7, _) => "DROP INDEX IF EXISTS origin_packages_origin_idx".into(),
        (8, _) => {
            "CREATE INDEX IF NOT EXISTS origin_packages_origin_idx ON origin_packages (origin, name)"
                .into()
        }
        (9, Some(table)) => format!("DROP TABLE {table}"),
        (10, Some(table)) => format!("ALTER TABLE {table} RENAME TO extra_{number}"),
        (11, Some(table)) => format!("ALTER TABLE {table} RENAME COLUMN note TO note_{number}"),
        (13..16, _) => {
            rewritten = Some(REWRITE.0);
            REWRITE.1.into()
        }
        _ => harmless(),
    };
    client.batch_execute(&statement).await?;
    Ok(Change {
        statement,
        rewritten,
    })
}

/// Returns the statements that Builder's API runs whenever it starts.
fn harmless() -> String {
    "CREATE OR REPLACE FUNCTION origin_package_count_v1(of_origin text) RETURNS int8 LANGUAGE sql STABLE AS
     $$ SELECT count(*) FROM public.origin_packages WHERE origin = of_origin $$;
     CREATE TABLE IF NOT EXISTS __diesel_schema_migrations (version varchar(50) PRIMARY KEY, run_on timestamp)"
        .into()
}

/// Returns a table that one of the changes above made, with the column that they use.
async fn extra_table(client: &Client) -> Result<Option<String>> {
    let sql = "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'note'
               WHERE c.relname LIKE 'extra\\_%' AND c.relkind = 'r' ORDER BY 1 LIMIT 1";
    Ok(client.query_opt(sql, &[]).await?.map(|row| row.get(0)))
}

async fn extra_column(client: &Client) -> Result<Option<(String, String)>> {
    let sql = "SELECT c.relname::text, a.attname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
               WHERE a.attname LIKE 'extra\\_%' AND c.relkind = 'r' AND NOT a.attisdropped ORDER BY 1, 2 LIMIT 1";
    let row = client.query_opt(sql, &[]).await?;
    Ok(row.map(|row| (row.get(0), row.get(1))))
}
