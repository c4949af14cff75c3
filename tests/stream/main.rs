//! Following the primary's transactions: kinds of changes, gate, resumption, bounds, schema, slots.

mod bounds;
mod gate;
mod harm;
mod keys;
mod kinds;
mod mode;
mod order;
mod pgoutput;
mod refusals;
mod resume;
mod schema;
mod slots;
mod turns;
mod whole;
