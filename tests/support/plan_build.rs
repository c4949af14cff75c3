//! Really builds packages from our plan, outside a studio. Dependencies are stand-ins, and so is
//! cargo, which copies the program that is being tested.
//!
//! `WARM_SPARE_PLAN_BUILD` names `hab-plan-build-linux.sh`; `hab`, wget and xz are required too.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::habitat::ROOT;
use super::process::{find_program, on_path};
use super::{Result, Supervisor};

/// Every package that the plan names.
const DEPENDENCIES: [&str; 7] = [
    "bash",
    "coreutils",
    "gcc-base",
    "glibc",
    "postgresql17-client",
    "gcc",
    "rust/1.91.1",
];

/// The stand-in for cargo; a real one builds the whole program.
const CARGO: &str = r#"#!/bin/bash
echo "cargo $*" >&2
mkdir -p "$CARGO_TARGET_DIR/release"
strip -o "$CARGO_TARGET_DIR/release/warm-spare" "$STAND_IN_PROGRAM"
"#;

/// The stand-in for `toml get FILE TABLE.KEY --raw`, which the build calls.
const TOML: &str = r#"#!/bin/bash
sed -n "/^\[${3%%.*}\]/,/^\[/s/^${3#*.} = //p" "$2"
"#;

/// Returns the build's script, or the reason why there is none.
pub fn find() -> Result<PathBuf, String> {
    let named = std::env::var_os("WARM_SPARE_PLAN_BUILD").map(PathBuf::from);
    for tool in ["wget", "xz", "strip"] {
        find_program(on_path(tool)).ok_or(format!("there is no {tool} for hab's plan build"))?;
    }
    find_program(named)
        .ok_or("there is no hab-plan-build: name its script by WARM_SPARE_PLAN_BUILD".into())
}

/// Builds and signs the package in this Supervisor's root. Returns the installed package.
pub fn build(script: &Path, supervisor: &Supervisor) -> Result<PathBuf> {
    let root = supervisor.root();
    let tools = root.join("tools");
    let hab = root.join("hab");
    for name in DEPENDENCIES {
        let folder = supervisor.lay_out_empty(&format!("core/{name}"))?;
        match name {
            "bash" => link(name, &folder)?,
            "coreutils" => {
                for program in ["timeout", "touch", "rm"] {
                    link(program, &folder)?;
                }
            }
            "rust/1.91.1" => write_program(&folder.join("bin/cargo"), CARGO)?,
            _ => {}
        }
    }
    fs::create_dir_all(&tools)?;
    write_program(&tools.join("toml"), TOML)?;
    let path = std::env::join_paths([tools.clone()].into_iter().chain(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    )))?;
    let environment = |command: &mut Command| {
        command
            .env("PATH", &path)
            .env("FS_ROOT", root)
            .env("HAB_ROOT_PATH", &hab)
            .env("HAB_CACHE_KEY_PATH", hab.join("cache/keys"))
            .env("HAB_BIN", supervisor.hab_program())
            .env("HAB_LICENSE", "accept-no-persist")
            .env("HAB_NONINTERACTIVE", "1")
            .env("HAB_ORIGIN", "site")
            .env("NO_INSTALL_DEPS", "1")
            .env("STAND_IN_PROGRAM", super::site::default_program())
            .env_remove("CARGO_TARGET_DIR")
            .current_dir(&tools);
    };
    let mut key = Command::new(supervisor.hab_program());
    environment(key.args(["origin", "key", "generate", "site"]));
    run(&mut key)?;
    let mut build = Command::new("bash");
    environment(build.arg(script).arg(ROOT));
    let said = run(&mut build)?;
    assert!(
        said.contains("cargo build --release --locked --bin warm-spare"),
        "{said}"
    );
    let built = tools.join("results/last_build.env");
    let built = fs::read_to_string(built)?;
    let ident = built
        .lines()
        .find_map(|line| line.strip_prefix("pkg_ident="))
        .ok_or("no pkg_ident")?;
    Ok(supervisor.packages().join(ident.trim_matches('"')))
}

fn link(program: &str, package: &Path) -> Result<()> {
    let found = find_program(on_path(program)).ok_or("no such program")?;
    Ok(std::os::unix::fs::symlink(
        found,
        package.join("bin").join(program),
    )?)
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    match output.status.success() {
        true => Ok(said),
        false => Err(said.into()),
    }
}
