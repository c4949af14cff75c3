//! Side by side with what operators use today, on real servers, in one run: ratios that hold on a noisy machine.
//!
//! `scripts/bench [rows|artifacts|idle]… [--smoke] [--runs N]`. Times are of whole processes or of the phases that a
//! process itself announces; memory is the kernel's own high-water mark.

mod common;
use common::{Plan, line, memory};

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::http_fault::HttpFault;
use support::{Factory, Output, Result, Running, Site, Spec};

const LIMIT: Duration = Duration::from_secs(1800);

#[tokio::main]
async fn main() -> Result<()> {
    let plan = Plan::read();
    if plan.wants("rows") {
        rows(&plan).await?;
    }
    if plan.wants("artifacts") {
        let (many, large) = if plan.smoke {
            ((40, 100_000), (2, 12 << 20))
        } else {
            ((10_000, 100_000), (20, 200 << 20))
        };
        artifacts(&plan, "many small", many.0, many.1).await?;
        artifacts(&plan, "few large", large.0, large.1).await?;
    }
    if plan.wants("idle") {
        idle(&plan).await?;
    }
    Ok(())
}

/// One run of ours: when each phase was announced, and the memory it took.
struct Timed {
    phases: Vec<(String, Instant)>,
    ended: Instant,
    peak_kib: u64,
}

impl Timed {
    /// From the announcement of `from` to that of `to`, or to the end.
    fn between(&self, from: &str, to: Option<&str>) -> f64 {
        let at = |name: &str| {
            let found = self
                .phases
                .iter()
                .find(|(line, _)| line == name || line.starts_with(&format!("{name}: ")));
            found
                .map(|(_, at)| *at)
                .unwrap_or_else(|| panic!("no phase {name}: {:?}", self.phases))
        };
        let end = to.map_or(self.ended, at);
        (end - at(from)).as_secs_f64()
    }
}

async fn timed(site: &Site, arguments: &[&str]) -> Result<Timed> {
    let mut running = site.spawn(arguments);
    let (pid, mut phases, mut peak_kib) = (running.pid(), Vec::new(), 0);
    while support::process::alive(pid) {
        peak_kib = peak_kib.max(memory(pid, "VmHWM"));
        if let Ok(line) = running
            .wait_for_line(|_| true, Duration::from_millis(20))
            .await
        {
            phases.push((line, Instant::now()));
        }
    }
    let ended = Instant::now();
    ok(running).await?;
    Ok(Timed {
        phases,
        ended,
        peak_kib,
    })
}

async fn ok(running: Running) -> Result<Output> {
    Ok(running.wait(LIMIT).await?.ok())
}

fn shell(script: &str, environment: &[(&str, String)]) -> Result<f64> {
    let began = Instant::now();
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .output()?;
    let took = began.elapsed().as_secs_f64();
    if output.status.success() {
        Ok(took)
    } else {
        Err(format!("{script}: {}", String::from_utf8_lossy(&output.stderr)).into())
    }
}

/// A database of about 1 GB: our copy with indexes, against the two usual ways, in turn.
async fn rows(plan: &Plan) -> Result<()> {
    let (count, manifest) = if plan.smoke {
        (200, 20_000)
    } else {
        (50_000, 20_000)
    };
    let site = Site::builder("rows").start().await?;
    let mut factory = Factory::new(1);
    factory
        .bulk_artifacts_of(&site.primary, count, 300, manifest)
        .await?;
    site.write_config("replication.keep_generations = 0");
    let first = timed(&site, &["sync"]).await?;
    let size: i64 = site
        .primary
        .conn()
        .await?
        .query_one("SELECT pg_database_size('builder')", &[])
        .await?
        .get(0);
    println!(
        "rows: {count} packages with manifests of {manifest} bytes, database of {} MB",
        size / 1_000_000
    );
    println!(
        "  first copy of {count} tiny artifacts      {:8.2} s",
        first.between("artifacts", Some("snapshot"))
    );

    let (primary, spare) = (&site.primary.pg, &site.spare.pg);
    let bin = primary.programs().display().to_string();
    let environment = [
        ("SOURCE", primary.url("builder")),
        ("TARGET", spare.url("other")),
        ("ADMIN", spare.url("postgres")),
        ("BIN", bin),
        (
            "SCRATCH",
            site.dir.path().join("pgcopydb").display().to_string(),
        ),
    ];
    let fresh = "\"$BIN\"/psql -qX -d \"$ADMIN\" -c 'DROP DATABASE IF EXISTS other WITH (FORCE)' -c 'CREATE DATABASE other TEMPLATE template0'; rm -rf \"$SCRATCH\"";
    let has_pgcopydb = shell("command -v pgcopydb", &[]).is_ok();
    let (mut peak, mut last) = (first.peak_kib, first);
    let (mut ours, mut whole, mut dump, mut copydb) = (vec![], vec![], vec![], vec![]);
    for _ in 0..plan.runs {
        let timed = timed(&site, &["sync", "--baseline"]).await?;
        ours.push(timed.between("snapshot", None));
        whole.push(timed.between("checks", None));
        peak = peak.max(timed.peak_kib);
        last = timed;
        shell(fresh, &environment)?;
        dump.push(shell(
            "\"$BIN\"/pg_dump -Fc -d \"$SOURCE\" | \"$BIN\"/pg_restore --no-owner -d \"$TARGET\"",
            &environment,
        )?);
        if has_pgcopydb {
            shell(fresh, &environment)?;
            copydb.push(shell(
                "pgcopydb clone --source \"$SOURCE\" --target \"$TARGET\" --dir \"$SCRATCH\" --no-owner --table-jobs 2 --index-jobs 2",
                &environment,
            )?);
        }
    }
    let mine = line("warm-spare, snapshot to switch", &mut ours);
    line("warm-spare, the whole process", &mut whole);
    for pair in [
        "snapshot",
        "schema",
        "tables",
        "indexes",
        "remaining artifacts",
        "replacements",
        "switch",
    ]
    .windows(2)
    {
        println!(
            "    of the last run, {:<17} {:8.2} s",
            pair[0],
            last.between(pair[0], Some(pair[1]))
        );
    }
    let theirs = line("pg_dump -Fc | pg_restore", &mut dump);
    println!(
        "  ratio to pg_dump | pg_restore      {:8.2} times as fast (wanted: 4)",
        theirs / mine
    );
    if copydb.is_empty() {
        println!("  pgcopydb is not here: scripts/setup --bench installs it");
    } else {
        let theirs = line("pgcopydb clone", &mut copydb);
        println!(
            "  ratio to pgcopydb clone            {:8.2} times as fast (wanted: 2.5)",
            theirs / mine
        );
    }
    println!(
        "  highest resident memory            {:8} KiB (wanted: under 153600)",
        peak
    );
    Ok(())
}

/// Artifacts alone, each time into an empty bucket: ours, which hashes, against `mc mirror`, which does not.
async fn artifacts(plan: &Plan, what: &str, count: usize, size: u64) -> Result<()> {
    let site = Site::builder("objects").start().await?;
    let mut factory = Factory::new(2);
    factory.bulk_artifacts(&site.primary, count, size).await?;
    println!("artifacts: {what}, {count} of {size} bytes");
    let mc = std::env::var("WARM_SPARE_MC").map(PathBuf::from).ok();
    let (mut ours, mut mirrored, mut peak) = (vec![], vec![], 0);
    let alias = |cluster: &support::Cluster| {
        let endpoint = cluster.minio.endpoint().replace("http://", "");
        format!(
            "http://{}:{}@{endpoint}",
            cluster.minio.access_key(),
            cluster.minio.secret_key()
        )
    };
    for run in 0..plan.runs {
        let bucket = format!("bench-{what}-{run}").replace(' ', "-");
        for name in [format!("{bucket}-ours"), format!("{bucket}-mc")] {
            site.spare.s3().create_bucket(&name).await?;
        }
        site.write_config(&format!("local.s3.bucket_name = \"{bucket}-ours\""));
        let timed = timed(&site, &["sync", "--baseline"]).await?;
        ours.push(timed.between("artifacts", Some("snapshot")));
        peak = peak.max(timed.peak_kib);
        if let Some(mc) = &mc {
            let environment = [
                ("MC", mc.display().to_string()),
                (
                    "MC_CONFIG_DIR",
                    site.dir.path().join("mc").display().to_string(),
                ),
                ("MC_HOST_primary", alias(&site.primary)),
                ("MC_HOST_spare", alias(&site.spare)),
                ("FROM", format!("primary/{}", site.primary.bucket)),
                ("TO", format!("spare/{bucket}-mc")),
            ];
            mirrored.push(shell(
                "\"$MC\" mirror --quiet \"$FROM\" \"$TO\" >/dev/null",
                &environment,
            )?);
        }
        // Room for the next run.
        empty(&site, &format!("{bucket}-ours")).await?;
        empty(&site, &format!("{bucket}-mc")).await?;
    }
    let mine = line("warm-spare, hashing", &mut ours);
    if mirrored.is_empty() {
        println!("  mc is not here: scripts/setup --bench builds it");
    } else {
        let theirs = line("mc mirror, not hashing", &mut mirrored);
        println!(
            "  ratio to mc mirror                 {:8.2} times as fast (wanted: 1)",
            theirs / mine
        );
    }
    println!(
        "  highest resident memory            {:8} KiB (wanted: under 153600)",
        peak
    );
    Ok(())
}

async fn empty(site: &Site, bucket: &str) -> Result<()> {
    for key in site.spare.s3().list(bucket, "").await? {
        site.spare.s3().delete(bucket, &key).await?;
    }
    Ok(())
}

/// A run with nothing to do: what it asks of the primary's store, and how long it takes.
async fn idle(plan: &Plan) -> Result<()> {
    let count = if plan.smoke { 20 } else { 2_000 };
    let site = Site::builder("idle").start().await?;
    let mut factory = Factory::new(3);
    factory.bulk_artifacts(&site.primary, count, 1_000).await?;
    factory
        .package(&site.primary, Spec::new("core", "one", "1"))
        .await?;
    let proxy = HttpFault::start(site.primary.minio.port()).await?;
    site.write_config(&format!("peer.s3.endpoint = \"{}\"", proxy.endpoint()));
    timed(&site, &["sync"]).await?;
    proxy.forget();
    let timed = timed(&site, &["sync"]).await?;
    let asked = proxy.requests();
    let artifacts = asked
        .iter()
        .filter(|(_, path)| path.contains(".hart"))
        .count();
    let listings = asked
        .iter()
        .filter(|(_, path)| path.contains("list-type") || path.contains("delimiter"))
        .count();
    println!("nothing to do: {} packages", count + 1);
    println!(
        "  the whole process                  {:8.2} s",
        timed.between("checks", None)
    );
    println!("  artifacts read on the primary      {artifacts:8} (wanted: 0)");
    println!("  listings of the primary's bucket   {listings:8} (wanted: 0)");
    println!(
        "  other requests to it               {:8} (is it served, is it another bucket)",
        asked.len() - artifacts - listings
    );
    assert_eq!((artifacts, listings), (0, 0));
    Ok(())
}
