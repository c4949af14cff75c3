//! The arrangements of docs/topologies.md, each from the first copy to the way back.

mod attached;
mod external;
mod place;
mod shared;
