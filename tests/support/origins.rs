//! The other transactions of Builder: origins with all rows that depend on them, and any text that
//! a user may type.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rand::{Rng, RngCore};
use tokio_postgres::Client;

use super::Result;
use super::packages::account;
use super::transactions::{Deed, Hand, Row, begin};

impl Hand {
    pub(super) async fn create_origin(&mut self, client: &Client) -> Result<()> {
        let name = format!("{}-t{}", self.name, self.count);
        begin(client).await?;
        let owner = account(client, &self.name).await?;
        let member = account(client, &format!("{}-m0", self.name)).await?;
        self.factory
            .origin_rows(client, &name, owner, member)
            .await?;
        self.commit(client, &format!("origin {name}")).await
    }

    pub(super) async fn transfer_origin(&mut self, client: &Client) -> Result<()> {
        let origin = self.some_origin(client).await?;
        begin(client).await?;
        let to = account(
            client,
            &format!("{}-m{}", self.name, self.rng.random_range(0..4)),
        )
        .await?;
        for statement in [
            "UPDATE origins SET owner_id = $2, updated_at = now() WHERE name = $1",
            "UPDATE origin_members SET member_role = 'maintainer', updated_at = now() WHERE origin = $1 AND member_role = 'owner' AND account_id <> $2",
            "INSERT INTO origin_members (origin, account_id, member_role) VALUES ($1, $2, 'owner')
             ON CONFLICT (origin, account_id) DO UPDATE SET member_role = 'owner', updated_at = now()",
            "INSERT INTO audit_origin (operation, target_object, origin, requester_id, requester_name) VALUES ('owner_transfer', $1, $1, $2, $1)",
        ] {
            client.execute(statement, &[&origin, &to]).await?;
        }
        self.commit(client, &format!("transfer of {origin}")).await
    }

    /// Deletes an origin with all its children, of every table, and their artifacts.
    pub(super) async fn delete_origin(&mut self, client: &Client) -> Result<()> {
        let origin = self.some_origin(client).await?;
        if origin == self.name {
            return Ok(());
        }
        let keys: Vec<String> = self
            .rows(client)
            .await?
            .iter()
            .filter(|row| row.origin == origin)
            .map(Row::key)
            .collect();
        begin(client).await?;
        for statement in [
            "DELETE FROM origin_channels WHERE origin = $1",
            "DELETE FROM origin_packages WHERE origin = $1",
            "DELETE FROM origin_members WHERE origin = $1",
            "DELETE FROM origin_invitations WHERE origin = $1",
            "DELETE FROM origin_package_settings WHERE origin = $1",
            "DELETE FROM origin_projects WHERE origin = $1",
            "DELETE FROM origin_integrations WHERE origin = $1",
            "DELETE FROM origin_public_keys WHERE origin = $1",
            "DELETE FROM origin_secret_keys WHERE origin = $1",
            "DELETE FROM origin_public_encryption_keys WHERE origin = $1",
            "DELETE FROM origin_private_encryption_keys WHERE origin = $1",
            "DELETE FROM origin_secrets WHERE origin = $1",
            "DELETE FROM origins WHERE name = $1",
            "INSERT INTO audit_origin (operation, target_object, origin, requester_id, requester_name) VALUES ('origin_delete', $1, $1, 1, $1)",
        ] {
            client.execute(statement, &[&origin]).await?;
        }
        for key in keys {
            self.take_object_away(&key).await?;
        }
        self.commit(client, &format!("deletion of origin {origin}"))
            .await
    }

    pub(super) async fn members(&mut self, client: &Client, deed: Deed) -> Result<()> {
        let origin = self.some_origin(client).await?;
        begin(client).await?;
        let name = format!("{}-m{}", self.name, self.rng.random_range(0..4));
        let whom = account(client, &name).await?;
        let statement = match deed {
            Deed::MemberJoin => {
                "INSERT INTO origin_members (origin, account_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
            }
            Deed::MemberRole => {
                "UPDATE origin_members SET updated_at = now(), member_role =
                 CASE member_role WHEN 'maintainer' THEN 'administrator'::origin_member_role ELSE 'maintainer' END
                 WHERE origin = $1 AND account_id = $2"
            }
            _ => "DELETE FROM origin_members WHERE origin = $1 AND account_id = $2",
        };
        client.execute(statement, &[&origin, &whom]).await?;
        self.commit(client, &format!("{deed:?} {name} in {origin}"))
            .await
    }

    pub(super) async fn settings(&mut self, client: &Client) -> Result<()> {
        let origin = self.some_origin(client).await?;
        let statement = match self.rng.random_ratio(1, 3) {
            true => "DELETE FROM origin_package_settings WHERE origin = $1 AND name = $2",
            false => {
                "INSERT INTO origin_package_settings (origin, name, visibility, owner_id)
                 SELECT $1, $2, 'private', owner_id FROM origins WHERE name = $1
                 ON CONFLICT (origin, name) DO UPDATE SET hidden = NOT origin_package_settings.hidden, updated_at = now()"
            }
        };
        let name = ["redis", "zlib"][self.rng.random_range(0..2)];
        begin(client).await?;
        client.execute(statement, &[&origin, &name]).await?;
        let seen = "UPDATE origins SET default_package_visibility = 'private', updated_at = now() WHERE name = $1";
        client.execute(seen, &[&origin]).await?;
        self.commit(client, &format!("settings of {origin}")).await
    }

    pub(super) async fn secrets(&mut self, client: &Client) -> Result<()> {
        let origin = self.some_origin(client).await?;
        let (value, full_name) = (self.odd(), format!("{origin}-{}", self.count));
        begin(client).await?;
        let statement = match self.rng.random_ratio(1, 3) {
            true => "DELETE FROM origin_secrets WHERE origin = $1 AND value = $2",
            false => {
                "INSERT INTO origin_secrets (owner_id, name, value, origin)
                      SELECT owner_id, 'secret ' || length($2::text), $2, name FROM origins WHERE name = $1
                      ON CONFLICT (origin, name) DO UPDATE SET value = excluded.value, updated_at = now()"
            }
        };
        client.execute(statement, &[&origin, &value]).await?;
        let key =
            "INSERT INTO origin_public_keys (owner_id, name, revision, full_name, body, origin)
                   VALUES (NULL, $1, NULL, $2, $3, $1)";
        let mut public = [0; 32];
        self.rng.fill_bytes(&mut public);
        let body = format!("SIG-PUB-1\n{full_name}\n\n{}", BASE64.encode(public));
        client.execute(key, &[&origin, &full_name, &body]).await?;
        self.commit(client, &format!("secrets of {origin}")).await
    }

    pub(super) async fn odd_text(&mut self, client: &Client) -> Result<()> {
        let origin = self.some_origin(client).await?;
        let (odd, other) = (self.odd(), self.odd());
        let name = format!("{} {}", self.name, self.count);
        begin(client).await?;
        let owner = account(client, &self.name).await?;
        let address =
            "UPDATE accounts SET email = $2, updated_at = clock_timestamp() WHERE id = $1";
        client.execute(address, &[&owner, &odd]).await?;
        let project = "INSERT INTO origin_projects (owner_id, origin, package_name, name, plan_path, vcs_type, vcs_data)
                       VALUES ($1, $2, $3, $4, $5, NULL, $3) RETURNING id";
        let project: i64 = client
            .query_one(project, &[&owner, &origin, &odd, &name, &other])
            .await?
            .get(0);
        let integration = "INSERT INTO origin_integrations (origin, integration, name, body) VALUES ($1, 'docker', $2, $3) RETURNING id";
        let integration: i64 = client
            .query_one(integration, &[&origin, &name, &other])
            .await?
            .get(0);
        let both = "INSERT INTO origin_project_integrations (origin, body, project_id, integration_id) VALUES ($1, $2, $3, $4)";
        client
            .execute(both, &[&origin, &odd, &project, &integration])
            .await?;
        let token = "INSERT INTO account_tokens (account_id, token) VALUES ($1, $2)
                     ON CONFLICT (account_id) DO UPDATE SET token = excluded.token";
        client.execute(token, &[&owner, &name]).await?;
        let invited = "INSERT INTO origin_invitations (origin, account_id, account_name, owner_id) VALUES ($1, $2, $3, NULL)
                       ON CONFLICT (origin, account_id) DO UPDATE SET ignored = NOT origin_invitations.ignored";
        client.execute(invited, &[&origin, &owner, &odd]).await?;
        if self.rng.random_bool(0.5) {
            let gone = "DELETE FROM origin_projects WHERE id = $1";
            client.execute(gone, &[&project]).await?;
        }
        // Two identical rows, in a table without a key.
        let twins =
            "INSERT INTO audit_package (operation, trigger, requester_name, origin, package_ident)
                     SELECT 'demote', 'unknown', $1, NULL, $2 FROM generate_series(1, 2)";
        client.execute(twins, &[&odd, &other]).await?;
        self.commit(client, "odd texts").await
    }
}
