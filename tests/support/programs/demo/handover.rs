//! The primary is lost, its spare takes its place, and it comes back: with what it alone had on record, as the spare,
//! and at last as the primary.

use std::time::Instant;

use super::{compare, operator, operator_sees, say, streaming};
use support::pair::{PROMOTE, Pair, first_write, forced, until_primary, until_settled, write};
use support::{Cluster, Factory, Package, Result, Service, Site, Spec};

/// Of every configuration here.
pub(crate) const NAMED: &str = "site = \"demo\"\n";

/// Ends with both clusters in the roles in which they began; returns both services.
pub(crate) async fn there_and_back<'a>(
    pair: &'a Pair,
    factory: &mut Factory,
    made: &mut Vec<Package>,
    service: Service<'a>,
) -> Result<[Service<'a>; 2]> {
    let (a, b) = (&pair.there.primary, &pair.there.spare);
    lose(&pair.there, factory, &service).await?;
    fail_over(&pair.there, &service).await?;
    made.push(
        factory
            .package(b, Spec::new("core", "new-primary", "5.0.0"))
            .await?,
    );
    println!("    Builder works on B: {} was uploaded.", last(made));
    fenced(a, &service).await?;
    let old = fail_back(&pair.back).await?;
    switch_back(pair, &service, &old).await?;
    compare(&pair.there, made).await?;
    Ok([service, old])
}

fn last(made: &[Package]) -> &str {
    made.last().map_or("nothing", |package| &package.ident)
}

/// One package is uploaded that the spare does not get, and then the primary is gone.
async fn lose(site: &Site, factory: &mut Factory, service: &Service<'_>) -> Result<()> {
    say("Now the worst day. From here on: A is the primary so far, B its spare.");
    applied(service, "paused = true");
    service.until_hold("paused").await;
    let spec = Spec::new("core", "only-on-a", "4.0.0").size(50_000);
    let package = factory.package(&site.primary, spec).await?;
    println!(
        "    B is paused, and {} is uploaded to A: B does not have it.",
        package.ident
    );
    site.primary.pg.kill9();
    site.primary.minio.kill9();
    println!("    A's PostgreSQL and MinIO are killed (kill -9).");
    Ok(())
}

async fn fail_over(site: &Site, service: &Service<'_>) -> Result<()> {
    say("On B: could it take A's place, as things are?");
    operator_sees(site, &["preflight", "--for", "unplanned"]).await;
    say("It could. Without force_epoch nothing would be promoted while A cannot be fenced.");
    let took = until_written(&site.spare, service, &forced(2)).await?;
    println!("    The first write that B accepted: {took} ms after the configuration was applied.");
    until_primary(service, 2).await;
    operator_sees(site, &["status"]).await;
    operator_sees(site, &["health"]).await;
    Ok(())
}

/// The old primary's servers are started, as if nothing had happened.
async fn fenced(a: &Cluster, service: &Service<'_>) -> Result<()> {
    say(
        "A's servers come back. They know nothing of what has happened; B does, and looks for them.",
    );
    a.pg.start_again().await?;
    a.minio.start_again().await?;
    let began = Instant::now();
    until_settled(service).await;
    println!(
        "    B has fenced A, {} ms after A was there again.",
        began.elapsed().as_millis()
    );
    match write(a, "too-late").await {
        Ok(()) => Err("A accepts a write".into()),
        Err(error) => {
            println!("    A client of A that writes is told: {}", told(&*error));
            Ok(())
        }
    }
}

/// The server's own words.
fn told(error: &(dyn std::error::Error + 'static)) -> String {
    let inner = error.source().unwrap_or(error);
    inner.to_string()
}

async fn fail_back(back: &Site) -> Result<Service<'_>> {
    say("A comes back as the spare: its own warm-spare is started there, with role = \"spare\".");
    back.write_config("");
    operator(back, &["prepare"]).await?;
    let began = Instant::now();
    let old = Service::start(back, NAMED);
    streaming(&old).await;
    println!(
        "    It follows B, {:.1} s after it was started. What A alone had:",
        began.elapsed().as_secs_f64()
    );
    operator_sees(back, &["divergence"]).await;
    operator(back, &["health"]).await?;
    Ok(old)
}

async fn switch_back(pair: &Pair, service: &Service<'_>, old: &Service<'_>) -> Result<()> {
    say("A quiet day later, A shall be the primary again: planned, so nothing is lost.");
    println!("    On A:");
    operator_sees(&pair.back, &["preflight"]).await;
    let took = until_written(&pair.back.spare, old, PROMOTE).await?;
    println!("    The first write that A accepted: {took} ms after the configuration was applied.");
    until_primary(old, 3).await;
    until_settled(old).await;
    say(
        "And B is the spare again. Its configuration says so before A is prepared, and is then applied.",
    );
    pair.there.write_config("");
    operator(&pair.there, &["prepare"]).await?;
    applied(service, "role = \"spare\"");
    streaming(service).await;
    operator(&pair.there, &["health"]).await
}

fn applied(service: &Service<'_>, extra: &str) {
    println!(
        "--- what an operator applies (hab config apply): {}",
        extra.replace('\n', ", ")
    );
    service.reconfigure(&format!("{NAMED}{extra}"));
}

/// Applies it; milliseconds until a plain client may write there.
async fn until_written(new: &Cluster, service: &Service<'_>, wish: &str) -> Result<u128> {
    let began = Instant::now();
    applied(service, wish);
    let written = first_write(new, &format!("demo-{}", service.port)).await?;
    Ok((written - began).as_millis())
}
