//! Keeps a spare cluster of Habitat Builder at a checked point of the primary's history.
//!
//! The map, from the ground up; a room knows only those above it in this list.

/// One side: datastore, artifact store, and what we keep there ourselves.
pub mod cluster;
/// One file for each verb of the command line.
pub mod command;
/// The configuration: one TOML file, every key checked and named in its error.
pub mod config;
/// The words of the field as types: role, epoch, step, position in the log, codes.
pub mod domain;
/// Where a test may have the process killed.
pub mod killpoint;
/// What is known of a running service, and how it is shown: status, health, metrics, HTTP.
pub mod observe;
/// What Builder means by a package: ident, target, object key, checksum, `.hart` header and signature.
pub mod package;
/// The baseline: artifacts before rows, at one snapshot, behind a fuse, made visible in one transaction.
pub mod replication;
/// What a cluster is, and how it becomes another: epoch, handover, failback, preflight, divergence, drill.
pub mod role;
/// The service: role and lock, what is due when, the guard of the fence, the configuration in force.
pub mod service;
/// Compares what the spare has with what the primary sent.
pub mod verify;
