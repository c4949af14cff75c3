//! The warm spare at work on one machine: a primary with packages, an empty spare, and what an operator types.
//! `scripts/demo` builds the program and runs this.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;
use std::time::Instant;

use support::{Factory, Package, Result, Service, Site, Spec, packages, postgres::Postgres};

const PACKAGES: usize = 300;

#[tokio::main]
async fn main() -> ExitCode {
    match demo().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("    {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<()> {
    say(
        "Two clusters of Habitat Builder on this machine: a primary and a spare, each PostgreSQL and MinIO.",
    );
    let began = Instant::now();
    let site = Site::builder("demo")
        .primary(Postgres::builder().logical())
        .own_stores()
        .start()
        .await?;
    let mut factory = Factory::new(1);
    let mut made = factory.fill(&site.primary, PACKAGES).await?;
    println!(
        "    {PACKAGES} packages in 3 origins were uploaded to the primary ({:.0?}).",
        began.elapsed()
    );
    println!("    The spare has an empty bucket and no database yet.");
    println!("    Configuration: {}", site.write_config("").display());

    say("Is the configuration right, and does every server answer?");
    operator(&site, &["check-config", "--connect"]).await?;

    say("The first pass copies everything.");
    operator(&site, &["sync"]).await?;
    compare(&site, &made).await?;

    say("Are both sides the same, down to the bytes of every artifact?");
    operator(&site, &["verify", "--deep"]).await?;

    say("On the primary, 5 packages are uploaded and 1 is deleted.");
    for number in 0..5 {
        let spec = Spec::new("core", "news", &format!("1.0.{number}")).size(20_000);
        made.push(factory.package(&site.primary, spec).await?);
    }
    let gone = made.remove(0);
    packages::delete_package(&site.primary, &gone).await?;
    println!("    deleted: {}", gone.ident);

    say("The second pass copies what is missing, and nothing else.");
    operator(&site, &["sync"]).await?;
    compare(&site, &made).await?;
    operator(&site, &["verify", "--deep"]).await?;

    always_on(&site, &mut factory, &mut made).await?;

    say("Done. The servers are stopped and their files removed.");
    Ok(())
}

/// The service follows by itself; nobody types anything while packages come and a store is killed.
async fn always_on(site: &Site, factory: &mut Factory, made: &mut Vec<Package>) -> Result<()> {
    say(
        "From now on the service does it (the Supervisor starts it on a real node): `warm-spare run`.",
    );
    let service = Service::start(site, "site = \"demo\"");
    service.until_level().await;
    operator(site, &["status"]).await?;

    say("20 packages are uploaded to the primary, one after the other.");
    for number in 0..20 {
        let spec = Spec::new("core", "stream", &format!("2.0.{number}")).size(50_000);
        made.push(factory.package(&site.primary, spec).await?);
    }
    let wanted = made.len() as i64;
    service
        .until("they are here", |status| {
            status["state"] == "following" && status["lag"]["bytes"] == 0
        })
        .await;
    caught_up(site, wanted).await?;
    operator(site, &["status"]).await?;
    compare(site, made).await?;

    say("The primary's datastore is killed (kill -9).");
    site.primary.pg.kill9();
    service.until_hold("peer_unreachable").await;
    operator_sees(site, &["status"]).await;
    operator_sees(site, &["health"]).await;

    say("It comes back, and a package is uploaded.");
    site.primary.pg.start_again().await?;
    let spec = Spec::new("core", "again", "3.0.0").size(50_000);
    made.push(factory.package(&site.primary, spec).await?);
    caught_up(site, wanted + 1).await?;
    service.until_level().await;
    operator(site, &["status"]).await?;
    operator(site, &["health"]).await?;
    compare(site, made).await?;

    say("The service is told to stop (SIGTERM).");
    let ended = service.stop().await;
    println!("    exit {}", shown(ended.code));
    println!("    Its log, without the debug lines:");
    for line in ended.stderr.lines().filter(|line| !line.contains("DEBUG")) {
        println!("    {line}");
    }
    Ok(())
}

/// Waits until the spare's database has so many packages.
async fn caught_up(site: &Site, packages: i64) -> Result<()> {
    support::wait_until("the packages are here", support::service::SOON, || async {
        let client = site.spare.conn().await?;
        let sql = "SELECT count(*) FROM origin_packages";
        let found: i64 = client.query_one(sql, &[]).await?.get(0);
        match found == packages {
            true => Ok(()),
            false => Err(format!("{found} of {packages}").into()),
        }
    })
    .await;
    Ok(())
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
