//! Compares rows and content of every table with the hashes taken while the rows were copied.

use super::Difference;
use crate::cluster::{LocalCluster, Table, TableContent, WriteSession};
use crate::config::Config;
use crate::observe::{Phase, Progress, Step};
use crate::replication::{self, ContentHash, ReplicationError};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

pub(super) struct Compared {
    pub tables: u64,
    pub rows: u64,
    pub differences: Vec<Difference>,
}

pub(super) async fn compare(
    config: &Config,
    session: &WriteSession,
    expected: Vec<TableContent>,
    progress: &Progress,
) -> Result<Compared, ReplicationError> {
    let tables = session.tables().await?;
    let bytes: i64 = tables.iter().map(|t| t.bytes).sum();
    let step = progress.begin(Phase::Tables, bytes.max(0) as u64);
    let found = hash_all(config, &tables, &step).await?;
    let mut expected: BTreeMap<String, TableContent> = expected
        .into_iter()
        .map(|content| (content.table.clone(), content))
        .collect();
    let mut differences = Vec::new();
    let mut rows = 0;
    for (table, content) in &found {
        rows += content.rows();
        let problem = match expected.remove(table) {
            None => Some("is not among the tables that were copied".to_string()),
            Some(sent) if sent.rows != content.rows() as i64 => Some(format!(
                "has {} rows, {} were copied",
                content.rows(),
                sent.rows
            )),
            Some(sent) if sent.hash != content.to_string() => Some(format!(
                "has {} rows as copied, but some rows differ",
                content.rows()
            )),
            Some(_) => None,
        };
        differences.extend(problem.map(|text| difference(table, text)));
    }
    differences.extend(
        expected
            .into_keys()
            .map(|table| difference(&table, "was copied and is gone".into())),
    );
    Ok(Compared {
        tables: found.len() as u64,
        rows,
        differences,
    })
}

/// Compares with the rows of the primary, because the stream has changed rows since they were
/// copied.
pub(super) async fn compare_both(
    config: &Config,
    session: &WriteSession,
    progress: &Progress,
) -> Result<Compared, ReplicationError> {
    let bytes: i64 = session.tables().await?.iter().map(|t| t.bytes).sum();
    let step = progress.begin(Phase::Tables, bytes.max(0) as u64);
    let compared = replication::compare_both(config, Some(&step)).await?;
    let problem = |(table, rows): &(String, u64)| match rows {
        0 => difference(table, "is on the primary but not on the spare".into()),
        rows => difference(table, format!("has {rows} rows that only one side has")),
    };
    Ok(Compared {
        tables: compared.tables,
        rows: compared.rows,
        differences: compared.differing.iter().map(problem).collect(),
    })
}

fn difference(table: &str, text: String) -> Difference {
    Difference {
        kind: "table",
        name: table.to_string(),
        text,
    }
}

async fn hash_all(
    config: &Config,
    tables: &[Table],
    step: &Step,
) -> Result<BTreeMap<String, ContentHash>, ReplicationError> {
    let queue = Arc::new(Mutex::new(tables.iter()));
    let found = Arc::new(Mutex::new(BTreeMap::new()));
    let workers = (0..config.replication.jobs).map(|_| {
        let (queue, found) = (queue.clone(), found.clone());
        async move {
            let session = LocalCluster::of(config).builder().await?;
            session.carry_bytes().await?;
            loop {
                let Some(table) = queue.lock().expect("no holder panics").next() else {
                    return Ok::<(), ReplicationError>(());
                };
                let doing = format!("reading table {}", table.full_name());
                let mut rows = session.copy_out(&doing, &table.copy_out()).await?;
                let mut content = ContentHash::default();
                while let Some(row) = rows.next().await? {
                    content.add(&row);
                    step.add(row.len() as u64);
                }
                found
                    .lock()
                    .expect("no holder panics")
                    .insert(table.full_name(), content);
            }
        }
    });
    futures_util::future::try_join_all(workers).await?;
    let found = found.lock().expect("no holder panics");
    Ok(found.clone())
}
