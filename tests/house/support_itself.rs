//! The tests' own tools do what the other tests believe of them.

use std::io::Read;
use std::process::Command;
use std::time::{Duration, Instant};

use support::http_fault::{Fault, HttpFault};
use support::process::{alive, bound, run_dir, tree};
use support::proxy::{Mode, Proxy};
use support::{
    Factory, Minio, Postgres, Result, Running, S3, Site, Spec, packages, servers, site, tls,
};

/// Set for a test that runs as a child of itself.
const END: &str = "WARM_SPARE_TEST_END";
const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn postgres_is_as_in_builder_datastore() -> Result<()> {
    let servers = servers().await;
    let client = servers.primary_pg.conn("postgres").await?;
    let show = async |name: &str| -> Result<String> {
        Ok(client.query_one(&format!("SHOW {name}"), &[]).await?.get(0))
    };
    assert_eq!(show("wal_level").await?, "replica");
    assert_eq!(show("password_encryption").await?, "md5");
    assert_eq!(show("server_encoding").await?, "UTF8");
    let hash: String = client
        .query_one(
            "SELECT rolpassword FROM pg_authid WHERE rolname = 'hab'",
            &[],
        )
        .await?
        .get(0);
    assert!(hash.starts_with("md5"), "{hash}");
    let system = "SELECT system_identifier FROM pg_control_system()";
    let primary: i64 = client.query_one(system, &[]).await?.get(0);
    let spare: i64 = servers
        .spare_pg
        .conn("postgres")
        .await?
        .query_one(system, &[])
        .await?
        .get(0);
    assert_ne!(
        primary, spare,
        "copies of one template must not pass for one server"
    );
    assert_ne!(servers.primary_pg.password(), servers.spare_pg.password());
    Ok(())
}

#[tokio::test]
async fn postgres_stops_starts_again_and_ends() -> Result<()> {
    let server = Postgres::builder().logical().scram().start().await?;
    let client = server.conn("postgres").await?;
    client
        .batch_execute("CREATE TABLE t AS SELECT 1 AS n")
        .await?;
    server.stop_fast().await?;
    assert!(server.conn("postgres").await.is_err());
    server.start_again().await?;
    server.kill9();
    server.start_again().await?;
    let client = server.conn("postgres").await?;
    let n: i32 = client.query_one("SELECT n FROM t", &[]).await?.get(0);
    let level: String = client.query_one("SHOW wal_level", &[]).await?.get(0);
    let hash: String = client
        .query_one(
            "SELECT rolpassword FROM pg_authid WHERE rolname = 'hab'",
            &[],
        )
        .await?
        .get(0);
    assert_eq!((n, level.as_str(), &hash[..5]), (1, "logical", "SCRAM"));

    server.sigstop();
    let frozen = tokio::time::timeout(
        Duration::from_millis(300),
        client.query_one("SELECT 1", &[]),
    )
    .await;
    assert!(frozen.is_err(), "a frozen server answers nothing");
    server.sigcont();
    client.query_one("SELECT 1", &[]).await?;

    server.sigstop();
    let (family, data) = (tree(server.pid()), server.data_dir());
    drop(server);
    assert!(!family.into_iter().any(alive) && !data.exists());
    Ok(())
}

#[tokio::test]
async fn minio_stops_starts_again_and_ends() -> Result<()> {
    let server = Minio::start().await?;
    let store = server.s3()?;
    store.create_bucket("artifacts").await?;
    store.put("artifacts", "a/b", "bytes").await?;
    server.kill9();
    assert!(store.head("artifacts", "a/b").await.is_err());
    server.start_again().await?;
    server.stop().await?;
    server.start_again().await?;
    assert_eq!(
        store.get("artifacts", "a/b").await?.as_deref(),
        Some(&b"bytes"[..])
    );
    assert_eq!(store.get("artifacts", "a/c").await?, None);
    assert_eq!(store.list("artifacts", "").await?, ["a/b"]);
    store.delete("artifacts", "a/b").await?;
    assert_eq!(store.head("artifacts", "a/b").await?, None);

    server.sigstop();
    let frozen =
        tokio::time::timeout(Duration::from_millis(300), store.head("artifacts", "a/b")).await;
    assert!(
        frozen.is_err(),
        "a frozen server answers nothing, not {frozen:?}"
    );
    let (pid, data) = (server.pid(), server.data_dir());
    drop(server);
    assert!(!alive(pid) && !data.exists());
    Ok(())
}

#[tokio::test]
async fn servers_speak_tls_with_a_given_certificate() -> Result<()> {
    let pair = tls::certificates(&["127.0.0.1", "localhost"])?;
    let minio = Minio::builder()
        .ssl(&pair.certificate, &pair.key)
        .start()
        .await;
    let authority = run_dir().join("authority.pem");
    std::fs::write(&authority, &pair.authority)?;
    let minio = minio?;
    let store = S3::new(
        &minio.endpoint(),
        minio.access_key(),
        minio.secret_key(),
        Some(&authority),
    )?;
    store.create_bucket("artifacts").await?;
    let stranger = S3::new(
        &minio.endpoint(),
        minio.access_key(),
        minio.secret_key(),
        None,
    )?;
    assert!(
        stranger.has_bucket("artifacts").await.is_err(),
        "nobody vouches for it"
    );

    let postgres = Postgres::builder()
        .ssl(&pair.certificate, &pair.key)
        .start()
        .await?;
    let psql = Command::new(postgres.programs().join("psql"))
        .arg(format!(
            "{}?sslmode=verify-full&sslrootcert={}",
            postgres.url("postgres"),
            authority.display()
        ))
        .args([
            "-Atc",
            "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
        ])
        .output()?;
    assert_eq!(String::from_utf8_lossy(&psql.stdout), "t\n", "{psql:?}");
    Ok(())
}

/// What the two tests below do in a process of their own: start servers, say which, and not end well.
async fn end_badly(end: &str) -> Result<()> {
    let postgres = Postgres::start().await?;
    let shared = servers().await;
    let pids = [
        postgres.pid(),
        shared.spare_pg.pid(),
        shared.primary_s3.pid(),
    ];
    // The three come first: of their children some live only for a moment.
    let children = pids.into_iter().flat_map(|pid| tree(pid).split_off(1));
    let families: Vec<String> = pids
        .into_iter()
        .chain(children)
        .map(|pid| pid.to_string())
        .collect();
    eprintln!("servers {} in {}", families.join(" "), run_dir().display());
    match end {
        "panic" => panic!("as asked"),
        _ => loop {
            tokio::time::sleep(SOON).await;
        },
    }
}

async fn servers_of_a_child(
    test: &str,
    end: &str,
) -> Result<(Running, Vec<u32>, std::path::PathBuf)> {
    let mut command = bound(std::env::current_exe()?);
    command
        .args(["--exact", &format!("support_itself::{test}"), "--nocapture"])
        .env(END, end);
    let mut child = Running::start(command)?;
    let line = child
        .wait_for_line(|line| line.starts_with("servers "), SOON * 3)
        .await?;
    let (pids, dir) = line["servers ".len()..]
        .split_once(" in ")
        .ok_or("no directory")?;
    let pids = pids
        .split(' ')
        .map(|pid| pid.parse().expect("a number"))
        .collect();
    Ok((child, pids, dir.into()))
}

async fn gone(pids: &[u32], dir: &std::path::Path) {
    support::wait_until("the servers and their files", SOON, async || {
        let left: Vec<_> = pids.iter().filter(|pid| alive(**pid)).collect();
        if left.is_empty() && !dir.exists() {
            return Ok(());
        }
        Err(format!("{left:?} run, {} exists: {}", dir.display(), dir.exists()).into())
    })
    .await;
}

#[tokio::test]
async fn a_panicking_test_leaves_nothing_behind() -> Result<()> {
    if let Ok(end) = std::env::var(END) {
        return end_badly(&end).await;
    }
    let (child, pids, dir) =
        servers_of_a_child("a_panicking_test_leaves_nothing_behind", "panic").await?;
    assert!(pids.len() > 10, "{pids:?}");
    assert_ne!(child.wait(SOON).await?.code, Some(0));
    gone(&pids, &dir).await;
    Ok(())
}

#[tokio::test]
async fn a_killed_test_leaves_nothing_behind() -> Result<()> {
    if let Ok(end) = std::env::var(END) {
        return end_badly(&end).await;
    }
    let (child, pids, dir) =
        servers_of_a_child("a_killed_test_leaves_nothing_behind", "never").await?;
    assert!(pids[..3].iter().all(|pid| alive(*pid)) && dir.exists());
    child.kill9()?;
    gone(&pids, &dir).await;
    Ok(())
}

#[tokio::test]
async fn the_schema_is_builders_in_what_matters() -> Result<()> {
    let site = site("schema").await;
    let client = site.primary.conn().await?;
    let count = async |sql: &str| -> Result<i64> { Ok(client.query_one(sql, &[]).await?.get(0)) };
    let keyless =
        "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class c WHERE relkind = 'r'
                   AND relnamespace = 'public'::regnamespace
                   AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary)";
    let keyless: String = client.query_one(keyless, &[]).await?.get(0);
    assert_eq!(keyless, "audit_package audit_package_group origin_members");
    let kind = |kind: &str| {
        format!(
            "SELECT count(*) FROM pg_class WHERE relkind = '{kind}' AND relnamespace = 'public'::regnamespace"
        )
    };
    assert_eq!(count(&kind("r")).await?, 23);
    assert_eq!(count(&kind("S")).await?, 18);
    assert_eq!(count(&kind("v")).await?, 6);
    assert_eq!(
        count("SELECT count(*) FROM pg_type WHERE typtype = 'e'").await?,
        7
    );
    assert_eq!(
        count("SELECT count(*) FROM __diesel_schema_migrations").await?,
        43
    );

    // Triggers, ids made of time, and the functions run.
    let mut factory = Factory::seeded();
    let package = factory
        .package(
            &site.primary,
            Spec::new("core", "redis", "7.0.1").channel("stable"),
        )
        .await?;
    let row = client
        .query_one(
            "SELECT id, ident_vector::text, created_at FROM origin_packages",
            &[],
        )
        .await?;
    let (id, vector): (i64, &str) = (row.get(0), row.get(1));
    assert!(vector.contains("'redis'"), "{vector}");
    let made =
        chrono::DateTime::<chrono::Utc>::from_timestamp_millis((id >> 23) + 1_409_266_191_000);
    let stored: chrono::DateTime<chrono::Utc> = row.get(2);
    assert!((stored - made.ok_or("no time")?).num_seconds().abs() < 5);
    let job = "INSERT INTO job_graph (group_id, dependencies, waiting_on_count, target_platform, job_state)
               VALUES (1, '{}', 0, 'x86_64-linux', 'running'), (1, '{1}', 1, 'x86_64-linux', 'waiting_on_dependency')";
    client.batch_execute(job).await?;
    assert_eq!(
        count("SELECT job_graph_mark_complete(1, 'core/a')::int8").await?,
        1
    );
    assert_eq!(
        count("SELECT count(*) FROM job_graph WHERE updated_at > created_at").await?,
        2
    );
    for view in [
        "job_graph_completed",
        "origin_package_versions",
        "origin_packages_with_version_array",
        "origins_with_secret_key",
        "origins_with_stats",
        "packages_with_channel_platform",
    ] {
        assert!(
            count(&format!("SELECT count(*) FROM {view}")).await? > 0,
            "{view}"
        );
    }
    let channels: Vec<String> = client
        .query_one("SELECT channels FROM packages_with_channel_platform", &[])
        .await?
        .get(0);
    assert_eq!(channels, ["stable", "unstable"]);

    packages::demote(&site.primary, &package, "stable").await?;
    packages::delete_package(&site.primary, &package).await?;
    assert_eq!(count("SELECT count(*) FROM origin_packages").await?, 0);
    assert_eq!(count("SELECT count(*) FROM audit_package").await?, 3);
    assert_eq!(site.primary.keys().await?, [""; 0]);
    Ok(())
}

#[test]
fn the_same_seed_makes_the_same_bytes() {
    let make = |seed| {
        let mut factory = Factory::new(seed);
        let small = factory.make(
            Spec::new("core", "zlib", "1.3")
                .target("x86_64-linux-kernel2")
                .size(50_000),
        );
        let large = factory.make(Spec::new("core", "glibc", "2.39").size(3 << 20));
        (small, large)
    };
    let ((a_small, a_large), (b_small, b_large)) = (make(7), make(7));
    assert_eq!(a_small.bytes(), b_small.bytes());
    assert_eq!(a_large.bytes(), b_large.bytes());
    assert_eq!(
        (&a_small.ident, &a_large.manifest),
        (&b_small.ident, &b_large.manifest)
    );
    assert_ne!(a_small.bytes(), make(8).0.bytes());

    assert_eq!(a_small.ident, "core/zlib/1.3/20240101000001");
    assert_eq!(
        a_small.key,
        "core/zlib/1.3/20240101000001/x86_64/linux/kernel2/core-zlib-1.3-20240101000001-x86_64-linux-kernel2.hart"
    );
    assert_eq!(a_large.size, 3 << 20);
    assert!(a_small.size.abs_diff(50_000) < 1000, "{}", a_small.size);
    assert_hart(&a_small.bytes(), Some("core/zlib/1.3/20240101000001"));
    assert_hart(&a_large.bytes(), None);
}

/// As Habitat reads it; not with the code under test.
fn assert_hart(bytes: &[u8], ident: Option<&str>) {
    use base64::Engine;
    let end = bytes
        .windows(2)
        .position(|pair| pair == b"\n\n")
        .expect("a header")
        + 2;
    let header: Vec<&str> = std::str::from_utf8(&bytes[..end])
        .expect("text")
        .lines()
        .collect();
    assert_eq!(
        (header[0], header[1], header[2]),
        ("HART-1", "core-20240101000000", "BLAKE2b")
    );
    let signed = base64::engine::general_purpose::STANDARD
        .decode(header[3])
        .expect("base64");
    let mut hash = packages::blake2b();
    assert_eq!(
        &signed[64..],
        hash.update(&bytes[end..]).finalize().to_hex().as_bytes()
    );
    if let Some(ident) = ident {
        let mut archive = tar::Archive::new(liblzma::read::XzDecoder::new(&bytes[end..]));
        let mut first = archive
            .entries()
            .expect("tar")
            .next()
            .expect("a file")
            .expect("tar");
        let mut text = String::new();
        first.read_to_string(&mut text).expect("text");
        assert_eq!(text, ident);
    }
}

#[tokio::test]
async fn packages_of_every_size_arrive_as_they_were_made() -> Result<()> {
    let site = site("sizes").await;
    let mut factory = Factory::seeded();
    for size in [0, 1024, 40_000, 2 << 20, 40 << 20] {
        let spec = Spec::new("core", "size", &size.to_string())
            .size(size)
            .manifest_size(60_000);
        let package = factory.package(&site.primary, spec).await?;
        let stored = site
            .primary
            .s3()
            .checksum(&site.primary.bucket, &package.key)
            .await?;
        assert_eq!(stored.as_deref(), Some(package.checksum.as_str()));
        let head = site
            .primary
            .s3()
            .head(&site.primary.bucket, &package.key)
            .await?
            .ok_or("gone")?;
        assert_eq!(head.size, package.size);
        assert_eq!(
            head.etag.contains('-'),
            size >= 10 << 20,
            "in parts, as Builder does: {head:?}"
        );
    }
    let started = Instant::now();
    factory.bulk_rows(&site.primary, 2000, 20_000).await?;
    println!("2000 rows of 20 kB in {:?}", started.elapsed());
    let bulk = factory.bulk_artifacts(&site.primary, 20, 100_000).await?;
    assert_eq!(site.primary.keys().await?.len(), 25);
    let client = site.primary.conn().await?;
    let sql = "SELECT count(*), min(length(manifest)) FROM origin_packages WHERE origin = 'bulk'";
    let row = client.query_one(sql, &[]).await?;
    assert_eq!(row.get::<_, i64>(0), 2020);
    let found = "SELECT ident_array FROM origin_packages WHERE ident = $1 AND checksum = $2";
    let array: Vec<String> = client
        .query_one(found, &[&bulk[3].ident, &bulk[3].checksum])
        .await?
        .get(0);
    assert_eq!(array.join("/"), bulk[3].ident);
    Ok(())
}

#[tokio::test]
async fn the_tcp_proxy_does_what_it_says() -> Result<()> {
    let server = servers().await.primary_pg.clone();
    let proxy = Proxy::start(server.port()).await?;
    let connect = async || -> Result<tokio_postgres::Client> {
        let (client, connection) = tokio_postgres::Config::new()
            .host("127.0.0.1")
            .port(proxy.port())
            .user("hab")
            .password(server.password())
            .dbname("postgres")
            .connect(tokio_postgres::NoTls)
            .await?;
        tokio::spawn(connection);
        Ok(client)
    };
    let client = connect().await?;
    client.query_one("SELECT 1", &[]).await?;
    assert_eq!(proxy.connections(), 1);
    let (sent, got) = proxy.bytes();
    assert!(sent > 50 && got > 50, "{sent} {got}");

    proxy.set(Mode::Hold).await;
    let moment = Duration::from_millis(300);
    assert!(
        tokio::time::timeout(moment, client.query_one("SELECT 1", &[]))
            .await
            .is_err()
    );
    assert!(tokio::time::timeout(moment, connect()).await.is_err());
    proxy.set(Mode::Pass).await;
    client.query_one("SELECT 1", &[]).await?;

    proxy.set(Mode::Refuse).await;
    let refused = tokio::net::TcpStream::connect(("127.0.0.1", proxy.port()))
        .await
        .expect_err("refused");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    client.query_one("SELECT 1", &[]).await?;
    proxy.cut();
    assert!(client.query_one("SELECT 1", &[]).await.is_err());
    proxy.set(Mode::Pass).await;
    connect().await?.query_one("SELECT 1", &[]).await?;
    Ok(())
}

#[tokio::test]
async fn a_far_line_counts_the_turns_of_its_clients() -> Result<()> {
    let server = servers().await.spare_pg.clone();
    let proxy = Proxy::start(server.port()).await?;
    proxy.set(Mode::Far(Duration::from_millis(20))).await;
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(proxy.port())
        .user(server.user())
        .password(server.password())
        .dbname("postgres");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    let turns = || proxy.turns().iter().map(|(_, turns)| turns).sum::<u64>();
    let before = turns();
    for number in 0..10 {
        client.batch_execute(&format!("SELECT {number}")).await?;
    }
    assert_eq!(turns() - before, 10, "each waits for the one before it");
    let before = turns();
    let all = (0..10).map(|number| client.simple_query(["SELECT 1", "SELECT 2"][number % 2]));
    futures_util::future::try_join_all(all).await?;
    assert_eq!(turns() - before, 1, "none waits");
    // More than one piece, in both directions and in order.
    let long = (0..300_000).map(|n| n.to_string()).collect::<String>();
    let row = client.query_one("SELECT $1::text", &[&long]).await?;
    assert_eq!(row.get::<_, String>(0), long);
    assert_eq!(proxy.turns().len(), 1);
    Ok(())
}

#[tokio::test]
async fn the_http_proxy_does_what_it_says() -> Result<()> {
    let server = servers().await.spare_s3.clone();
    let direct = server.s3()?;
    direct.create_bucket("faults").await?;
    let proxy = HttpFault::start(server.port()).await?;
    let store = S3::new(
        &proxy.endpoint(),
        server.access_key(),
        server.secret_key(),
        None,
    )?;
    let body = vec![7; 100_000];
    store.put("faults", "one", body.clone()).await?;
    assert_eq!(
        store.get("faults", "one").await?.as_deref(),
        Some(&body[..]),
        "signatures stay valid"
    );
    assert_eq!(
        (
            proxy.count("PUT", "/faults/one"),
            proxy.count("GET", "/faults/one")
        ),
        (1, 1)
    );

    proxy.times(
        1,
        |request| request.method == "PUT",
        Fault::s3(503, "SlowDown"),
    );
    assert!(store.put("faults", "two", body.clone()).await.is_err());
    assert_eq!(direct.head("faults", "two").await?, None);
    store.put("faults", "two", body.clone()).await?;

    proxy.times(1, |request| request.method == "PUT", Fault::ForwardThenDrop);
    assert!(store.put("faults", "three", body.clone()).await.is_err());
    assert!(
        direct.head("faults", "three").await?.is_some(),
        "the server did it"
    );
    proxy.times(
        1,
        |request| request.method == "DELETE",
        Fault::ForwardThenRespond(500, "".into()),
    );
    assert!(store.delete("faults", "three").await.is_err());
    assert_eq!(direct.head("faults", "three").await?, None);

    for declared in [None, Some(200_000)] {
        let fault = Fault::ShortBody {
            declared,
            sent: 50_000,
        };
        proxy.times(1, |request| request.method == "GET", fault);
        assert!(store.get("faults", "one").await.is_err(), "{declared:?}");
    }
    proxy.times(1, |request| request.method == "GET", Fault::Corrupt(70_000));
    let spoiled = store.get("faults", "one").await?.ok_or("gone")?;
    let wrong: Vec<usize> = (0..body.len()).filter(|at| spoiled[*at] != 7).collect();
    assert_eq!((spoiled.len(), wrong), (body.len(), vec![70_000]));

    proxy.set(|_| Fault::Hang);
    let hung = tokio::time::timeout(Duration::from_millis(300), store.head("faults", "one")).await;
    assert!(hung.is_err());
    proxy.set(|_| Fault::Drop);
    assert!(store.head("faults", "one").await.is_err());
    let late = Duration::from_millis(200);
    proxy.times(1, |_| true, Fault::Delay(late));
    let started = Instant::now();
    assert!(store.head("faults", "one").await?.is_some() && started.elapsed() >= late);
    Ok(())
}

#[tokio::test]
async fn a_site_writes_its_configuration_and_runs_the_program() -> Result<()> {
    let mut site = Site::builder("config_of_a_site")
        .spare_database()
        .start()
        .await?;
    let file =
        site.write_config("log_level = \"debug\"\n[peer.s3]\nendpoint = \"http://127.0.0.1:1\"");
    let config: toml::Table = std::fs::read_to_string(file)?.parse()?;
    assert_eq!(config["role"].as_str(), Some("spare"));
    assert_eq!(config["log_level"].as_str(), Some("debug"));
    assert_eq!(
        config["peer"]["s3"]["endpoint"].as_str(),
        Some("http://127.0.0.1:1")
    );
    assert_eq!(
        config["peer"]["s3"]["bucket_name"].as_str(),
        Some(site.primary.bucket.as_str())
    );
    assert_eq!(
        config["local"]["datastore"]["port"].as_integer(),
        Some(site.spare.pg.port().into())
    );
    assert!(site.spare.pg.has_database("builder").await?);

    // Any program will do for the running of it.
    let script = site.dir.path().join("program");
    std::fs::write(
        &script,
        "#!/bin/sh\necho \"$3\"\necho one >&2\necho two >&2\n[ \"$3\" = end ] || exec sleep 60\nexit 3\n",
    )?;
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    site.program = script;
    let output = site.warm_spare(&["end"]).await;
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (Some(3), "end\n", "one\ntwo\n")
    );
    let mut running = site.spawn(&["stay"]);
    assert_eq!(
        running
            .wait_for_line(|line| line.starts_with('t'), SOON)
            .await?,
        "two"
    );
    let again = running
        .wait_for_line(|line| line == "one", Duration::from_millis(50))
        .await;
    assert!(again.is_err(), "what was found once is not found again");
    let pid = running.pid();
    assert_eq!(running.kill9()?.code, None);
    assert!(!alive(pid));
    Ok(())
}
