//! Three Supervisors in one ring, two sites with their own groups, and the package under test on
//! one of them.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::follow::logical;
use super::ports::free_port;
use super::service::{SOON, get};
use super::supervisor::{Programs, Supervisor};
use super::{Factory, Result, Site, Spec, content, skip, wait_until};

pub const GROUP: &str = "warm-spare.dc2";

/// Three Supervisors in one ring: the primary's node, the spare's, and the one on which our package
/// is loaded.
pub struct World {
    pub site: Site,
    pub primary: Supervisor,
    pub stores: Supervisor,
    pub ours: Supervisor,
    /// Port at which the service under test answers.
    pub port: u16,
    pub version: u64,
}

/// Makes a world. None: there is no Supervisor here, and that was printed.
pub async fn world(name: &str) -> Result<Option<World>> {
    if let Err(why) = Programs::find() {
        skip(&format!("the suite under the Supervisor: {why} (hab)"));
        return Ok(None);
    }
    let builder = Site::builder(name).primary(logical()).own_stores();
    let site = builder.start().await?;
    Factory::seeded().fill(&site.primary, 5).await?;
    super::follow::prepare(&site).await;
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

/// Writes builder-api's rendered configuration, as it is on a node with Builder's own services.
pub fn write_builder_api(world: &World) -> Result<String> {
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

/// Writes the permanent settings into user.toml: where secrets are, and no address but our own
/// port.
pub fn prepare_node(world: &World, node: &Supervisor, port: u16) -> Result<()> {
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

pub async fn load(node: &Supervisor, topology: &str) {
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

pub async fn status_at(port: u16) -> Result<Value> {
    Ok(get(port, "/status").await?.json())
}

pub async fn until_at(port: u16, what: &str, so: impl Fn(&Value) -> bool) -> Value {
    wait_until(what, SOON, || async {
        let status = status_at(port).await?;
        match so(&status) {
            true => Ok(status),
            false => Err(format!("{status:#}").into()),
        }
    })
    .await
}

pub fn follows(status: &Value) -> bool {
    status["state"] == "following"
        && status["replication"]["mode"] == "stream"
        && status["lag"]["bytes"] == 0
}

impl World {
    pub async fn until(&self, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        until_at(self.port, what, so).await
    }

    pub async fn apply(&mut self, text: &str) -> Instant {
        self.version += 1;
        self.ours.apply(GROUP, self.version, text).await;
        Instant::now()
    }

    /// Uploads one more package on the primary, and waits until the spare has all of it.
    pub async fn one_more(&self, name: &str) -> Result<()> {
        let mut factory = Factory::seeded();
        let package = factory
            .package(&self.site.primary, Spec::new("core", name, "1"))
            .await?;
        self.equal().await?;
        assert!(self.site.spare.get(&package.key).await?.is_some());
        Ok(())
    }

    pub async fn equal(&self) -> Result<()> {
        let expected = content(&self.site.primary).await?;
        wait_until("the primary's rows are here", SOON, || async {
            let found = content(&self.site.spare).await?;
            (found == expected).then_some(()).ok_or("other rows".into())
        })
        .await;
        Ok(())
    }

    pub async fn baselines(&self) -> Result<String> {
        let page = get(self.port, "/metrics").await?.text;
        let lines = page
            .lines()
            .filter(|l| l.starts_with("warm_spare_baselines_total"));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }
}

pub fn say(step: &str, took: Duration) {
    println!("seen: {step}: {:.2} s", took.as_secs_f64());
}

/// Loads the service, sets its role by gossip, and lets it follow by the addresses of four binds.
pub async fn following(name: &str) -> Result<Option<World>> {
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
