//! A takeover is rehearsed on a clone, and nothing of that is left, however the drill ends.

use std::time::Duration;

use support::follow::{followed, prepared, until_equal};
use support::ports::free_port;
use support::process::alive;
use support::{Factory, Package, Result, Site, Spec, site, wait_until};
use warm_spare::cluster::LocalCluster;
use warm_spare::role::remove_drill_leftovers;

const SOON: Duration = Duration::from_secs(30);

async fn copied(name: &str) -> Result<(Site, Vec<Package>)> {
    let site = site(name).await;
    let packages = Factory::seeded().fill(&site.primary, 12).await?;
    site.warm_spare(&["sync"]).await.ok();
    Ok((site, packages))
}

async fn clones(site: &Site) -> Result<Vec<String>> {
    let sql = "SELECT datname::text FROM pg_database WHERE datname LIKE 'warm_spare_drill_%'";
    let rows = site
        .spare
        .pg
        .conn("postgres")
        .await?
        .query(sql, &[])
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Records of drills: whether it succeeded, and the seconds to the first write and answer.
async fn records(site: &Site) -> Result<Vec<(bool, Option<f64>, Option<f64>)>> {
    let sql = "SELECT ok, write_seconds, answer_seconds FROM drill ORDER BY id";
    let rows = site
        .spare
        .pg
        .conn("warm_spare")
        .await?
        .query(sql, &[])
        .await?;
    Ok(rows
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect())
}

/// A process's number that a command has written down.
async fn noted(file: &std::path::Path) -> u32 {
    wait_until("the command runs", SOON, || async {
        Ok(std::fs::read_to_string(file)?.trim().parse()?)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_spare_could_take_over_and_stays_as_it_is() -> Result<()> {
    let (site, _) = copied("sound").await?;
    let json = site.warm_spare(&["--json", "drill"]).await.ok().json();
    assert_eq!(json["ok"], true, "{json:#}");
    assert!(json["write_seconds"].as_f64().is_some_and(|s| s < 10.0));
    assert_eq!(json["answer_seconds"], serde_json::Value::Null);
    let names: Vec<&str> = json["steps"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|step| step["name"].as_str())
        .collect();
    assert_eq!(names, ["clone", "rows", "artifacts", "write"]);
    println!("{json:#}");

    // Answered by what the command starts, which knows the clone by its environment.
    let port = free_port()?;
    let note = site.dir.path().join("note");
    let script = format!(
        "echo $$ > {note}.pid; env | grep -E '^PG|^WARM_SPARE_DRILL' | sort > {note}; \
         exec python3 -m http.server --bind 127.0.0.1 {port}",
        note = note.display()
    );
    let url = format!("http://127.0.0.1:{port}/");
    let output = site
        .warm_spare(&["drill", "--sample", "all", "--exec", &script, "--url", &url])
        .await
        .ok();
    assert!(output.stdout.contains("First answer"), "{output}");
    println!("{output}");
    let environment = std::fs::read_to_string(&note)?;
    for name in ["PGHOST=", "PGPASSWORD=", "PGDATABASE=warm_spare_drill_"] {
        assert!(environment.contains(name), "{name}: {environment}");
    }
    let server = noted(&site.dir.path().join("note.pid")).await;
    assert!(!alive(server), "the command is ended");
    assert_eq!(clones(&site).await?, Vec::<String>::new());
    let records = records(&site).await?;
    assert!(
        matches!(
            records[..],
            [(true, Some(_), None), (true, Some(_), Some(_))]
        ),
        "{records:?}"
    );
    site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_artifact_and_a_failing_command_fail_the_drill() -> Result<()> {
    let (site, packages) = copied("damaged").await?;
    let output = site.warm_spare(&["drill", "--exec", "exit 7"]).await;
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.stdout.contains("FAILED command"), "{output}");
    site.spare.put(&packages[0].key, "not its bytes").await?;
    let output = site.warm_spare(&["drill", "--sample", "all"]).await;
    assert_eq!(output.code, Some(1), "{output}");
    assert!(
        output.stdout.contains("FAILED artifacts") && output.stdout.contains(&packages[0].key),
        "{output}"
    );
    assert!(output.stdout.contains("ok write"), "{output}");
    assert_eq!(clones(&site).await?, Vec::<String>::new());
    assert_eq!(records(&site).await?.len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_drill_leaves_the_next_one_removes() -> Result<()> {
    let (site, _) = copied("killed").await?;
    let note = site.dir.path().join("pid");
    let script = format!("echo $$ > {}; sleep 100", note.display());
    let drill = ["drill", "--exec", &script, "--url", "http://127.0.0.1:1/"];
    let running = site.spawn(&drill);
    let command = noted(&note).await;
    let left = clones(&site).await?;
    assert_eq!(left.len(), 1);
    let config = warm_spare::config::load(&site.config_file())?;
    let state = LocalCluster::of(&config).state().await?;
    assert!(
        remove_drill_leftovers(&state).await?.is_empty(),
        "a drill under way is left alone"
    );
    // One at a time.
    let output = site.warm_spare(&["drill"]).await;
    assert_eq!(output.code, Some(4), "{output}");
    running.kill9()?;
    assert_eq!(clones(&site).await?.len(), 1, "it could not tidy up");
    wait_until("its command ends with it", SOON, || async {
        match alive(command) {
            true => Err("it lives".into()),
            false => Ok(()),
        }
    })
    .await;
    site.warm_spare(&["drill", "--sample", "1"]).await.ok();
    assert_eq!(clones(&site).await?, Vec::<String>::new());

    std::fs::remove_file(&note)?;
    let running = site.spawn(&drill);
    noted(&note).await;
    let left = clones(&site).await?;
    running.kill9()?;
    wait_until("as a starting service removes it", SOON, || async {
        let removed = remove_drill_leftovers(&state).await?;
        (removed == left)
            .then_some(())
            .ok_or("its lock is held".into())
    })
    .await;
    assert_eq!(clones(&site).await?, Vec::<String>::new());

    std::fs::remove_file(&note)?;
    let running = site.spawn(&drill);
    let command = noted(&note).await;
    running.terminate();
    let output = running.wait(SOON).await?;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(!alive(command), "the command is ended");
    assert_eq!(
        clones(&site).await?,
        Vec::<String>::new(),
        "told to end, it tidies up"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_following_service_goes_on_under_a_drill() -> Result<()> {
    let site = prepared("under").await?;
    let mut factory = Factory::seeded();
    factory.fill(&site.primary, 5).await?;
    let service = followed(&site, "").await?;
    let output = site.warm_spare(&["drill", "--exec", "true"]).await.ok();
    assert!(output.stdout.contains("ok command"), "{output}");
    factory
        .package(&site.primary, Spec::new("core", "later", "1"))
        .await?;
    until_equal(&site).await?;
    assert_eq!(
        support::follow::copies(&service).await?,
        1,
        "and by no new copy"
    );
    service.stop().await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_first_copy_there_is_nothing_to_take_over_with() -> Result<()> {
    let site = site("empty").await;
    assert_eq!(site.warm_spare(&["drill"]).await.code, Some(3));
    assert_eq!(
        site.warm_spare(&["drill", "--url", "ftp://x"]).await.code,
        Some(2)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_generations_are_listed_and_dropped_by_name_alone() -> Result<()> {
    let (site, _) = copied("kept").await?;
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    let list = async || {
        site.warm_spare(&["--json", "generations", "list"])
            .await
            .ok()
            .json()
    };
    let listed = list().await;
    let kept = listed["generations"].as_array().expect("a list");
    assert_eq!(kept.len(), 1, "{listed:#}");
    assert!(kept[0]["bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    let name = kept[0]["name"].as_str().expect("a name");
    for not in ["builder", "postgres", "warm_spare", "no_such"] {
        let output = site.warm_spare(&["generations", "drop", not]).await;
        assert_eq!(output.code, Some(4), "{not}: {output}");
    }
    let state = site.spare.pg.conn("warm_spare").await?;
    state
        .batch_execute("UPDATE generation SET pinned = true")
        .await?;
    let output = site.warm_spare(&["generations", "drop", name]).await;
    assert_eq!(output.code, Some(4), "{output}");
    assert!(output.stderr.contains("--pinned"), "{output}");
    let drop = ["generations", "drop", name, "--pinned"];
    site.warm_spare(&drop).await.ok();
    assert!(!site.spare.pg.has_database(name).await?);
    assert!(site.spare.pg.has_database("builder").await?);
    assert_eq!(list().await["generations"], serde_json::json!([]));
    Ok(())
}
