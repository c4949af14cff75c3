//! The command line: exit codes, one clear error, one document on stdout, no secret anywhere.

use std::os::unix::fs::PermissionsExt;
use support::{Factory, Result, site};

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_configuration_names_its_key_and_touches_nothing() -> Result<()> {
    let site = site("config").await;
    let secret = site.dir.path().join("secret");
    std::fs::write(&secret, "word")?;
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644))?;
    for (extra, words) in [
        (
            "peer.datastore.hots = \"x\"",
            vec!["peer.datastore.hots", "peer.datastore.host"],
        ),
        (
            "peer.s3.endpoint = \"ftp://x\"",
            vec!["peer.s3.endpoint", "http"],
        ),
        (
            "replication.gate_grace = \"soon\"",
            vec!["replication.gate_grace"],
        ),
        (
            "replication.buffer = \"64 bananas\"",
            vec!["replication.buffer"],
        ),
        (
            "replication.direction = \"both\"",
            vec!["replication.direction", "push"],
        ),
        ("peer.datastore.port = 99999", vec!["peer.datastore.port"]),
        ("role = \"king\"", vec!["role", "spare"]),
        (
            "peer.datastore.password_file = \"/nonexistent\"",
            vec!["peer.datastore.password"],
        ),
    ] {
        site.write_config(extra);
        for verb in ["check-config", "sync", "verify"] {
            let output = site.warm_spare(&[verb]).await;
            assert_eq!(output.code, Some(2), "{extra}: {output}");
            for word in &words {
                assert!(output.stderr.contains(word), "{word:?} in {output}");
            }
            assert_eq!(
                output.stderr.lines().count(),
                1,
                "one clear error: {output}"
            );
        }
    }
    let file = site.write_config("");
    let text = std::fs::read_to_string(&file)?.replace(
        &format!("password = \"{}\"", site.primary.pg.password()),
        &format!("password_file = \"{}\"", secret.display()),
    );
    std::fs::write(&file, text)?;
    let output = site.warm_spare(&["check-config"]).await;
    assert_eq!(output.code, Some(2), "{output}");
    assert!(
        output.stderr.contains("peer.datastore.password_file") && output.stderr.contains("chmod"),
        "{output}"
    );
    assert!(
        !site.spare.pg.has_database("warm_spare").await?,
        "nothing was touched"
    );
    assert_eq!(site.warm_spare(&["no-such-verb"]).await.code, Some(2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_one_document_and_no_secret_is_ever_printed() -> Result<()> {
    let site = site("documents").await;
    Factory::seeded().fill(&site.primary, 3).await?;
    site.write_config("log_level = \"trace\"");
    let secrets = [
        site.primary.pg.password(),
        site.spare.pg.password(),
        site.primary.minio.secret_key(),
        site.spare.minio.secret_key(),
    ];
    for arguments in [
        &["--json", "check-config"][..],
        &["--json", "check-config", "--connect"],
        &["--json", "sync"],
        &["--json", "verify", "--deep"],
    ] {
        let output = site.warm_spare(arguments).await.ok();
        assert_eq!(output.json()["format"], 1, "{output}");
        for secret in secrets {
            assert!(
                !output.stdout.contains(secret) && !output.stderr.contains(secret),
                "{arguments:?}"
            );
        }
    }
    site.write_config("peer.datastore.password = \"wrong\"");
    let output = site.warm_spare(&["--json", "sync"]).await;
    assert_eq!(output.code, Some(3));
    assert_eq!(output.json()["error"]["exit_code"], 3);
    Ok(())
}
