//! Codes: words for programs. The documents have the same lists, which a test compares with these.

use strum::{Display, EnumString, IntoStaticStr, VariantArray};

/// Names the reason of an error. `docs/troubleshoot.md` explains each.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum ErrorCode {
    AnotherServer,
    ArchiveDamaged,
    ArchiveForeign,
    ArchiveUnreachable,
    ArtifactLacking,
    Clocks,
    Compare,
    CurrentDatabase,
    Divergence,
    Drain,
    DrillRuns,
    EmptyPrimary,
    Encoding,
    EndsExchanged,
    EpochOutOfRange,
    Extension,
    FileExists,
    ForceNeeded,
    Fuse,
    Interrupted,
    LeaseHeld,
    LeaseUnanswered,
    ListOfLosses,
    Locale,
    MissingArtifacts,
    NewerPrimary,
    NoArchive,
    NoClusterId,
    NoGeneration,
    NoLease,
    NoNewerPrimary,
    NoRecoveryPoint,
    NotAttached,
    NotBuilder,
    NotEmpty,
    NotFollowing,
    NotPrepared,
    OlderPrimary,
    OtherLine,
    OtherServer,
    OtherSlots,
    PeerIsFenced,
    PeerIsSpare,
    PeerUnreachable,
    Pinned,
    PrimaryLives,
    Publication,
    Replacement,
    Replacing,
    Role,
    RoleUnset,
    Roles,
    RowCount,
    SameBucket,
    SameServer,
    Sequences,
    SetBack,
    Slot,
    SlotActive,
    SlotInUse,
    Standby,
    StandbyWaits,
    StateIsNeeded,
    StateWentBack,
    Stranger,
    TableBusy,
    TwoBuckets,
    UnaskedGeneration,
    Undecoded,
    Unlogged,
    Unsupported,
    UnsupportedStore,
    Version,
    WasPrimary,
    // Classes of faults that are no refusal.
    Busy,
    ClientProgram,
    Datastore,
    DiskFull,
    Fence,
    Http,
    InTheWay,
    Locked,
    NewerFormat,
    NotMet,
    Overtaken,
    Privilege,
    Rewritten,
    Scratch,
    Spool,
    Store,
    Superseded,
    Unknown,
}

/// Names a reason for the health that is not OK, beside those of [`HoldReason`].
/// `docs/troubleshoot.md` explains each.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum HealthCode {
    Starting,
    FirstBaseline,
    BaselineStalled,
    Lag,
    ConfigRefused,
    MissingOnPrimary,
    DamagedOnPrimary,
    UnreadableOnPrimary,
    Unstorable,
    NotReplicated,
    ProviderBehind,
    UnprovenArtifacts,
    MissingHere,
    LocalStoreUnreachable,
    PeerStoreUnreachable,
    PeerDatastoreUnreachable,
    NotFenced,
    DatabaseAstray,
    VerifyDifferences,
    VerifyFailed,
    OpenTransaction,
    LeftOnPrimary,
    NoSpare,
    OldPrimaryOpen,
    Fenced,
    PrimaryReadOnly,
    HandoverUndone,
    StateWentBack,
    SilentHolder,
    LeaseExpired,
    LeaseInDoubt,
    BuilderApiRuns,
    /// No process waits at the spare's site while another one pushes.
    NoStandby,
    /// The process that pushed is gone.
    NoPusher,
    ArchiveUnreachable,
    ArchiveForeign,
    ArchiveFailed,
    ArchiveLate,
    ArchiveDamaged,
    ArchiveUnproven,
}

/// Names a check of `preflight`, in the order in which they are shown.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum PreflightCheck {
    RecoveryPoint,
    Lag,
    Artifacts,
    Verification,
    Versions,
    NoWayBack,
    Extensions,
    Clients,
    Disk,
    Privileges,
    Fence,
    PeerIdentity,
    PeerReachable,
    Tls,
    BuilderKeys,
    Bucket,
    Lease,
    BuilderApi,
    Wal,
    Clocks,
    Supervisor,
    Standby,
    ReadOnlyTime,
    Mode,
}

/// Names the kind of an event. `docs/reference.md` describes each.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum EventKind {
    Approved,
    Archive,
    Artifacts,
    Baseline,
    Config,
    Divergence,
    Failback,
    Fence,
    Fuse,
    FuseApproved,
    Gap,
    HandoverUndone,
    Hold,
    HoldEnded,
    Mode,
    Prepared,
    Promotion,
    Released,
    Role,
    Slot,
    Verification,
}

/// Why nothing is applied. `docs/troubleshoot.md` explains each.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum HoldReason {
    RoleUnset,
    /// The configuration names no peer.
    PeerUnset,
    Config,
    LocalUnreachable,
    PeerUnreachable,
    /// The stream is demanded, and what it needs is not there.
    NotPrepared,
    Paused,
    Fuse,
    Conflict,
    DiskFull,
    Privilege,
    Version,
    SameServer,
    SameBucket,
    UnsupportedStore,
    /// The peer is out of reach, or a check refuses: only force_epoch goes on.
    ForceNeeded,
    /// Both clusters are the primary.
    TwoPrimaries,
    /// The lease of the shared bucket is another cluster's, which renews it.
    LeaseHeld,
    /// The holder of the lease does not answer, or the lease cannot be read or believed.
    LeaseUnanswered,
    /// The takeover waits for the shared file system.
    NotAttached,
    /// The process that pushes and the one at the spare's site are configured for two roles.
    WishesDiffer,
    /// Anything else that a pass may end with; the detail says what.
    Failed,
}

impl HoldReason {
    /// Returns whether the hold goes on although replication works again.
    pub fn stays(self) -> bool {
        self.is_of_a_takeover()
            || matches!(
                self,
                HoldReason::Config | HoldReason::PeerUnset | HoldReason::Paused
            )
    }

    /// Returns whether a takeover waits for the operator.
    pub fn is_of_a_takeover(self) -> bool {
        matches!(
            self,
            HoldReason::ForceNeeded
                | HoldReason::LeaseHeld
                | HoldReason::LeaseUnanswered
                | HoldReason::NotAttached
                | HoldReason::WishesDiffer
        )
    }
}

/// The state of the service, as `status` shows it.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum StateName {
    Starting,
    Standby,
    Baselining,
    Following,
    Holding,
    Promoting,
    Primary,
    Fenced,
}

/// The result of a preflight check, the best first.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Verdict {
    Ok,
    Warn,
    Refuse,
}
