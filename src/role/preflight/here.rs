//! Facts of our own side.

use crate::cluster::{
    ClusterRecord, Confirmation, CopiedPoint, Keeps, LocalSession, LocalStore, State,
    VerificationRecord, is_fenced, prove_fence, prove_writable,
};
use crate::config::Config;
use crate::replication::{
    Disk, PassError, Rights, disk, lacking_extensions, major, may_apply, newest_id, recovery_point,
    rights, stands_at, unavailable_here,
};
use chrono::{DateTime, Utc};
use std::time::Duration;

/// How often our own bucket is asked: an operator waits for the answer.
const TRIES: usize = 2;

/// What our state database knows.
pub struct Remembered {
    pub cluster: ClusterRecord,
    /// As the visible database stands.
    pub point: Option<CopiedPoint>,
    pub confirmation: Option<Confirmation>,
    pub verification: Option<VerificationRecord>,
    /// Artifacts that the primary lacks, with the reason; None: the visible database is none of ours.
    pub lacking: Option<Vec<(String, String)>>,
    /// Why the fence does not hold.
    pub open: Option<String>,
}

pub async fn remember(config: &Config) -> Result<Option<Remembered>, PassError> {
    let Some(state) = State::open_existing(&config.local.datastore).await? else {
        return Ok(None);
    };
    let cluster = state.cluster().await?;
    let copied = state.copied_point().await?;
    let confirmation = state.confirmation().await?;
    let verification = state.last_verification().await?;
    let point = async {
        match copied {
            Some(copied) => stands_at(config, copied).await.map(Some),
            None => Ok(None),
        }
    };
    let (point, lacking, open) =
        tokio::try_join!(point, unavailable_here(config), open_fence(config, &state))?;
    Ok(Some(Remembered {
        cluster,
        point,
        confirmation,
        verification,
        lacking,
        open,
    }))
}

/// Why the fence does not hold; None: it does.
async fn open_fence(config: &Config, state: &State) -> Result<Option<String>, PassError> {
    let to = &config.local.datastore;
    if !is_fenced(state.session(), &to.database).await? {
        return Ok(Some(format!(
            "database {} is open to every client: its fence is down",
            to.database
        )));
    }
    let proven = prove_fence(state.session(), to, &to.database).await;
    Ok(proven.err().map(|error| error.to_string()))
}

/// Our own server, and the visible database.
pub struct Server {
    pub major: u32,
    pub rights: Rights,
    pub may_apply: bool,
    pub bytes: u64,
    pub disk: Option<Disk>,
    /// Extensions of the visible database whose files are not there.
    pub lacking_extensions: Vec<String>,
    /// Where the visible database says that it stands; None: it is none of ours.
    pub stands: Option<String>,
    pub clock: DateTime<Utc>,
    /// When the newest of Builder's ids was made, which are made of time.
    pub newest_id: Option<DateTime<Utc>>,
    /// The same without those of a time to come by the primary's clock, where there are such.
    pub newest_past_id: Option<DateTime<Utc>>,
    pub sealed: Result<Vec<Sealed>, PassError>,
}

pub async fn server(config: &Config) -> Result<Server, PassError> {
    let to = &config.local.datastore;
    let session = LocalSession::open(to, &to.database).await?;
    let sql = "SELECT pg_database_size(current_database()), clock_timestamp()";
    let row = session
        .query_one("measuring our database", sql, &[])
        .await?;
    Ok(Server {
        major: major(&session).await?,
        rights: rights(&session, &to.database).await?,
        may_apply: may_apply(&session).await?,
        bytes: row.get::<_, i64>(0).unsigned_abs(),
        disk: disk(config, &session).await,
        lacking_extensions: lacking_extensions(&session, &session).await?,
        stands: recovery_point(&session).await?,
        clock: row.get(1),
        newest_id: newest_id(&session, None).await?,
        newest_past_id: None,
        sealed: sealed(&session).await,
    })
}

pub async fn newest_past_id(
    config: &Config,
    until: DateTime<Utc>,
) -> Result<Option<DateTime<Utc>>, PassError> {
    let to = &config.local.datastore;
    let session = LocalSession::open(to, &to.database).await?;
    newest_id(&session, Some(until)).await
}

/// What the builder keys have sealed, of one kind and one revision.
pub struct Sealed {
    /// In words.
    pub what: &'static str,
    /// As its table has it; empty: only the ciphertext names it.
    pub revision: String,
    pub rows: i64,
    /// The newest of them.
    pub newest: Vec<String>,
}

/// Where ciphertexts of the builder keys lie, with the column that names the revision beside, if there is one.
const CIPHERTEXTS: [(&str, &str, &str, &str); 4] = [
    (
        "an origin's secret key",
        "origin_secret_keys",
        "body",
        "encryption_key_rev",
    ),
    ("an access token", "account_tokens", "token", ""),
    ("an integration", "origin_integrations", "body", ""),
    (
        "a project's integration",
        "origin_project_integrations",
        "body",
        "",
    ),
];
/// Characters by which ciphertexts of different revisions differ: in both forms format and sender lie before it. A base64
/// digit more or less would make groups of one row each.
const HEAD: u32 = 37;
/// One that is spoilt says nothing of the key.
const NEWEST: u32 = 3;

/// All of these tables grow with origins and people, not with packages.
async fn sealed(session: &LocalSession) -> Result<Vec<Sealed>, PassError> {
    let doing = "reading what the builder keys have sealed";
    let mut found = Vec::new();
    for (what, table, column, revision) in CIPHERTEXTS {
        let there = "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.' || $1) \
                       AND attname = $2 AND NOT attisdropped)";
        let row = session.query_one(doing, there, &[&table, &column]).await?;
        if !row.get::<_, bool>(0) {
            continue;
        }
        let revision = match revision {
            "" => "''",
            named => &format!("coalesce({named}::text, '')"),
        };
        let sql = format!(
            "SELECT revision, count(*), (array_agg(sealed ORDER BY id DESC))[1:{NEWEST}] FROM ( \
               SELECT id, {revision} AS revision, {column}::text AS sealed FROM public.{table} WHERE {column} <> '') t \
             GROUP BY revision, left(sealed, {HEAD})"
        );
        let rows = session.query(doing, &sql, &[]).await?;
        found.extend(rows.iter().map(|row| Sealed {
            what,
            revision: row.get(0),
            rows: row.get(1),
            newest: row.get(2),
        }));
    }
    Ok(found)
}

/// Whether our own bucket is there and can be written, and what it does with what is deleted.
pub async fn bucket(config: &Config, patience: Duration) -> Result<Keeps, PassError> {
    let store = LocalStore::open(&config.local.s3)?.with_limits(patience, TRIES);
    store.reading().check_bucket().await?;
    Ok(prove_writable(&store).await?)
}
