//! Facts about the local side.

use crate::cluster::{
    ClusterRecord, Confirmation, CopiedPoint, Keeps, LocalSession, LocalStore, State,
    VerificationRecord, is_fenced, prove_fence, prove_writable,
};
use crate::config::Config;
use crate::replication::rights;
use crate::replication::{
    Disk, PassError, Rights, disk, lacking_extensions, major, may_apply, newest_id, recovery_point,
    stands_at, unavailable_here,
};
use chrono::{DateTime, Utc};
use std::time::Duration;

/// Number of questions to the local bucket, because an operator waits for the answer.
const MAX_ATTEMPTS: usize = 2;

/// The facts in the local state database.
pub(super) struct Remembered {
    pub cluster: ClusterRecord,
    /// The point of the visible database.
    pub point: Option<CopiedPoint>,
    pub confirmation: Option<Confirmation>,
    pub verification: Option<VerificationRecord>,
    /// Artifacts that are unavailable on the primary, with the reason; None: the visible database
    /// is not a copy that warm-spare made.
    pub lacking: Option<Vec<(String, String)>>,
    /// The reason why the fence does not hold.
    pub open: Option<String>,
}

pub(super) async fn remember(config: &Config) -> Result<Option<Remembered>, PassError> {
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

/// Returns the reason why the fence does not hold; None: it holds.
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

/// The local server and the visible database.
pub(super) struct Server {
    pub major: u32,
    pub rights: Rights,
    pub may_apply: bool,
    pub bytes: u64,
    pub disk: Option<Disk>,
    /// Extensions of the visible database whose files are missing.
    pub lacking_extensions: Vec<String>,
    /// The recovery point in the visible database; None: it is not a copy that warm-spare made.
    pub stands: Option<String>,
    pub clock: DateTime<Utc>,
    /// Time of the newest of Builder's ids, which are made of time.
    pub newest_id: Option<DateTime<Utc>>,
    /// Time of the newest id that is not in the future by the primary's clock, if there are ids of
    /// the future.
    pub newest_past_id: Option<DateTime<Utc>>,
    pub sealed: Result<Vec<Sealed>, PassError>,
}

pub(super) async fn server(config: &Config) -> Result<Server, PassError> {
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

pub(super) async fn newest_past_id(
    config: &Config,
    until: DateTime<Utc>,
) -> Result<Option<DateTime<Utc>>, PassError> {
    let to = &config.local.datastore;
    let session = LocalSession::open(to, &to.database).await?;
    newest_id(&session, Some(until)).await
}

/// The rows of one kind that one revision of the builder keys has sealed.
pub(super) struct Sealed {
    /// The kind of the rows, as text.
    pub what: &'static str,
    /// The revision, as its table has it; empty: only the ciphertext names it.
    pub revision: String,
    pub rows: i64,
    /// The newest rows.
    pub newest: Vec<String>,
}

/// The columns with ciphertexts of the builder keys, each with the column that names the revision,
/// if there is one.
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
/// Number of first characters by which ciphertexts of different revisions differ: in both forms
/// they include format and sender. One base64 digit more would make groups of one row each.
const HEAD_CHARS: u32 = 37;
/// Number of the newest rows that are read, because a spoilt row says nothing about the key.
const NEWEST_ROWS: u32 = 3;

/// Reads the sealed rows. These tables grow with origins and people, not with packages.
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
            "SELECT revision, count(*), (array_agg(sealed ORDER BY id DESC))[1:{NEWEST_ROWS}] FROM ( \
               SELECT id, {revision} AS revision, {column}::text AS sealed FROM public.{table} WHERE {column} <> '') t \
             GROUP BY revision, left(sealed, {HEAD_CHARS})"
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

/// Checks that the local bucket exists and can be written, and returns how it treats deleted
/// objects.
pub(super) async fn bucket(config: &Config, patience: Duration) -> Result<Keeps, PassError> {
    let store = LocalStore::open(&config.local.s3)?.with_limits(patience, MAX_ATTEMPTS);
    store.reading().check_bucket().await?;
    Ok(prove_writable(&store).await?)
}
