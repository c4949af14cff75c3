//! What users see behind nginx and HAProxy, with the files of `docs/balancer`.

mod rules;
mod switchovers;
mod upgrade;
