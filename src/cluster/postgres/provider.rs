//! Recognises a server that a provider manages: its administrator is no superuser, its settings are
//! the provider's parameters, and the provider has sessions that nobody else may end.

use super::session::Session;
use crate::cluster::postgres::datastore_error::DatastoreError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    Amazon,
    Google,
    Azure,
}

/// The superusers of the providers. Their sessions are the provider's own work on the server.
pub(in crate::cluster) const SUPERUSERS: [&str; 5] = [
    "rdsadmin",
    "cloudsqladmin",
    "cloudsqlagent",
    "azuresu",
    "azure_superuser",
];

/// A provider's server has settings with the provider's prefix. Settings that no module has defined
/// are not listed, so a few are asked for by name.
const KNOWN_BY: &str = "
SELECT split_part(name, '.', 1) FROM pg_settings WHERE name ~ '^(rds|cloudsql|azure)[.]'
UNION ALL
SELECT split_part(name, '.', 1) FROM unnest(ARRAY['rds.extensions', 'rds.logical_replication', 'cloudsql.iam_authentication',
  'cloudsql.logical_decoding', 'azure.extensions']) name WHERE current_setting(name, true) <> ''
LIMIT 1";

/// SQL: whether our user may not end session `a` of `pg_stat_activity`, and a provider's superuser
/// owns the session. `$n` are [`SUPERUSERS`].
macro_rules! is_providers_own {
    ($roles:literal) => {
        concat!(
            "(EXISTS (SELECT FROM pg_roles r WHERE r.oid = a.usesysid AND r.rolsuper AND r.rolname = ANY (",
            $roles,
            ")) AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user))"
        )
    };
}
pub(in crate::cluster) use is_providers_own;

impl Provider {
    pub fn name(self) -> &'static str {
        match self {
            Provider::Amazon => "Amazon RDS or Aurora",
            Provider::Google => "Google Cloud SQL",
            Provider::Azure => "Azure Database for PostgreSQL",
        }
    }

    /// Returns the provider whose settings have this prefix.
    fn of_prefix(prefix: &str) -> Option<Provider> {
        match prefix {
            "rds" => Some(Provider::Amazon),
            "cloudsql" => Some(Provider::Google),
            "azure" => Some(Provider::Azure),
            _ => None,
        }
    }
}

impl Session {
    /// Returns the provider that manages the session's server. None: it is not a known provider's.
    pub async fn provider(&self) -> Result<Option<Provider>, DatastoreError> {
        let doing = "asking whose server it is";
        let rows = self.rows(doing, KNOWN_BY, &[]).await?;
        let prefix = rows.first().map(|row| row.get::<String>(0)).transpose()?;
        Ok(prefix.and_then(|prefix| Provider::of_prefix(&prefix)))
    }

    /// Returns the extensions that the provider lets its users create, in lower case. None: it sets
    /// no limit.
    pub async fn allowed_extensions(&self) -> Result<Option<Vec<String>>, DatastoreError> {
        let sql = "SELECT lower(concat_ws(',', current_setting('azure.extensions', true), \
                     current_setting('rds.allowed_extensions', true)))";
        let doing = "reading which extensions the provider allows";
        let text: String = self.row(doing, sql, &[]).await?.get(0)?;
        let names = text.split(',').map(|name| name.trim().to_string());
        let names: Vec<String> = names.filter(|name| !name.is_empty()).collect();
        let unlimited = names.is_empty() || names.iter().any(|name| name == "*");
        Ok((!unlimited).then_some(names))
    }
}
