//! Killed at any moment, the spare stays promotable, and the next run finishes.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::Duration;
use support::history::History;
use support::oracle::{Oracle, is_fenced};
use support::packages::delete_package;
use support::weather::Weather;
use support::{Factory, Package, Result, Site, Spec, seed, site};

const PHASES: [&str; 8] = [
    "artifacts",
    "snapshot",
    "schema",
    "tables",
    "indexes",
    "remaining artifacts",
    "replacements",
    "switch",
];

/// Knows the states that the primary had when the test asked, with nobody at work there.
struct Judge<'a> {
    site: &'a Site,
    history: Arc<History>,
    oracle: Oracle,
}

impl<'a> Judge<'a> {
    async fn of(site: &'a Site) -> Result<Self> {
        let history = History::start(&site.primary).await?;
        let oracle = Oracle::new(&history, &Arc::new(Weather::default()), false);
        Ok(Self {
            site,
            history,
            oracle,
        })
    }

    /// What an operator would promote: a state of the primary, every row with its artifact, and nobody but us can write.
    async fn finds_it_promotable(&mut self, after: &str) -> Result<()> {
        self.history.note("as it is now").await?;
        let stand = self.oracle.check(self.site).await;
        let stand = stand.map_err(|error| format!("killed at {after}: {error}"))?;
        let stand = stand.ok_or_else(|| format!("killed at {after}: it cannot be looked at"))?;
        assert!(stand.artifacts_seen, "killed at {after}: {stand:?}");
        is_fenced(self.site, &Weather::default()).await
    }

    /// The same, and nothing is missing.
    async fn finds_it_level(&mut self) -> Result<()> {
        self.finds_it_promotable("nothing").await?;
        self.oracle.is_level(self.site).await
    }
}

/// Something new in rows and artifacts, something gone.
async fn change(site: &Site, factory: &mut Factory, packages: &mut Vec<Package>) -> Result<()> {
    for number in 0..3 {
        let spec =
            Spec::new("core", "changed", &format!("{}.{number}", packages.len())).size(200_000);
        packages.push(factory.package(&site.primary, spec).await?);
    }
    delete_package(&site.primary, &packages.remove(0)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_each_phase_it_finishes_the_next_time() -> Result<()> {
    let site = site("phases").await;
    let mut factory = Factory::seeded();
    let mut packages = factory.fill(&site.primary, 30).await?;
    let mut judge = Judge::of(&site).await?;
    let mut first = true;
    for phase in PHASES {
        change(&site, &mut factory, &mut packages).await?;
        let mut running = site.spawn(&["sync", "--baseline"]);
        let begins = |line: &str| line == phase || line.starts_with(&format!("{phase}: "));
        running
            .wait_for_line(begins, Duration::from_secs(120))
            .await?;
        running.kill9()?;
        if !first {
            judge.finds_it_promotable(phase).await?;
        }
        let output = site.warm_spare(&["sync"]).await;
        assert_eq!(
            output.code,
            Some(0),
            "after being killed at {phase}: {output}"
        );
        judge.finds_it_level().await?;
        assert!(!site.spare.pg.has_database("builder_incoming").await?);
        let rows = site
            .spare
            .conn()
            .await?
            .query_one("SELECT count(*) FROM origin_packages", &[])
            .await?;
        assert_eq!(rows.get::<_, i64>(0), packages.len() as i64);
        first = false;
    }
    Ok(())
}

/// The first copy has nothing to fall back on: killed, it leaves no database that looks like one.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_first_copy_leaves_nothing_that_could_be_mistaken() -> Result<()> {
    for phase in ["artifacts", "tables", "switch"] {
        let site = site("first").await;
        Factory::seeded().fill(&site.primary, 10).await?;
        let mut judge = Judge::of(&site).await?;
        let mut running = site.spawn(&["sync"]);
        let begins = |line: &str| line == phase || line.starts_with(&format!("{phase}: "));
        running
            .wait_for_line(begins, Duration::from_secs(120))
            .await?;
        running.kill9()?;
        if site.spare.pg.has_database("builder").await? {
            // The rename was already committed: then it stands whole.
            judge.finds_it_promotable(phase).await?;
        }
        site.warm_spare(&["sync"]).await.ok();
        judge.finds_it_level().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_moments_it_is_promotable_throughout() -> Result<()> {
    let site = site("moments").await;
    let mut factory = Factory::seeded();
    let mut random = StdRng::seed_from_u64(seed());
    let mut packages = factory.fill(&site.primary, 30).await?;
    let mut judge = Judge::of(&site).await?;
    let whole = site.warm_spare(&["sync"]).await.ok().took;
    for round in 0..12 {
        change(&site, &mut factory, &mut packages).await?;
        let running = site.spawn(&["sync", "--baseline"]);
        let moment = whole.mul_f64(random.random_range(0.0..1.2));
        tokio::time::sleep(moment).await;
        running.kill9()?;
        judge
            .finds_it_promotable(&format!("{moment:?} of {whole:?}, round {round}"))
            .await?;
    }
    site.warm_spare(&["sync"]).await.ok();
    judge.finds_it_level().await
}

/// Bytes under a key that a visible row names are being replaced: the one moment at which a kill leaves both kinds.
/// The next start puts them back before anything else.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_done_replacement_is_put_back_at_the_next_start() -> Result<()> {
    let site = site("halfway").await;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 3).await?;
    let spec = Spec::new("core", "again", "1").release("20240101000000");
    let old = factory.package(&site.primary, spec.clone()).await?;
    let mut judge = Judge::of(&site).await?;
    site.warm_spare(&["sync"]).await.ok();
    delete_package(&site.primary, &old).await?;
    let new = factory.package(&site.primary, spec.size(5000)).await?;
    assert_eq!(old.key, new.key);
    assert_ne!(old.checksum, new.checksum);

    // As a kill between the replacement and the rename leaves it: journalled, retired, replaced.
    site.spare
        .put(
            &format!(".warm-spare/retired/{}", old.checksum),
            old.bytes(),
        )
        .await?;
    let state = site.spare.pg.conn("warm_spare").await?;
    state
        .execute(
            "INSERT INTO replacement VALUES ($1, $2, $3)",
            &[&old.key, &old.checksum, &new.checksum],
        )
        .await?;
    site.spare.put(&old.key, new.bytes()).await?;

    // The next pass fails for another reason after its start: what it must have done by then is to put the old bytes back.
    site.write_config(
        "[replication]\nkeep_generations = 2\n[fuse]\nmin_count = 1\nmax_percent = 0",
    );
    delete_package(
        &site.primary,
        &factory.fill(&site.primary, 1).await?.remove(0),
    )
    .await?;
    let client = site.primary.conn().await?;
    client.batch_execute("DELETE FROM origin_channel_packages; DELETE FROM origin_packages WHERE name <> 'again'").await?;
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(4), "the fuse stops it: {output}");
    assert!(
        output.stderr.contains("the old bytes were restored"),
        "{output}"
    );
    let found = site
        .spare
        .s3()
        .checksum(&site.spare.bucket, &old.key)
        .await?;
    assert_eq!(found.as_deref(), Some(old.checksum.as_str()));
    judge.finds_it_promotable("the replacement").await?;

    site.write_config("");
    site.warm_spare(&["sync"]).await.ok();
    let found = site
        .spare
        .s3()
        .checksum(&site.spare.bucket, &old.key)
        .await?;
    assert_eq!(found.as_deref(), Some(new.checksum.as_str()));
    judge.finds_it_level().await
}

/// A first copy into a bucket that holds other bytes under the wanted keys: killed while it replaces them, it puts them
/// back and finishes the next time, though no role is recorded yet.
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_it_replaces_bytes_in_a_first_copy_it_finishes_the_next_time() -> Result<()> {
    let site = site("replacing").await;
    let packages = Factory::seeded()
        .bulk_artifacts(&site.primary, 60, 3000)
        .await?;
    let mut judge = Judge::of(&site).await?;
    for package in &packages {
        site.spare
            .put(&package.key, format!("not {}", package.ident))
            .await?;
    }
    let mut running = site.spawn(&["sync"]);
    running
        .wait_for_line(|line| line == "replacements: 60", Duration::from_secs(120))
        .await?;
    let state = site.spare.pg.conn("warm_spare").await?;
    support::wait_until(
        "the journal is written",
        Duration::from_secs(60),
        async || {
            let sql = "SELECT count(*) FROM replacement";
            let begun: i64 = state.query_one(sql, &[]).await?.get(0);
            let switched = site.spare.pg.has_database("builder").await?;
            if begun > 0 || switched {
                Ok(())
            } else {
                Err("not yet".into())
            }
        },
    )
    .await;
    running.kill9()?;
    site.warm_spare(&["sync"]).await.ok();
    judge.finds_it_level().await
}
