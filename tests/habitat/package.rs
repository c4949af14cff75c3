//! The package as it is laid out: by the plan's own callbacks under bash, by `scripts/package`, and by the real build where
//! that is at hand. The two ways must come to the same.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::habitat::{HOOKS, ROOT};
use support::process::server_dir;
use support::service::SOON;
use support::{Result, Supervisor, plan_build, skip, wait_until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_warm-spare");
/// The compiler that the plan names: Habitat itself is built with this version.
const RUST: &str = "1.91.1";

/// Sources the plan as the build does, with stand-ins for what it calls, and runs `script`.
fn with_plan(script: &str, folder: &Path) -> String {
    with_plan_of(Path::new(ROOT), script, folder)
}

/// The same for sources in another folder.
fn with_plan_of(root: &Path, script: &str, folder: &Path) -> String {
    let prelude = r#"
        set -euo pipefail
        declare -A pkg_exports=() pkg_binds=() pkg_binds_optional=()
        declare -a pkg_exposes=() pkg_deps=() pkg_build_deps=()
        PLAN_CONTEXT=$1/habitat HAB_CACHE_SRC_PATH=$2/src pkg_prefix=$2/pkg pkg_dirname=warm-spare-0
        update_pkg_version() { pkg_version=$(pkg_version); }
        cargo() { echo "cargo $*"; install -D /bin/true "$CARGO_TARGET_DIR/release/warm-spare"; }
        unset CARGO_TARGET_DIR
        . "$PLAN_CONTEXT/plan.sh""#;
    let output = Command::new("bash")
        .args(["-c", &format!("{prelude}\n{script}"), "plan"])
        .args([root, folder])
        .env_remove("HAB_ORIGIN")
        .output()
        .expect("bash runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("it is text")
}

#[test]
fn the_plans_callbacks_build_and_install_the_one_program() -> Result<()> {
    let folder = server_dir("plan-")?;
    let said = with_plan(
        "for step in before download verify unpack prepare build check install strip; do do_$step; done; echo $pkg_version",
        folder.path(),
    );
    let lines: Vec<&str> = said.lines().collect();
    assert!(
        lines[0].starts_with("cargo build --release --locked --bin warm-spare --manifest-path "),
        "{said}"
    );
    assert_eq!(lines.last(), Some(&env!("CARGO_PKG_VERSION")), "{said}");
    let installed = folder.path().join("pkg/bin/warm-spare");
    assert_eq!(fs::metadata(installed)?.permissions().mode() & 0o777, 0o755);
    // Nothing is written among the sources.
    assert!(
        folder
            .path()
            .join("src/warm-spare-0/target/release/warm-spare")
            .exists()
    );
    Ok(())
}

/// `cargo vendor` brings the crates beside the sources, and the plan tells cargo to take them from there.
#[test]
fn vendored_crates_need_no_network() -> Result<()> {
    let folder = server_dir("vendored-")?;
    let root = folder.path().join("sources");
    fs::create_dir_all(root.join("habitat"))?;
    fs::copy(
        Path::new(ROOT).join("habitat/plan.sh"),
        root.join("habitat/plan.sh"),
    )?;
    fs::write(root.join("Cargo.toml"), "version = \"1.0.0\"\n")?;
    let build = || with_plan_of(&root, "do_build", folder.path());
    assert!(!build().contains("--offline"));
    fs::create_dir(root.join("vendor"))?;
    let said = build();
    let directory = root.join("vendor").display().to_string();
    for words in [
        "--offline",
        "--config source.crates-io.replace-with=\"vendored\"",
        &format!("--config source.vendored.directory=\"{directory}\""),
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    Ok(())
}

#[test]
fn the_plan_names_what_the_reference_names() -> Result<()> {
    let folder = server_dir("plan-")?;
    let said = with_plan(
        r#"echo "$pkg_name $pkg_origin $pkg_svc_user:$pkg_svc_group $pkg_shutdown_signal $pkg_shutdown_timeout_sec"
        for bind in "${!pkg_binds_optional[@]}"; do echo "bind $bind=${pkg_binds_optional[$bind]}"; done | sort
        echo "binds ${#pkg_binds[@]}"
        for export in "${!pkg_exports[@]}"; do echo "export $export=${pkg_exports[$export]}"; done
        echo "exposes ${pkg_exposes[*]}"
        echo "built by ${pkg_build_deps[*]}"
        HAB_ORIGIN=ours; . "$PLAN_CONTEXT/plan.sh"; echo "$pkg_origin""#,
        folder.path(),
    );
    assert_eq!(
        said.lines().collect::<Vec<_>>(),
        [
            "warm-spare site hab:hab TERM 8",
            "bind datastore=port",
            "bind minio=port bucket-name",
            "bind peer-datastore=port",
            "bind peer-minio=port bucket-name",
            "binds 0",
            "export port=http.port",
            "exposes port",
            &format!("built by core/gcc core/rust/{RUST}"),
            "ours",
        ]
    );
    Ok(())
}

fn package(root: &Path) -> Result<PathBuf> {
    let made = Command::new(Path::new(ROOT).join("scripts/package"))
        .arg(root)
        .env("WARM_SPARE_BIN", PROGRAM)
        .env_remove("HAB_ORIGIN")
        .output()?;
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    Ok(PathBuf::from(String::from_utf8(made.stdout)?.trim()))
}

/// Names and texts of all of a package that the Supervisor reads, in an order that does not depend on the shell.
fn contents(package: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for folder in ["", "config", "hooks"] {
        for entry in fs::read_dir(package.join(folder))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let text = fs::read_to_string(entry.path())?;
                let mut lines: Vec<&str> = text.lines().collect();
                if folder.is_empty() && entry.file_name() != "default.toml" {
                    lines.sort_unstable();
                }
                let name = Path::new(folder).join(entry.file_name());
                found.insert(name.display().to_string(), lines.join("\n"));
            }
        }
    }
    Ok(found)
}

#[test]
fn scripts_package_lays_out_what_the_supervisor_reads() -> Result<()> {
    let folder = server_dir("package-")?;
    let made = package(folder.path())?;
    let ident = made.strip_prefix(folder.path())?.display().to_string();
    assert!(
        ident.starts_with(&format!("site/warm-spare/{}/", env!("CARGO_PKG_VERSION"))),
        "{ident}"
    );
    let found = contents(&made)?;
    assert_eq!(found["IDENT"], ident);
    assert_eq!(found["EXPORTS"], "port=http.port");
    assert_eq!(found["EXPOSES"], "9640");
    assert_eq!(found["PATH"], format!("/hab/pkgs/{ident}/bin"));
    assert!(found["BINDS_OPTIONAL"].contains("peer-minio=port bucket-name"));
    let hooks: Vec<&str> = found
        .keys()
        .filter_map(|name| name.strip_prefix("hooks/"))
        .collect();
    assert_eq!(hooks.len(), HOOKS.len(), "{hooks:?}");
    for hook in HOOKS {
        let mode = fs::metadata(made.join("hooks").join(hook))?
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o755, "{hook}");
    }
    let ran = Command::new(made.join("bin/warm-spare"))
        .arg("--version")
        .output()?;
    assert!(ran.status.success());
    // A second one of the same release is refused, and leaves nothing behind.
    let again = Command::new(Path::new(ROOT).join("scripts/package"))
        .arg(folder.path())
        .env("WARM_SPARE_BIN", PROGRAM)
        .env_remove("HAB_ORIGIN")
        .env("WARM_SPARE_RELEASE", made.file_name().expect("a release"))
        .output()?;
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(fs::read_dir(made.parent().expect("a version"))?.count(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_build_comes_to_the_same_and_is_loaded() -> Result<()> {
    let (script, mut supervisor) = match (plan_build::find(), Supervisor::new()) {
        (Ok(script), Ok(supervisor)) => (script, supervisor),
        (Err(why), _) => {
            skip(&format!("the real build of the package: {why}"));
            return Ok(());
        }
        (_, Err(why)) => {
            skip(&format!("the real build of the package: {why} (hab)"));
            return Ok(());
        }
    };
    let built = plan_build::build(&script, &supervisor)?;
    let ours = server_dir("package-")?;
    let (built_files, ours) = (contents(&built)?, contents(&package(ours.path())?)?);
    for (name, text) in &ours {
        // The release is another one.
        if !["IDENT", "PATH", "RUNTIME_PATH"].contains(&name.as_str()) {
            assert_eq!(built_files.get(name), Some(text), "{name}");
        }
    }
    let manifest = &built_files["MANIFEST"];
    for word in [
        "License",
        "Upstream URL",
        "core/postgresql17-client",
        &format!("core/rust/{RUST}"),
    ] {
        assert!(manifest.contains(word), "{word}: {manifest}");
    }
    supervisor.start(&[]).await?;
    supervisor
        .hab(&["svc", "load", "site/warm-spare"])
        .await
        .ok();
    wait_until("the Supervisor's health", SOON, || async {
        let (_, body) = supervisor.health("warm-spare", "default").await?;
        let held = body["stdout"].to_string().contains("holding; config");
        held.then_some(()).ok_or_else(|| body.to_string().into())
    })
    .await;
    // The hooks take bash from the dependency, and so does nothing of this machine's.
    let hook = fs::read_to_string(supervisor.svc("warm-spare").join("hooks/run"))?;
    let bash = supervisor.packages().join("core/bash");
    assert!(
        hook.starts_with(&format!("#!{}/", bash.display())),
        "{hook}"
    );
    Ok(())
}
