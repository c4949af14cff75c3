//! The arrangements of docs/topologies.md, each from the first copy to the way back.

mod external;
mod managed;
mod place;
