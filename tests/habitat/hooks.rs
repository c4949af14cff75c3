//! The hooks as the Supervisor renders them, run under bash with the real program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use support::habitat::Rendered;
use support::ports::free_port;
use support::process::alive;
use support::service::SOON;
use support::{Output, Running, wait_until};

/// Two sides of which none answers: the service stays up and says so.
fn rendered(port: u16) -> Rendered {
    let mut rendered = Rendered::new(Path::new(env!("CARGO_BIN_EXE_warm-spare")));
    rendered.set(&format!(
        r#"
        role = "spare"
        http.port = {port}
        local.builder_api_config = ""
        [local.datastore]
        host = "127.0.0.1"
        port = 1
        [local.s3]
        endpoint = "http://127.0.0.1:1"
        bucket_name = "here"
        key_id = "x"
        secret_key = "hunter2"
        [peer.datastore]
        host = "127.0.0.1"
        port = 1
        [peer.s3]
        endpoint = "http://127.0.0.1:1"
        key_id = "x"
        secret_key = "hunter2""#
    ));
    rendered
}

async fn status(port: u16) -> support::Result<serde_json::Value> {
    Ok(support::service::get(port, "/status").await?.json())
}

async fn started(rendered: &Rendered, port: u16) -> Running {
    rendered.write();
    rendered.run_hook("init").await.ok();
    let running = rendered.start();
    wait_until("it answers", SOON, || status(port)).await;
    running
}

fn one_line(ended: &Output) -> &str {
    assert_eq!(ended.stderr, "", "{ended}");
    let mut lines = ended.stdout.lines();
    let line = lines.next().expect("a line");
    assert_eq!(lines.next(), None, "{ended}");
    line
}

#[tokio::test]
async fn the_service_knows_no_secret_of_the_supervisors_environment_and_has_a_home() {
    let port = free_port().expect("a port");
    let rendered = rendered(port);
    let running = started(&rendered, port).await;
    let environ = fs::read(format!("/proc/{}/environ", running.pid())).expect("its environment");
    let environ = String::from_utf8_lossy(&environ).replace('\0', "\n");
    let environ = format!("\n{environ}");
    assert!(
        !environ.contains("hunter2") && !environ.contains("HAB_"),
        "{environ}"
    );
    let home = format!("\nHOME={}\n", rendered.svc().join("data").display());
    let scratch = format!("\nTMPDIR={}\n", rendered.svc().join("var").display());
    assert!(
        environ.contains(&home) && environ.contains(&scratch),
        "{environ}"
    );
    // The pid that the Launcher knows is the service's own: signals reach it.
    let name = fs::read_to_string(format!("/proc/{}/comm", running.pid())).expect("its name");
    assert_eq!(name.trim(), "warm-spare");
    running.terminate();
    let ended = running.wait(Duration::from_secs(8)).await.expect("it ends");
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(ended.stderr, "", "everything goes to the one stream");
    assert!(ended.stdout.contains("stopped"), "{ended}");
}

#[tokio::test]
async fn a_changed_configuration_is_in_force_by_the_reconfigure_hook_and_a_bad_one_is_refused() {
    let port = free_port().expect("a port");
    let mut rendered = rendered(port);
    let running = started(&rendered, port).await;
    let until = async |site: &str, valid: bool| {
        let asked = Instant::now();
        wait_until(site, SOON, || async {
            let status = status(port).await?;
            let there = status["site"] == site && status["config"]["valid"] == valid;
            there
                .then_some(())
                .ok_or_else(|| format!("{status:#}").into())
        })
        .await;
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(2), "{site}: {took:?}");
    };
    rendered.set("site = \"one\"").write();
    rendered.run_hook("reconfigure").await.ok();
    until("one", true).await;
    rendered
        .set("site = \"two\"\nfuse.window = \"soon\"")
        .write();
    rendered.run_hook("reconfigure").await.ok();
    until("one", false).await;
    rendered.set("fuse.window = \"2h\"").write();
    rendered.run_hook("reconfigure").await.ok();
    until("two", true).await;
    assert!(alive(running.pid()));
}

/// After `hab sup restart` nobody calls the reconfigure hook for what was changed meanwhile.
#[tokio::test]
async fn the_health_check_notices_a_configuration_that_nobody_spoke_of() {
    let port = free_port().expect("a port");
    let mut rendered = rendered(port);
    let _running = started(&rendered, port).await;
    rendered.set("site = \"unspoken\"").write();
    rendered.run_hook("health-check").await;
    wait_until("it is in force", SOON, || async {
        let there = status(port).await?["site"] == "unspoken";
        there.then_some(()).ok_or("not yet".into())
    })
    .await;
    // And does not ask for it again and again.
    let read = rendered.svc().join("var/config-read");
    let before = fs::metadata(&read)
        .expect("a time")
        .modified()
        .expect("a time");
    rendered.run_hook("health-check").await;
    let after = fs::metadata(&read)
        .expect("a time")
        .modified()
        .expect("a time");
    assert_eq!(before, after);
}

const A_WHILE: Duration = Duration::from_millis(300);

/// Takes the service's place: SIGHUP ends it.
fn decoy(rendered: &Rendered) -> Running {
    let program = rendered.dir.path().join("warm-spare");
    fs::copy("/bin/sleep", &program).expect("a copy");
    let mut command = support::process::bound(&program);
    command.arg("600");
    let running = Running::start(command).expect("it starts");
    fs::write(rendered.pid_file(), running.pid().to_string()).expect("it is written");
    running
}

/// Waits for the signal for as long as it may take; or long enough to see that none came.
async fn signalled(rendered: &Rendered, limit: Duration) -> bool {
    let decoy = decoy(rendered);
    let named = || fs::read_to_string(format!("/proc/{}/comm", decoy.pid()));
    wait_until("its name", SOON, || async {
        let there = named()?.trim() == "warm-spare";
        there.then_some(()).ok_or("not yet".into())
    })
    .await;
    let ended = rendered.run_hook("health-check").await;
    assert!(one_line(&ended).starts_with("UNKNOWN: "), "{ended}");
    decoy.wait(limit).await.is_ok()
}

/// Neither a wrong clock nor a stamp that cannot be written makes every check a wish to read the configuration again.
#[tokio::test]
async fn the_health_check_has_a_configuration_read_once() {
    let rendered = rendered(1);
    rendered.write();
    let config = fs::File::options()
        .write(true)
        .open(rendered.config_file())
        .expect("the configuration");
    let hour = Duration::from_secs(3600);
    let now = std::time::SystemTime::now();
    for time in [now, now + 1000 * hour, now - 1000 * hour] {
        config.set_modified(time).expect("its time");
        assert!(signalled(&rendered, SOON).await, "{time:?}");
        assert!(!signalled(&rendered, A_WHILE).await, "{time:?}: again");
    }
    // Left by an operator.
    let stamp = rendered.svc().join("var/config-read");
    fs::remove_file(&stamp).expect("the stamp");
    fs::write(&stamp, "").expect("another");
    fs::set_permissions(&stamp, fs::Permissions::from_mode(0o400)).expect("its mode");
    assert!(signalled(&rendered, SOON).await);
    assert!(!signalled(&rendered, A_WHILE).await);

    config.set_modified(now).expect("its time");
    fs::remove_dir_all(rendered.svc().join("var")).expect("the directory");
    for _ in 0..2 {
        assert!(!signalled(&rendered, A_WHILE).await, "it cannot be noted");
    }
}

/// A configuration was refused for want of a secret, which is uploaded then.
#[tokio::test]
async fn an_uploaded_file_has_a_refused_configuration_read_again() {
    let port = free_port().expect("a port");
    let mut rendered = rendered(port);
    let running = started(&rendered, port).await;
    let secret = rendered.svc().join("files/peer");
    let valid = async |wanted: bool| {
        wait_until("the configuration", SOON, || async {
            let status = status(port).await?;
            let there = status["config"]["valid"] == wanted;
            there
                .then_some(())
                .ok_or_else(|| format!("{status:#}").into())
        })
        .await;
    };
    let set = format!("peer.datastore.password_file = \"{}\"", secret.display());
    rendered.set(&set).write();
    rendered.run_hook("reconfigure").await.ok();
    valid(false).await;
    support::site::write_secret(&secret, "hunter2").expect("it is written");
    let ended = rendered.run_hook("file-updated").await.ok();
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""));
    valid(true).await;
    assert!(alive(running.pid()));
}

/// The Supervisor calls it while the process is still a shell, while it begins, and again and again.
#[tokio::test]
async fn a_reconfigure_in_the_first_moment_does_no_harm_and_is_not_lost() {
    for round in 0..10 {
        let port = free_port().expect("a port");
        let mut rendered = rendered(port);
        rendered.write();
        let running = rendered.start();
        rendered.set(&format!("site = \"round {round}\"")).write();
        wait_until("the last one is in force", SOON, || async {
            let ended = rendered.run_hook("reconfigure").await.ok();
            assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""));
            assert!(alive(running.pid()), "it was ended");
            let status = status(port).await?;
            let there = status["site"] == format!("round {round}");
            there.then_some(()).ok_or_else(|| "not yet".into())
        })
        .await;
    }
}

/// Until it catches the signal itself, which the test above meets only now and then.
#[tokio::test]
async fn the_program_is_started_with_the_signal_ignored() {
    let rendered = rendered(1);
    rendered.write();
    replace_program(&rendered, "#!/bin/sh\ngrep SigIgn /proc/$$/status\n", 0o755);
    let ended = rendered.run_hook("run").await.ok();
    let mask = one_line(&ended).rsplit('\t').next().expect("a mask");
    let mask = u64::from_str_radix(mask, 16).expect("hexadecimal");
    assert_eq!(mask & 1, 1, "{ended}");
}

fn replace_program(rendered: &Rendered, text: &str, mode: u32) {
    let place = rendered.package.join("bin/warm-spare");
    fs::remove_file(&place).expect("the link");
    fs::write(&place, text).expect("it is written");
    fs::set_permissions(&place, fs::Permissions::from_mode(mode)).expect("its mode");
}

#[tokio::test]
async fn a_reconfigure_without_a_service_touches_nobody() {
    let rendered = rendered(1);
    rendered.write();
    let quiet = async || {
        let ended = rendered.run_hook("reconfigure").await.ok();
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""));
    };
    quiet().await;
    for pid in ["", "none", "999999999"] {
        fs::write(rendered.pid_file(), pid).expect("it is written");
        quiet().await;
    }
    // The number is another's by now, which SIGHUP would end.
    let mut command = support::process::bound("sleep");
    command.arg("600");
    let other = Running::start(command).expect("it starts");
    fs::write(rendered.pid_file(), other.pid().to_string()).expect("it is written");
    quiet().await;
    assert!(alive(other.pid()));
}

#[tokio::test]
async fn health_is_one_line_and_its_code() {
    let port = free_port().expect("a port");
    let rendered = rendered(port);
    rendered.write();
    let ended = rendered.run_hook("health-check").await;
    assert!(
        one_line(&ended).starts_with("UNKNOWN: no warm-spare service"),
        "{ended}"
    );
    assert_eq!(ended.code, Some(3));

    let running = started(&rendered, port).await;
    let said = support::service::get(port, "/health")
        .await
        .expect("health")
        .json();
    let ended = rendered.run_hook("health-check").await;
    assert!(
        one_line(&ended).starts_with(said["status"].as_str().expect("a word")),
        "{ended}"
    );
    assert_eq!(ended.code.map(i64::from), said["level"].as_i64(), "{ended}");

    running.signal(rustix::process::Signal::STOP);
    let asked = Instant::now();
    let ended = rendered.run_hook("health-check").await;
    assert!(one_line(&ended).contains("no answer within 5s"), "{ended}");
    assert_eq!(ended.code, Some(3));
    assert!(
        asked.elapsed() < Duration::from_secs(8),
        "{:?}",
        asked.elapsed()
    );
    running.signal(rustix::process::Signal::CONT);
}

/// A program that hangs before it could mind its own limit, and one that dies.
#[tokio::test]
async fn health_has_an_end_even_if_the_program_has_none() {
    for (program, why) in [("trap '' TERM; sleep 60", "137"), ("exit 101", "101")] {
        let rendered = rendered(1);
        rendered.write();
        replace_program(&rendered, &format!("#!/bin/sh\n{program}\n"), 0o755);
        let asked = Instant::now();
        let ended = rendered.run_hook("health-check").await;
        assert_eq!(ended.code, Some(3), "{ended}");
        assert!(
            ended
                .stdout
                .ends_with(&format!("UNKNOWN: the health check ended with {why}\n")),
            "{ended}"
        );
        assert!(asked.elapsed() < Duration::from_secs(15));
    }
}

#[tokio::test]
async fn init_makes_its_directories_and_fails_only_if_the_program_cannot_run() {
    let rendered = rendered(1);
    rendered.write();
    fs::remove_dir(rendered.svc().join("data")).expect("it is empty");
    // No configuration at all: the service holds, and says what lacks.
    fs::remove_file(rendered.config_file()).expect("the configuration");
    let ended = rendered.run_hook("init").await.ok();
    assert!(one_line(&ended).starts_with("warm-spare 0"), "{ended}");
    assert!(rendered.svc().join("data").is_dir());

    replace_program(&rendered, "no program", 0o644);
    let ended = rendered.run_hook("init").await;
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(1), ""),
        "{ended}"
    );
    assert!(
        ended.stdout.contains("does not run on this machine"),
        "{ended}"
    );
}

#[tokio::test]
async fn with_no_good_configuration_it_stays_up_and_says_so() {
    let port = free_port().expect("a port");
    let mut rendered = rendered(port);
    rendered.set("role = \"boss\"").write();
    let running = rendered.start();
    // Where it is to answer is good, whatever else is not.
    wait_until("it holds", SOON, || async {
        assert!(alive(running.pid()), "it ended");
        let status = status(port).await?;
        let holds = status["hold"]["reason"] == "config";
        holds
            .then_some(())
            .ok_or_else(|| format!("{status:#}").into())
    })
    .await;
    let ended = rendered.run_hook("health-check").await;
    assert_eq!(ended.code, Some(2), "{ended}");
}
