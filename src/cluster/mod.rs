//! One side: its datastore (PostgreSQL), its artifact store (S3), and the state that we keep there.
//!
//! `postgres` and `s3` connect to servers. `state_db` owns database `warm_spare`. `fence` sets and
//! proves the fence. `preparation` changes the primary for the stream. Nothing above this room
//! names MinIO or PostgreSQL's wire protocol. The peer is read-only by type: [`PeerSession`](crate::cluster::PeerSession) has no
//! way to write, and its transactions are read-only for the server too.

mod builder_keys;
mod fence;
mod identity;
mod postgres;
pub mod preparation;
mod s3;
mod state_db;

pub use builder_keys::{BuilderKeyError, BuilderKeys, sealed_by};
pub(crate) use fence::local::fenced;
pub use fence::local::{
    FenceError, clear_out, end_sessions, enforce_fence, exempt_role, is_fenced, prove_fence,
    raise_fence, set_fence,
};
pub use fence::peer_fence::{PeerFence, RaiseError};
pub use fence::rehearsal::lift_and_write;
pub use identity::{IdentityError, differ_in_bucket, differ_in_server, system_id};
pub use postgres::applying::{Applying, TextValue, TextValues, end_former_writers};
pub use postgres::as_client::{AsClient, as_client};
pub use postgres::cancelling::last_words;
pub(crate) use postgres::channel::{is_loopback, is_verified};
pub use postgres::clients::{ClientPrograms, InstalledClients, ProgramError};
pub use postgres::datastore_error::{DatastoreError, DatastoreFault};
pub use postgres::footprint::{Footprint, footprint};
pub use postgres::room::make_room;
pub use postgres::rows::Row;
pub(crate) use postgres::session::pipe;
pub use postgres::session::{
    CopyIn, CopyRows, LocalSession, PeerSession, Session, Snapshot, quote_ident, quote_literal,
};
pub(crate) use postgres::timeline::timeline;
pub use postgres::walsender::{Arrived, NewSlot, TextRows, WalSession, WalStream};
pub use s3::probe::{Keeps, prove_writable};
pub use s3::store::download::Download;
pub use s3::store::object::{Expected, Listed, Stored};
pub use s3::store::{Completion, LocalStore, Store, Upload};
pub use s3::store_error::{StoreError, StoreFault};
pub use s3::throttle::{ByteBudget, Throttle};
pub use state_db::history::{Confirmation, DrillRecord, Event, VerificationRecord};
pub use state_db::lineage::{Descent, Lineage, record_lineage};
pub use state_db::roles::{EPOCH_STEP_MAX, FenceRecord, Promotion, Record, peers_record};
pub use state_db::state::DATABASE as STATE_DATABASE;
pub use state_db::state::{
    Artifact, ClusterRecord, CopiedPoint, Generation, State, StateError, TableContent,
    record_artifacts,
};
pub use state_db::upkeep::{
    AbsentArtifact, ComparedTable, NOTE_VANISHED, Replacement, Retirement, Vanished,
};
pub use state_db::working_lock::{Holder, Lock, Watch};

/// Names of the PostgreSQL client that the rooms above may use. They use no other ones.
pub use tokio_postgres::{Row as RawRow, Statement, error::SqlState, types::ToSql};
