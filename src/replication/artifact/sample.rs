//! Looks in the local bucket for a sample of the artifacts that the visible rows name: the newest,
//! the oldest, and some at random. The cost does not grow with the number of artifacts, and a
//! bucket that was emptied, replaced or thinned out is noticed. An artifact that was found absent
//! is looked for each time until it is seen again, or no row names it any more, so that two samples
//! do not contradict each other because chance chose other rows.

use super::inventory::UNSOUND;
use crate::cluster::{
    AbsentArtifact, DatastoreFault, LocalSession, RawRow, State, Store, StoreError, StoreFault,
};
use crate::config::Config;
use crate::domain::{Sampled, Side};
use crate::package::{Checksum, Ident, Target, object_key};
use crate::replication::error::PassError;
use futures_util::StreamExt;
use std::collections::HashSet;
use std::str::FromStr;
use std::time::Duration;

/// Number of HEAD requests at once.
const MAX_REQUESTS: usize = 8;
/// Number of tries for each artifact. It is small, because the next sample comes soon.
const TRIES: usize = 2;

/// Ten rows at each end, and twenty in between.
const CHOSEN: &str = "WITH bounds AS (SELECT min(id) AS least, max(id) AS most FROM public.origin_packages), chosen AS ( \
       (SELECT id FROM public.origin_packages ORDER BY id DESC LIMIT 10) UNION \
       (SELECT id FROM public.origin_packages ORDER BY id LIMIT 10) UNION \
       (SELECT found.id FROM bounds, generate_series(1, 20) n, \
          LATERAL (SELECT n, least + (random() * (most - least))::int8 AS place) random_one, \
          LATERAL (SELECT id FROM public.origin_packages WHERE id >= place ORDER BY id LIMIT 1) found)) \
     SELECT ident::text, target::text, checksum::text FROM public.origin_packages \
     WHERE id IN (SELECT id FROM chosen) AND ident IS NOT NULL AND target IS NOT NULL AND checksum IS NOT NULL";

/// The current rows of artifacts that were absent before.
const KNOWN: &str = "SELECT p.ident::text, p.target::text, p.checksum::text \
     FROM unnest($1::text[], $2::text[]) k (ident, target) JOIN public.origin_packages p USING (ident, target) \
     WHERE p.checksum IS NOT NULL";

/// The row still exists, and its artifact is not recorded as missing on the primary.
const STILL_NAMED: &str = "SELECT EXISTS (SELECT FROM public.origin_packages WHERE ident = $1 AND target = $2 AND checksum = $3) \
       AND NOT EXISTS (SELECT FROM warm_spare.unavailable WHERE key = $4 AND reason <> $5)";

struct Chosen {
    ident: String,
    target: String,
    checksum: String,
    key: String,
}

/// Takes a sample. None: the visible database has none of our tables.
pub async fn sample(config: &Config, patience: Duration) -> Result<Option<Sampled>, PassError> {
    let local = &config.local.datastore;
    let session = match LocalSession::open(local, &local.database).await {
        Ok(session) => session,
        Err(error) if error.fault == DatastoreFault::NoDatabase => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let sql = "SELECT to_regclass('warm_spare.unavailable') IS NOT NULL \
                 AND to_regclass('public.origin_packages') IS NOT NULL";
    let row = session
        .query_one("looking for our tables", sql, &[])
        .await?;
    if !row.get::<_, bool>(0) {
        return Ok(None);
    }
    let doing = "choosing artifacts to look for";
    let rows = session.query(doing, CHOSEN, &[]).await?;
    let state = State::open_existing(&config.local.datastore).await?;
    let known = match &state {
        Some(state) => state.absent().await?,
        None => Vec::new(),
    };
    let idents: Vec<&str> = known.iter().map(|absent| absent.ident.as_str()).collect();
    let targets: Vec<&str> = known.iter().map(|absent| absent.target.as_str()).collect();
    let named = session.query(doing, KNOWN, &[&idents, &targets]).await?;
    let mut chosen: Vec<Chosen> = named.iter().chain(&rows).filter_map(chosen).collect();
    let mut twice = HashSet::new();
    chosen.retain(|chosen| twice.insert(chosen.key.clone()));
    let store = Store::open(Side::Local, &config.local.s3)?.with_limits(patience, TRIES);
    let looked_for = chosen.len();
    let mut looks = futures_util::stream::iter(chosen)
        .map(|chosen| async {
            let there = store.head(&chosen.key).await;
            (chosen, there)
        })
        .buffer_unordered(MAX_REQUESTS);
    let mut absent = Vec::new();
    while let Some((chosen, there)) = looks.next().await {
        if there?.is_none() {
            absent.push(chosen);
        }
    }
    drop(looks);
    let mut sampled = Sampled {
        looked_for,
        absent: Vec::new(),
    };
    let mut lacking = Vec::new();
    for chosen in absent {
        let Chosen {
            ident,
            target,
            checksum,
            key,
        } = &chosen;
        let row = session
            .query_one(
                doing,
                STILL_NAMED,
                &[ident, target, checksum, key, &UNSOUND],
            )
            .await?;
        if row.get(0) {
            sampled.absent.push(key.clone());
            lacking.push(AbsentArtifact {
                key: chosen.key,
                ident: chosen.ident,
                target: chosen.target,
            });
        }
    }
    sampled.absent.sort();
    let gone = known.into_iter().map(|absent| absent.key);
    let gone: Vec<String> = gone.filter(|key| !sampled.absent.contains(key)).collect();
    if let Some(state) = &state {
        state.note_absent(&lacking, &gone).await?;
    }
    Ok(Some(sampled))
}

fn chosen(row: &RawRow) -> Option<Chosen> {
    let (ident, target, checksum): (String, String, String) = (row.get(0), row.get(1), row.get(2));
    // A row that names no possible artifact is reported elsewhere.
    Checksum::from_str(&checksum).ok()?;
    let key = object_key(
        &Ident::from_str(&ident).ok()?,
        &Target::from_str(&target).ok()?,
    );
    Some(Chosen {
        ident,
        target,
        checksum,
        key,
    })
}

/// Returns the error for a sample of the local bucket that did not end in time.
pub fn not_in_time(config: &Config, limit: Duration) -> PassError {
    PassError::Store(StoreError {
        side: Side::Local,
        endpoint: config.local.s3.endpoint.clone(),
        doing: "looking for a sample of the artifacts".into(),
        fault: StoreFault::Unreachable,
        text: format!("not done within {}", humantime::format_duration(limit)),
        wait: None,
    })
}
