//! One side: its datastore (PostgreSQL), its artifact store (S3), and what we keep there ourselves.
//!
//! Nothing above this room knows MinIO or PostgreSQL's wire by name. The peer is read-only by type:
//! [`PeerSession`] has no way to write, and its transactions are read-only for the server too.

mod applying;
mod as_client;
mod builder_keys;
mod cancelling;
mod channel;
mod clients;
mod datastore;
mod fence;
mod fence_record;
mod footprint;
mod history;
mod identity;
mod libpq;
mod lineage;
mod login;
mod maintenance;
mod peer_fence;
mod per_server;
pub mod preparation;
mod probe;
mod rehearsal;
mod roles;
mod room;
mod rows;
mod session;
mod state;
mod store;
mod store_error;
mod throttle;
mod timeline;
mod tls;
mod toc;
mod upkeep;
mod walsender;
mod words;
mod working_lock;

pub use applying::{Applying, TextValue, TextValues, end_former_writers};
pub use as_client::{AsClient, as_client};
pub use builder_keys::{BuilderKeyError, BuilderKeys, sealed_by};
pub use cancelling::last_words;
pub(crate) use channel::{is_loopback, is_verified};
pub use clients::{ClientPrograms, InstalledClients, ProgramError};
pub use datastore::{DatastoreError, DatastoreFault};
pub(crate) use fence::fenced;
pub use fence::{
    FenceError, clear_out, end_sessions, enforce_fence, exempt_role, is_fenced, prove_fence,
    raise_fence, set_fence,
};
pub use footprint::{Footprint, footprint};
pub use history::{Confirmation, DrillRecord, Event, VerificationRecord};
pub use identity::{IdentityError, differ_in_bucket, differ_in_server, system_id};
pub use lineage::{Descent, Lineage, record_lineage};
pub use peer_fence::{PeerFence, RaiseError};
pub use probe::{Keeps, prove_writable};
pub use rehearsal::lift_and_write;
pub use roles::{EPOCH_STEP_MAX, FenceRecord, Promotion, Record, peers_record};
pub use room::make_room;
pub use rows::Row;
pub(crate) use session::pipe;
pub use session::{
    CopyIn, CopyRows, LocalSession, PeerSession, Session, Snapshot, quote_ident, quote_literal,
};
pub use state::DATABASE as STATE_DATABASE;
pub use state::{
    Artifact, ClusterRecord, CopiedPoint, Generation, State, StateError, TableContent,
    record_artifacts,
};
pub use store::{Completion, Download, Expected, Listed, LocalStore, Store, Stored, Upload};
pub use store_error::{StoreError, StoreFault};
pub use throttle::{ByteBudget, Throttle};
pub(crate) use timeline::timeline;
pub use upkeep::{AbsentArtifact, ComparedTable, NOTE_VANISHED, Replacement, Retirement, Vanished};
pub use walsender::{Arrived, NewSlot, TextRows, WalSession, WalStream};
pub use working_lock::{Holder, Lock, Watch};
