//! What an old primary has and its successor lacks is recorded before it is copied over, exactly where its slot is left.

use std::path::Path;
use warm_spare::domain::PromotionKind;

use serde_json::Value;
use support::follow::{followed, prepared, tamper, until_equal};
use support::packages::{delete_package, promote};
use support::service::Service;
use support::{Factory, Package, Result, Site, Spec, slots};
use warm_spare::cluster::{LocalCluster, Promotion};
use warm_spare::config::{self, Config};
use warm_spare::role;

/// The site as its old primary sees it: itself the local side, the former spare its peer.
struct Returning {
    site: Site,
    config: Config,
    promotion: Promotion,
}

impl Returning {
    async fn of(site: &Site) -> Result<Self> {
        let reversed = site.turned()?;
        let config = config::load(&reversed.write_config(""))?;
        Ok(Self {
            site: reversed,
            config,
            promotion: promotion(site).await?,
        })
    }

    async fn record(&self) -> Result<warm_spare::cluster::Divergence> {
        let state = LocalCluster::of(&self.config).state().await?;
        Ok(role::record(&self.config, &state, &self.promotion, false).await?)
    }

    /// What `divergence` prints; its exit code.
    async fn told(&self, arguments: &[&str]) -> (Option<i32>, Value) {
        let arguments = [&["--json", "divergence"], arguments].concat();
        let output = self.site.warm_spare(&arguments).await;
        (output.code, output.json())
    }

    /// The rows on record: table, change, old and new.
    async fn rows(&self) -> Result<Vec<(String, String, Value, Value)>> {
        let client = self.site.spare.pg.conn("warm_spare").await?;
        let sql =
            "SELECT table_name, change, coalesce(old, 'null')::text, coalesce(new, 'null')::text
                   FROM diverged_row ORDER BY id";
        let rows = client.query(sql, &[]).await?;
        let json = |text: String| serde_json::from_str(&text).expect("JSON");
        let row = |r: &tokio_postgres::Row| (r.get(0), r.get(1), json(r.get(2)), json(r.get(3)));
        Ok(rows.iter().map(row).collect())
    }
}

/// As a failover at the spare's recovery point would record it.
async fn promotion(site: &Site) -> Result<Promotion> {
    let point = "SELECT lsn::text, system_id, timeline FROM warm_spare.recovery_point";
    let point = site.spare.conn().await?.query_one(point, &[]).await?;
    let state = site.spare.pg.conn("warm_spare").await?;
    let slot: String = state
        .query_one("SELECT slot FROM copied", &[])
        .await?
        .get(0);
    Ok(Promotion {
        id: String::new(),
        epoch: 2,
        kind: PromotionKind::Failover,
        time: chrono::Utc::now(),
        lsn: point.get(0),
        commit_time: None,
        system_id: point.get(1),
        timeline: point.get(2),
        peer_cluster: String::new(),
        publication: slot.clone(),
        slot,
        peer_fenced: false,
        settled: false,
    })
}

/// Follows, and then no more: what the primary does after that, the spare lacks.
async fn parted(name: &str) -> Result<(Site, Factory, Vec<Package>)> {
    let site = prepared(name).await?;
    let mut factory = Factory::seeded();
    let packages = factory.fill(&site.primary, 8).await?;
    let service: Service = followed(&site, "").await?;
    promote(&site.primary, &packages[0], "stable").await?;
    until_equal(&site).await?;
    service.stop().await.ok();
    Ok((site, factory, packages))
}

/// At the end of a manifest.
const TOUCHED: &str = "touched";

/// Changes each package's row on the primary, whatever the seed had put there.
async fn touch(site: &Site, packages: &[&Package]) -> Result<()> {
    let idents: Vec<&str> = packages.iter().map(|p| p.ident.as_str()).collect();
    let sql = "UPDATE origin_packages SET manifest = manifest || $1 WHERE ident = ANY ($2)";
    let client = site.primary.conn().await?;
    let touched = client.execute(sql, &[&TOUCHED, &idents]).await?;
    assert_eq!(touched, packages.len() as u64);
    Ok(())
}

/// Of each package its class.
fn classes(told: &Value) -> Vec<(String, String)> {
    let packages = told["divergence"]["packages"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().expect("a text").to_string();
    let mut all: Vec<_> = packages
        .iter()
        .map(|package| (text(&package["class"]), text(&package["ident"])))
        .collect();
    all.sort();
    all
}

fn table<'a>(told: &'a Value, name: &str) -> &'a Value {
    let tables = told["divergence"]["tables"].as_array().expect("a list");
    let found = tables.iter().find(|table| table["table"] == name);
    found.unwrap_or_else(|| panic!("{name}: {told:#}"))
}

async fn confirmed(site: &Site) -> Result<Option<(String, String)>> {
    support::follow::slot(site).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_slot_holds_is_recorded_exactly_and_as_often_as_it_is_asked_for() -> Result<()> {
    let (site, mut factory, packages) = parted("exactly").await?;
    let new = factory
        .package(&site.primary, Spec::new("core", "alone", "1"))
        .await?;
    let gone = &packages[1];
    delete_package(&site.primary, gone).await?;
    promote(&site.primary, &packages[2], "stable").await?;
    // Two that both sides have, touched here: one of them was made anew over there with other bytes.
    let (same, other) = (&packages[3], &packages[4]);
    touch(&site, &[same, other]).await?;
    let sql = "UPDATE origin_packages SET checksum = repeat('ab', 32) WHERE ident = ";
    tamper(&site, &format!("{sql}'{}'", other.ident)).await?;
    site.primary.pg.set_fence(true).await?;
    let before = confirmed(&site).await?;
    let returning = Returning::of(&site).await?;

    let found = returning.record().await?;
    assert!(found.exact, "{found:?}");
    assert_eq!((found.epoch, found.transactions), (2, 4), "{found:?}");
    let first = returning.rows().await?;
    assert_eq!(found.rows, first.len() as i64);
    let (code, told) = returning.told(&[]).await;
    assert_eq!(code, Some(1));
    let mut expected = vec![
        ("gone_here".to_string(), gone.ident.clone()),
        ("only_here".into(), new.ident.clone()),
        ("other_bytes".into(), other.ident.clone()),
        ("same".into(), same.ident.clone()),
    ];
    expected.sort();
    assert_eq!(classes(&told), expected, "{told:#}");
    let counts = table(&told, "public.origin_packages");
    assert_eq!(
        (&counts["inserted"], &counts["updated"], &counts["deleted"]),
        (&1.into(), &2.into(), &1.into())
    );
    assert_eq!(table(&told, "public.audit_package")["updated"], 0);
    let (_, _, _, row) = first
        .iter()
        .find(|(table, change, ..)| table == "public.origin_packages" && change == "insert")
        .expect("the new package's row");
    assert_eq!(row["ident"], new.ident.as_str());
    assert!(row["id"].is_i64() && row["hidden"].is_boolean(), "{row:#}");

    let again = returning.record().await?;
    // The end is further on by the mark that was set to find it.
    assert_eq!(
        (again.rows, again.transactions, again.packages),
        (found.rows, found.transactions, found.packages)
    );
    assert_eq!(returning.rows().await?, first);
    assert_eq!(
        confirmed(&site).await?,
        before,
        "the slot stays where it is"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_of_the_divergence_are_fetched_and_checked() -> Result<()> {
    let (site, mut factory, packages) = parted("fetched").await?;
    let new = factory
        .package(&site.primary, Spec::new("core", "alone", "1"))
        .await?;
    let lost = factory
        .package(&site.primary, Spec::new("core", "lost", "1"))
        .await?;
    let other = &packages[4];
    touch(&site, &[other]).await?;
    let sql = "UPDATE origin_packages SET checksum = repeat('ab', 32) WHERE ident = ";
    tamper(&site, &format!("{sql}'{}'", other.ident)).await?;
    let returning = Returning::of(&site).await?;
    returning.record().await?;
    // As a baseline from the new primary leaves the key, and as an accident does.
    let retired = format!(".warm-spare/retired/{}", other.checksum);
    site.primary.put(&retired, other.bytes()).await?;
    site.primary.put(&other.key, "the new primary's").await?;
    site.primary.delete(&lost.key).await?;

    let directory = site.dir.path().join("fetched");
    let target = directory.display().to_string();
    let (code, told) = returning.told(&["--fetch", &target]).await;
    assert_eq!(code, Some(3), "one is lacking: {told:#}");
    let file = |package: &Package| {
        let name = Path::new(&package.key).file_name().expect("a name");
        directory.join(name)
    };
    assert_eq!(std::fs::read(file(&new))?, new.bytes());
    assert_eq!(std::fs::read(file(other))?, other.bytes());
    assert_eq!(std::fs::read_dir(&directory)?.count(), 2, "and no more");

    site.primary.put(&lost.key, lost.bytes()).await?;
    let output = returning
        .site
        .warm_spare(&["divergence", "--fetch", &target])
        .await;
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.stdout.contains("exact"), "{output}");
    let command = format!("hab pkg upload --force {}", file(&new).display());
    assert!(output.stdout.contains(&command), "{output}");
    assert!(output.stdout.contains("WARNING"), "{output}");
    assert!(output.stdout.contains("Already there"), "{output}");
    std::fs::write(file(&new), "an operator's own")?;
    let (code, _) = returning.told(&["--fetch", &target]).await;
    assert_eq!(code, Some(3), "it is not overwritten");
    assert_eq!(std::fs::read(file(&new))?, b"an operator's own");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_slot_both_sides_are_compared_and_that_is_said() -> Result<()> {
    let (site, mut factory, packages) = parted("compared").await?;
    let returning = Returning::of(&site).await?;
    let nothing = returning.record().await?;
    assert!(nothing.exact && nothing.rows == 0, "{nothing:?}");
    let (code, told) = returning.told(&[]).await;
    assert_eq!(code, Some(0), "{told:#}");

    let new = factory
        .package(&site.primary, Spec::new("core", "alone", "1"))
        .await?;
    touch(&site, &[&packages[3]]).await?;
    assert!(slots::drop_slot(&site.primary, slots::ANY).await?);
    site.primary.pg.set_fence(true).await?;
    let found = returning.record().await?;
    assert!(
        !found.exact && found.reason.contains("is gone"),
        "{found:?}"
    );
    let (code, told) = returning.told(&[]).await;
    assert_eq!(code, Some(1));
    let mut expected = vec![
        ("only_here".to_string(), new.ident.clone()),
        ("same".into(), packages[3].ident.clone()),
    ];
    expected.sort();
    assert_eq!(classes(&told), expected, "{told:#}");
    let counts = table(&told, "public.origin_packages");
    assert_eq!(
        (&counts["inserted"], &counts["updated"]),
        (&1.into(), &1.into())
    );
    let rows = returning.rows().await?;
    let (_, _, old, row) = rows
        .iter()
        .find(|(table, change, ..)| table == "public.origin_packages" && change == "update")
        .expect("the touched row");
    assert_eq!(old["id"], row["id"]);
    let manifest = |row: &Value| row["manifest"].as_str().expect("a text").to_string();
    assert_eq!(manifest(row), manifest(old) + TOUCHED);
    let output = returning.site.warm_spare(&["divergence"]).await;
    assert!(output.stdout.contains("APPROXIMATE"), "{output}");

    let mut planned = returning;
    planned.promotion.kind = PromotionKind::Switchover;
    let found = planned.record().await?;
    assert!(found.exact && found.rows == 0, "{found:?}");
    Ok(())
}

/// What was deleted there is not nothing, and what is not proved is never called nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_is_found_by_comparison_and_no_comparison_ends_with_nothing() -> Result<()> {
    let (site, _, packages) = parted("deleted").await?;
    let mut returning = Returning::of(&site).await?;
    assert!(slots::drop_slot(&site.primary, slots::ANY).await?);
    let found = returning.record().await?;
    assert!(!found.exact && found.rows == 0, "{found:?}");
    assert!(found.reason.contains("cannot be listed"), "{found:?}");
    let (code, told) = returning.told(&[]).await;
    assert_eq!(code, Some(1), "{told:#}");

    returning.promotion.commit_time = Some(chrono::Utc::now());
    // Made by the new primary itself.
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    tamper(
        &site,
        "INSERT INTO accounts (name, email) VALUES ('there', '')",
    )
    .await?;
    delete_package(&site.primary, &packages[2]).await?;
    let found = returning.record().await?;
    assert!(!found.exact && found.rows > 0, "{found:?}");
    let (code, told) = returning.told(&[]).await;
    assert_eq!(code, Some(1), "{told:#}");
    let gone = ("gone_here".to_string(), packages[2].ident.clone());
    assert_eq!(classes(&told), [gone], "{told:#}");
    assert_eq!(
        table(&told, "public.origin_packages")["deleted"],
        1,
        "{told:#}"
    );
    let rows = returning.rows().await?;
    assert!(
        rows.iter().all(|(table, ..)| table != "public.accounts"),
        "{rows:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_is_recorded_there_is_none() -> Result<()> {
    let site = support::site("none").await;
    let output = site.warm_spare(&["divergence"]).await.ok();
    assert!(output.stdout.contains("No divergence"), "{output}");
    assert!(!site.spare.pg.has_database("warm_spare").await?);
    site.spare.pg.stop_fast().await?;
    assert_eq!(site.warm_spare(&["divergence"]).await.code, Some(3));
    Ok(())
}
