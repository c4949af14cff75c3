//! Following: the primary's transactions, in commit order, from logical decoding to the spare's rows.

pub mod pgoutput;
pub mod spool;
