//! Reads the configuration file and returns a configuration in which every value is good.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use humantime::format_duration;

use super::builder::{self, BuilderApi, Places};
use super::kept::{Accepted, data_dir, kept_table};
use super::keys::Key;
use super::kind::Checked;
use super::values::Values;
use super::{
    Artifacts, ArtifactsMode, Config, ConfigError, Direction, Fuse, Http, LeasePlan, LogFormat,
    Mode, Replication, Takeover, VerifyPlan, WantedRole, archive, binds, secret_places, sides,
    syntax,
};

/// Bytes of a part of a multipart upload. S3 takes no smaller part except the last one, and a copy
/// holds one part at a time.
const PART_BYTES: u64 = 5 * bytesize::MIB;

/// Shortest time for which a lease may hold.
const SHORTEST_LEASE: Duration = Duration::from_secs(1);

/// Mode bit that lets every user read a file.
const READ_BY_OTHERS: u32 = 0o004;

/// Reads and checks the configuration, and every file that it names. It changes nothing.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    load_text(path).map(|(config, _)| config)
}

/// [`load`] for work that uses only the local cluster, such as an archive: a configuration that
/// names no peer is good too. The peer of its result is one that nobody can reach.
pub fn load_alone(path: &Path) -> Result<Config, ConfigError> {
    match load(path) {
        Err(ConfigError::PeerUnset { alone }) => Ok(*alone),
        loaded => loaded,
    }
}

/// [`load`], which also returns the data that [`Accepted::keep`] writes.
pub fn load_text(path: &Path) -> Result<(Config, Accepted), ConfigError> {
    load_text_at(path, &Places::default())
}

/// [`load_text`], with Builder's own files at other places. Tests use it.
pub(super) fn load_text_at(
    path: &Path,
    places: &Places,
) -> Result<(Config, Accepted), ConfigError> {
    let (text, mode) = read(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_path_buf(),
        source,
    })?;
    let kept = kept_table(&data_dir(path));
    accept(path, &text, mode, places, kept.as_ref())
}

/// Checks a configuration of which text and mode were read at `path`. Binds that have vanished keep
/// the address that they have in `kept`.
pub(super) fn accept(
    path: &Path,
    text: &str,
    mode: u32,
    places: &Places,
    kept: Option<&toml::Table>,
) -> Result<(Config, Accepted), ConfigError> {
    let mut table = text
        .parse::<toml::Table>()
        .map_err(|error| ConfigError::Syntax {
            path: path.to_path_buf(),
            message: syntax(text, &error),
        })?;
    let moved = kept.map_or_else(Vec::new, |kept| binds::moved(&table, kept));
    let remembered = kept.map_or_else(Vec::new, |kept| binds::remember(&mut table, kept));
    let mut values = Values::read(&table)?;
    check_together(&values)?;
    check_mode(path, mode, &values)?;
    secret_places::check(path, &values)?;
    let archives = archive::entries(&table)?;
    for entry in &archives {
        check_mode(path, mode, &entry.values)
            .and_then(|()| secret_places::check(path, &entry.values))
            .map_err(|error| entry.named(error))?;
    }
    let accepted = Accepted::new(table, &values, &archives, remembered, moved);

    let (builder, mut builder_unread) = match builder_api(&values, places) {
        Ok(found) => (found, None),
        Err(error) if values.needs_no_builder() => (None, Some(error.to_string())),
        Err(error) => return Err(with_a_way_round(error, values.near())),
    };
    if let Some(api) = &builder {
        refuse_artifactory(api)?;
    }
    match values.complete_near(builder.as_ref()) {
        Err(error) if values.needs_no_builder() => {
            builder_unread = Some(error.to_string());
            values.complete_near(None)?;
        }
        completed => completed?,
    }
    let pushes = values.near() == "peer";
    let far = if pushes { "local" } else { "peer" };
    binds::Binds::far(far).complete(&mut values);
    let near_side = sides::near(&values, builder.as_ref(), &places.datastore_password)?;
    let is_unset = |key| values.text(key).is_none();
    let is_alone = !pushes && is_unset("peer.datastore.host") && is_unset("peer.s3.endpoint");
    let far_side = match is_alone {
        false => sides::far(&values, far, &near_side)?,
        true => sides::nobody(),
    };
    let (local, peer) = match pushes {
        false => (near_side, far_side),
        true => (far_side, near_side),
    };
    let mut config = assemble(&values, local, peer)?;
    config.builder_unread = builder_unread;
    config.archives = archive::plans(&archives, [&config.local, &config.peer])?;
    if pushes {
        // The files of this node belong to the primary.
        config.builder_keys_dir = None;
    } else {
        config.builder_api = builder.as_ref().map(BuilderApi::address);
    }
    if is_alone {
        let alone = Box::new(config);
        return Err(ConfigError::PeerUnset { alone });
    }
    Ok((config, accepted))
}

/// Reads text and mode of one file. Both belong together even while the file is replaced.
pub(super) fn read(path: &Path) -> std::io::Result<(String, u32)> {
    let mut file = File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok((text, mode))
}

/// Returns the address of the HTTP interface for a refused configuration: the values that are good
/// in it, and otherwise the defaults.
pub fn http_of(path: &Path) -> Http {
    let default = Http::default();
    let table = read(path)
        .ok()
        .and_then(|(text, _)| text.parse::<toml::Table>().ok());
    let checked = |name: &str| {
        let value = table.as_ref()?.get("http")?.get(name)?;
        let key = Key::find(&format!("http.{name}"))?;
        key.kind.check(value).ok()?
    };
    Http {
        listen: match checked("listen") {
            Some(Checked::Ip(address)) => address,
            _ => default.listen,
        },
        port: match checked("port") {
            Some(Checked::Int(port)) => port.try_into().unwrap_or(default.port),
            _ => default.port,
        },
    }
}

/// Checks the rules that concern several keys together.
fn check_together(values: &Values) -> Result<(), ConfigError> {
    if values.flag("artifacts.fill")? && values.required("artifacts.mode")? != "external" {
        return Err(ConfigError::key(
            "artifacts.fill",
            "true is only for artifacts.mode = \"external\": otherwise nobody else brings artifacts",
        ));
    }
    if values.text("artifacts.own_prefix").is_some()
        && values.required("artifacts.mode")? != "external"
    {
        return Err(ConfigError::key(
            "artifacts.own_prefix",
            "is only for artifacts.mode = \"external\": otherwise our own objects have a fixed place",
        ));
    }
    check_shared(values)?;
    check_rpo(values)?;
    let copies: u64 = values.int("replication.copies")?;
    let (buffer, least) = (
        values.bytes("replication.buffer").unwrap_or_default(),
        copies * PART_BYTES,
    );
    if buffer < least {
        let least = least / bytesize::MIB;
        return Err(ConfigError::key(
            "replication.buffer",
            format!(
                "too small for {copies} copies at once (replication.copies), which hold 5MiB each: set at least \"{least}MiB\", or reduce replication.copies"
            ),
        ));
    }
    Ok(())
}

/// Checks the keys that only a shared bucket has.
fn check_shared(values: &Values) -> Result<(), ConfigError> {
    let is_shared = values.required("artifacts.mode")? == "shared";
    for (key, value) in [
        ("artifacts.attach", "at_takeover"),
        ("artifacts.isolated", "fence"),
    ] {
        if values.required(key)? == value && !is_shared {
            return Err(ConfigError::key(
                key,
                format!("\"{value}\" is only for artifacts.mode = \"shared\""),
            ));
        }
    }
    if is_shared && values.near() == "peer" {
        return Err(ConfigError::key(
            "replication.direction",
            "\"push\" does not go with artifacts.mode = \"shared\": the warm-spare at the primary's site must renew the lease for the primary, so it cannot work for the spare",
        ));
    }
    let (ttl, least) = (values.duration("artifacts.lease_ttl")?, SHORTEST_LEASE);
    if ttl < least {
        return Err(ConfigError::key(
            "artifacts.lease_ttl",
            format!(
                "must be at least {}, found {}: the lease is renewed three times in this time",
                format_duration(least),
                format_duration(ttl)
            ),
        ));
    }
    Ok(())
}

/// Checks that `replication.rpo` exceeds every lag that is normal by design; otherwise health would
/// become critical for it.
fn check_rpo(values: &Values) -> Result<(), ConfigError> {
    let rpo = values.duration("replication.rpo")?;
    let exceeds = |what: &str, least: Duration| {
        if rpo > least {
            return Ok(());
        }
        let (least, found) = (format_duration(least), format_duration(rpo));
        let problem = format!("must exceed {what} ({least}), found {found}");
        Err(ConfigError::key("replication.rpo", problem))
    };
    exceeds(
        "replication.interval",
        values.duration("replication.interval")?,
    )?;
    match values.schedule("replication.schedule") {
        Some(schedule) => exceeds(
            "the longest pause of replication.schedule",
            schedule.longest_pause(),
        ),
        None => Ok(()),
    }
}

/// Checks that not every user can read a configuration that holds secrets.
fn check_mode(path: &Path, mode: u32, values: &Values) -> Result<(), ConfigError> {
    match values.inline_secrets().next() {
        Some(key) if mode & READ_BY_OTHERS != 0 => {
            let path = path.display();
            let mode = mode & 0o7777;
            Err(ConfigError::key(
                key,
                format!(
                    "{path} holds this secret and every user can read it (mode {mode:04o}): chmod o= {path}, or use {key}_file"
                ),
            ))
        }
        _ => Ok(()),
    }
}

fn builder_api(values: &Values, places: &Places) -> Result<Option<BuilderApi>, ConfigError> {
    let usual = Path::new(super::keys::BUILDER_API_CONFIG);
    let configured = Path::new(values.required(builder::KEY)?);
    // Tests move the usual place.
    let path = if configured == usual {
        &places.api_config
    } else {
        configured
    };
    BuilderApi::find(path, &places.api_config)
}

fn with_a_way_round(error: ConfigError, near: &str) -> ConfigError {
    let keys = super::keys::SERVERS
        .iter()
        .map(|name| format!("{near}.{name}"));
    let keys = keys.collect::<Vec<_>>().join(", ");
    match error {
        ConfigError::Key { key, problem } => ConfigError::key(
            key,
            format!("{problem}; this file is not needed if your own configuration sets {keys}"),
        ),
        other => other,
    }
}

fn refuse_artifactory(api: &BuilderApi) -> Result<(), ConfigError> {
    if !api.has_feature("ARTIFACTORY") {
        return Ok(());
    }
    Err(ConfigError::key(
        builder::KEY,
        format!(
            "unsupported_store: Builder keeps its packages in Artifactory, which warm-spare cannot replicate \
             (api.features_enabled in {})",
            api.path().display()
        ),
    ))
}

fn assemble(values: &Values, local: super::Side, peer: super::Side) -> Result<Config, ConfigError> {
    let text = |key| values.text(key).unwrap_or_default().to_string();
    Ok(Config {
        role: WantedRole::parse(values.required("role")?).unwrap_or(WantedRole::Keep),
        force_epoch: values.int("force_epoch")?,
        paused: values.flag("paused")?,
        paused_until: values.time("paused_until"),
        quiet_until: values.time("quiet_until"),
        change: text("change"),
        site: text("site"),
        builder_keys_dir: values
            .text("local.builder_keys_dir")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        builder_unread: None,
        builder_api: None,
        log_level: values
            .required("log_level")?
            .parse()
            .unwrap_or(log::LevelFilter::Info),
        log_format: match values.required("log_format")? {
            "json" => LogFormat::Json,
            _ => LogFormat::Text,
        },
        local,
        peer,
        replication: replication(values)?,
        artifacts: artifacts(values)?,
        archives: Vec::new(),
        fuse: Fuse {
            max_percent: values.int("fuse.max_percent")?,
            min_count: values.int("fuse.min_count")?,
            window: values.duration("fuse.window")?,
            approve: text("fuse.approve"),
        },
        takeover: Takeover {
            drain_timeout: values.duration("takeover.drain_timeout")?,
            read_only_limit: values.duration("takeover.read_only_limit")?,
            fence_retry: values.duration("takeover.fence_retry")?,
            attach_timeout: values.duration("takeover.attach_timeout")?,
            fence_command: text("takeover.fence_command"),
            force_lease: text("takeover.force_lease"),
        },
        verify: VerifyPlan {
            schedule: values.schedule("verify.schedule").cloned(),
            deep: values.flag("verify.deep")?,
            rolling: values.int("verify.rolling")?,
        },
        http: Http {
            listen: values.address("http.listen")?,
            port: values.int("http.port")?,
        },
    })
}

fn artifacts(values: &Values) -> Result<Artifacts, ConfigError> {
    Ok(Artifacts {
        mode: match values.required("artifacts.mode")? {
            "external" => ArtifactsMode::External,
            "shared" => ArtifactsMode::Shared,
            _ => ArtifactsMode::Replicate,
        },
        fill: values.flag("artifacts.fill")?,
        own_prefix: values.text("artifacts.own_prefix").map(String::from),
        arrival_limit: values.duration("artifacts.arrival_limit")?,
        attach_at_takeover: values.required("artifacts.attach")? == "at_takeover",
        lease: LeasePlan {
            ttl: values.duration("artifacts.lease_ttl")?,
            fences_isolated: values.required("artifacts.isolated")? == "fence",
            store: sides::lease(values)?,
        },
    })
}

fn replication(values: &Values) -> Result<Replication, ConfigError> {
    let bytes = |key| values.bytes(key).ok_or_else(|| values.missing(key));
    let name = |key| values.text(key).map(String::from);
    Ok(Replication {
        mode: match values.required("replication.mode")? {
            "stream" => Mode::Stream,
            "snapshot" => Mode::Snapshot,
            _ => Mode::Auto,
        },
        direction: match values.required("replication.direction")? {
            "push" => Direction::Push,
            _ => Direction::Pull,
        },
        interval: values.duration("replication.interval")?,
        schedule: values.schedule("replication.schedule").cloned(),
        lag_warn: values.duration("replication.lag_warn")?,
        rpo: values.duration("replication.rpo")?,
        jobs: values.int("replication.jobs")?,
        copies: values.int("replication.copies")?,
        buffer: bytes("replication.buffer")?,
        bandwidth_limit: values.bytes("replication.bandwidth_limit"),
        gate_grace: values.duration("replication.gate_grace")?,
        retry_missing: values.duration("replication.retry_missing")?,
        artifact_retention: values.duration("replication.artifact_retention")?,
        wal_hold_limit: bytes("replication.wal_hold_limit")?,
        wal_unbounded: values.flag("replication.wal_unbounded")?,
        slot: name("replication.slot"),
        publication: name("replication.publication"),
        keep_generations: values.int("replication.keep_generations")?,
    })
}
