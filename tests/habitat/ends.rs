//! The package under the real Supervisor when something ends: a bound node, the service, the Supervisor, one node of two.
//! Skipped, loudly, where there is no `hab` (`support::supervisor` says what is wanted).

use std::fs;
use std::time::Instant;

use support::follow::events;
use support::ports::free_port;
use support::process::alive;
use support::service::{SOON, get};
use support::world::{
    GROUP, World, following, follows, load, prepare_node, say, status_at, until_at, world,
};
use support::{Result, Supervisor, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn a_bind_that_vanishes_and_returns_is_no_restart_and_no_other_server() -> Result<()> {
    let Some(mut world) = following("bind").await? else {
        return Ok(());
    };
    let pid = world.ours.pid("warm-spare")?;
    let copies = world.baselines().await?;
    let config = world.ours.svc("warm-spare").join("config/config.toml");
    let bound = |name: &str| -> Result<bool> {
        let text = fs::read_to_string(&config)?;
        Ok(text
            .lines()
            .any(|line| line.starts_with(&format!("{name} = {{"))))
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
