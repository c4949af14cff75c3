//! The timeline that a server writes on.

/// SQL: the timeline that the server writes on; NULL if it is in recovery and writes on none. The
/// control file names the timeline of the last checkpoint, which after a promotion is the old one
/// for minutes.
macro_rules! timeline {
    () => {
        "CASE WHEN NOT pg_is_in_recovery() THEN \
         ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int4 END"
    };
}
pub(crate) use timeline;
