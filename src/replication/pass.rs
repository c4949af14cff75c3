//! One pass: the checks, the artifacts, and a baseline if the primary has changed.

use super::artifacts::{self, Round};
use super::baseline::{self, Baseline, Copied};
use super::checks::{self, Facts};
use super::courier::Courier;
use super::error::PassError;
use super::inventory::{Inventory, InventoryError, UNSOUND};
use super::{replacements, tables};
use crate::cluster::{
    ByteBudget, ClusterRecord, CopiedPoint, LocalSession, LocalStore, PeerSession, Side, State,
    Store, Throttle, is_fenced, prove_fence, raise_fence,
};
use crate::config::{Config, Role};
use crate::observe::{Phase, Progress};

/// Below this many artifacts left, the snapshot is taken; the rest is copied while it stands.
const SMALL_REST: u64 = 50;
/// A primary that is uploaded to faster than we copy is not waited for without end.
const ROUNDS_BEFORE: usize = 5;

#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// A new baseline even if nothing has changed.
    pub baseline: bool,
}

#[derive(Debug)]
pub struct Report {
    pub outcome: Outcome,
    /// Artifacts of this pass, those of the baseline included.
    pub artifacts: Round,
    pub packages: u64,
    /// Keys that the primary lacks or has damaged, as recorded now.
    pub unavailable: Vec<(String, String)>,
    pub undone: usize,
    pub fence_reset: bool,
}

#[derive(Debug)]
pub enum Outcome {
    Copied(Box<Copied>),
    /// Not a row was read: the primary has committed nothing since.
    Unchanged(CopiedPoint),
}

/// Connections to both ends, as one pass needs them.
pub struct Ends {
    pub local: LocalSession,
    pub peer: PeerSession,
    pub local_store: LocalStore,
    pub peer_store: Store,
}

impl Ends {
    pub async fn open(config: &Config) -> Result<Ends, PassError> {
        Ok(Ends {
            local: LocalSession::open(&config.local.datastore, "postgres").await?,
            local_store: LocalStore::open(&config.local.s3)?,
            peer: PeerSession::open(&config.peer.datastore).await?,
            peer_store: Store::open(Side::Peer, &config.peer.s3)?,
        })
    }
}

/// Brings the spare to the primary's present, once.
pub async fn sync(
    config: &Config,
    options: Options,
    progress: &Progress,
) -> Result<Report, PassError> {
    progress.begin(Phase::Checks, 0);
    let recorded = match State::open_existing(&config.local.datastore).await? {
        Some(state) => Some(state.cluster().await?),
        None => None,
    };
    may_work(config, recorded.as_ref())?;
    let ends = Ends::open(config).await?;
    let facts = checks::check(
        config,
        &ends.local,
        &ends.peer,
        &ends.local_store,
        &ends.peer_store,
    )
    .await?;
    let state = State::open(&config.local.datastore).await?;
    let lock = state.lock().await?;
    let first = state.cluster().await?.role.is_none();
    let courier = Courier {
        peer: ends.peer_store,
        local: ends.local_store,
        budget: ByteBudget::new(config.replication.buffer),
        throttle: Throttle::new(config.replication.bandwidth_limit),
    };
    let undone = replacements::undo(&state, &courier).await?;
    if undone > 0 {
        log::warn!(
            "local: a pass before this one was interrupted while it replaced {undone} artifacts; they were put back"
        );
    }
    let fence_reset = keep_fenced(config, &state, first, facts.visible).await?;

    let inventory = Inventory::new(state.session()).await?;
    let visible = Visible::open(config, &facts).await?;
    let visible_rows = match &visible.rows {
        Some(session) => inventory.load_visible(session).await?.rows,
        None => 0,
    };
    let pass = Pass {
        config,
        facts: &facts,
        state: &state,
        courier: &courier,
        inventory: &inventory,
        progress,
    };
    if first && visible_rows > 0 {
        pass.ends_not_exchanged(&ends.peer).await?;
    }
    inventory.load_present(&courier.local).await?;
    if !options.baseline
        && let Some(point) = pass.unchanged(&ends.peer, &visible).await?
    {
        let round = pass.mend(&visible).await?;
        return pass
            .report(Outcome::Unchanged(point), round, undone, fence_reset)
            .await;
    }
    let mut round = pass.artifacts_first(&ends.peer).await?;
    // From here on nothing of ours stays open on the primary longer than its one statement, or its part of the copy.
    drop(ends.peer);
    let known_unavailable = visible
        .unavailable()
        .await?
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    drop(visible);
    let copied = Baseline {
        config,
        facts: &facts,
        state: &state,
        lock,
        courier: &courier,
        inventory: &inventory,
        progress,
        visible_rows,
        known_unavailable,
    }
    .run()
    .await?;
    prove_fence(&config.local.datastore, &config.local.datastore.database).await?;
    round.copied += copied.artifacts.copied;
    round.copied_bytes += copied.artifacts.copied_bytes;
    round.verified += copied.artifacts.verified;
    pass.report(
        Outcome::Copied(Box::new(copied)),
        round,
        undone,
        fence_reset,
    )
    .await
}

/// A cluster that was never told its role does nothing at all; one that is no spare copies nothing over itself.
fn may_work(config: &Config, recorded: Option<&ClusterRecord>) -> Result<(), PassError> {
    let role = recorded.and_then(|record| record.role.as_deref());
    match (config.role, role) {
        (Role::Spare, None | Some("spare")) | (Role::Keep, Some("spare")) => Ok(()),
        (Role::Keep, None) => Err(PassError::Refused {
            rule: "role_unset",
            text: "this cluster was never told its role, so nothing is done".into(),
            next_step: "set role = \"spare\" on the cluster that is to be the copy".into(),
        }),
        (_, recorded) => Err(PassError::Refused {
            rule: "role",
            text: format!(
                "this cluster is recorded as {}",
                recorded.unwrap_or("nothing")
            ),
            next_step: "only a spare is copied to".into(),
        }),
    }
}

/// The fence is a condition, not an event: looked for at every start, and set again if somebody lifted it.
async fn keep_fenced(
    config: &Config,
    state: &State,
    first: bool,
    visible: bool,
) -> Result<bool, PassError> {
    if first || !visible {
        return Ok(false);
    }
    let database = &config.local.datastore.database;
    if is_fenced(state.session(), database).await? {
        return Ok(false);
    }
    log::warn!("local: database {database} was not fenced; it is again");
    raise_fence(state.session(), &config.local.datastore, database).await?;
    state
        .event(
            "fence",
            &format!("the fence on {database} had been lifted; it was set again"),
            &config.change,
        )
        .await?;
    Ok(true)
}

/// The database that Builder on the spare sees, as far as it is there and is Builder's.
struct Visible {
    rows: Option<LocalSession>,
    ours: bool,
}

impl Visible {
    async fn open(config: &Config, facts: &Facts) -> Result<Visible, PassError> {
        if !facts.visible {
            return Ok(Visible {
                rows: None,
                ours: false,
            });
        }
        let session =
            LocalSession::open(&config.local.datastore, &config.local.datastore.database).await?;
        let sql = "SELECT to_regclass('public.origin_packages') IS NOT NULL, to_regclass('warm_spare.recovery_point') IS NOT NULL";
        let row = session
            .query_one("looking into the visible database", sql, &[])
            .await?;
        let (rows, ours): (bool, bool) = (row.get(0), row.get(1));
        Ok(Visible {
            rows: rows.then_some(session),
            ours,
        })
    }

    fn session_of_ours(&self) -> Option<&LocalSession> {
        self.rows.as_ref().filter(|_| self.ours)
    }

    async fn unavailable(&self) -> Result<Vec<(String, String)>, PassError> {
        match self.session_of_ours() {
            Some(session) => unavailable(session).await,
            None => Ok(Vec::new()),
        }
    }
}

/// Artifacts recorded as missing or damaged on the primary, with the reason.
pub async fn unavailable(session: &LocalSession) -> Result<Vec<(String, String)>, PassError> {
    let sql = "SELECT key, reason FROM warm_spare.unavailable ORDER BY key";
    let rows = session
        .query("reading what the primary lacks", sql, &[])
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

struct Pass<'a> {
    config: &'a Config,
    facts: &'a Facts,
    state: &'a State,
    courier: &'a Courier,
    inventory: &'a Inventory<'a>,
    progress: &'a Progress,
}

impl Pass<'_> {
    /// The first baseline must not wipe out a cluster that has what its peer lacks: then the ends are exchanged.
    async fn ends_not_exchanged(&self, peer: &PeerSession) -> Result<(), PassError> {
        self.inventory.load_wanted_from_peer(peer).await?;
        let lacking = self.inventory.vanishing().await?;
        let epoch = self.state.cluster().await?.epoch + 1;
        if lacking.is_empty() || self.config.force_epoch == epoch as u64 {
            return Ok(());
        }
        Err(PassError::Refused {
            rule: "ends_exchanged",
            text: format!(
                "the local database holds {} packages that the peer lacks (for example {}); this would be the first copy over it",
                lacking.len(),
                lacking[0]
            ),
            next_step: format!(
                "if local and peer are exchanged, exchange them; if these packages may go, set force_epoch = {epoch}"
            ),
        })
    }

    /// Some: the primary has committed nothing since the recovery point. A start of its server in between, another
    /// timeline, or a database of ours that is not the one remembered, count as a change.
    async fn unchanged(
        &self,
        peer: &PeerSession,
        visible: &Visible,
    ) -> Result<Option<CopiedPoint>, PassError> {
        let (Some(point), Some(session)) =
            (self.state.copied_point().await?, visible.session_of_ours())
        else {
            return Ok(None);
        };
        let sql = "SELECT lsn::text FROM warm_spare.recovery_point";
        let rows = session
            .query("reading the recovery point", sql, &[])
            .await?;
        let ours: Option<String> = rows.first().map(|row| row.get(0));
        let same_server = point.system_id == self.facts.system_id
            && point.timeline == self.facts.timeline
            && point.server_started == self.facts.server_started;
        if ours.as_ref() != Some(&point.lsn) || !same_server {
            return Ok(None);
        }
        let sql = "SELECT txid_current_snapshot()::text";
        let now: String = peer
            .query_one("asking for committed transactions", sql, &[])
            .await?
            .get(0);
        let same = now == point.transactions
            && baseline::digest(&tables::sequence_values(peer).await?) == point.sequences;
        Ok(same.then_some(point))
    }

    /// Nothing new: only artifacts that vanished here, and those that the primary lacked before.
    async fn mend(&self, visible: &Visible) -> Result<Round, PassError> {
        let Some(session) = visible.session_of_ours() else {
            return Ok(Round::default());
        };
        self.inventory.load_wanted_from(session).await?;
        let mut before = visible.unavailable().await?;
        // Such a row cannot be mended but by another row.
        before.retain(|(_, reason)| reason != UNSOUND);
        let todo = self.inventory.plan(&[]).await?;
        let step = self.progress.begin(Phase::Artifacts, todo);
        let copies = self.config.replication.copies;
        let round =
            artifacts::round(self.inventory, self.state, self.courier, copies, &step).await?;
        let still = artifacts::keys(round.missing.iter().chain(&round.damaged));
        if still
            .iter()
            .any(|key| before.iter().all(|(known, _)| known != key))
        {
            artifacts::confirm_bucket(self.courier, None).await?;
        }
        let mended: Vec<&str> = before
            .iter()
            .map(|(key, _)| key.as_str())
            .filter(|key| !still.contains(key))
            .collect();
        let sql = "DELETE FROM warm_spare.unavailable WHERE key = ANY ($1)";
        session
            .execute("forgetting what is there now", sql, &[&mended])
            .await?;
        let sql = "INSERT INTO warm_spare.unavailable (key, checksum, reason) VALUES ($1, $2, $3) ON CONFLICT (key) DO NOTHING";
        for (item, reason) in round.unavailable() {
            let checksum = item.checksum.to_string();
            session
                .execute(
                    "recording what the primary lacks",
                    sql,
                    &[&item.key, &checksum, &reason],
                )
                .await?;
        }
        Ok(round)
    }

    /// A first copy of terabytes must not hold a snapshot for days: artifacts come before it, until little is left.
    async fn artifacts_first(&self, peer: &PeerSession) -> Result<Round, PassError> {
        let mut all = Round::default();
        for number in 0..ROUNDS_BEFORE {
            self.inventory.load_wanted_from_peer(peer).await?;
            let settled: Vec<String> = all
                .unavailable()
                .map(|(item, _)| item.key.clone())
                .chain(all.staged.iter().map(|swap| swap.key.clone()))
                .collect();
            let todo = self.inventory.plan(&settled).await?;
            if number > 0 && todo <= SMALL_REST {
                break;
            }
            let step = self.progress.begin(Phase::Artifacts, todo);
            let copies = self.config.replication.copies;
            all.absorb(
                artifacts::round(self.inventory, self.state, self.courier, copies, &step).await?,
            );
            if number == 0 {
                self.bucket_is_theirs(&all).await?;
            }
        }
        Ok(all)
    }

    /// A bucket that has none of the artifacts is not the primary's, however few they are.
    async fn bucket_is_theirs(&self, round: &Round) -> Result<(), PassError> {
        let wanted = self.inventory.wanted().await?;
        if wanted == 0 || (round.missing.len() as u64) < wanted {
            return Ok(());
        }
        Err(PassError::Unfit {
            check: "missing_artifacts",
            text: format!(
                "the peer's bucket {} has none of the {wanted} artifacts that the primary's rows name (for example {})",
                self.courier.peer.bucket(),
                round.missing[0].key
            ),
            next_step: "check peer.s3.endpoint and peer.s3.bucket_name".into(),
        })
    }

    async fn report(
        &self,
        outcome: Outcome,
        artifacts: Round,
        undone: usize,
        fence_reset: bool,
    ) -> Result<Report, PassError> {
        let session = LocalSession::open(
            &self.config.local.datastore,
            &self.config.local.datastore.database,
        )
        .await?;
        Ok(Report {
            outcome,
            artifacts,
            packages: self.inventory.wanted().await?,
            unavailable: unavailable(&session).await?,
            undone,
            fence_reset,
        })
    }
}

impl From<InventoryError> for PassError {
    fn from(error: InventoryError) -> Self {
        match error {
            InventoryError::Datastore(e) => e.into(),
            InventoryError::Store(e) => e.into(),
        }
    }
}
