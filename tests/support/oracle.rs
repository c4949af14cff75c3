//! Judges the present spare, knowing every state that the primary has ever had: invariants 1 to 4
//! of the design.
//!
//! It does not trust the service's reports. Facts that it cannot see, because a fault strikes the
//! server that it would have to ask, are not judged; the next check will judge them.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::faults::Server;
use super::history::{Content, History, Moments, begin_reading, content_inside};
use super::packages::object_key;
use super::weather::Weather;
use super::{Cluster, Error, Result, Site};

/// Maximum time for which the visible database is away while it is exchanged.
const EXCHANGE: Duration = Duration::from_secs(30);
/// Number of tries: a disagreement is none if the spare moved while it was checked.
const LOOKS: usize = 25;
/// Maximum delay until a schema change is seen in stream mode (a fingerprint every 10 s, then a
/// copy). A spare that is behind comes to the change later, and its time begins then.
const SCHEMA_LATE: Duration = Duration::from_secs(90);

/// The visible database at one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    database: u32,
    pub lsn: i64,
    pub content: Content,
    /// Object keys with the checksum their row states.
    packages: Vec<(String, String)>,
    pub unavailable: BTreeSet<String>,
}

/// The spare's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stand {
    pub moment: usize,
    /// Other states of the primary between this one and its present, and the age of the first of them.
    pub behind: usize,
    pub late: Duration,
    /// True: not all rows are the same, which only the difference of their columns excuses.
    pub schema_behind: bool,
    pub artifacts_seen: bool,
}

pub struct Oracle {
    history: Arc<History>,
    weather: Arc<Weather>,
    /// True: the spare may for a while follow the rows of a schema that it does not have.
    pub streams: bool,
    /// The oldest state at which the spare may be.
    floor: usize,
    floor_lsn: i64,
    floor_era: u32,
    /// Hashes of objects by key and ETag.
    hashes: HashMap<(String, String), String>,
    /// Views from a time when the primary's commits could not be read.
    undecided: Vec<View>,
    /// Time at which the spare was first seen at or after a state's commit, by the state's number.
    passed: HashMap<usize, Instant>,
    /// A fault set the spare back to this log position: until it has left it, its bucket is ahead
    /// of its rows.
    put_back_to: Option<i64>,
}

impl Oracle {
    pub fn new(history: &Arc<History>, weather: &Arc<Weather>, streams: bool) -> Self {
        Self {
            history: history.clone(),
            weather: weather.clone(),
            streams,
            floor: 0,
            floor_lsn: 0,
            floor_era: 0,
            hashes: HashMap::new(),
            undecided: Vec::new(),
            passed: HashMap::new(),
            put_back_to: None,
        }
    }

    /// Notes that a fault set the spare back to an older copy of itself.
    pub async fn spare_was_put_back(&mut self, site: &Site) -> Result<()> {
        self.floor = 0;
        self.floor_lsn = 0;
        // Views from before would raise the floor again.
        self.undecided.clear();
        let view = view(&site.spare).await?;
        self.put_back_to = view.map(|view| view.lsn);
        Ok(())
    }

    /// Checks the spare. None: it could not be read. An error is a violation, in words.
    pub async fn check(&mut self, site: &Site) -> Result<Option<Stand>> {
        let Some((view, artifacts_seen)) = self.look(site).await? else {
            return Ok(None);
        };
        if self.put_back_to.is_some_and(|lsn| lsn != view.lsn) {
            self.put_back_to = None;
        }
        let primary_away = self.weather.is_active(Server::PrimaryDatastore);
        if !primary_away {
            self.history.settle().await?;
        }
        let history = self.history.clone();
        // A commit that a frozen primary does not answer blocks the history as long.
        let patience = match primary_away {
            true => Duration::from_millis(500),
            false => Duration::from_secs(60),
        };
        let Ok(moments) = tokio::time::timeout(patience, history.lock()).await else {
            self.undecided.push(view);
            return Ok(None);
        };
        if moments.unsettled {
            // The spare may hold a transaction that was committed just before the primary went
            // away.
            self.undecided.push(view);
            return Ok(None);
        }
        for earlier in std::mem::take(&mut self.undecided) {
            self.judge(&earlier, &moments)?;
        }
        let mut stand = self.judge(&view, &moments)?;
        stand.artifacts_seen = artifacts_seen;
        Ok(Some(stand))
    }

    /// Checks that the rows equal those of the primary's last state; the error is the reason why
    /// not.
    pub async fn is_level(&mut self, site: &Site) -> Result<()> {
        match self.check(site).await? {
            None => Err("the spare cannot be looked at".into()),
            Some(stand) if stand.schema_behind => Err("its schema is behind".into()),
            Some(stand) if stand.behind > 0 => Err(format!("{} behind", stand.behind).into()),
            Some(stand) if !stand.artifacts_seen => Err("its artifacts cannot be seen".into()),
            Some(_) => Ok(()),
        }
    }

    fn judge(&mut self, view: &View, moments: &Moments) -> Result<Stand> {
        let list = &moments.list;
        let last = list.len() - 1;
        for (number, moment) in list.iter().enumerate() {
            if moment.lsn <= view.lsn {
                self.passed.entry(number).or_insert_with(Instant::now);
            }
        }
        let within = |number: usize| {
            // After the commit before it, and not after the commit after it.
            let era = list[number].era;
            let after = |at: usize| list.get(at).filter(|moment| moment.era == era);
            let before = number.checked_sub(1).and_then(after);
            // A snapshot's position is read after it was taken: other transactions may have
            // committed in between.
            let exact = self.streams;
            before.is_none_or(|moment| moment.lsn <= view.lsn)
                && after(number + 1).is_none_or(|moment| !exact || view.lsn < moment.lsn)
        };
        let equal: Vec<usize> = (0..=last)
            .filter(|number| *list[*number].content == view.content)
            .collect();
        let mut schema_behind = false;
        let mut fitting: Vec<usize> = equal.iter().copied().filter(|n| within(*n)).collect();
        if fitting.is_empty() && self.streams {
            // A state's own schema may be older than the present one only by the spare's allowed
            // delay.
            schema_behind = true;
            let lately = |number: usize| {
                let passed = self.passed.get(&number);
                list[number].at.elapsed() < SCHEMA_LATE
                    || passed.is_none_or(|when| when.elapsed() < SCHEMA_LATE)
            };
            let rewritten: BTreeSet<&String> = (0..=last)
                .filter(|number| lately(*number))
                .filter_map(|number| list[number].rewritten.as_ref())
                .collect();
            fitting = (0..=last)
                .filter(|number| within(*number))
                .filter(|number| {
                    let content = &list[*number].content;
                    view.content.agrees_where_columns_do(content, &rewritten)
                })
                .filter(|number| {
                    let same =
                        |content: &Content| columns(content) == columns(&list[*number].content);
                    let since = (0..=*number)
                        .rev()
                        .take_while(|earlier| same(&list[*earlier].content));
                    !rewritten.is_empty() || since.last().is_some_and(lately)
                })
                .collect();
        }
        let (Some(&first), Some(&latest)) = (fitting.first(), fitting.last()) else {
            return Err(match equal.as_slice() {
                [] => nearest(view, moments),
                _ => format!(
                    "INVARIANT 1: the spare holds state {equal:?} ({}), and its recovery point {} is not that commit's (log positions {:?})",
                    list[equal[0]].what,
                    lsn(view.lsn),
                    equal.iter().map(|n| (lsn(list[*n].lsn), list.get(n + 1).map(|m| lsn(m.lsn)))).collect::<Vec<_>>()
                ),
            }
            .into());
        };
        if latest < self.floor {
            return Err(format!(
                "INVARIANT 3: the spare went back: it stood at state {} or later, and stands at {latest} ({})",
                self.floor, list[latest].what
            )
            .into());
        }
        if list[latest].era == self.floor_era && view.lsn < self.floor_lsn {
            return Err(format!(
                "INVARIANT 3: the recovery point went back from {} to {}",
                lsn(self.floor_lsn),
                lsn(view.lsn)
            )
            .into());
        }
        self.floor = self.floor.max(first);
        self.floor_lsn = view.lsn;
        self.floor_era = list[first].era;
        let waiting = list[latest + 1..].iter();
        let waiting: Vec<_> = waiting
            .filter(|moment| *moment.content != view.content)
            .collect();
        Ok(Stand {
            moment: latest,
            behind: waiting.len(),
            late: waiting
                .first()
                .map_or(Duration::ZERO, |moment| moment.at.elapsed()),
            schema_behind,
            artifacts_seen: false,
        })
    }

    /// Reads the visible database, its artifacts checked if the store can be asked. The spare moves
    /// in the meantime: only a disagreement that stays while it does not move counts.
    async fn look(&mut self, site: &Site) -> Result<Option<(View, bool)>> {
        let mut complaint = String::new();
        for _ in 0..LOOKS {
            let began = Instant::now();
            let Some(before) = self.see(site).await? else {
                return Ok(None);
            };
            if self.weather.is_active(Server::SpareStore) {
                return Ok(Some((before, false)));
            }
            let begun = journal(&site.spare).await;
            let bad = match self.bad_artifacts(&site.spare, &before).await {
                Ok(bad) => bad,
                Err(_) if self.weather.excuses(Server::SpareStore, began) => {
                    return Ok(Some((before, false)));
                }
                Err(error) => return Err(format!("the spare's store: {error}").into()),
            };
            if bad.is_empty() || self.put_back_to == Some(before.lsn) {
                return Ok(Some((before, bad.is_empty())));
            }
            let (Ok(begun), Ok(ended)) = (begun, journal(&site.spare).await) else {
                continue;
            };
            let excused = |key: &String| begun.contains(key) || ended.contains(key);
            let bad: Vec<_> = bad.into_iter().filter(|(key, _)| !excused(key)).collect();
            let Some(after) = self.see(site).await? else {
                return Ok(None);
            };
            if bad.is_empty() {
                return Ok(Some((before, true)));
            }
            let told: Vec<String> = bad
                .iter()
                .map(|(key, why)| format!("{key}: {why}"))
                .collect();
            let told = told.join("; ");
            if after == before && complaint == told {
                return Err(format!(
                    "INVARIANT 1: at {} rows have not their artifacts: {told}",
                    lsn(before.lsn)
                )
                .into());
            }
            complaint = told;
        }
        Err(format!(
            "the spare never stood still, and every look found artifacts wrong: {complaint}"
        )
        .into())
    }

    async fn see(&self, site: &Site) -> Result<Option<View>> {
        let began = Instant::now();
        loop {
            if self.weather.is_active(Server::SpareDatastore) {
                return Ok(None);
            }
            match view(&site.spare).await {
                Ok(Some(view)) => return Ok(Some(view)),
                Ok(None) => return Err("the visible database is not the service's".into()),
                Err(error) if began.elapsed() > EXCHANGE => {
                    return Err(format!("no database to promote for {EXCHANGE:?}: {error}").into());
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// Returns keys whose object is not what the row says, and which are not in the list.
    async fn bad_artifacts(
        &mut self,
        spare: &Cluster,
        view: &View,
    ) -> Result<Vec<(String, String)>> {
        let listed = spare.s3().list_etags(&spare.bucket, "").await?;
        let listed: HashMap<String, String> = listed.into_iter().collect();
        let mut unread = Vec::new();
        for (key, _) in &view.packages {
            if let Some(etag) = listed.get(key) {
                let known = (key.clone(), etag.clone());
                if !self.hashes.contains_key(&known) {
                    unread.push(known);
                }
            }
        }
        let read: Vec<((String, String), Option<String>)> = stream::iter(unread)
            .map(async |known| {
                let hash = spare.s3().checksum(&spare.bucket, &known.0).await;
                // The object was replaced between the listing and the reading: then this is not the
                // hash of that ETag.
                let now = spare.s3().head(&spare.bucket, &known.0).await?;
                let same = now.is_some_and(|head| head.etag == known.1);
                Ok::<_, Error>((known, hash?.filter(|_| same)))
            })
            .buffer_unordered(8)
            .try_collect()
            .await?;
        for (known, hash) in read {
            if let Some(hash) = hash {
                self.hashes.insert(known, hash);
            }
        }
        let mut bad = Vec::new();
        for (key, checksum) in &view.packages {
            if view.unavailable.contains(key) {
                if !self.history.has_lacked(key) {
                    let why = "listed as lacking on the primary, whose store has always had it";
                    bad.push((key.clone(), why.to_string()));
                }
                continue;
            }
            let Some(etag) = listed.get(key) else {
                bad.push((key.clone(), "not there".to_string()));
                continue;
            };
            match self.hashes.get(&(key.clone(), etag.clone())) {
                Some(hash) if hash == checksum => {}
                Some(hash) => bad.push((key.clone(), format!("{hash}, not {checksum}"))),
                None => bad.push((key.clone(), "changed while it was read".to_string())),
            }
        }
        Ok(bad)
    }
}

fn columns(content: &Content) -> Vec<(&String, &String)> {
    let tables = content.tables.iter();
    tables.map(|(name, table)| (name, &table.columns)).collect()
}

fn nearest(view: &View, moments: &Moments) -> String {
    let list = &moments.list;
    let best = (0..list.len()).min_by_key(|n| {
        let far = view.content.differing(&list[*n].content).len();
        (far, list[*n].lsn.abs_diff(view.lsn))
    });
    let best = best.expect("the history has a beginning");
    let differing = view.content.differing(&list[best].content);
    let shown: Vec<String> = differing
        .iter()
        .map(|table| {
            let (here, there) = (
                view.content.tables.get(*table),
                list[best].content.tables.get(*table),
            );
            format!("{table}: {here:?} here, {there:?} there")
        })
        .collect();
    let near: Vec<String> = (best.saturating_sub(3)..(best + 4).min(list.len()))
        .map(|n| format!("  {n} at {}: {}", lsn(list[n].lsn), list[n].what))
        .collect();
    format!(
        "INVARIANT 1: the spare, at {}, holds no state that the primary ever had; of {} the nearest is {best} ({}), with other {}\n{}",
        lsn(view.lsn),
        list.len(),
        list[best].what,
        shown.join("; "),
        near.join("\n")
    )
}

fn lsn(position: i64) -> String {
    format!("{:X}/{:X}", position >> 32, position & 0xffff_ffff)
}

/// Returns the content that Builder on the spare would see. None: a database that the service did
/// not make.
pub async fn view(spare: &Cluster) -> Result<Option<View>> {
    let client = spare.conn().await?;
    begin_reading(&client).await?;
    let ours = "SELECT to_regclass('warm_spare.recovery_point') IS NOT NULL,
                       (SELECT oid FROM pg_database WHERE datname = current_database())";
    let row = client.query_one(ours, &[]).await?;
    if !row.get::<_, bool>(0) {
        return Ok(None);
    }
    let database = row.get(1);
    let point = "SELECT (lsn - '0/0'::pg_lsn)::int8 FROM warm_spare.recovery_point";
    let lsn = client.query_one(point, &[]).await?.get(0);
    let lacking = client
        .query("SELECT key FROM warm_spare.unavailable", &[])
        .await?;
    let view = View {
        database,
        lsn,
        packages: packages(&client).await?,
        unavailable: lacking.iter().map(|row| row.get(0)).collect(),
        content: content_inside(&client).await?,
    };
    Ok(Some(view))
}

/// Returns the keys and checksums that the rows name.
pub async fn packages(client: &Client) -> Result<Vec<(String, String)>> {
    let sql = "SELECT ident, target, checksum FROM origin_packages ORDER BY 1, 2";
    let rows = client.query(sql, &[]).await?;
    let key = |row: &tokio_postgres::Row| object_key(row.get(0), row.get(1));
    Ok(rows.iter().map(|row| (key(row), row.get(2))).collect())
}

/// Returns the artifacts of the primary's rows that its own store does not have, or has with other
/// bytes.
pub async fn really_lacking(primary: &Cluster) -> Result<BTreeSet<String>> {
    let mut lacking = BTreeSet::new();
    for (key, checksum) in packages(&primary.conn().await?).await? {
        let found = primary.s3().checksum(&primary.bucket, &key).await?;
        if found.as_ref() != Some(&checksum) {
            lacking.insert(key);
        }
    }
    Ok(lacking)
}

/// Returns keys whose bytes are being exchanged: the one documented exception to invariant 1.
async fn journal(spare: &Cluster) -> Result<BTreeSet<String>> {
    let client = spare.pg.conn("warm_spare").await?;
    let rows = client.query("SELECT key FROM replacement", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Checks that a client that is not the service cannot write. An error: it could.
pub async fn is_fenced(site: &Site, weather: &Weather) -> Result<()> {
    let began = Instant::now();
    loop {
        if weather.is_active(Server::SpareDatastore) {
            return Ok(());
        }
        let tried = async {
            let client = site.spare.conn().await?;
            let write = "UPDATE accounts SET email = email WHERE false";
            Result::Ok(client.batch_execute(write).await)
        };
        let error = match tried.await {
            Ok(Ok(())) => return Err("INVARIANT 6: a plain session can write on the spare".into()),
            Ok(Err(error)) => {
                if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) {
                    return Ok(());
                }
                error.into()
            }
            Err(error) => error,
        };
        if began.elapsed() > EXCHANGE {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
