//! The package under the real Supervisor: loaded by `hab svc load`, steered by `hab config apply`, its binds those of real
//! datastores and artifact stores. Skipped, loudly, where there is no `hab` (`support::supervisor` says what is wanted).

mod support;

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::follow::{events, logical};
use support::process::{alive, free_port};
use support::service::{SOON, get};
use support::supervisor::{Programs, Supervisor};
use support::{Factory, Result, Site, Spec, content, skip, wait_until};

const GROUP: &str = "warm-spare.dc2";
/// What an operator waits for a gossiped change, by the issue.
const IN_FORCE: Duration = Duration::from_secs(2);

/// Three Supervisors in one ring: the primary's node, the spare's, and the one on which ours is loaded.
struct World {
    site: Site,
    primary: Supervisor,
    stores: Supervisor,
    ours: Supervisor,
    /// Where the service under test answers.
    port: u16,
    version: u64,
}

/// None: there is no Supervisor here, and that was said.
async fn world(name: &str) -> Result<Option<World>> {
    if let Err(why) = Programs::find() {
        skip(&format!("the suite under the Supervisor: {why} (hab)"));
        return Ok(None);
    }
    let builder = Site::builder(name).primary(logical()).own_stores();
    let site = builder.start().await?;
    Factory::seeded().fill(&site.primary, 5).await?;
    support::follow::prepare(&site).await;
    let mut primary = Supervisor::new()?;
    primary.start(&[]).await?;
    let mut stores = Supervisor::new()?;
    stores.start(&[&primary]).await?;
    let mut ours = Supervisor::new()?;
    ours.start(&[&primary, &stores]).await?;
    primary.load_datastore(&site.primary.pg, "dc1").await?;
    primary
        .load_minio(&site.primary.minio, &site.primary.bucket, "dc1")
        .await?;
    stores.load_datastore(&site.spare.pg, "dc2").await?;
    stores
        .load_minio(&site.spare.minio, &site.spare.bucket, "dc2")
        .await?;
    let port = free_port()?;
    let world = World {
        site,
        primary,
        stores,
        ours,
        port,
        version: 0,
    };
    prepare_node(&world, &world.ours, port)?;
    Ok(Some(world))
}

/// builder-api's rendered configuration, as it is on a node with Builder's own services.
fn write_builder_api(world: &World) -> Result<String> {
    let spare = &world.site.spare;
    world.ours.write_secret(
        "builder-api.toml",
        &format!(
            r#"
            [datastore]
            host = "127.0.0.1"
            port = {}
            user = "hab"
            password = "{}"
            database = "builder"
            [s3]
            backend = "minio"
            endpoint = "{}"
            bucket_name = "{}"
            key_id = "{}"
            secret_key = "{}""#,
            spare.pg.port(),
            spare.pg.password(),
            spare.minio.endpoint(),
            spare.bucket,
            spare.minio.access_key(),
            spare.minio.secret_key(),
        ),
    )
}

/// What lasts, and so stands in user.toml: where secrets are, and nothing that has an address but our own port.
fn prepare_node(world: &World, node: &Supervisor, port: u16) -> Result<()> {
    let (spare, primary) = (&world.site.spare, &world.site.primary);
    let secret = |name: &str, text: &str| node.write_secret(name, text);
    let text = format!(
        r#"
        http.port = {port}
        local.builder_api_config = ""
        verify.schedule = ""
        [local.datastore]
        password_file = "{}"
        [local.s3]
        key_id_file = "{}"
        secret_key_file = "{}"
        [peer.datastore]
        password_file = "{}"
        [peer.s3]
        key_id_file = "{}"
        secret_key_file = "{}"
        [replication]
        interval = "1s"
        gate_grace = "1s""#,
        secret("local-password", spare.pg.password())?,
        secret("local-id", spare.minio.access_key())?,
        secret("local-key", spare.minio.secret_key())?,
        secret("peer-password", primary.pg.password())?,
        secret("peer-id", primary.minio.access_key())?,
        secret("peer-key", primary.minio.secret_key())?,
    );
    node.write_user_toml("warm-spare", &text)?;
    node.lay_out_warm_spare()
}

async fn load(node: &Supervisor, topology: &str) {
    let binds = [
        "datastore:builder-datastore.dc2",
        "minio:builder-minio.dc2",
        "peer-datastore:builder-datastore.dc1",
        "peer-minio:builder-minio.dc1",
    ];
    let mut arguments = vec!["svc", "load", "site/warm-spare", "--group", "dc2"];
    arguments.extend(["--binding-mode", "relaxed", "--topology", topology]);
    for bind in &binds {
        arguments.extend(["--bind", bind]);
    }
    node.hab(&arguments).await.ok();
}

async fn status_at(port: u16) -> Result<Value> {
    Ok(get(port, "/status").await?.json())
}

async fn until_at(port: u16, what: &str, so: impl Fn(&Value) -> bool) -> Value {
    wait_until(what, SOON, || async {
        let status = status_at(port).await?;
        match so(&status) {
            true => Ok(status),
            false => Err(format!("{status:#}").into()),
        }
    })
    .await
}

fn follows(status: &Value) -> bool {
    status["state"] == "following"
        && status["replication"]["mode"] == "stream"
        && status["lag"]["bytes"] == 0
}

impl World {
    async fn until(&self, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        until_at(self.port, what, so).await
    }

    async fn apply(&mut self, text: &str) -> Instant {
        self.version += 1;
        self.ours.apply(GROUP, self.version, text).await;
        Instant::now()
    }

    /// One more package on the primary, and everything of it here.
    async fn one_more(&self, name: &str) -> Result<()> {
        let mut factory = Factory::seeded();
        let package = factory
            .package(&self.site.primary, Spec::new("core", name, "1"))
            .await?;
        self.equal().await?;
        assert!(self.site.spare.get(&package.key).await?.is_some());
        Ok(())
    }

    async fn equal(&self) -> Result<()> {
        let expected = content(&self.site.primary).await?;
        wait_until("the primary's rows are here", SOON, || async {
            let found = content(&self.site.spare).await?;
            (found == expected).then_some(()).ok_or("other rows".into())
        })
        .await;
        Ok(())
    }

    async fn baselines(&self) -> Result<String> {
        let page = get(self.port, "/metrics").await?.text;
        let lines = page
            .lines()
            .filter(|l| l.starts_with("warm_spare_baselines_total"));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }
}

fn say(step: &str, took: Duration) {
    println!("seen: {step}: {:.2} s", took.as_secs_f64());
}

/// Loaded, told its role by gossip, and following by the addresses of four binds.
async fn following(name: &str) -> Result<Option<World>> {
    let Some(mut world) = world(name).await? else {
        return Ok(None);
    };
    let began = Instant::now();
    load(&world.ours, "standalone").await;
    let idle = world
        .until("the binds are there and no role is", |status| {
            status["hold"]["reason"] == "role_unset"
        })
        .await;
    assert_eq!(idle["local"]["datastore"]["source"], "bind", "{idle:#}");
    say("load, to holding role_unset", began.elapsed());
    let told = world.apply("role = \"spare\"").await;
    let status = world.until("it follows", follows).await;
    say("role = spare by gossip, to following", told.elapsed());
    for side in ["local", "peer"] {
        for store in ["datastore", "s3"] {
            assert_eq!(
                status[side][store]["source"], "bind",
                "{side} {store}: {status:#}"
            );
        }
    }
    Ok(Some(world))
}

#[tokio::test(flavor = "multi_thread")]
async fn gossip_steers_it_without_a_restart_and_a_dropped_key_hurts_nothing() -> Result<()> {
    let Some(mut world) = following("gossip").await? else {
        return Ok(());
    };
    let pid = world.ours.pid("warm-spare")?;
    let copies = world.baselines().await?;
    let environ = fs::read(format!("/proc/{pid}/environ"))?;
    assert!(!String::from_utf8_lossy(&environ).contains("hunter2"));
    world.one_more("first").await?;
    wait_until("the Supervisor's health", SOON, || async {
        let (code, body) = world.ours.health("warm-spare", "dc2").await?;
        let good = code == 200 && body["status"] == "OK";
        good.then_some(())
            .ok_or_else(|| format!("{code} {body}").into())
    })
    .await;

    // Good, and the role is dropped by it: the one on record stays.
    let told = world.apply("site = \"one\"\nlog_level = \"debug\"").await;
    let status = world.until("site", |status| status["site"] == "one").await;
    let took = told.elapsed();
    say("a good apply, in force", took);
    assert!(took < IN_FORCE, "{took:?}");
    assert_eq!(status["role"]["wanted"], "keep");
    assert_eq!(status["role"]["actual"], "spare");
    world.one_more("second").await?;

    // Bad: refused by name, and what was in force stays.
    let told = world
        .apply("site = \"two\"\nreplication.rop = \"1h\"")
        .await;
    let status = world
        .until("refused", |status| status["config"]["valid"] == false)
        .await;
    say("a bad apply, refused", told.elapsed());
    assert_eq!(status["site"], "one", "{status:#}");
    assert!(
        status["config"]["errors"][0]
            .to_string()
            .contains("replication.rop"),
        "{status:#}"
    );
    wait_until("the Supervisor says what is wrong", SOON, || async {
        let (_, body) = world.ours.health("warm-spare", "dc2").await?;
        let said =
            body["status"] == "WARNING" && body["stdout"].to_string().contains("replication.rop");
        said.then_some(()).ok_or_else(|| body.to_string().into())
    })
    .await;
    world.one_more("third").await?;

    // Paused; rows meanwhile; the next apply drops the pause, and nothing was lost.
    world.apply("paused = true").await;
    world
        .until("paused", |status| status["hold"]["reason"] == "paused")
        .await;
    let before = content(&world.site.spare).await?;
    let mut factory = Factory::seeded();
    for name in ["fourth", "fifth"] {
        factory
            .package(&world.site.primary, Spec::new("core", name, "1"))
            .await?;
    }
    assert_eq!(
        content(&world.site.spare).await?,
        before,
        "applied while paused"
    );
    let told = world.apply("site = \"three\"").await;
    world
        .until("it follows again", |s| follows(s) && s["site"] == "three")
        .await;
    world.equal().await?;
    say("the pause dropped, and caught up", told.elapsed());

    // Applied empty: everything is back at user.toml and the package's defaults.
    world.apply("").await;
    let status = world.until("no site", |status| status["site"] == "").await;
    assert_eq!(status["role"]["actual"], "spare", "{status:#}");
    world.one_more("sixth").await?;
    assert_eq!(world.ours.pid("warm-spare")?, pid, "it was restarted");
    assert_eq!(world.baselines().await?, copies, "it copied anew");
    Ok(())
}

/// Applied and dropped again, one after the other: no restart, no copy, no other server, no other role.
#[tokio::test(flavor = "multi_thread")]
async fn every_key_may_be_applied_and_dropped() -> Result<()> {
    let Some(mut world) = following("each-key").await? else {
        return Ok(());
    };
    let pid = world.ours.pid("warm-spare")?;
    let copies = world.baselines().await?;
    let texts = [
        "force_epoch = 7",
        "quiet_until = \"2030-01-01T00:00:00Z\"",
        "paused_until = \"2020-01-01T00:00:00Z\"",
        "change = \"CHG-1\"",
        "log_format = \"json\"",
        "replication.interval = \"2s\"",
        "replication.lag_warn = \"2m\"",
        "replication.rpo = \"1h\"",
        "replication.schedule = \"* * * * *\"",
        "replication.jobs = 3",
        "replication.copies = 4",
        "replication.buffer = \"128MiB\"",
        "replication.bandwidth_limit = \"50MB/s\"",
        "replication.gate_grace = \"2s\"",
        "replication.retry_missing = \"1m\"",
        "replication.artifact_retention = \"30d\"",
        "replication.wal_hold_limit = \"5GB\"",
        "replication.wal_unbounded = true",
        "replication.keep_generations = 9",
        "fuse.max_percent = 50",
        "fuse.min_count = 1",
        "fuse.window = \"2h\"",
        "fuse.approve = \"f-1\"",
        "verify.schedule = \"0 4 * * *\"",
        "verify.deep = true",
        "http.port = 1",
        "http.listen = \"::1\"",
        "local.datastore.ssl_mode = \"disable\"",
        "peer.datastore.user = \"hab\"",
        "peer.datastore.host = \"127.0.0.1\"",
        // Bad ones, which are refused: another kind of value, a table's place, nobody's key.
        "peer = 1",
        "local.s3.endpoint = \"minio\"",
        "[replication]\nmode = [1]",
        "x = { y = 1 }",
    ];
    for (number, text) in texts.iter().enumerate() {
        let site = format!("apply {number}");
        world.apply(&format!("site = \"{site}\"\n{text}")).await;
        wait_until("it is seen", SOON, || async {
            let status = status_at(world.port).await?;
            let seen = status["site"] == site || status["config"]["valid"] == false;
            seen.then_some(())
                .ok_or_else(|| format!("{text}: {status:#}").into())
        })
        .await;
        // Dropped.
        let site = format!("after {number}");
        world.apply(&format!("site = \"{site}\"")).await;
        let status = world.until(text, |status| status["site"] == site).await;
        assert_eq!(status["role"]["actual"], "spare", "{text}");
        assert_eq!(status["role"]["epoch"], 1, "{text}");
    }
    world.until("it follows", follows).await;
    world.one_more("after-all").await?;
    assert_eq!(world.ours.pid("warm-spare")?, pid, "it was restarted");
    assert_eq!(world.baselines().await?, copies, "it copied anew");
    Ok(())
}

/// Builder's own word goes before the binds, and nothing of the local side is configured.
#[tokio::test(flavor = "multi_thread")]
async fn a_stock_node_needs_nothing_of_the_local_side() -> Result<()> {
    let Some(mut world) = world("stock").await? else {
        return Ok(());
    };
    let api = write_builder_api(&world)?;
    let mut user: toml::Table = world.ours.user_toml("warm-spare")?.parse()?;
    // In its usual place it would not even be named; this Supervisor's root is another.
    let local = toml::Table::from_iter([("builder_api_config".into(), api.into())]);
    user.insert("local".into(), local.into());
    user.insert("role".into(), "spare".into());
    world
        .ours
        .write_user_toml("warm-spare", &user.to_string())?;
    load(&world.ours, "standalone").await;
    let status = world.until("it follows", follows).await;
    assert_eq!(status["local"]["datastore"]["source"], "builder-api");
    assert_eq!(status["local"]["s3"]["source"], "builder-api");
    assert_eq!(status["peer"]["datastore"]["source"], "bind");
    world.apply("role = \"keep\"").await;
    world
        .until("keep", |s| follows(s) && s["role"]["wanted"] == "keep")
        .await;
    world.one_more("stock").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bind_that_vanishes_and_returns_is_no_restart_and_no_other_server() -> Result<()> {
    let Some(mut world) = following("bind").await? else {
        return Ok(());
    };
    let pid = world.ours.pid("warm-spare")?;
    let copies = world.baselines().await?;
    let config = world.ours.svc("warm-spare").join("config/config.toml");
    let bound = |name: &str| -> Result<bool> {
        Ok(fs::read_to_string(&config)?.contains(&format!("[bind.{name}]")))
    };
    for name in ["datastore", "minio", "peer-datastore", "peer-minio"] {
        assert!(bound(name)?, "{name}");
    }
    // Its node goes down, servers and all.
    let began = Instant::now();
    world.stores.stop().await?;
    wait_until(
        "the binds are gone from the configuration",
        SOON,
        || async {
            let gone = !bound("datastore")? && !bound("minio")?;
            gone.then_some(()).ok_or("still there".into())
        },
    )
    .await;
    say("a node stopped, to its binds gone", began.elapsed());
    let status = world
        .until("it holds", |status| {
            status["hold"]["reason"] == "local_unreachable"
        })
        .await;
    let address = format!("127.0.0.1:{}", world.site.spare.pg.port());
    assert!(
        status["local"]["datastore"]["address"]
            .to_string()
            .contains(&address),
        "{status:#}"
    );
    assert_eq!(status["config"]["valid"], true, "{status:#}");
    assert_eq!(world.ours.pid("warm-spare")?, pid);

    let began = Instant::now();
    let World {
        stores,
        primary,
        ours,
        ..
    } = &mut world;
    stores.start(&[primary, ours]).await?;
    wait_until("the binds are back", SOON, || async {
        let back = bound("datastore")? && bound("minio")?;
        back.then_some(()).ok_or("not yet".into())
    })
    .await;
    world.until("it follows", follows).await;
    say("the node started, to following", began.elapsed());
    world.one_more("after").await?;
    assert_eq!(world.ours.pid("warm-spare")?, pid, "it was restarted");
    assert_eq!(world.baselines().await?, copies, "it copied anew");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_on_after_every_kind_of_end() -> Result<()> {
    let Some(mut world) = following("ends").await? else {
        return Ok(());
    };
    let expected = world.until("its epoch", |s| s["role"]["epoch"] == 1).await;
    let pid = world.ours.pid("warm-spare")?;

    // A secret by file upload: no restart; and the configuration may name it.
    let secret = world
        .ours
        .write_secret("uploaded", world.site.primary.pg.password())?;
    world
        .ours
        .hab(&["file", "upload", GROUP, "1", &secret])
        .await
        .ok();
    let file = world.ours.svc("warm-spare").join("files/uploaded");
    wait_until("the file is there", SOON, || async {
        Ok(fs::metadata(&file).map(drop)?)
    })
    .await;
    let text = format!(
        "site = \"file\"\npeer.datastore.password_file = \"{}\"",
        file.display()
    );
    world.apply(&text).await;
    world
        .until("it follows by the uploaded secret", |s| {
            follows(s) && s["site"] == "file"
        })
        .await;
    assert_eq!(world.ours.pid("warm-spare")?, pid, "an upload restarted it");

    // A service restart.
    let began = Instant::now();
    world
        .ours
        .hab(&["svc", "stop", "site/warm-spare"])
        .await
        .ok();
    wait_until("it ends", SOON, || async {
        (!alive(pid)).then_some(()).ok_or("alive".into())
    })
    .await;
    say("hab svc stop, to its end", began.elapsed());
    world
        .ours
        .hab(&["svc", "start", "site/warm-spare"])
        .await
        .ok();
    world.until("it follows", follows).await;
    world.one_more("restarted").await?;

    // Killed.
    let began = Instant::now();
    let pid = world.ours.pid("warm-spare")?;
    std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()?;
    let next = wait_until("the Supervisor starts it again", SOON, || async {
        let next = world.ours.pid("warm-spare")?;
        (next != pid).then_some(next).ok_or("the same".into())
    })
    .await;
    world.until("it follows", follows).await;
    say("kill -9 of the service, to following", began.elapsed());
    world.one_more("killed").await?;

    world.apply("").await;
    world
        .until("no site", |s| follows(s) && s["site"] == "")
        .await;
    // The Supervisor alone is restarted; the Launcher keeps our process, and the new one takes it over.
    world.ours.hab(&["sup", "restart"]).await.ok();
    wait_until("it is down", SOON, || async {
        let up = world.ours.ask("/services").await.is_ok();
        (!up).then_some(()).ok_or("still up".into())
    })
    .await;
    // Nobody watches this file now.
    let lasting = world.ours.user_toml("warm-spare")?;
    world
        .ours
        .write_user_toml("warm-spare", &format!("site = \"while down\"\n{lasting}"))?;
    wait_until("the Launcher starts it again", SOON, || async {
        let again = world.ours.said("Starting http-gateway") > 1;
        let pid = world.ours.pid("warm-spare")?;
        world.ours.ask("/services").await?;
        (again && pid == next).then_some(()).ok_or("not yet".into())
    })
    .await;
    world
        .until("what was changed meanwhile is in force", |s| {
            s["site"] == "while down"
        })
        .await;
    world.apply("site = \"again\"").await;
    world
        .until("gossip arrives", |s| follows(s) && s["site"] == "again")
        .await;
    assert_eq!(world.ours.pid("warm-spare")?, next, "it was not reattached");

    // All of it is stopped and started, as a reboot does.
    let began = Instant::now();
    world.ours.stop().await?;
    say("the Supervisor stopped, services and all", began.elapsed());
    assert!(!alive(next));
    let World {
        ours,
        primary,
        stores,
        ..
    } = &mut world;
    ours.start(&[primary, stores]).await?;
    world.until("it follows", follows).await;
    say("and started, to following", began.elapsed());
    world.one_more("rebooted").await?;

    let pid = world.ours.pid("warm-spare")?;
    world
        .ours
        .hab(&["svc", "unload", "site/warm-spare"])
        .await
        .ok();
    wait_until("it is gone", SOON, || async {
        let listed = world.ours.ask("/services").await?.text;
        let gone = !alive(pid) && !listed.contains("warm-spare");
        gone.then_some(()).ok_or("still there".into())
    })
    .await;
    assert_eq!(expected["role"]["epoch"], 1);
    world.site.warm_spare(&["verify", "--deep"]).await.ok();
    Ok(())
}

/// Both topologies: exactly one works, by the lock; the other says that it stands by, and takes over.
async fn one_works(topology: &str) -> Result<()> {
    let Some(mut world) = world(&format!("nodes-{topology}")).await? else {
        return Ok(());
    };
    let mut second = Supervisor::new()?;
    second
        .start(&[&world.primary, &world.stores, &world.ours])
        .await?;
    let port = free_port()?;
    prepare_node(&world, &second, port)?;
    load(&world.ours, topology).await;
    load(&second, topology).await;
    world.apply("role = \"spare\"").await;
    world
        .until("the first answers", |s| s["role"]["wanted"] == "spare")
        .await;
    until_at(port, "the second answers", |s| {
        s["role"]["wanted"] == "spare"
    })
    .await;
    let (working, waiting) = wait_until("one works and one waits", SOON, || async {
        let (one, two) = (status_at(world.port).await?, status_at(port).await?);
        match (follows(&one), follows(&two)) {
            (true, false) if two["state"] == "standby" => Ok((world.port, port)),
            (false, true) if one["state"] == "standby" => Ok((port, world.port)),
            _ => Err(format!("{one:#}\n{two:#}").into()),
        }
    })
    .await;
    let waits = status_at(waiting).await?;
    assert_eq!(waits["active"], false, "{waits:#}");
    let health = get(waiting, "/health").await?.json();
    assert!(health["line"].to_string().contains("standby"), "{health:#}");
    world.one_more("by-one").await?;

    let began = Instant::now();
    let loser = if working == port {
        &second
    } else {
        &world.ours
    };
    loser.hab(&["svc", "stop", "site/warm-spare"]).await.ok();
    until_at(waiting, "the other takes over", follows).await;
    say(
        &format!("{topology}: the working node stopped, to the other following"),
        began.elapsed(),
    );
    world.one_more("by-the-other").await?;
    let status = status_at(waiting).await?;
    assert!(events(&status, "gap").is_empty(), "{status:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_standalone_one_works() -> Result<()> {
    one_works("standalone").await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_with_a_leader_one_works() -> Result<()> {
    one_works("leader").await
}
