//! What an operator can do about each health code.

use crate::domain::HealthCode;

/// Returns the next step for a code. A hold brings its own.
pub(super) fn next_step(code: HealthCode) -> &'static str {
    match code {
        HealthCode::Starting | HealthCode::FirstBaseline => "wait",
        HealthCode::SilentHolder => {
            "nothing: this one takes over within half a minute; if it does not, stop the other one, or end its session in the local datastore with pg_terminate_backend"
        }
        HealthCode::BaselineStalled => {
            "look at the log and at both sides' stores; a restart of the service loses no artifact"
        }
        HealthCode::Lag => {
            "look whether the primary is reachable and how fast copies go; if this is usual here, raise replication.rpo or lag_warn"
        }
        HealthCode::ConfigRefused => "correct that key; `warm-spare check-config` tries it",
        HealthCode::MissingOnPrimary => {
            "upload the package again on the primary (hab pkg upload --force), or delete it there"
        }
        HealthCode::DamagedOnPrimary => {
            "upload the package again on the primary (hab pkg upload --force); its file there is not what its row says"
        }
        HealthCode::UnreadableOnPrimary => {
            "see on the primary why its store refuses that object (archived, a disabled key, a policy); or upload the package again there, or delete it"
        }
        HealthCode::Unstorable => {
            "delete the package on the primary if nobody needs it; a promoted spare serves its row and not its file"
        }
        HealthCode::MissingHere => {
            "find out what took them away; with verify.schedule set a verification begins at once, and what the primary still has is copied again"
        }
        HealthCode::LocalStoreUnreachable => "check that MinIO runs here, and local.s3",
        HealthCode::PeerDatastoreUnreachable => {
            "check that the primary's PostgreSQL runs; the copy under way waits for it, and begins again if it must"
        }
        HealthCode::PeerStoreUnreachable => "check that the primary's MinIO runs, and peer.s3",
        HealthCode::NotFenced => {
            "see the log for what is in the way; until then Builder here could be written to"
        }
        HealthCode::DatabaseAstray => {
            "nothing: it is copied again at once, unless paused; find out who dropped or renamed it"
        }
        HealthCode::VerifyDifferences => {
            "rows and artifacts are copied again and verified once more by themselves; `warm-spare verify --deep --json` lists what stays"
        }
        HealthCode::VerifyFailed => "read what it says; it is tried again within the hour",
        HealthCode::OpenTransaction => {
            "end that transaction on the primary (pg_terminate_backend, ROLLBACK PREPARED) if nobody needs it; the stream goes on meanwhile"
        }
        HealthCode::LeftOnPrimary => {
            "see pg_stat_activity (application warm-spare) and pg_replication_slots there; what no running warm-spare uses can be ended with pg_terminate_backend"
        }
        HealthCode::NoSpare => {
            "let the peer follow: set role = \"spare\" there, as docs/failback.md says"
        }
        HealthCode::OldPrimaryOpen => {
            "make the old primary reachable from here, or stop Builder there; it is fenced as soon as it answers"
        }
        HealthCode::Fenced => {
            "set role = \"spare\" here to come back as the spare: docs/failback.md; Builder here is read-only until then"
        }
        HealthCode::PrimaryReadOnly => {
            "if nobody meant it, on the primary: ALTER DATABASE builder RESET default_transaction_read_only, and end the sessions from before"
        }
        HealthCode::HandoverUndone => {
            "see what stood in the way, mend it, and apply role = \"primary\" with another change number: docs/failover.md"
        }
        HealthCode::StateWentBack => {
            "find out which cluster has the newest rows before anything is promoted: docs/failover.md, \"A database that was set back\"; a consent to an epoch of before has no effect any more"
        }
    }
}
