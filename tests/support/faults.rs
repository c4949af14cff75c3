//! Faults for a pair of clusters and the service between them: struck at random, undone within a
//! limited time.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Server {
    PrimaryDatastore,
    PrimaryStore,
    SpareDatastore,
    SpareStore,
}
use Server::{PrimaryDatastore, PrimaryStore, SpareDatastore, SpareStore};

pub const SERVERS: [Server; 4] = [PrimaryDatastore, PrimaryStore, SpareDatastore, SpareStore];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blow {
    Kill,
    Pause,
    Restart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Line {
    /// The connection to the primary's datastore.
    Datastore,
    /// The connection to the primary's store.
    Store,
    /// The connection to the spare's store.
    OwnStore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    ServiceKilled,
    /// Killed in this phase of a copy, as its log names it.
    ServiceKilledIn(&'static str),
    /// Killed at this point of the program, when it comes there for this number of times.
    ServiceKilledAt(&'static str, u32),
    ServicePaused,
    ServiceRestarted,
    Struck(Server, Blow),
    /// The primary's datastore ends as the Supervisor ends it, while only our sessions are
    /// connected.
    SmartShutdown,
    Cut(Line),
    Stalled(Line),
    Slow(Line),
    SlotDropped,
    SlotMadeAnew,
    SlotAdvanced,
    /// Set back to an older copy of its data directory; its bucket stays.
    RolledBack(Server),
    /// The primary's datastore is set back while the service is away, and its log has grown past
    /// the old position when the service comes back.
    RolledBackAndOutgrown,
    Schema,
    /// A truncated table with rows. It locks the table, so no other client is at work.
    Truncated,
    /// One of our sessions on that server is ended by its administrator.
    SessionEnded(Server),
    /// The service stops at this point of the program, and continues later.
    ServiceFrozenAt(&'static str),
    /// The store answers every second request with this status.
    StoreAnswers(Server, u16),
    /// A transaction that writes is left open on the primary.
    WriterLeftOpen,
    /// The same, but prepared: no session holds it.
    PreparedLeftOpen,
    /// More log without changes than an idle primary may keep for us.
    LogOfNothing,
    /// The datastore's clock is stepped by this number of seconds.
    ClockStepped(Server, i64),
    /// The service of another spare of the same primary.
    OtherSpare(Blow),
    /// More packages in one transaction than the gate remembers at once.
    ManyPackages,
}

impl Fault {
    /// Returns the kind, for the summary.
    pub fn kind(&self) -> String {
        match self {
            Fault::ServiceKilledAt(point, _) => format!("ServiceKilledAt({point})"),
            other => format!("{other:?}"),
        }
    }

    pub fn random(rng: &mut StdRng, points: &[&'static str]) -> Self {
        if rng.random_ratio(1, 30) {
            let blow = [Blow::Kill, Blow::Pause, Blow::Restart][rng.random_range(0..3)];
            return Fault::OtherSpare(blow);
        }
        if !points.is_empty() && rng.random_ratio(1, 100) {
            return Fault::ManyPackages;
        }
        if !points.is_empty() && rng.random_ratio(1, 4) {
            return Self::of_a_stream(rng, points);
        }
        let lines = [Line::Datastore, Line::Store, Line::OwnStore];
        let line = |rng: &mut StdRng| lines[rng.random_range(0..3)];
        match rng.random_range(0..100) {
            0..8 => Fault::ServiceKilled,
            8..18 if points.is_empty() => {
                Fault::ServiceKilledIn(PHASES.choose(rng).expect("there are phases"))
            }
            8..26 if !points.is_empty() => {
                let point = points.choose(rng).expect("there are points");
                Fault::killed_at(point, rng)
            }
            8..28 => Fault::ServiceKilledIn(PHASES.choose(rng).expect("there are phases")),
            28..32 => Fault::ServicePaused,
            32..34 => Fault::ServiceRestarted,
            34..60 => {
                let server = *SERVERS.choose(rng).expect("there are servers");
                let blow = [Blow::Kill, Blow::Pause, Blow::Restart][rng.random_range(0..3)];
                Fault::Struck(server, blow)
            }
            60..63 => Fault::SmartShutdown,
            63..68 => Fault::Cut(line(rng)),
            68..73 => Fault::Stalled(line(rng)),
            73..76 => Fault::Slow(line(rng)),
            76..80 => Fault::SlotDropped,
            80..83 => Fault::SlotMadeAnew,
            83..87 => Fault::SlotAdvanced,
            87..89 => Fault::RolledBack(PrimaryDatastore),
            89..91 => Fault::RolledBackAndOutgrown,
            91..93 => Fault::RolledBack(SpareDatastore),
            93..97 => Fault::Schema,
            97 => Fault::Truncated,
            _ => Fault::LogOfNothing,
        }
    }
}

impl Fault {
    /// Returns a kill at this point. A process passes a point of a copy once: its second copy may
    /// be hours away.
    pub fn killed_at(point: &'static str, rng: &mut StdRng) -> Self {
        let again = FOLLOWING.iter().any(|room| point.starts_with(room));
        let count = if again { rng.random_range(1..4) } else { 1 };
        Fault::ServiceKilledAt(point, count)
    }

    fn of_a_stream(rng: &mut StdRng, points: &[&'static str]) -> Self {
        let datastore = [PrimaryDatastore, SpareDatastore][rng.random_range(0..2)];
        match rng.random_range(0..12) {
            0..3 => Fault::SessionEnded(datastore),
            3..5 => Fault::ServiceFrozenAt(points.choose(rng).expect("there are points")),
            5..8 => {
                let status = [403, 404, 429, 500, 503][rng.random_range(0..5)];
                let store = [PrimaryStore, SpareStore][rng.random_range(0..2)];
                Fault::StoreAnswers(store, status)
            }
            8 => Fault::WriterLeftOpen,
            9 => Fault::PreparedLeftOpen,
            _ => {
                let by = [3600, -3600][rng.random_range(0..2)];
                Fault::ClockStepped(datastore, by)
            }
        }
    }
}

/// Points that a service passes when it has made its copy already.
pub const FOLLOWING: [&str; 4] = ["gate.", "apply.", "confirm.", "retention."];

/// The phases in which a copy may be killed, as the service's log names them.
pub const PHASES: [&str; 8] = [
    "artifacts",
    "snapshot",
    "schema",
    "tables",
    "indexes",
    "remaining artifacts",
    "replacements",
    "switch",
];
