//! A stand-in for the PostgreSQL server of a provider.
//!
//! It is a real server whose superuser belongs to the provider. Builder's user `hab` has what the
//! provider gives to its administrator: the right to create databases and roles, membership in
//! `pg_monitor` and `pg_signal_backend`, and the right to replicate. It has no `ALTER SYSTEM` and
//! no files, and it cannot end the provider's sessions.
//!
//! Not imitated: Amazon's right to replicate by membership in `rds_replication` alone. A stock
//! server asks for the attribute of the role.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::service::SOON;
use super::{Postgres, Result, postgres, wait_until};

/// Duration of a visit of the provider in Builder's database, and the pause between two.
const VISIT: Duration = Duration::from_secs(2);
const VISIT_PAUSE: Duration = Duration::from_secs(8);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    Rds,
    CloudSql,
    Azure,
}

/// A provider's server, as it is imitated.
#[derive(Debug, Clone, Copy)]
pub struct Managed {
    pub provider: Provider,
    /// False: nobody but the provider may set `session_replication_role`, as on Cloud SQL.
    pub may_apply: bool,
    /// False: the role has not been given the right to replicate yet.
    pub may_replicate: bool,
    /// False: the provider's parameters are as they come.
    pub logical: bool,
}

impl Managed {
    pub fn of(provider: Provider) -> Self {
        Managed {
            provider,
            may_apply: provider != Provider::CloudSql,
            may_replicate: true,
            logical: true,
        }
    }

    pub fn server(self) -> postgres::Builder {
        Postgres::builder().managed(self)
    }

    /// Returns the lines of `postgresql.conf`: the parameters that the provider's console sets, and
    /// a setting by which the provider is known.
    pub(super) fn parameters(&self) -> String {
        let known_by = match self.provider {
            Provider::Rds => "rds.extensions = 'intarray, plpgsql'",
            Provider::CloudSql => "cloudsql.iam_authentication = off",
            Provider::Azure => "azure.extensions = 'INTARRAY'",
        };
        match self.logical {
            true => format!("{known_by}\n{}", self.console()),
            false => format!("{known_by}\n"),
        }
    }

    /// Returns the parameters that an operator sets in the provider's console for the stream.
    pub fn console(&self) -> &'static str {
        match self.provider {
            // Cloud SQL cannot bound the log.
            Provider::CloudSql => "wal_level = logical\n",
            Provider::Rds | Provider::Azure => {
                "wal_level = logical\nmax_slot_wal_keep_size = 2GB\n"
            }
        }
    }

    /// Returns the statements that make the roles, one a line.
    pub(super) fn roles(&self, password: &str) -> String {
        let (superuser, administrators) = (self.superuser(), self.administrators());
        let replicate = if self.may_replicate {
            "REPLICATION"
        } else {
            "NOREPLICATION"
        };
        let mut statements = vec![
            // ALTER ROLE does not rename the role of the session.
            format!("UPDATE pg_authid SET rolname = '{superuser}' WHERE oid = 10"),
            format!("ALTER ROLE {superuser} PASSWORD '{password}'"),
            format!("CREATE ROLE {administrators}"),
            format!("CREATE ROLE hab LOGIN CREATEDB CREATEROLE {replicate} PASSWORD '{password}'"),
            format!("GRANT pg_monitor, pg_signal_backend TO {administrators} WITH ADMIN OPTION"),
            format!("GRANT {administrators} TO hab"),
            format!("CREATE DATABASE {}", self.own_database()),
        ];
        if self.provider == Provider::Rds {
            statements.push("CREATE ROLE rds_replication".into());
            statements.push("GRANT rds_replication TO hab WITH ADMIN OPTION".into());
        }
        if self.may_apply {
            statements.push(format!(
                "GRANT SET ON PARAMETER session_replication_role TO {administrators}"
            ));
        }
        statements.join("\n") + "\n"
    }

    pub fn superuser(&self) -> &'static str {
        match self.provider {
            Provider::Rds => "rdsadmin",
            Provider::CloudSql => "cloudsqladmin",
            Provider::Azure => "azuresu",
        }
    }

    fn administrators(&self) -> &'static str {
        match self.provider {
            Provider::Rds => "rds_superuser",
            Provider::CloudSql => "cloudsqlsuperuser",
            Provider::Azure => "azure_pg_admin",
        }
    }

    /// Returns the database in which the provider's own session stays.
    fn own_database(&self) -> &'static str {
        match self.provider {
            Provider::Rds => "rdsadmin",
            Provider::CloudSql => "cloudsqladmin",
            Provider::Azure => "azure_maintenance",
        }
    }
}

impl Postgres {
    /// Opens a session of the provider's superuser.
    pub async fn as_provider(&self, database: &str) -> Result<Client> {
        let managed = self.managed.expect("it is a provider's server");
        self.conn_as(managed.superuser(), database, "provider")
            .await
    }
}

/// The provider's sessions on a server: one that stays in the provider's own database, and one that
/// visits Builder's database again and again. They end when this is dropped.
pub struct Visitor {
    visits: Arc<AtomicU64>,
    tasks: [JoinHandle<()>; 2],
}

impl Visitor {
    pub async fn start(server: &Arc<Postgres>) -> Result<Visitor> {
        let managed = server.managed.expect("it is a provider's server");
        let own = managed.own_database();
        let stays = server.clone();
        let stays = tokio::spawn(async move {
            loop {
                if let Ok(client) = stays.as_provider(own).await {
                    let _ = client.batch_execute("SELECT pg_sleep(3600)").await;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        let visits = Arc::new(AtomicU64::new(0));
        let (visiting, counted) = (server.clone(), visits.clone());
        let visits_builder = tokio::spawn(async move {
            loop {
                let sleep = format!("SELECT pg_sleep({})", VISIT.as_secs());
                match visiting.as_provider("builder").await {
                    Ok(client) => {
                        counted.fetch_add(1, Ordering::Relaxed);
                        let _ = client.batch_execute(&sleep).await;
                        drop(client);
                        tokio::time::sleep(VISIT_PAUSE).await;
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        Ok(Visitor {
            visits,
            tasks: [stays, visits_builder],
        })
    }

    /// Waits until a visit begins.
    pub async fn until_inside(&self) {
        let before = self.visits.load(Ordering::Relaxed);
        wait_until("the provider visits", SOON, || async {
            match self.visits.load(Ordering::Relaxed) {
                now if now > before => Ok(()),
                _ => Err("not yet".into()),
            }
        })
        .await;
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
