//! The arrangements of docs/topologies, each from the first copy to the way back.

mod attached;
mod external;
mod managed;
mod place;
mod push;
mod shared;
mod unproven;
