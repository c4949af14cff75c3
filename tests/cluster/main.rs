//! One side: connections, sessions, PostgreSQL as others have set it up, stores as they answer, and what is prepared on the primary.

mod foreign_databases;
mod foreign_settings;
mod hostile_primary;
mod poolers;
mod prepare;
mod primary_unharmed;
mod sessions;
mod sessions_held;
mod slow_lines;
mod state_formats;
mod store;
mod store_faults;
mod store_proxy;
mod store_rules;
mod tls;
mod versions;
