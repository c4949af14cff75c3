//! The archive: generations made, restored by hand and by the program, proved, pruned, and killed.

mod buckets;
mod damage;
mod kill9;
mod place;
mod retention;
mod service;
mod whole;
mod writers;
