//! One side: its datastore (PostgreSQL), its artifact store (S3), and the state that we keep there.
//!
//! `postgres` and `s3` connect to servers. `state_db` owns database `warm_spare`. `fence` sets and
//! proves the fence. `preparation` changes the primary for the stream. Nothing above this room
//! names MinIO or PostgreSQL's wire protocol. The peer is read-only by type:
//! [`ReadSession`](crate::cluster::ReadSession) has no way to write, and its transactions are
//! read-only for the server too.

mod builder_db;
mod builder_keys;
mod error_text;
mod fence;
mod identity;
mod local;
mod peer;
mod postgres;
pub mod preparation;
mod primary_status;
mod s3;
mod spare_db;
mod state_db;
mod triggers;

pub use builder_db::{BuilderDb, CIPHERTEXTS, PACKAGES, ShardedPackages};
pub use builder_keys::{BuilderKeyError, BuilderKeys, sealed_by};
pub use fence::fence_record::fence_number_of;
pub use fence::first_write::lift_and_write;
pub use fence::keep::{FenceCheck, FenceReason, KeepError, KeptFence};
pub use fence::peer_fence::{PeerFence, RaiseError};
pub use fence::proof::{exempt_role, prove_fence};
pub use fence::setting::{
    FenceError, Waived, end_sessions, end_sessions_from_before, enforce_fence, is_fenced,
    lift_statement, raise_fence, set_fence,
};
pub use identity::{
    IdentityError, differ_by_reading, differ_in_bucket, differ_in_server, system_id,
};
pub use local::{LocalCluster, on_record};
pub use peer::PeerCluster;
pub use postgres::applying::{ApplySession, TextValue, TextValues};
pub use postgres::as_client::{AsClient, as_client};
pub use postgres::cancelling::last_words;
pub(crate) use postgres::channel::{is_loopback, is_verified};
pub use postgres::clients::{ClientPrograms, InstalledClients, ProgramError};
pub use postgres::copy_text::escape;
pub use postgres::databases::{DatabaseProperties, drop_statement};
pub use postgres::datastore_error::{DatastoreError, DatastoreFault};
pub use postgres::footprint::Footprint;
pub use postgres::maintenance::has_database;
pub use postgres::program::ProgramOutput;
pub use postgres::provider::Provider;
pub use postgres::rights::{MayApply, Rights, may_apply, rights};
pub use postgres::rows::Row;
pub use postgres::sequences::{Sequence, SequenceName};
pub use postgres::server_state::{Server, ServerState};
pub(crate) use postgres::session::pipe;
pub use postgres::session::{
    CopyIn, CopyRows, ReadSession, Session, Snapshot, WriteSession, quote_ident, quote_literal,
};
pub use postgres::slots::LocalSlot;
pub use postgres::tables::Table;
pub use postgres::tried::{Replicates, Tried};
pub use postgres::walsender::{Arrived, NewSlot, TextRows, WalSession, WalStream};
pub use primary_status::{PrimaryStatus, SlotStatus, StatusError};
pub use s3::lease_store::{FoundObject, LeaseStore, SeenLease, WroteLease};
pub(crate) use s3::probe::unpredictable;
pub use s3::probe::{Keeps, prove_writable};
pub use s3::store::download::Download;
pub use s3::store::object::{Expected, Listed, Stored};
pub use s3::store::{Completion, LocalStore, ReplicationStatus, Source, Store, Upload};
pub use s3::store_error::{StoreError, StoreFault};
pub use s3::throttle::{ByteBudget, Throttle};
pub use spare_db::{ApplyPosition, DROP_SCHEMA, HolderError, Silenced, SpareDb, Unavailable};
pub use state_db::DATABASE as STATE_DATABASE;
pub use state_db::artifact_place::{ArtifactPlace, FormerRecords};
pub use state_db::divergence::{
    DivergedPackage, DivergedRow, Divergence, DivergenceBook, FoundDivergence, PackageName,
    TableChanges,
};
pub use state_db::history::{Confirmation, DrillRecord, Event, VerificationRecord};
pub use state_db::kept::KeptDatabase;
pub use state_db::lease::LeaseRecord;
pub use state_db::lineage::{Descent, Lineage, record_lineage};
pub use state_db::new_copy::NewCopy;
pub use state_db::nodes::{Disk, Node, NodeTold};
pub use state_db::roles::{EPOCH_STEP_MAX, FenceRecord, Promotion, Record};
pub use state_db::state::{
    Artifact, ClusterRecord, Generation, RecoveryPoint, StateDb, StateError, StreamSource,
    TableContent, record_artifacts, recorded_artifact,
};
pub use state_db::unproven::Unproven;
pub use state_db::upkeep::{
    AbsentArtifact, ComparedTable, NOTE_VANISHED, Replacement, Retirement, Vanished,
};
pub use state_db::working_lock::{Holder, Lock, Turn, Watch};

pub use triggers::{silence_triggers, wake_triggers, wake_triggers_as_in};

/// Names of the PostgreSQL client that the rooms above may use. They use no other ones.
pub use tokio_postgres::{Row as RawRow, Statement, error::SqlState, types::ToSql};
