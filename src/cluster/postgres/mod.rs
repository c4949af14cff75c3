//! PostgreSQL: connections, sessions, rows, the replication protocol, the client programs.

pub(super) mod applying;
pub(super) mod as_client;
pub(super) mod cancelling;
pub(super) mod channel;
pub(super) mod clients;
pub(super) mod datastore;
pub(super) mod datastore_error;
pub(super) mod footprint;
pub(super) mod libpq;
pub(super) mod login;
pub(super) mod maintenance;
pub(super) mod per_server;
pub(super) mod room;
pub(super) mod rows;
pub(super) mod session;
pub(super) mod timeline;
pub(super) mod tls;
pub(super) mod toc;
pub(super) mod walsender;
pub(super) mod words;
