//! Renders the package as the Supervisor does: with its data, its two helpers that our templates
//! use, and its rules (nothing is escaped, a missing value is empty).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use handlebars::{
    Context, Handlebars, Helper, HelperResult, Output, RenderContext, RenderErrorReason, no_escape,
};
use serde_json::{Value, json};

use super::process::bound;
use super::site::merge;
use super::{Output as Ended, Result, Running};

pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

pub const HOOKS: [&str; 5] = ["run", "init", "health-check", "reconfigure", "file-updated"];

/// A service directory as the Supervisor keeps it, for one installed package.
pub struct Rendered {
    pub dir: tempfile::TempDir,
    /// The installed package.
    pub package: PathBuf,
    /// Configuration on top of default.toml: user.toml and the gossiped one, merged.
    pub cfg: toml::Table,
    /// Binds by name; a bind that is not satisfied is absent.
    pub binds: serde_json::Map<String, Value>,
}

impl Rendered {
    pub fn new(program: &Path) -> Self {
        let dir = super::process::server_dir("habitat-").expect("a directory");
        let package = dir.path().join("package");
        fs::create_dir_all(package.join("bin")).expect("a directory");
        std::os::unix::fs::symlink(program, package.join("bin/warm-spare")).expect("a link");
        let rendered = Self {
            package,
            cfg: toml::Table::new(),
            binds: serde_json::Map::new(),
            dir,
        };
        for name in ["config", "data", "files", "var", "static", "hooks"] {
            fs::create_dir_all(rendered.svc().join(name)).expect("a directory");
        }
        rendered
    }

    pub fn svc(&self) -> PathBuf {
        self.dir.path().join("svc")
    }

    pub fn config_file(&self) -> PathBuf {
        self.svc().join("config/config.toml")
    }

    pub fn pid_file(&self) -> PathBuf {
        self.svc().join("PID")
    }

    /// The one member of a group that `name` is bound to, with what it exports.
    pub fn bind(&mut self, name: &str, ip: &str, exports: Value) -> &mut Self {
        self.bind_members(name, vec![Self::member(ip, exports)], None)
    }

    pub fn bind_members(
        &mut self,
        name: &str,
        members: Vec<Value>,
        leader: Option<Value>,
    ) -> &mut Self {
        let group = json!({"first": members.first(), "members": members, "leader": leader});
        self.binds.insert(name.into(), group);
        self
    }

    /// Returns an alive member.
    pub fn member(ip: &str, exports: Value) -> Value {
        json!({
            "member_id": "0a", "alive": true, "suspect": false, "confirmed": false, "departed": false,
            "leader": false, "follower": false, "service": "other", "group": "dc2",
            "sys": {"ip": ip, "hostname": "node", "gossip_port": 9638},
            "cfg": exports,
        })
    }

    pub fn set(&mut self, toml: &str) -> &mut Self {
        merge(&mut self.cfg, toml.parse().expect("it is TOML"));
        self
    }

    fn data(&self) -> Value {
        let mut cfg: toml::Table = default_toml().parse().expect("default.toml is TOML");
        merge(&mut cfg, self.cfg.clone());
        let svc = self.svc();
        let path = |name: &str| svc.join(name).display().to_string();
        json!({
            "sys": {"ip": "127.0.0.1", "hostname": "node"},
            "pkg": {
                "ident": "site/warm-spare/0.1.0/20260101000000", "origin": "site", "name": "warm-spare",
                "version": "0.1.0", "release": "20260101000000", "deps": [],
                "path": self.package, "svc_path": svc, "svc_config_path": path("config"),
                "svc_data_path": path("data"), "svc_files_path": path("files"),
                "svc_static_path": path("static"), "svc_var_path": path("var"),
                "svc_pid_file": path("PID"), "svc_run": path("run"),
                "svc_user": "hab", "svc_group": "hab",
            },
            "cfg": serde_json::to_value(cfg).expect("it is JSON"),
            "svc": {"service": "warm-spare", "group": "dc2", "members": [], "first": null},
            "bind": self.binds,
        })
    }

    /// One template of the package.
    pub fn render(&self, template: &str) -> Result<String> {
        let text = fs::read_to_string(Path::new(ROOT).join(template))?;
        let mut engine = Handlebars::new();
        engine.register_escape_fn(no_escape);
        engine.register_helper("toToml", Box::new(to_toml));
        engine.register_helper("pkgPathFor", Box::new(pkg_path_for));
        Ok(engine.render_template(&text, &self.data())?)
    }

    pub fn config(&self) -> String {
        self.render("habitat/config/config.toml")
            .unwrap_or_else(|error| panic!("config.toml: {error}"))
    }

    pub fn hook(&self, name: &str) -> String {
        self.render(&format!("hooks/{name}"))
            .unwrap_or_else(|error| panic!("hooks/{name}: {error}"))
    }

    /// Writes configuration and hooks where the Supervisor does, with its modes.
    pub fn write(&self) {
        write(&self.config_file(), &self.config(), 0o740);
        for name in HOOKS {
            write(
                &self.svc().join("hooks").join(name),
                &self.hook(name),
                0o755,
            );
        }
    }

    /// Runs a hook to its end, as the Supervisor does: with an environment that holds its own secrets.
    pub async fn run_hook(&self, name: &str) -> Ended {
        let running = Running::start(self.command(name)).expect("the hook starts");
        let ended = running.wait(std::time::Duration::from_secs(60)).await;
        ended.expect("the hook ends")
    }

    /// Starts the service by its run hook, and notes its process as the Launcher does.
    pub fn start(&self) -> Running {
        let command = self.command("run");
        let running = Running::start(command).expect("the hook starts");
        fs::write(self.pid_file(), running.pid().to_string()).expect("it is written");
        running
    }

    fn command(&self, name: &str) -> Command {
        let mut command = bound(self.svc().join("hooks").join(name));
        command
            .env("HAB_AUTH_TOKEN", "hunter2-token")
            .env("HAB_SUP_GATEWAY_AUTH_TOKEN", "hunter2-gateway")
            // Variables that an operator's shell may have.
            .env("HAB_LICENSE", "accept-no-persist")
            .env("HAB_ORIGIN", "ours")
            .env("HAB_WARM_SPARE", "peer.datastore.password = 'hunter2'")
            .env_remove("HOME")
            .current_dir("/");
        command
    }
}

pub fn default_toml() -> String {
    fs::read_to_string(Path::new(ROOT).join("habitat/default.toml")).expect("default.toml")
}

/// Writes a file only if it changed, as the Supervisor does, so that no hook is written while it is
/// being started.
fn write(path: &Path, text: &str, mode: u32) {
    if fs::read_to_string(path).is_ok_and(|there| there == text) {
        return;
    }
    fs::write(path, text).expect("it is written");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("its mode");
}

/// A table as the body of a document, anything else as a literal; null is an error.
fn to_toml(
    helper: &Helper,
    _: &Handlebars,
    _: &Context,
    _: &mut RenderContext,
    out: &mut dyn Output,
) -> HelperResult {
    let value = helper.param(0).map(|param| param.value());
    let value = value.filter(|value| !value.is_null());
    let value = value.ok_or_else(|| RenderErrorReason::Other("toToml of nothing".into()))?;
    let wrong = |error: toml::ser::Error| RenderErrorReason::Other(error.to_string());
    let text = if value.is_object() {
        toml::to_string(value).map_err(wrong)?
    } else {
        let mut text = String::new();
        serde::Serialize::serialize(value, toml::ser::ValueSerializer::new(&mut text))
            .map_err(wrong)?;
        text
    };
    out.write(&text)?;
    Ok(())
}

/// Returns nothing, because the package that `scripts/package` lays out has no dependencies.
fn pkg_path_for(
    _: &Helper,
    _: &Handlebars,
    _: &Context,
    _: &mut RenderContext,
    _: &mut dyn Output,
) -> HelperResult {
    Ok(())
}
