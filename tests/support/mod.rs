//! Real servers and their content: PostgreSQL and MinIO as a Habitat Builder has them, packages,
//! and faults.
//!
//! Used by the tests, by the programs in `programs/` and by the benchmarks.

pub mod api_clients;
pub mod archive;
pub mod balancer;
pub mod between;
pub mod blocks;
pub mod bucket_rules;
pub mod builder_front;
pub mod builder_keys;
pub mod campaign;
pub mod crowd;
pub mod cuts;
pub mod exchanges;
pub mod faults;
pub mod follow;
pub mod forward_proxy;
pub mod habitat;
pub mod handovers;
pub mod history;
pub mod hostile;
pub mod http_fault;
pub mod inventory;
pub mod machine;
pub mod managed;
pub mod minio;
pub mod oracle;
pub mod origins;
pub mod packages;
pub mod pair;
pub mod pg_upgrade;
pub mod plan_build;
pub mod pooler;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod running;
pub mod s3;
pub mod schema_changes;
pub mod servers;
pub mod service;
pub mod site;
pub mod slots;
pub mod stage;
pub mod stock;
pub mod supervisor;
pub mod tls;
pub mod transactions;
pub mod upgrades;
pub mod visitors;
pub mod weather;
pub mod workload;
pub mod world;

use std::time::Duration;

pub use minio::Minio;
pub use packages::{Factory, Package, Spec, content};
pub use postgres::Postgres;
pub use running::{Output, Running};
pub use s3::S3;
pub use servers::{Servers, servers};
pub use service::Service;
pub use site::{Cluster, Site, site};
pub use supervisor::Supervisor;

pub type Error = Box<dyn std::error::Error + Send + Sync>;
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Returns an error as text, with each of its causes on a line of its own.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    std::iter::once(error.to_string())
        .chain(causes.map(|cause| format!("\n    {cause}")))
        .collect()
}

/// How long a server may take to start or to stop on a busy machine.
pub const SERVER_DEADLINE: Duration = Duration::from_secs(60);

/// Says that this test was not run; the test must return right after it. `scripts/test` counts these lines.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
}

/// Returns the cases that this run tries: every other one. For tests that try every combination, each of which takes a
/// while.
pub fn every_other<T>(cases: impl IntoIterator<Item = T>) -> Vec<T> {
    let (first, step) = share_of_cases();
    cases.into_iter().skip(first).step_by(step).collect()
}

/// Returns the number of the first case that this run tries, and the step to the next one. `WARM_SPARE_CASES` is a
/// number whose parity says which is the first, or `all`; without it the seed decides.
pub fn share_of_cases() -> (usize, usize) {
    let number = match std::env::var("WARM_SPARE_CASES").as_deref() {
        Ok("all") => return (0, 1),
        Ok(number) => number.parse().expect("WARM_SPARE_CASES is a number or all"),
        Err(_) => seed(),
    };
    println!("WARM_SPARE_CASES={}", number % 2);
    ((number % 2) as usize, 2)
}

/// The seed of everything random in this run, printed so that a failure can be repeated with `WARM_SPARE_SEED`.
pub fn seed() -> u64 {
    static SEED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *SEED.get_or_init(|| {
        let seed = match std::env::var("WARM_SPARE_SEED") {
            Ok(text) => text.parse().expect("WARM_SPARE_SEED is a number"),
            Err(_) => rand::random::<u32>().into(),
        };
        println!("WARM_SPARE_SEED={seed}");
        seed
    })
}

/// Asks again and again until the answer is there; fails with the last answer in words. The pauses
/// grow with the time, because asking costs time of the servers that are waited for.
pub async fn wait_until<F, Fut, T>(what: &str, limit: Duration, mut ask: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let started = std::time::Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) if started.elapsed() > limit => {
                panic!("{what}: not after {limit:?}: {error}")
            }
            Err(_) => {
                let pause = started.elapsed() / 10;
                let (least, most) = (Duration::from_millis(20), Duration::from_millis(100));
                tokio::time::sleep(pause.clamp(least, most)).await;
            }
        }
    }
}

/// Reads once more if the reading session was ended: a fence and a switch of databases end every session.
pub async fn reading<F, Fut, T>(mut read: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    for _ in 0..10 {
        match read().await {
            Err(error) if was_ended(&error) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => return other,
        }
    }
    read().await
}

fn was_ended(error: &Error) -> bool {
    let ended = tokio_postgres::error::SqlState::ADMIN_SHUTDOWN;
    error
        .downcast_ref::<tokio_postgres::Error>()
        .is_some_and(|error| error.is_closed() || error.code() == Some(&ended))
}

/// Returns letters and digits that nobody guesses and no two servers share.
pub(crate) fn random_word(length: usize) -> String {
    use rand::Rng;
    let letters = rand::rng().sample_iter(rand::distr::Alphanumeric);
    letters.take(length).map(char::from).collect()
}
