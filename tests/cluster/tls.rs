//! TLS to both stores: checked against a given authority, and certificate errors that a person understands.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use support::tls::certificates;
use support::{Cluster, Factory, Minio, Output, Postgres, Result, Service, Site};

async fn sealed(name: &str, names: &[&str]) -> Result<(Site, PathBuf)> {
    let made = certificates(names)?;
    let pg = Postgres::builder().ssl(&made.certificate, &made.key);
    let mut site = Site::builder(name).primary(pg).start().await?;
    let authority = site.dir.path().join("authority.pem");
    std::fs::write(&authority, &made.authority)?;
    let minio = Arc::new(
        Minio::builder()
            .ssl(&made.certificate, &made.key)
            .start()
            .await?,
    );
    let cluster = Cluster::new(site.primary.pg.clone(), minio, "sealed").await?;
    site.primary = cluster;
    Factory::seeded().fill(&site.primary, 3).await?;
    Ok((site, authority))
}

fn settings(authority: Option<&PathBuf>, mode: &str) -> String {
    let (ca, root) = match authority {
        Some(path) => (
            format!("ca_file = \"{}\"", path.display()),
            format!("ssl_root_cert = \"{}\"", path.display()),
        ),
        None => (String::new(), String::new()),
    };
    format!("[peer.s3]\n{ca}\n[peer.datastore]\nssl_mode = \"{mode}\"\n{root}")
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_authority_given_both_stores_are_checked() -> Result<()> {
    let (site, authority) = sealed("sealed", &["127.0.0.1", "localhost"]).await?;
    site.write_config(&settings(Some(&authority), "verify-full"));
    site.warm_spare(&["sync"]).await.ok();
    site.warm_spare(&["verify", "--deep"]).await.ok();
    site.write_config(&settings(Some(&authority), "require"));
    site.warm_spare(&["sync", "--baseline"]).await.ok();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_authority_is_explained_for_each_store() -> Result<()> {
    let (site, authority) = sealed("unknown", &["127.0.0.1"]).await?;
    let store =
        settings(Some(&authority), "verify-full").replace("[peer.s3]\nca_file", "[peer.s3]\n#");
    site.write_config(&store);
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(
        output.stderr.contains("peer artifact store")
            && output.stderr.contains("authority that is not trusted"),
        "{output}"
    );
    assert!(output.stderr.contains("peer.s3.ca_file"), "{output}");
    site.write_config(&settings(None, "verify-full"));
    let output = site.warm_spare(&["sync"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(
        output.stderr.contains("peer datastore")
            && output.stderr.contains("authority that is not trusted"),
        "{output}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_differs_matters_to_verify_full_only() -> Result<()> {
    let (site, authority) = sealed("name", &["elsewhere.example"]).await?;
    let other = site.dir.path().join("config.toml");
    site.write_config(&settings(Some(&authority), "verify-full"));
    assert!(other.exists());
    let output = site.warm_spare(&["check-config", "--connect"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(output.stderr.contains("for another host name"), "{output}");
    // The datastore is past; the store still insists on the name, and says so.
    site.write_config(&settings(Some(&authority), "verify-ca"));
    let output = site.warm_spare(&["check-config", "--connect"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(
        output.stderr.contains("peer artifact store")
            && output.stderr.contains("for another host name"),
        "{output}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_self_signed_server_certificate_is_explained() -> Result<()> {
    let made = support::tls::self_signed(&["127.0.0.1"])?;
    let pg = Postgres::builder().ssl(&made.certificate, &made.key);
    let site = Site::builder("selfsigned").primary(pg).start().await?;
    let authority = site.dir.path().join("authority.pem");
    std::fs::write(&authority, &made.certificate)?;
    site.write_config(&format!(
        "[peer.datastore]\nssl_mode = \"verify-full\"\nssl_root_cert = \"{}\"",
        authority.display()
    ));
    let output = site.warm_spare(&["check-config", "--connect"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(output.stderr.contains("self-signed"), "{output}");
    let minio = Arc::new(
        Minio::builder()
            .ssl(&made.certificate, &made.key)
            .start()
            .await?,
    );
    site.write_config(&format!(
        "[peer.s3]\nendpoint = \"{}\"\nca_file = \"{}\"",
        minio.endpoint(),
        authority.display()
    ));
    let output = site.warm_spare(&["check-config", "--connect"]).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(
        output.stderr.contains("peer artifact store") && output.stderr.contains("self-signed"),
        "{output}"
    );
    // Without checking, as libpq's prefer and require are, it serves.
    Factory::seeded().fill(&site.primary, 2).await?;
    site.write_config("peer.datastore.ssl_mode = \"require\"");
    site.warm_spare(&["sync"]).await.ok();
    Ok(())
}

/// Certificates are read again at every connection: a rotation needs neither a restart nor a signal.
#[tokio::test(flavor = "multi_thread")]
async fn the_service_takes_a_rotated_authority_by_itself() -> Result<()> {
    let (site, authority) = sealed("rotated", &["127.0.0.1"]).await?;
    let right = std::fs::read(&authority)?;
    let service = Service::start(&site, &settings(Some(&authority), "verify-full"));
    let status = service.until_level().await;
    assert_eq!(status["peer"]["datastore"]["tls"], true, "{status:#}");
    std::fs::write(&authority, certificates(&["127.0.0.1"])?.authority)?;
    let status = service.until_hold("peer_unreachable").await;
    let detail = status["hold"]["detail"].as_str().unwrap_or_default();
    assert!(
        detail.contains("certificate was not accepted"),
        "{status:#}"
    );
    assert_eq!(status["peer"]["s3"]["reachable"], false, "{status:#}");
    let next_step = status["hold"]["next_step"].as_str().unwrap_or_default();
    assert!(
        next_step.contains("peer.datastore.ssl_root_cert"),
        "{status:#}"
    );
    std::fs::write(&authority, right)?;
    let status = service.until_level().await;
    assert_eq!(status["health"]["level"], 0, "{status:#}");
    Ok(())
}

/// libpq reads its environment and the user's home directory. Our own sessions read neither, so what `check-config` says
/// must hold for `pg_dump`.
#[tokio::test(flavor = "multi_thread")]
async fn what_lies_about_for_libpq_is_not_read() -> Result<()> {
    let (site, authority) = sealed("stray", &["127.0.0.1"]).await?;
    let home = site.dir.path().join("home");
    let of_libpq = home.join(".postgresql");
    std::fs::create_dir_all(&of_libpq)?;
    let other = certificates(&["127.0.0.1"])?;
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let path = of_libpq.join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    };
    let stray = write("root.crt", &other.authority)?;
    write("root.crl", "no list at all")?;
    write("postgresql.crt", "no certificate at all")?;
    write("postgresql.key", "no key at all")?;
    std::fs::write(home.join(".pg_service.conf"), "[stray]\nport=1\n")?;
    let stray = stray.display().to_string();
    let home = home.display().to_string();
    let environment = [
        ("HOME", home.as_str()),
        ("PGSSLROOTCERT", &stray),
        ("PGSSLCRL", &stray),
        ("PGSSLCRLDIR", &home),
        ("PGSSLNEGOTIATION", "direct"),
        ("PGSSLMINPROTOCOLVERSION", "TLSv1.3"),
        ("PGSSLMAXPROTOCOLVERSION", "TLSv1.1"),
        ("PGCHANNELBINDING", "require"),
        ("PGREQUIREAUTH", "gss"),
        ("PGGSSENCMODE", "require"),
        ("PGSERVICE", "stray"),
        ("PGDATESTYLE", "none"),
        ("PGTZ", "Nowhere/At_all"),
        ("PGDATABASE", "none"),
        ("PGLOADBALANCEHOSTS", "none"),
        ("PGKEEPALIVES_IDLE", "none"),
    ];
    let with_peer = |of_datastore: &str| {
        let ca = authority.display();
        format!("[peer.s3]\nca_file = \"{ca}\"\n[peer.datastore]\n{of_datastore}")
    };
    let right = format!("ssl_root_cert = \"{}\"", authority.display());
    let wrong = format!("ssl_root_cert = \"{stray}\"");
    for of_datastore in [
        "ssl_mode = \"require\"".into(),
        format!("ssl_mode = \"require\"\n{right}"),
        // Asked for by nobody, so not checked.
        format!("ssl_mode = \"prefer\"\n{wrong}"),
    ] {
        site.write_config(&with_peer(&of_datastore));
        run(&site, &["check-config", "--connect"], &environment)
            .await
            .ok();
        run(&site, &["sync", "--baseline"], &environment).await.ok();
    }
    // The authorities of the system are those that our own sessions trust.
    site.write_config(&with_peer("ssl_mode = \"verify-full\""));
    let mut environment = environment.to_vec();
    let trusted = authority.display().to_string();
    environment.push(("SSL_CERT_FILE", &trusted));
    run(&site, &["sync", "--baseline"], &environment).await.ok();
    Ok(())
}

/// Our own sessions being let in is no proof that the client programs are.
#[tokio::test(flavor = "multi_thread")]
async fn check_config_has_pg_dump_connect() -> Result<()> {
    let site = Site::builder("programs").start().await?;
    Factory::seeded().fill(&site.primary, 1).await?;
    let programs = site.dir.path().join("programs");
    std::fs::create_dir(&programs)?;
    // Those of this machine, but for a host that nobody answers on.
    for name in ["pg_dump", "pg_restore"] {
        let real = site.primary.pg.programs().join(name);
        let script = format!(
            "#!/bin/sh\nPGHOST=127.0.0.1 PGPORT=1 exec {} \"$@\"\n",
            real.display()
        );
        let path = programs.join(name);
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    let programs = programs.display().to_string();
    site.write_config("");
    let there = [("WARM_SPARE_PG_CLIENTS", programs.as_str())];
    let output = run(&site, &["check-config", "--connect"], &there).await;
    assert_eq!(output.code, Some(3), "{output}");
    assert!(
        output.stderr.contains("pg_dump failed") && output.stderr.contains("port 1 failed"),
        "{output}"
    );
    Ok(())
}

async fn run(site: &Site, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let running = site.spawn_with(&site.config_file(), arguments, environment);
    let limit = Duration::from_secs(300);
    running.wait(limit).await.expect("the program ends")
}
