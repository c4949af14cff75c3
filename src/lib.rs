//! Keeps a spare cluster of Habitat Builder at a checked point of the primary's history.
//!
//! At each moment the spare equals the primary at one commit, and each package row has its
//! artifact, byte for byte. One word of the configuration makes the spare the primary.
//!
//! # Data flow
//!
//! 1. [`replication::sync`] makes the first full copy at one snapshot of the primary: artifacts first,
//!    then rows, into a database of its own. One transaction makes that database visible.
//! 2. [`replication::stream`] follows: it reads each transaction from a replication slot, brings the
//!    artifacts that its rows name, and commits the rows together with the new recovery point.
//! 3. [`role`] changes which cluster is the primary: it fences the old primary, brings the rest of its
//!    transactions, and promotes the spare in one commit.
//!
//! # Rooms
//!
//! The modules below stand in this order, from the ground up. A room uses only rooms above it in
//! this list, and only [`cluster`] names the clients of PostgreSQL and S3.
//! `tests/house/architecture.rs` checks both. `docs/architecture.md` is the map, with entry points
//! and invariants.
#![forbid(unsafe_code)]

/// Words of the field as types, without I/O: role, step, position in the log, codes.
pub mod domain;

/// The configuration: one TOML file, each key checked and named in its error.
pub mod config;

/// Builder's packages: ident, target, object key, checksum, `.hart` header and signature.
pub mod package;

/// One side: its datastore, its artifact store, and the state that warm-spare keeps there.
pub mod cluster;

/// The state of a running service and its readers: status, health, metrics, HTTP.
pub mod observe;

/// The full copy and the stream: artifacts before rows, at a point that the primary really had.
pub mod replication;

/// Compares the spare with the rows and artifacts that the primary sent.
pub mod verify;

/// Generations of the whole Builder in a directory or a bucket: made, listed, proved, restored.
pub mod archive;

/// The role of a cluster and its changes: handover, failback, preflight, divergence, drill.
pub mod role;

/// The process that runs for good: lock, schedule, guard of the fence, configuration in force.
pub mod service;

/// One file for each verb of the command line.
pub mod command;

/// Points at which a test kills a debug build.
pub mod killpoint;
