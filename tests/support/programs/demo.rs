//! The warm spare at work on one machine: a primary with packages, an empty spare, and what an operator types.
//! `scripts/demo` builds the program and runs this.

#[path = "demo/handover.rs"]
mod handover;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use support::follow::logical;
use support::pair::Pair;
use support::service::SOON;
use support::{Factory, Package, Result, Service, Site, Spec, packages};
use tokio_postgres::Client;

const PACKAGES: usize = 300;

#[tokio::main]
async fn main() -> ExitCode {
    match demo().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {}", support::with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<()> {
    say(
        "Two clusters of Habitat Builder on this machine: a primary and a spare, each PostgreSQL and MinIO.",
    );
    let began = Instant::now();
    let servers = Site::builder("demo").primary(logical()).spare(logical());
    let pair = Pair::of(servers.own_stores().start().await?)?;
    let site = &pair.there;
    let mut factory = Factory::new(1);
    let mut made = factory.fill(&site.primary, PACKAGES).await?;
    println!(
        "    {PACKAGES} packages in 3 origins were uploaded to the primary ({:.0?}).",
        began.elapsed()
    );
    println!("    The spare has an empty bucket and no database yet.");
    println!("    Configuration: {}", site.write_config("").display());

    say("Is the configuration right, and does every server answer?");
    operator(site, &["check-config", "--connect"]).await?;

    say(
        "The primary is prepared: what logical decoding needs there, and nothing that harms Builder.",
    );
    operator(site, &["prepare"]).await?;

    say("The service is started (on a real node the Supervisor does that): `warm-spare run`.");
    let service = Service::start(site, handover::NAMED);
    streaming(&service).await;
    println!("    It has copied everything once, and follows from there.");
    compare(site, &made).await?;
    operator(site, &["status"]).await?;

    let eye = Eye::open(site).await?;
    live(site, &eye, &mut factory, &mut made).await?;
    let service = killed(site, &eye, &mut factory, &mut made, service).await?;
    primary_down(site, &eye, &mut factory, &mut made, &service).await?;

    say("Are both sides the same, down to the bytes of every artifact?");
    compare(site, &made).await?;
    operator(site, &["verify", "--deep"]).await?;

    drop(eye);
    let services = handover::there_and_back(&pair, &mut factory, &mut made, service).await?;
    ended(services).await;
    say("Done. The servers are stopped and their files removed.");
    Ok(())
}

async fn ended([spare, primary]: [Service<'_>; 2]) {
    say("Both services are told to stop (SIGTERM).");
    println!("    On A: exit {}", shown(primary.stop().await.code));
    let ended = spare.stop().await;
    println!("    On B: exit {}", shown(ended.code));
    println!("    Its log since it was killed, without the debug lines:");
    for line in ended.stderr.lines().filter(|line| !line.contains("DEBUG")) {
        println!("    {line}");
    }
}

/// What is committed on the primary is on the spare while you watch.
async fn live(
    site: &Site,
    eye: &Eye<'_>,
    factory: &mut Factory,
    made: &mut Vec<Package>,
) -> Result<()> {
    say("Packages are uploaded to the primary. From each COMMIT there to its row here:");
    for number in 0..10 {
        let spec = Spec::new("core", "live", &format!("1.0.{number}")).size(50_000 << (number / 2));
        let package = factory.package(&site.primary, spec).await?;
        eye.sees(&package, Instant::now()).await?;
        made.push(package);
    }

    say("One of them is promoted to stable, another one is deleted.");
    packages::promote(&site.primary, &made[PACKAGES], "stable").await?;
    let committed = Instant::now();
    eye.until(&made[PACKAGES], "stable", true).await?;
    println!(
        "    {:<40} in channel stable here after {} ms",
        made[PACKAGES].ident,
        committed.elapsed().as_millis()
    );
    let gone = made.remove(PACKAGES + 1);
    packages::delete_package(&site.primary, &gone).await?;
    let committed = Instant::now();
    eye.until(&gone, "unstable", false).await?;
    println!(
        "    {:<40} gone here after {} ms",
        gone.ident,
        committed.elapsed().as_millis()
    );
    compare(site, made).await
}

/// The service is killed between two uploads, and begun again after more of them.
async fn killed<'a>(
    site: &'a Site,
    eye: &Eye<'_>,
    factory: &mut Factory,
    made: &mut Vec<Package>,
    service: Service<'a>,
) -> Result<Service<'a>> {
    say("The service is killed (kill -9) in the middle of 20 uploads.");
    let Service { port, running, .. } = service;
    let mut running = Some(running);
    let first = made.len();
    for number in 0..20 {
        let spec = Spec::new("core", "killed", &format!("2.0.{number}")).size(50_000);
        made.push(factory.package(&site.primary, spec).await?);
        if number == 7
            && let Some(running) = running.take()
        {
            running.kill9()?;
        }
    }
    let here = eye.count().await?;
    println!(
        "    {here} of {} packages are here. It is started again.",
        made.len()
    );
    let started = Instant::now();
    let service = Service {
        site,
        port,
        running: site.spawn(&["run"]),
    };
    for package in &made[first..] {
        eye.until(package, "unstable", true).await?;
    }
    println!(
        "    All are here {} ms after that: it went on where it was, without a copy.",
        started.elapsed().as_millis()
    );
    streaming(&service).await;
    compare(site, made).await?;
    Ok(service)
}

async fn primary_down(
    site: &Site,
    eye: &Eye<'_>,
    factory: &mut Factory,
    made: &mut Vec<Package>,
    service: &Service<'_>,
) -> Result<()> {
    say("The primary's datastore is killed (kill -9).");
    site.primary.pg.kill9();
    service.until_hold("peer_unreachable").await;
    operator_sees(site, &["status"]).await;
    operator_sees(site, &["health"]).await;

    say("It comes back, and a package is uploaded.");
    site.primary.pg.start_again().await?;
    let spec = Spec::new("core", "again", "3.0.0").size(50_000);
    let package = factory.package(&site.primary, spec).await?;
    eye.sees(&package, Instant::now()).await?;
    made.push(package);
    streaming(service).await;
    operator(site, &["status"]).await?;
    operator(site, &["health"]).await
}

/// Waits until the service follows by the stream, and nothing waits.
async fn streaming(service: &Service<'_>) {
    service
        .until("following by the stream", |status| {
            status["state"] == "following"
                && status["replication"]["mode"] == "stream"
                && status["lag"]["bytes"] == 0
        })
        .await;
}

/// Looks at the spare all the time.
struct Eye<'a> {
    site: &'a Site,
    rows: Client,
}

impl<'a> Eye<'a> {
    async fn open(site: &'a Site) -> Result<Self> {
        let rows = site.spare.conn().await?;
        Ok(Eye { site, rows })
    }

    /// Until the package is in the channel here, or is not any more.
    async fn until(&self, package: &Package, channel: &str, there: bool) -> Result<()> {
        let sql = "SELECT EXISTS (SELECT 1 FROM origin_packages p
                   JOIN origin_channel_packages e ON e.package_id = p.id JOIN origin_channels c ON c.id = e.channel_id
                   WHERE p.ident = $1 AND p.target = $2 AND c.name = $3)";
        let began = Instant::now();
        loop {
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
                [&package.ident, &package.target, &channel];
            if self.rows.query_one(sql, &values).await?.get::<_, bool>(0) == there {
                return Ok(());
            }
            if began.elapsed() > SOON {
                return Err(format!("{} does not come", package.ident).into());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits for the row, and then looks whether its artifact came before it.
    async fn sees(&self, package: &Package, committed: Instant) -> Result<()> {
        self.until(package, "unstable", true).await?;
        let after = committed.elapsed().as_millis();
        let spare = &self.site.spare;
        let stored = spare.s3().head(&spare.bucket, &package.key).await?;
        if stored.is_none_or(|head| head.size != package.size) {
            return Err(format!("{} came before its artifact", package.ident).into());
        }
        println!(
            "    {:<40} {:>9} bytes: artifact and row here after {after} ms",
            package.ident, package.size
        );
        Ok(())
    }

    async fn count(&self) -> Result<i64> {
        let sql = "SELECT count(*) FROM origin_packages";
        Ok(self.rows.query_one(sql, &[]).await?.get(0))
    }
}

fn say(text: &str) {
    println!("\n=== {text}");
}

/// Runs a command as an operator does, with its output shown. It must succeed.
async fn operator(site: &Site, arguments: &[&str]) -> Result<()> {
    match operator_sees(site, arguments).await {
        Some(0) => Ok(()),
        code => Err(format!(
            "warm-spare {} ended with {}",
            arguments.join(" "),
            shown(code)
        )
        .into()),
    }
}

/// The same; returns the exit code, whatever it is.
async fn operator_sees(site: &Site, arguments: &[&str]) -> Option<i32> {
    println!(
        "--- what an operator types: warm-spare --config config.toml {}",
        arguments.join(" ")
    );
    let output = site.warm_spare(arguments).await;
    for line in output.stdout.lines().chain(output.stderr.lines()) {
        println!("    {line}");
    }
    println!("    (exit {}, {:.1?})", shown(output.code), output.took);
    output.code
}

fn shown(code: Option<i32>) -> String {
    code.map_or("a signal".into(), |code| code.to_string())
}

/// The demo believes no program: it looks for itself.
async fn compare(site: &Site, expected: &[Package]) -> Result<()> {
    let client = site.spare.conn().await?;
    let sql = "SELECT 1 FROM origin_packages WHERE ident = $1 AND target = $2 AND checksum = $3";
    let sql = client.prepare(sql).await?;
    for package in expected {
        let row = client
            .query_opt(&sql, &[&package.ident, &package.target, &package.checksum])
            .await?;
        let stored = site
            .spare
            .s3()
            .checksum(&site.spare.bucket, &package.key)
            .await?;
        if row.is_none() || stored.as_ref() != Some(&package.checksum) {
            return Err(format!("{} is not on the spare as it should be", package.ident).into());
        }
    }
    let rows: i64 = client
        .query_one("SELECT count(*) FROM origin_packages", &[])
        .await?
        .get(0);
    if rows != expected.len() as i64 {
        return Err(format!(
            "the spare has {rows} packages, and should have {}",
            expected.len()
        )
        .into());
    }
    println!("    looked up on the spare: {rows} packages, each with its artifact, byte for byte.");
    Ok(())
}
