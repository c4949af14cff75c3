//! Builder's key pairs as files, and what Builder seals with them.

use std::fs;
use std::path::Path;

use base64::prelude::{BASE64_STANDARD, Engine};
use crypto_box::aead::Aead;
use crypto_box::{SalsaBox, SecretKey};
use rand::Rng;

use super::{Cluster, Result};

pub struct BuilderKey {
    pub revision: String,
    secret: SecretKey,
}

impl BuilderKey {
    pub fn new(revision: &str) -> Self {
        Self {
            revision: revision.into(),
            secret: SecretKey::from_bytes(rand::rng().random()),
        }
    }

    /// Writes both halves.
    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let public = self.secret.public_key();
        let halves: [(&str, &str, &[u8]); 2] = [
            ("box.key", "BOX-SEC-1", &self.secret.to_bytes()),
            ("pub", "BOX-PUB-1", public.as_bytes()),
        ];
        for (ending, format, key) in halves {
            let name = format!("bldr-{}", self.revision);
            let text = format!("{format}\n{name}\n\n{}\n", BASE64_STANDARD.encode(key));
            fs::write(directory.join(format!("{name}.{ending}")), text)?;
        }
        Ok(())
    }

    pub fn remove(&self, directory: &Path) -> Result<()> {
        for ending in ["box.key", "pub"] {
            fs::remove_file(directory.join(format!("bldr-{}.{ending}", self.revision)))?;
        }
        Ok(())
    }

    /// Seals a text as Builder stores it: from itself to itself.
    pub fn seal(&self, content: &str) -> String {
        let nonce: [u8; 24] = rand::rng().random();
        let to_itself = SalsaBox::new(&self.secret.public_key(), &self.secret);
        let sealed = to_itself.encrypt(&nonce.into(), content.as_bytes());
        let name = format!("bldr-{}", self.revision);
        format!(
            "BOX-1\n{name}\n{name}\n{}\n{}",
            BASE64_STANDARD.encode(nonce),
            BASE64_STANDARD.encode(sealed.expect("it is sealed"))
        )
    }

    /// Seals every origin's secret key, and one access token, as if they had always been sealed by
    /// this key.
    pub async fn seal_all(&self, cluster: &Cluster) -> Result<()> {
        self.seal_in(&cluster.conn().await?).await
    }

    /// Does the same in Builder's database, over this session.
    pub async fn seal_in(&self, client: &tokio_postgres::Client) -> Result<()> {
        let sql = "UPDATE origin_secret_keys SET body = $1, encryption_key_rev = $2";
        client
            .execute(sql, &[&self.seal("a secret key"), &self.revision])
            .await?;
        let token = format!("_{}", BASE64_STANDARD.encode(self.seal("a token")));
        let sql = "INSERT INTO account_tokens (account_id, token) SELECT id, $1 FROM accounts LIMIT 1 \
                   ON CONFLICT (account_id) DO UPDATE SET token = excluded.token";
        client.execute(sql, &[&token]).await?;
        Ok(())
    }
}
