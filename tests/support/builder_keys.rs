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

    /// Makes an access token of that account that never expires.
    pub fn token(&self, account: i64) -> String {
        // Three numbers in protocol buffers: the account, its privileges, and the end of the token's life.
        let mut content = vec![0x08];
        varint(account as u64, &mut content);
        content.extend([0x10, 0x00, 0x18]);
        varint(NEVER_EXPIRES, &mut content);
        format!("_{}", BASE64_STANDARD.encode(self.seal_bytes(&content)))
    }

    /// Seals a text as Builder stores it: from itself to itself.
    pub fn seal(&self, content: &str) -> String {
        self.seal_bytes(content.as_bytes())
    }

    fn seal_bytes(&self, content: &[u8]) -> String {
        let nonce: [u8; 24] = rand::rng().random();
        let to_itself = SalsaBox::new(&self.secret.public_key(), &self.secret);
        let sealed = to_itself.encrypt(&nonce.into(), content);
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
        let sql = "SELECT id FROM accounts ORDER BY id LIMIT 1";
        let account: i64 = client.query_one(sql, &[]).await?.get(0);
        let sql = "INSERT INTO account_tokens (account_id, token) VALUES ($1, $2) \
                   ON CONFLICT (account_id) DO UPDATE SET token = excluded.token";
        client
            .execute(sql, &[&account, &self.token(account)])
            .await?;
        Ok(())
    }
}

/// The time that Builder writes into a token which never expires, in seconds since 1970.
const NEVER_EXPIRES: u64 = 8_210_298_326_400;

fn varint(mut number: u64, into: &mut Vec<u8>) {
    while number >= 0x80 {
        into.push(number as u8 | 0x80);
        number >>= 7;
    }
    into.push(number as u8);
}
