//! Origins, packages and all their rows, put into a cluster in the order in which Builder does it.
//!
//! The same seed and the same calls give the same bytes.

use std::collections::HashMap;
use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{BufMut, Bytes, BytesMut};
use ed25519_dalek::{Signer, SigningKey};
use futures_util::{SinkExt, Stream, StreamExt, TryStreamExt, stream};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use tokio_postgres::Client;

use super::{Cluster, Result};

/// The revision of the builder key with which all secrets here claim to be encrypted.
pub const BUILDER_KEY_REVISION: &str = "20240101000000";
/// Artifacts up to this size are real archives; larger ones are random bytes behind a valid header.
const ARCHIVE_UP_TO: u64 = 1 << 20;
const CHUNK: usize = 1 << 20;
const TARGETS: [&str; 4] = [
    "x86_64-linux",
    "x86_64-linux-kernel2",
    "x86_64-windows",
    "aarch64-linux",
];
const NAMES: [&str; 12] = [
    "redis",
    "nginx",
    "openssl",
    "zlib",
    "glibc",
    "ruby",
    "node",
    "curl",
    "jq",
    "vault",
    "consul",
    "postgresql",
];

/// BLAKE2b with 256 bits, as Habitat uses it everywhere.
pub fn blake2b() -> blake2b_simd::State {
    blake2b_simd::Params::new().hash_length(32).to_state()
}

/// The properties of a package: `Spec::new`, then the differences.
#[derive(Debug, Clone)]
pub struct Spec {
    pub origin: String,
    pub name: String,
    pub version: String,
    /// None: the factory's clock, a second later for every package.
    pub release: Option<String>,
    pub target: String,
    /// Size of the artifact in bytes; archives have about this size, larger artifacts exactly.
    pub size: u64,
    pub manifest_size: usize,
    pub visibility: String,
    /// Channels in addition to `unstable`, which every package is in.
    pub channels: Vec<String>,
    pub deps: Vec<String>,
    pub exposes: Vec<i32>,
}

impl Spec {
    pub fn new(origin: &str, name: &str, version: &str) -> Self {
        Self {
            origin: origin.into(),
            name: name.into(),
            version: version.into(),
            release: None,
            target: "x86_64-linux".into(),
            size: 2048,
            manifest_size: 4096,
            visibility: "public".into(),
            channels: Vec::new(),
            deps: Vec::new(),
            exposes: Vec::new(),
        }
    }

    pub fn release(mut self, release: &str) -> Self {
        self.release = Some(release.into());
        self
    }

    pub fn target(mut self, target: &str) -> Self {
        self.target = target.into();
        self
    }

    pub fn size(mut self, size: u64) -> Self {
        self.size = size;
        self
    }

    pub fn manifest_size(mut self, size: usize) -> Self {
        self.manifest_size = size;
        self
    }

    pub fn visibility(mut self, visibility: &str) -> Self {
        self.visibility = visibility.into();
        self
    }

    pub fn channel(mut self, channel: &str) -> Self {
        self.channels.push(channel.into());
        self
    }
}

/// A package: its row and its artifact.
#[derive(Debug, Clone)]
pub struct Package {
    /// `origin/name/version/release`
    pub ident: String,
    pub target: String,
    /// Key of the object in the bucket.
    pub key: String,
    /// Checksum as Builder stores it: of the whole file.
    pub checksum: String,
    pub size: u64,
    pub manifest: String,
    pub spec: Spec,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Whole(Bytes),
    /// A header, then random bytes that are made again whenever they are read.
    Filled {
        header: Bytes,
        seed: u64,
        payload: u64,
    },
}

impl Package {
    /// Makes the package of an upload: what a server knows of it.
    pub fn uploaded(ident: &str, target: &str, bytes: Bytes) -> Self {
        let mut words = ident.split('/');
        let mut next = || words.next().unwrap_or_default();
        let mut spec = Spec::new(next(), next(), next()).target(target);
        spec.release = words.next().map(String::from);
        Self {
            ident: ident.into(),
            target: target.into(),
            key: object_key(ident, target),
            checksum: blake2b().update(&bytes).finalize().to_hex().to_string(),
            size: bytes.len() as u64,
            manifest: String::new(),
            spec,
            content: Content::Whole(bytes),
        }
    }

    pub fn names(&self) -> Names<'_> {
        Names {
            origin: &self.spec.origin,
            ident: &self.ident,
            target: &self.target,
        }
    }

    /// The whole artifact, in memory.
    pub fn bytes(&self) -> Bytes {
        self.chunks()
            .fold(BytesMut::new(), |mut all, chunk| {
                all.put(chunk);
                all
            })
            .freeze()
    }

    /// The artifact in chunks of at most 1 MiB.
    pub fn chunks(&self) -> Box<dyn Iterator<Item = Bytes> + Send> {
        match &self.content {
            Content::Whole(bytes) => Box::new(std::iter::once(bytes.clone())),
            Content::Filled {
                header,
                seed,
                payload,
            } => Box::new(std::iter::once(header.clone()).chain(filler(*seed, *payload))),
        }
    }

    pub fn stream(&self) -> impl Stream<Item = Bytes> + Unpin + use<> {
        stream::iter(self.chunks())
    }
}

/// `size` random bytes: one random block again and again, each time with another number in front.
fn filler(seed: u64, size: u64) -> impl Iterator<Item = Bytes> + Send {
    let mut block = vec![0; CHUNK.min(size as usize)];
    StdRng::seed_from_u64(seed).fill_bytes(&mut block);
    (0..size.div_ceil(CHUNK as u64)).map(move |number| {
        let left = size - number * CHUNK as u64;
        let mut chunk = block.clone();
        let stamp = (seed ^ number).to_le_bytes();
        let stamped = stamp.len().min(chunk.len());
        chunk[..stamped].copy_from_slice(&stamp[..stamped]);
        chunk.truncate(left.min(CHUNK as u64) as usize);
        chunk.into()
    })
}

/// The key of the object in the bucket.
pub fn object_key(ident: &str, target: &str) -> String {
    let file = ident.replace('/', "-");
    let folders = target.replace('-', "/");
    format!("{ident}/{folders}/{file}-{target}.hart")
}

pub struct Factory {
    pub seed: u64,
    /// Seed of the origins' keys: all factories that sign for one site must have the same.
    key_seed: u64,
    rng: StdRng,
    /// Seconds since 1970; the next release.
    clock: i64,
    keys: HashMap<String, SigningKey>,
    /// Idents made so far, to depend on.
    made: Vec<String>,
    text: Vec<String>,
}

impl Factory {
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            key_seed: seed,
            rng: StdRng::seed_from_u64(seed),
            clock: 1_704_067_200,
            keys: HashMap::new(),
            made: Vec::new(),
            text: plan_lines(seed),
        }
    }

    /// Signs with the keys of another factory.
    pub fn with_keys_of(mut self, seed: u64) -> Self {
        self.key_seed = seed;
        self
    }

    /// Returns a factory with the seed of this run.
    pub fn seeded() -> Self {
        Self::new(super::seed())
    }

    /// Makes only the package: nothing is stored anywhere.
    pub fn make(&mut self, spec: Spec) -> Package {
        let release = spec.release.clone().unwrap_or_else(|| self.next_release());
        let ident = format!("{}/{}/{}/{release}", spec.origin, spec.name, spec.version);
        let manifest = self.manifest(&ident, &spec);
        let key = self.signing_key(&spec.origin);
        let signer = format!("{}-{BUILDER_KEY_REVISION}", spec.origin);
        let content = if spec.size <= ARCHIVE_UP_TO {
            let payload = self.archive(&ident, &manifest, &spec);
            let mut hash = blake2b();
            let header = header(&signer, &key, hash.update(&payload));
            Content::Whole([header, payload].concat().into())
        } else {
            // The header's length does not depend on what is signed.
            let length = header(&signer, &key, &blake2b()).len() as u64;
            let (seed, payload) = (self.rng.next_u64(), spec.size - length);
            let mut hash = blake2b();
            filler(seed, payload).for_each(|chunk| {
                hash.update(&chunk);
            });
            Content::Filled {
                header: header(&signer, &key, &hash).into(),
                seed,
                payload,
            }
        };
        self.made.push(ident.clone());
        let mut package = Package {
            key: object_key(&ident, &spec.target),
            target: spec.target.clone(),
            checksum: String::new(),
            size: 0,
            ident,
            manifest,
            spec,
            content,
        };
        let mut hash = blake2b();
        for chunk in package.chunks() {
            hash.update(&chunk);
            package.size += chunk.len() as u64;
        }
        package.checksum = hash.finalize().to_hex().to_string();
        package
    }

    /// Makes a package and uploads it: the object first, then the rows. Its origin is made when there is none.
    pub async fn package(&mut self, cluster: &Cluster, spec: Spec) -> Result<Package> {
        self.origin(cluster, &spec.origin).await?;
        let package = self.make(spec);
        upload(cluster, &package).await?;
        Ok(package)
    }

    /// `count` packages of several origins, names, targets and sizes up to 64 KiB, some of them private or promoted.
    pub async fn fill(&mut self, cluster: &Cluster, count: usize) -> Result<Vec<Package>> {
        let mut packages = Vec::with_capacity(count);
        for number in 0..count {
            let spec = self.some_spec(number);
            self.origin(cluster, &spec.origin).await?;
            packages.push(self.make(spec));
        }
        stream::iter(&packages)
            .map(|package| upload(cluster, package))
            .buffer_unordered(4)
            .try_collect::<Vec<()>>()
            .await?;
        Ok(packages)
    }

    fn some_spec(&mut self, number: usize) -> Spec {
        let rng = &mut self.rng;
        let origin = ["core", "acme", "neurosis"][number % 3];
        let name = NAMES.choose(rng).expect("there are names");
        let version = format!(
            "{}.{}.{number}",
            rng.random_range(0..12),
            rng.random_range(0..30)
        );
        let mut spec = Spec::new(origin, name, &version)
            .target(TARGETS.choose(rng).expect("there are targets"))
            .size(1024 << rng.random_range(0..7))
            .manifest_size(2048 << rng.random_range(0..5));
        if rng.random_ratio(1, 8) {
            spec.visibility = ["private", "hidden"][rng.random_range(0..2)].into();
        }
        if rng.random_ratio(1, 3) {
            spec.channels.push("stable".into());
        }
        if rng.random_ratio(1, 4) {
            spec.exposes = vec![80, 443, rng.random_range(1024..60000)];
        }
        let wanted = rng.random_range(0..4);
        spec.deps = self.made.choose_multiple(rng, wanted).cloned().collect();
        spec
    }

    /// Rows of packages without artifacts, fast, for benchmarks.
    pub async fn bulk_rows(
        &mut self,
        cluster: &Cluster,
        count: usize,
        manifest_size: usize,
    ) -> Result<()> {
        self.origin(cluster, "bulk").await?;
        let client = cluster.conn().await?;
        let owner = account(&client, "bulk").await?;
        let mut rows = Rows::start(&client, owner).await?;
        for number in 0..count {
            let version = format!("1.{}.{}", number / 100, number % 100);
            let spec = Spec::new("bulk", NAMES[number % NAMES.len()], &version);
            let ident = format!("bulk/{}/{version}/{}", spec.name, self.next_release());
            let manifest = self.manifest(&ident, &spec.clone().manifest_size(manifest_size));
            let mut checksum = [0; 32];
            self.rng.fill_bytes(&mut checksum);
            rows.add(&ident, &spec, &hex(&checksum), &manifest).await?;
        }
        rows.finish().await
    }

    /// Packages with artifacts of one size, several uploads at a time, for benchmarks.
    pub async fn bulk_artifacts(
        &mut self,
        cluster: &Cluster,
        count: usize,
        size: u64,
    ) -> Result<Vec<Package>> {
        self.bulk_artifacts_of(cluster, count, size, 4096).await
    }

    /// The same, with manifests of a chosen size.
    pub async fn bulk_artifacts_of(
        &mut self,
        cluster: &Cluster,
        count: usize,
        size: u64,
        manifest_size: usize,
    ) -> Result<Vec<Package>> {
        self.origin(cluster, "bulk").await?;
        let packages: Vec<Package> = (0..count)
            .map(|number| {
                let name = NAMES[number % NAMES.len()];
                self.make(
                    Spec::new("bulk", name, &format!("2.0.{number}"))
                        .size(size)
                        .manifest_size(manifest_size),
                )
            })
            .collect();
        stream::iter(&packages)
            .map(|package| put(cluster, package))
            .buffer_unordered(8)
            .try_collect::<Vec<()>>()
            .await?;
        let client = cluster.conn().await?;
        let owner = account(&client, "bulk").await?;
        let mut rows = Rows::start(&client, owner).await?;
        for package in &packages {
            rows.add(
                &package.ident,
                &package.spec,
                &package.checksum,
                &package.manifest,
            )
            .await?;
        }
        rows.finish().await?;
        Ok(packages)
    }

    /// An origin with its owner, channels, keys, a secret and its line in the audit; nothing when it is there.
    pub async fn origin(&mut self, cluster: &Cluster, name: &str) -> Result<()> {
        let mut client = cluster.conn().await?;
        let there = client
            .query_opt("SELECT 1 FROM origins WHERE name = $1", &[&name])
            .await?;
        if there.is_some() {
            return Ok(());
        }
        let owner = account(&client, name).await?;
        let member = account(&client, &format!("{name}-member")).await?;
        let work = client.transaction().await?;
        self.origin_rows(work.client(), name, owner, member).await?;
        Ok(work.commit().await?)
    }

    /// The rows of a new origin, in the transaction that is open.
    pub async fn origin_rows(
        &mut self,
        work: &Client,
        name: &str,
        owner: i64,
        member: i64,
    ) -> Result<()> {
        let full_name = format!("{name}-{BUILDER_KEY_REVISION}");
        let public = self.signing_key(name).verifying_key();
        let public = format!(
            "SIG-PUB-1\n{full_name}\n\n{}",
            BASE64.encode(public.as_bytes())
        );
        let mut sealed = [0; 96];
        self.rng.fill_bytes(&mut sealed);
        let sealed = BASE64.encode(sealed);
        let secret = format!("BOX-1\nbldr-{BUILDER_KEY_REVISION}\n\n{sealed}");

        let one = "INSERT INTO origins (name, owner_id) VALUES ($1, $2)";
        work.execute(one, &[&name, &owner]).await?;
        let roles = "INSERT INTO origin_members (origin, account_id, member_role)
                     VALUES ($1, $2, 'owner'), ($1, $3, 'maintainer')";
        work.execute(roles, &[&name, &owner, &member]).await?;
        let channels = "INSERT INTO origin_channels (owner_id, name, origin)
                        VALUES ($1, 'stable', $2), ($1, 'unstable', $2)";
        work.execute(channels, &[&owner, &name]).await?;
        for (table, body) in [
            ("origin_public_keys", &public),
            ("origin_secret_keys", &secret),
            ("origin_public_encryption_keys", &public),
            ("origin_private_encryption_keys", &secret),
        ] {
            let key = format!(
                "INSERT INTO {table} (owner_id, name, revision, full_name, body, origin) VALUES ($1, $2, $3, $4, $5, $2)"
            );
            work.execute(
                &key,
                &[&owner, &name, &BUILDER_KEY_REVISION, &full_name, body],
            )
            .await?;
        }
        let revision = "UPDATE origin_secret_keys SET encryption_key_rev = $1 WHERE full_name = $2";
        work.execute(revision, &[&BUILDER_KEY_REVISION, &full_name])
            .await?;
        let hidden = "INSERT INTO origin_secrets (owner_id, name, value, origin) VALUES ($1, 'token', $2, $3)";
        work.execute(hidden, &[&owner, &secret, &name]).await?;
        let audit = "INSERT INTO audit_origin (operation, target_object, origin, requester_id, requester_name)
                     VALUES ('origin_create', $1, $1, $2, $1)";
        work.execute(audit, &[&name, &owner]).await?;
        Ok(())
    }

    fn next_release(&mut self) -> String {
        self.clock += 1;
        let time = chrono::DateTime::from_timestamp(self.clock, 0).expect("it is a date");
        time.format("%Y%m%d%H%M%S").to_string()
    }

    fn signing_key(&mut self, origin: &str) -> SigningKey {
        let mut seed = blake2b();
        seed.update(&self.key_seed.to_le_bytes())
            .update(origin.as_bytes());
        let make =
            || SigningKey::from_bytes(seed.finalize().as_bytes().try_into().expect("32 bytes"));
        self.keys.entry(origin.into()).or_insert_with(make).clone()
    }

    /// The text Builder keeps of a plan: words, and checksums that no compressor makes smaller.
    fn manifest(&mut self, ident: &str, spec: &Spec) -> String {
        let mut text = String::with_capacity(spec.manifest_size + 256);
        let _ = write!(text, "# {ident}\n\n* __Target__: {}\n\n", spec.target);
        let mut line = self.rng.random_range(0..self.text.len());
        while text.len() < spec.manifest_size {
            text.push_str(&self.text[line]);
            line = (line + 1) % self.text.len();
        }
        text
    }

    fn archive(&mut self, ident: &str, manifest: &str, spec: &Spec) -> Vec<u8> {
        let root = format!("hab/pkgs/{ident}");
        // What the header, the tar blocks and the small files come to.
        let mut filler = vec![0; spec.size.saturating_sub(900) as usize];
        self.rng.fill_bytes(&mut filler);
        // The manifest in the archive is short, so that small artifacts can be made.
        let manifest = &manifest[..manifest.len().min(160)];
        let files: [(&str, &[u8]); 5] = [
            ("IDENT", ident.as_bytes()),
            ("TARGET", spec.target.as_bytes()),
            ("TYPE", b"standard"),
            ("MANIFEST", manifest.as_bytes()),
            ("bin/filler", &filler),
        ];
        let packed = liblzma::write::XzEncoder::new(Vec::new(), 0);
        let mut tar = tar::Builder::new(packed);
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(0);
            tar.append_data(&mut header, format!("{root}/{name}"), content)
                .expect("memory takes it");
        }
        tar.into_inner()
            .and_then(|packed| packed.finish())
            .expect("memory takes it")
    }
}

/// Five lines: format, signer, hash, signature over the payload's hash with that hash behind it, nothing.
fn header(signer: &str, key: &SigningKey, payload: &blake2b_simd::State) -> Vec<u8> {
    let hash = payload.finalize().to_hex();
    let mut signed = key.sign(hash.as_bytes()).to_bytes().to_vec();
    signed.extend_from_slice(hash.as_bytes());
    format!("HART-1\n{signer}\nBLAKE2b\n{}\n\n", BASE64.encode(signed)).into_bytes()
}

fn plan_lines(seed: u64) -> Vec<String> {
    const WORDS: [&str; 16] = [
        "pkg_deps",
        "do_build",
        "attach",
        "core",
        "make",
        "install",
        "source",
        "shasum",
        "prefix",
        "include",
        "bin",
        "configure",
        "return",
        "maintainer",
        "license",
        "upstream",
    ];
    let mut rng = StdRng::seed_from_u64(seed ^ 0x706c_616e);
    let mut line = || {
        let mut text = String::new();
        for _ in 0..4 {
            text.push_str(WORDS.choose(&mut rng).expect("there are words"));
            text.push(' ');
        }
        let mut noise = [0; 24];
        rng.fill_bytes(&mut noise);
        text + &hex(&noise) + "\n"
    };
    (0..8192).map(|_| line()).collect()
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from(DIGITS[digit as usize]))
        .collect()
}

/// PUT, HEAD, then the rows.
pub async fn upload(cluster: &Cluster, package: &Package) -> Result<()> {
    put(cluster, package).await?;
    insert(cluster, package).await
}

/// The object alone; without `insert` what a crash in an upload leaves.
pub async fn put(cluster: &Cluster, package: &Package) -> Result<()> {
    let store = cluster.s3();
    store
        .put_stream(
            &cluster.bucket,
            &package.key,
            package.size,
            package.stream(),
        )
        .await?;
    let head = store.head(&cluster.bucket, &package.key).await?;
    match head {
        Some(head) if head.size == package.size => Ok(()),
        other => Err(format!("{} was put, and there is {other:?}", package.key).into()),
    }
}

/// The package's rows alone; its origin must be there.
pub async fn insert(cluster: &Cluster, package: &Package) -> Result<()> {
    let mut client = cluster.conn().await?;
    let work = client.transaction().await?;
    insert_rows(work.client(), package).await?;
    Ok(work.commit().await?)
}

/// The same in the transaction that is open.
pub async fn insert_rows(work: &Client, package: &Package) -> Result<()> {
    let spec = &package.spec;
    let array: Vec<&str> = package.ident.split('/').collect();
    let row = "INSERT INTO origin_packages (owner_id, name, ident, ident_array, checksum, manifest, config, target,
                   deps, tdeps, exposes, visibility, origin)
               SELECT owner_id, $2, $3, $4, $5, $6, $7, $8, $9, $9, $10, $11::text::origin_package_visibility, $1
               FROM origins WHERE name = $1
               ON CONFLICT (ident, target) DO UPDATE SET updated_at = now(), checksum = excluded.checksum
               RETURNING id";
    let config = format!("[server]\nname = \"{}\"\nport = 8080\n", spec.name);
    let id: i64 = work
        .query_one(
            row,
            &[
                &spec.origin,
                &spec.name,
                &package.ident,
                &array,
                &package.checksum,
                &package.manifest,
                &config,
                &package.target,
                &spec.deps,
                &spec.exposes,
                &spec.visibility,
            ],
        )
        .await?
        .get(0);
    enter_channel(work, id, package.names(), "unstable").await?;
    for channel in &spec.channels {
        enter_channel(work, id, package.names(), channel).await?;
    }
    Ok(())
}

/// By what statements name a package.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    pub origin: &'a str,
    pub ident: &'a str,
    pub target: &'a str,
}

async fn enter_channel(work: &Client, id: i64, names: Names<'_>, channel: &str) -> Result<()> {
    let origin = names.origin;
    let make = "INSERT INTO origin_channels (owner_id, name, origin) SELECT owner_id, $2, name FROM origins
                WHERE name = $1 ON CONFLICT DO NOTHING";
    work.execute(make, &[&origin, &channel]).await?;
    let enter = "INSERT INTO origin_channel_packages (channel_id, package_id)
                 SELECT id, $3 FROM origin_channels WHERE origin = $1 AND name = $2 ON CONFLICT DO NOTHING";
    work.execute(enter, &[&origin, &channel, &id]).await?;
    audit(work, names, channel, "promote").await
}

async fn audit(work: &Client, names: Names<'_>, channel: &str, operation: &str) -> Result<()> {
    let row = "INSERT INTO audit_package (operation, trigger, requester_id, requester_name, origin, channel, package_ident)
               SELECT $1::text::package_channel_operation, 'hab_client', owner_id, name, name, $2, $3
               FROM origins WHERE name = $4";
    work.execute(row, &[&operation, &channel, &names.ident, &names.origin])
        .await?;
    Ok(())
}

/// Into a channel, which is made when there is none.
pub async fn promote(cluster: &Cluster, package: &Package, channel: &str) -> Result<()> {
    let mut client = cluster.conn().await?;
    let work = client.transaction().await?;
    promote_rows(work.client(), package.names(), channel).await?;
    Ok(work.commit().await?)
}

/// The same in the transaction that is open; the package's id.
pub async fn promote_rows(work: &Client, names: Names<'_>, channel: &str) -> Result<i64> {
    let id = "SELECT id FROM origin_packages WHERE ident = $1 AND target = $2";
    let row = work.query_one(id, &[&names.ident, &names.target]).await?;
    let id: i64 = row.get(0);
    enter_channel(work, id, names, channel).await?;
    Ok(id)
}

pub async fn demote(cluster: &Cluster, package: &Package, channel: &str) -> Result<()> {
    let mut client = cluster.conn().await?;
    let work = client.transaction().await?;
    demote_rows(work.client(), package.names(), channel).await?;
    Ok(work.commit().await?)
}

/// The same in the transaction that is open.
pub async fn demote_rows(work: &Client, names: Names<'_>, channel: &str) -> Result<()> {
    let leave = "DELETE FROM origin_channel_packages USING origin_channels c, origin_packages p
                 WHERE channel_id = c.id AND package_id = p.id AND c.origin = p.origin AND c.name = $1
                   AND p.ident = $2 AND p.target = $3";
    work.execute(leave, &[&channel, &names.ident, &names.target])
        .await?;
    audit(work, names, channel, "demote").await
}

/// As Builder deletes: the rows, the object, then COMMIT.
pub async fn delete_package(cluster: &Cluster, package: &Package) -> Result<()> {
    let mut client = cluster.conn().await?;
    let work = client.transaction().await?;
    delete_rows(work.client(), package.names()).await?;
    cluster.delete(&package.key).await?;
    Ok(work.commit().await?)
}

/// The package's rows, in the transaction that is open.
pub async fn delete_rows(work: &Client, names: Names<'_>) -> Result<()> {
    let channels = "DELETE FROM origin_channel_packages USING origin_packages p
                    WHERE package_id = p.id AND p.ident = $1 AND p.target = $2";
    work.execute(channels, &[&names.ident, &names.target])
        .await?;
    let row = "DELETE FROM origin_packages WHERE ident = $1 AND target = $2";
    match work.execute(row, &[&names.ident, &names.target]).await? {
        1 => Ok(()),
        _ => Err(format!("{} has no row", names.ident).into()),
    }
}

/// The account of this name, made when there is none.
pub async fn account(client: &Client, name: &str) -> Result<i64> {
    let sql = "WITH there AS (SELECT id FROM accounts WHERE name = $1),
                    made AS (INSERT INTO accounts (name, email) SELECT $1, $1 || '@example.com'
                        WHERE NOT EXISTS (SELECT FROM there) ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING id)
               SELECT id FROM there UNION ALL SELECT id FROM made";
    Ok(client.query_one(sql, &[&name]).await?.get(0))
}

/// Rows of packages by COPY.
struct Rows {
    sink: std::pin::Pin<Box<tokio_postgres::CopyInSink<Bytes>>>,
    owner: i64,
    buffer: BytesMut,
}

impl Rows {
    async fn start(client: &Client, owner: i64) -> Result<Self> {
        let copy = "COPY origin_packages (owner_id, name, ident, ident_array, checksum, manifest, target, origin,
                    visibility) FROM STDIN";
        Ok(Self {
            sink: Box::pin(client.copy_in(copy).await?),
            owner,
            buffer: BytesMut::new(),
        })
    }

    async fn add(
        &mut self,
        ident: &str,
        spec: &Spec,
        checksum: &str,
        manifest: &str,
    ) -> Result<()> {
        let array = ident.replace('/', ",");
        let (owner, name) = (self.owner, &spec.name);
        let _ = write!(
            self.buffer,
            "{owner}\t{name}\t{ident}\t{{{array}}}\t{checksum}\t"
        );
        for line in manifest.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => {
                    self.buffer.extend_from_slice(line.as_bytes());
                    self.buffer.extend_from_slice(b"\\n");
                }
                None => self.buffer.extend_from_slice(line.as_bytes()),
            }
        }
        let _ = writeln!(
            self.buffer,
            "\t{}\t{}\t{}",
            spec.target, spec.origin, spec.visibility
        );
        if self.buffer.len() >= CHUNK {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        let full = self.buffer.split().freeze();
        Ok(self.sink.send(full).await?)
    }

    async fn finish(mut self) -> Result<()> {
        self.flush().await?;
        self.sink.as_mut().finish().await?;
        Ok(())
    }
}

/// All rows of all of Builder's tables, as text, in an order that does not depend on how they lie there.
pub async fn content(cluster: &Cluster) -> Result<Vec<String>> {
    super::reading(|| content_once(cluster)).await
}

async fn content_once(cluster: &Cluster) -> Result<Vec<String>> {
    rows_of(&cluster.conn().await?).await
}

/// The same, of the database that a session is in.
pub async fn rows_of(client: &Client) -> Result<Vec<String>> {
    let sql = "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'public' ORDER BY 1";
    let mut lines = Vec::new();
    for table in client.query(sql, &[]).await? {
        let name: String = table.get(0);
        let rows = format!("SELECT whole_row::text FROM {name} whole_row ORDER BY 1");
        let rows = client.query(&rows, &[]).await?;
        lines.extend(
            rows.iter()
                .map(|row| format!("{name}: {}", row.get::<_, String>(0))),
        );
    }
    Ok(lines)
}

/// Waits until the spare has the rows that the primary has now.
pub async fn arrived(site: &super::Site) -> Result<()> {
    let expected = content(&site.primary).await?;
    super::wait_until("the rows arrive", super::service::SOON, || async {
        match content(&site.spare).await? == expected {
            true => Ok(()),
            false => Err("other rows".into()),
        }
    })
    .await;
    Ok(())
}
