//! The transactions of Builder, as far as a replicator can distinguish them: which rows, in which
//! order, with which object written or deleted at what time. Each works only on packages, origins
//! and accounts of one hand, so that two hands never wait for each other, and a hand that waits is
//! made to wait by another program.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;

use super::packages::{self, Names, blake2b, object_key, put};
use super::{Cluster, Factory, Result, Spec, history::History};

/// The kinds, with the relative frequency of each.
pub const DEEDS: [(Deed, u32); 24] = [
    (Deed::Upload, 22),
    (Deed::Promote, 10),
    (Deed::Demote, 6),
    (Deed::Delete, 9),
    (Deed::UploadForced, 5),
    (Deed::UploadOtherBytes, 7),
    (Deed::OriginCreate, 3),
    (Deed::OriginTransfer, 2),
    (Deed::OriginDelete, 2),
    (Deed::MemberJoin, 4),
    (Deed::MemberRole, 4),
    (Deed::MemberLeave, 3),
    (Deed::Settings, 3),
    (Deed::Secrets, 4),
    (Deed::PromoteBatch, 3),
    (Deed::Visibility, 6),
    (Deed::Jobs, 5),
    (Deed::OddText, 4),
    (Deed::GivenUp, 3),
    (Deed::Partly, 3),
    (Deed::Nothing, 2),
    (Deed::Large, 1),
    (Deed::KeyChange, 2),
    (Deed::SideBySide, 4),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Deed {
    Upload,
    Promote,
    Demote,
    Delete,
    UploadForced,
    UploadOtherBytes,
    OriginCreate,
    OriginTransfer,
    OriginDelete,
    MemberJoin,
    MemberRole,
    MemberLeave,
    Settings,
    Secrets,
    PromoteBatch,
    Visibility,
    Jobs,
    OddText,
    GivenUp,
    Partly,
    Nothing,
    /// More changes than are applied in one piece, and then their deletion row by row.
    Large,
    KeyChange,
    /// Uploads on several sessions, committed at the same time.
    SideBySide,
}

/// Number of packages above which the next upload becomes a deletion.
const ENOUGH_PACKAGES: usize = 25;
const ODD: [&str; 9] = [
    "",
    "it's \"quoted\" and 'quoted'",
    "back\\slash \\N \\. \\t",
    "a tab\there, a line\nand another\r\n",
    "Zuverlässigkeit, 信頼性, надёжность 🦀",
    "NULL",
    "{\"json\": [1, null, \"\\u0041\"]}",
    "  spaces  ",
    "$$ ; -- /* comment",
];

/// A package as its present row.
pub(super) struct Row {
    id: i64,
    ident: String,
    target: String,
    pub(super) origin: String,
    checksum: String,
}

impl Row {
    fn names(&self) -> Names<'_> {
        Names {
            origin: &self.origin,
            ident: &self.ident,
            target: &self.target,
        }
    }

    pub(super) fn key(&self) -> String {
        object_key(&self.ident, &self.target)
    }
}

/// A client that does such transactions, one after the other.
pub struct Hand {
    pub name: String,
    pub(super) cluster: Cluster,
    history: Arc<History>,
    pub(super) factory: Factory,
    pub(super) rng: StdRng,
    pub(super) count: u64,
}

impl Hand {
    pub fn new(number: usize, seed: u64, cluster: &Cluster, history: &Arc<History>) -> Self {
        let keys = seed;
        let seed = seed.wrapping_mul(1_000_003).wrapping_add(number as u64);
        Self {
            name: format!("w{number}"),
            cluster: cluster.clone(),
            history: history.clone(),
            factory: Factory::new(seed).with_keys_of(keys),
            rng: StdRng::seed_from_u64(seed ^ 0x6861_6e64),
            count: 0,
        }
    }

    pub fn choose(&mut self) -> Deed {
        let chosen = DEEDS.choose_weighted(&mut self.rng, |(_, weight)| *weight);
        chosen.expect("there are deeds").0
    }

    pub fn pause(&mut self, most: u64) -> std::time::Duration {
        std::time::Duration::from_millis(self.rng.random_range(0..=most))
    }

    pub async fn act(&mut self, client: &Client, deed: Deed) -> Result<()> {
        self.count += 1;
        match deed {
            Deed::Upload => self.upload(client).await,
            Deed::Promote => self.promote(client).await,
            Deed::Demote => self.demote(client).await,
            Deed::Delete => self.delete_one(client).await,
            Deed::UploadForced => self.upload_forced(client).await,
            Deed::UploadOtherBytes => self.upload_other_bytes(client).await,
            Deed::OriginCreate => self.create_origin(client).await,
            Deed::OriginTransfer => self.transfer_origin(client).await,
            Deed::OriginDelete => self.delete_origin(client).await,
            Deed::MemberJoin | Deed::MemberRole | Deed::MemberLeave => {
                self.members(client, deed).await
            }
            Deed::Settings => self.settings(client).await,
            Deed::Secrets => self.secrets(client).await,
            Deed::PromoteBatch => self.promote_batch(client).await,
            Deed::Visibility => self.visibility(client).await,
            Deed::Jobs => self.jobs(client).await,
            Deed::OddText => self.odd_text(client).await,
            Deed::GivenUp => self.given_up(client).await,
            Deed::Partly => self.partly(client).await,
            Deed::Large => self.large(client).await,
            Deed::KeyChange => self.key_change(client).await,
            Deed::SideBySide => self.side_by_side().await,
            Deed::Nothing => {
                begin(client).await?;
                client.query_one("SELECT 1", &[]).await?;
                self.commit(client, "nothing").await
            }
        }
    }

    pub(super) async fn commit(&self, client: &Client, what: &str) -> Result<()> {
        let what = format!("{}: {what}", self.name);
        self.history.commit(client, &what).await
    }

    pub(super) fn odd(&mut self) -> &'static str {
        ODD.choose(&mut self.rng).expect("there are odd texts")
    }

    pub(super) async fn rows(&self, client: &Client) -> Result<Vec<Row>> {
        let sql = "SELECT id, ident, target, origin, checksum FROM origin_packages WHERE name LIKE '%-' || $1 ORDER BY id";
        let rows = client.query(sql, &[&self.name]).await?;
        Ok(rows
            .iter()
            .map(|row| Row {
                id: row.get(0),
                ident: row.get(1),
                target: row.get(2),
                origin: row.get(3),
                checksum: row.get(4),
            })
            .collect())
    }

    async fn some_row(&mut self, client: &Client) -> Result<Option<Row>> {
        let mut rows = self.rows(client).await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let chosen = self.rng.random_range(0..rows.len());
        Ok(Some(rows.swap_remove(chosen)))
    }

    /// Returns an origin of this hand, including temporary ones.
    pub(super) async fn some_origin(&mut self, client: &Client) -> Result<String> {
        let sql = "SELECT name FROM origins WHERE name = $1 OR name LIKE $1 || '-t%' ORDER BY name";
        let rows = client.query(sql, &[&self.name]).await?;
        let row = rows.choose(&mut self.rng).ok_or("its origin is gone")?;
        Ok(row.get(0))
    }

    fn spec(&mut self, origin: &str) -> Spec {
        let word = ["redis", "zlib", "glibc", "vault"][self.rng.random_range(0..4)];
        let mut spec = Spec::new(
            origin,
            &format!("{word}-{}", self.name),
            &format!("1.{}", self.count),
        )
        .size(self.size())
        .manifest_size(match self.rng.random_ratio(1, 5) {
            true => self.rng.random_range(9_000..60_000),
            false => self.rng.random_range(200..1500),
        });
        if self.rng.random_ratio(1, 4) {
            spec = spec.target("x86_64-windows");
        }
        if self.rng.random_ratio(1, 4) {
            spec = spec.channel("stable");
        }
        spec
    }

    fn size(&mut self) -> u64 {
        match self.rng.random_range(0..40) {
            0 => 2 << 20,
            1..6 => self.rng.random_range(30_000..300_000),
            _ => self.rng.random_range(1000..8000),
        }
    }

    async fn upload(&mut self, client: &Client) -> Result<()> {
        if self.rows(client).await?.len() >= ENOUGH_PACKAGES {
            return self.delete_one(client).await;
        }
        let origin = match self.rng.random_ratio(1, 3) {
            true => "core".into(),
            false => self.some_origin(client).await?,
        };
        let spec = self.spec(&origin);
        let package = self.factory.make(spec);
        put(&self.cluster, &package).await?;
        begin(client).await?;
        packages::insert_rows(client, &package).await?;
        self.commit(client, &format!("upload of {}", package.ident))
            .await
    }

    async fn side_by_side(&mut self) -> Result<()> {
        let mut clients = Vec::new();
        for number in 0..3 {
            // It uses existing channels: none of the transactions creates one for which another
            // would wait.
            let name = format!("beside{number}-{}", self.name);
            let size = self.size();
            let version = format!("1.{}", self.count);
            let package = self
                .factory
                .make(Spec::new(&self.name, &name, &version).size(size));
            put(&self.cluster, &package).await?;
            let client = self.cluster.conn().await?;
            client.batch_execute("SET lock_timeout = '2s'").await?;
            begin(&client).await?;
            packages::insert_rows(&client, &package).await?;
            clients.push(client);
        }
        let what = format!("{}: uploads side by side", self.name);
        self.history.commit_side_by_side(&clients, &what).await
    }

    async fn promote(&mut self, client: &Client) -> Result<()> {
        let Some(row) = self.some_row(client).await? else {
            return Ok(());
        };
        let channel = ["stable", "dev", "rc"][self.rng.random_range(0..3)];
        begin(client).await?;
        packages::promote_rows(client, row.names(), channel).await?;
        self.commit(client, &format!("promotion of {}", row.ident))
            .await
    }

    async fn demote(&mut self, client: &Client) -> Result<()> {
        let Some(row) = self.some_row(client).await? else {
            return Ok(());
        };
        let channel = ["stable", "dev", "rc"][self.rng.random_range(0..3)];
        begin(client).await?;
        packages::demote_rows(client, row.names(), channel).await?;
        self.commit(client, &format!("demotion of {}", row.ident))
            .await
    }

    async fn delete_one(&mut self, client: &Client) -> Result<()> {
        match self.some_row(client).await? {
            Some(row) => self.delete(client, &row).await,
            None => Ok(()),
        }
    }

    async fn delete(&mut self, client: &Client, row: &Row) -> Result<()> {
        begin(client).await?;
        packages::delete_rows(client, row.names()).await?;
        self.take_object_away(&row.key()).await?;
        self.commit(client, &format!("deletion of {}", row.ident))
            .await
    }

    /// Removes an object. A spare that is behind finds it missing, and may report that.
    pub(super) async fn take_object_away(&self, key: &str) -> Result<()> {
        self.history.note_lacking(key);
        self.cluster.delete(key).await
    }

    /// Uploads the same bytes once more. An object that the store has lost or damaged is removed
    /// first, as an operator would.
    async fn upload_forced(&mut self, client: &Client) -> Result<()> {
        let Some(row) = self.some_row(client).await? else {
            return Ok(());
        };
        let bytes = self.cluster.get(&row.key()).await?;
        let right = |bytes: &bytes::Bytes| {
            let mut hash = blake2b();
            hash.update(bytes).finalize().to_hex().as_str() == row.checksum
        };
        let Some(bytes) = bytes.filter(right) else {
            return self.delete(client, &row).await;
        };
        self.cluster.put(&row.key(), bytes).await?;
        begin(client).await?;
        let upsert = "INSERT INTO origin_packages (owner_id, name, ident, ident_array, checksum, target, origin)
                      SELECT owner_id, name, ident, ident_array, checksum, target, origin FROM origin_packages WHERE id = $1
                      ON CONFLICT (ident, target) DO UPDATE SET updated_at = now(), checksum = excluded.checksum";
        client.execute(upsert, &[&row.id]).await?;
        self.commit(client, &format!("forced upload of {}", row.ident))
            .await
    }

    async fn upload_other_bytes(&mut self, client: &Client) -> Result<()> {
        let Some(row) = self.some_row(client).await? else {
            return Ok(());
        };
        self.delete(client, &row).await?;
        let parts: Vec<&str> = row.ident.split('/').collect();
        let spec = Spec::new(parts[0], parts[1], parts[2])
            .release(parts[3])
            .target(&row.target)
            .size(self.size());
        let package = self.factory.make(spec);
        put(&self.cluster, &package).await?;
        begin(client).await?;
        packages::insert_rows(client, &package).await?;
        self.commit(client, &format!("other bytes of {}", row.ident))
            .await
    }

    async fn promote_batch(&mut self, client: &Client) -> Result<()> {
        let rows = self.rows(client).await?;
        begin(client).await?;
        let mut ids = Vec::new();
        for row in rows.iter().filter(|row| row.origin == "core") {
            ids.push(packages::promote_rows(client, row.names(), "batch").await?);
        }
        let group = "INSERT INTO audit_package_group (package_ids, operation, trigger, requester_id, requester_name, group_id, origin, channel)
                     VALUES ($1, 'promote', 'builder_ui', 7, $2, $3, 'core', 'batch')";
        let number = self.count as i64;
        client.execute(group, &[&ids, &self.name, &number]).await?;
        self.commit(client, &format!("batch of {}", ids.len()))
            .await
    }

    /// Changes the visibility, also of rows whose manifest is stored outside of the row, and is not
    /// sent with such an update.
    async fn visibility(&mut self, client: &Client) -> Result<()> {
        let Some(row) = self.some_row(client).await? else {
            return Ok(());
        };
        let seen = ["public", "private", "hidden"][self.rng.random_range(0..3)];
        begin(client).await?;
        let sql = "UPDATE origin_packages SET visibility = $2::text::origin_package_visibility, updated_at = now() WHERE id = $1";
        client.execute(sql, &[&row.id, &seen]).await?;
        self.commit(client, &format!("{} is {seen}", row.ident))
            .await
    }

    async fn jobs(&mut self, client: &Client) -> Result<()> {
        begin(client).await?;
        let group = self.count as i64;
        let first = "INSERT INTO job_graph (group_id, project_name, job_id, job_state, dependencies, waiting_on_count, target_platform)
                     VALUES ($1, $2, NULL, 'ready', '{}', 0, 'x86_64-linux') RETURNING id";
        let id: i64 = client.query_one(first, &[&group, &self.name]).await?.get(0);
        let second = "INSERT INTO job_graph (group_id, project_name, job_state, dependencies, waiting_on_count, target_platform)
                      VALUES ($1, $2, 'waiting_on_dependency', ARRAY[$3::int8], 1, 'x86_64-linux')";
        client.execute(second, &[&group, &self.name, &id]).await?;
        self.commit(client, &format!("job {id}")).await?;
        begin(client).await?;
        let built = "SELECT job_graph_mark_complete($1, $2)";
        client.execute(built, &[&id, &self.odd()]).await?;
        self.commit(client, &format!("job {id} is built")).await
    }

    async fn large(&mut self, client: &Client) -> Result<()> {
        begin(client).await?;
        let many = "INSERT INTO audit_package (operation, trigger, requester_id, requester_name, package_ident)
                    SELECT 'promote', 'hab_client', n, $1, repeat('x', 2500) FROM generate_series(1, 2000) n";
        client.execute(many, &[&self.name]).await?;
        self.commit(client, "2000 rows, 5 MB").await?;
        begin(client).await?;
        let trim =
            "DELETE FROM audit_package WHERE requester_name = $1 AND length(package_ident) = 2500";
        client.execute(trim, &[&self.name]).await?;
        self.commit(client, "and all of them away").await
    }

    async fn key_change(&mut self, client: &Client) -> Result<()> {
        begin(client).await?;
        let sql = "UPDATE job_graph SET id = nextval('job_graph_id_seq')
                   WHERE id = (SELECT max(id) FROM job_graph WHERE project_name = $1)";
        client.execute(sql, &[&self.name]).await?;
        self.commit(client, "another key of a job").await
    }

    async fn given_up(&mut self, client: &Client) -> Result<()> {
        let Some(row) = self.some_row(client).await? else {
            return Ok(());
        };
        begin(client).await?;
        packages::promote_rows(client, row.names(), "given-up").await?;
        client.batch_execute("ROLLBACK").await?;
        Ok(())
    }

    async fn partly(&mut self, client: &Client) -> Result<()> {
        let Some(row) = self.some_row(client).await? else {
            return Ok(());
        };
        begin(client).await?;
        client.batch_execute("SAVEPOINT one").await?;
        packages::promote_rows(client, row.names(), "given-up").await?;
        client
            .batch_execute("ROLLBACK TO one; SAVEPOINT two")
            .await?;
        packages::promote_rows(client, row.names(), "kept").await?;
        client.batch_execute("RELEASE two; SAVEPOINT three").await?;
        let many = "INSERT INTO audit_package (operation, trigger, requester_id, package_ident)
                    SELECT 'promote', 'hab_client', n, $1 FROM generate_series(1, 60) n";
        client.execute(many, &[&row.ident]).await?;
        self.commit(client, &format!("partly {}", row.ident)).await
    }
}

pub(super) async fn begin(client: &Client) -> Result<()> {
    Ok(client.batch_execute("BEGIN").await?)
}
