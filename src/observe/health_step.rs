//! The next step of an operator for each health code.

use crate::domain::HealthCode;

/// Returns the next step of a code. A hold has its own next step.
pub(super) fn next_step(code: HealthCode) -> &'static str {
    match code {
        HealthCode::Starting | HealthCode::FirstBaseline => "wait",
        HealthCode::SilentHolder => {
            "no step is needed: this process takes over within half a minute; if it does not, stop the other process, or end its session in the local datastore with pg_terminate_backend"
        }
        HealthCode::NoStandby => {
            "start warm-spare at the spare's site too, with the same servers and replication.direction = \"pull\""
        }
        HealthCode::NoPusher => {
            "start warm-spare at the primary's site; if that site is lost, promote this cluster with force_epoch"
        }
        HealthCode::ArchiveUnreachable => {
            "check the archive's keys, its server or mount, and the room there; the service tries again every minute"
        }
        HealthCode::ArchiveForeign => {
            "another cluster writes there: give this cluster another place, or, if that cluster writes there no more, run `warm-spare archive create --take-over`"
        }
        HealthCode::ArchiveFailed => {
            "read the text; `warm-spare archive create` and `warm-spare archive prune` do the same by hand"
        }
        HealthCode::ArchiveLate => {
            "find out why no generation is made: `warm-spare archive create` makes one by hand"
        }
        HealthCode::ArchiveDamaged => {
            "`warm-spare archive verify --all` names each file and the generations that need it; bring the file back from another copy, or make a new generation"
        }
        HealthCode::ArchiveUnproven => {
            "run `warm-spare archive verify --all`; if it lasts too long at that rate, raise archive.verify_budget"
        }
        HealthCode::BaselineStalled => {
            "check the log and the stores of both sides; a restart of the service loses no artifact"
        }
        HealthCode::Lag => {
            "check that the primary is reachable and how fast copies are; if this lag is usual here, raise replication.rpo or replication.lag_warn"
        }
        HealthCode::ConfigRefused => {
            "correct that key; check the result with `warm-spare check-config`"
        }
        HealthCode::MissingOnPrimary => {
            "upload the package again on the primary (hab pkg upload --force), or delete it there"
        }
        HealthCode::DamagedOnPrimary => {
            "upload the package again on the primary (hab pkg upload --force); its file there does not match its row"
        }
        HealthCode::UnreadableOnPrimary => {
            "find out why the primary's store refuses that object (archived, a disabled key, a policy); or upload the package again there, or delete it"
        }
        HealthCode::Unstorable => {
            "delete the package on the primary if nobody needs it; a promoted spare serves its row, but not its file"
        }
        HealthCode::NotReplicated => {
            "find out why the provider does not replicate them (a failed rule, objects older than the rule, a prefix left out); or set artifacts.fill = true, and they are copied"
        }
        HealthCode::ProviderBehind => {
            "look at the replication of the primary's bucket: its queue, its failures; rows wait until their artifacts are here"
        }
        HealthCode::UnprovenArtifacts => {
            "wait: the service reads them one after the other, within replication.bandwidth_limit; `warm-spare verify --deep` reads all of them at once"
        }
        HealthCode::MissingHere => {
            "find out what removed them; if verify.schedule is set, a verification starts at once, and artifacts that the primary still has are copied again"
        }
        HealthCode::LocalStoreUnreachable => "check that the local MinIO runs, and check local.s3",
        HealthCode::PeerDatastoreUnreachable => {
            "check that the primary's PostgreSQL runs; the running copy waits for it, and starts again if necessary"
        }
        HealthCode::PeerStoreUnreachable => {
            "check that the primary's MinIO runs, and check peer.s3"
        }
        HealthCode::NotFenced => {
            "find the obstacle in the log; until it is removed, clients can write to this Builder"
        }
        HealthCode::DatabaseAstray => {
            "no step is needed: the database is copied again at once, unless paused; find out who dropped or renamed it"
        }
        HealthCode::VerifyDifferences => {
            "the service copies rows and artifacts again and verifies them once more; `warm-spare verify --deep --json` lists the remaining differences"
        }
        HealthCode::VerifyFailed => {
            "read the error above; the verification is tried again within an hour"
        }
        HealthCode::OpenTransaction => {
            "end that transaction on the primary (pg_terminate_backend, ROLLBACK PREPARED) if nobody needs it; the stream continues in any case"
        }
        HealthCode::LeftOnPrimary => {
            "check pg_stat_activity (application warm-spare) and pg_replication_slots there; sessions that no running warm-spare uses can be ended with pg_terminate_backend"
        }
        HealthCode::NoSpare => {
            "let the peer follow: set role = \"spare\" there, as docs/failback.md describes"
        }
        HealthCode::OldPrimaryOpen => {
            "make the old primary reachable from this node, or stop Builder there; it will be fenced as soon as it answers"
        }
        HealthCode::Fenced => {
            "set role = \"spare\" here to come back as the spare: docs/failback.md; until then this Builder is read-only"
        }
        HealthCode::PrimaryReadOnly => {
            "if nobody intended this, on the primary: ALTER DATABASE builder RESET default_transaction_read_only, and end the older sessions"
        }
        HealthCode::HandoverUndone => {
            "remove the obstacle that the text names, and apply role = \"primary\" with another change number: docs/held.md"
        }
        HealthCode::LeaseExpired => {
            "make the store of the lease answer at this site; until then the other site may take over by an operator's consent"
        }
        HealthCode::LeaseInDoubt => {
            "look at the object .warm-spare/lease.json in the shared bucket, and at the log of the acting primary: docs/topologies/shared-bucket.md"
        }
        HealthCode::BuilderApiRuns => {
            "stop builder-api on the spare, or give it a key of the store that only reads: an upload to a fenced Builder overwrites the shared object before it fails"
        }
        HealthCode::StateWentBack => {
            "find out which cluster has the newest rows before anything is promoted: docs/two-primaries.md, \"A database that was set back\"; a force_epoch of an earlier time has no effect any more"
        }
    }
}
