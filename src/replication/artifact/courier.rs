//! Copies one artifact as a stream. It is hashed on the way, and becomes visible only if checksum
//! and length are right.

use crate::cluster::{
    ByteBudget, Completion, Download, Expected, LocalCluster, LocalStore, PeerCluster, Store,
    StoreError, StoreFault, Stored, Throttle,
};
use crate::config::Config;
use crate::package::{Checksum, Hasher};
use bytes::{Bytes, BytesMut};

/// Bytes of a part, and maximum number of parts. S3's minimum for a part is 5 MiB, its maximum
/// number of parts 10,000.
const PART_BYTES: u64 = 8 << 20;
const MAX_PARTS: u64 = 9_000;

#[derive(Clone)]
pub struct Courier {
    pub peer: Store,
    pub local: LocalStore,
    pub budget: ByteBudget,
    pub throttle: Throttle,
}

/// The result of a copy. Only [`Delivery::Done`] left an object under the key.
#[derive(Debug)]
pub enum Delivery {
    Done(Stored),
    /// The source serves the bucket and has no such key.
    Missing,
    /// A complete body of another checksum, twice.
    Damaged(Checksum),
}

impl Courier {
    /// Opens a courier between the two configured buckets. None: the objects of the local bucket
    /// are not ours to write.
    pub fn open(config: &Config, throttle: &Throttle) -> Result<Option<Courier>, StoreError> {
        let local = LocalCluster::of(config).own_store()?;
        Courier::between(config, local, throttle)
    }

    /// Opens a courier for artifacts that nobody else brings. None: they are not to be copied.
    pub(super) fn to_fill(
        config: &Config,
        throttle: &Throttle,
    ) -> Result<Option<Courier>, StoreError> {
        let local = LocalCluster::of(config).store_to_fill()?;
        Courier::between(config, local, throttle)
    }

    /// Opens a courier within one bucket.
    pub(super) fn within(config: &Config, local: LocalStore, throttle: &Throttle) -> Courier {
        Courier {
            peer: local.reading().clone(),
            local,
            budget: ByteBudget::new(config.replication.buffer),
            throttle: throttle.clone(),
        }
    }

    fn between(
        config: &Config,
        local: Option<LocalStore>,
        throttle: &Throttle,
    ) -> Result<Option<Courier>, StoreError> {
        let Some(local) = local else {
            return Ok(None);
        };
        Ok(Some(Courier {
            peer: PeerCluster::of(config).store()?,
            local,
            budget: ByteBudget::new(config.replication.buffer),
            throttle: throttle.clone(),
        }))
    }

    /// Copies `key` from the peer to `to` in the local bucket.
    pub async fn fetch(
        &self,
        key: &str,
        to: &str,
        checksum: &Checksum,
    ) -> Result<Delivery, StoreError> {
        self.fetch_as_found(key, to, checksum, &Expected::Anything)
            .await
    }

    /// Copies like `fetch`, but `expected` must be the present object under `to`.
    pub async fn fetch_as_found(
        &self,
        key: &str,
        to: &str,
        checksum: &Checksum,
        expected: &Expected,
    ) -> Result<Delivery, StoreError> {
        self.copy(&self.peer, key, to, checksum, expected).await
    }

    /// Copies within the local bucket through this process, so that the stored bytes are the ones
    /// that were checked.
    pub async fn move_within(
        &self,
        from: &str,
        to: &str,
        checksum: &Checksum,
        expected: &Expected,
    ) -> Result<Delivery, StoreError> {
        let local = self.local.reading();
        self.copy(local, from, to, checksum, expected).await
    }

    /// Reads and hashes an object of the local bucket. None: it does not exist.
    pub async fn hash_local(&self, key: &str) -> Result<Option<(Checksum, Stored)>, StoreError> {
        hash(self.local.reading(), key, None).await
    }

    async fn copy(
        &self,
        from: &Store,
        key: &str,
        to: &str,
        checksum: &Checksum,
        expected: &Expected,
    ) -> Result<Delivery, StoreError> {
        let mut damaged = None;
        for _ in 0..2 {
            // Memory is reserved first, because a server gives up a body that is opened and not
            // read.
            let room = self.budget.room(PART_BYTES).await;
            let Some(body) = from.get(key).await? else {
                return Ok(Delivery::Missing);
            };
            let sent = if body.stored.bytes <= PART_BYTES {
                self.send_whole(body, to, checksum, expected).await?
            } else {
                // The memory is given back before more is requested, so that no copy holds some
                // while it waits for the rest.
                let part = PART_BYTES.max(body.stored.bytes.div_ceil(MAX_PARTS));
                drop((body, room));
                let _room = self.budget.room(2 * part).await;
                let Some(body) = from.get(key).await? else {
                    return Ok(Delivery::Missing);
                };
                self.send_parts(body, (to, expected), checksum, part)
                    .await?
            };
            match sent {
                Sent::Stored(stored) => return Ok(Delivery::Done(stored)),
                Sent::Unproven(stored) => {
                    if let Some((found, now)) = self.hash_local(to).await?
                        && found == *checksum
                        && now == stored
                    {
                        return Ok(Delivery::Done(stored));
                    }
                }
                Sent::Wrong(found) => damaged = Some(found),
            }
        }
        match damaged {
            Some(found) => Ok(Delivery::Damaged(found)),
            None => Err(StoreError {
                side: self.local.reading().side(),
                endpoint: self.local.reading().endpoint().to_string(),
                proxy: self.local.reading().proxy(),
                doing: format!("writing {to}"),
                fault: StoreFault::Unreachable,
                text: "the store acknowledged two uploads, but neither could be confirmed, or other bytes were written there in the meantime".into(),
                wait: None,
            }),
        }
    }

    async fn send_whole(
        &self,
        mut body: Download,
        to: &str,
        checksum: &Checksum,
        expected: &Expected,
    ) -> Result<Sent, StoreError> {
        let mut hasher = Hasher::new();
        let announced = usize::try_from(body.stored.bytes).unwrap_or(usize::MAX);
        let whole = self.fill(&mut body, announced, &mut hasher).await?.freeze();
        // After the announced length there must be no more bytes.
        if let Some(more) = body.next().await? {
            hasher.update(&more);
        }
        let found = hasher.finalize();
        if found != *checksum {
            return Ok(Sent::Wrong(found));
        }
        match self.local.put(to, whole, expected).await {
            Ok(stored) => Ok(Sent::Stored(stored)),
            Err(error) => self.written_meanwhile(to, error).await,
        }
    }

    /// Reads the next part while the last one is being written: two parts in memory, whatever the
    /// object's size.
    async fn send_parts(
        &self,
        mut body: Download,
        (to, expected): (&str, &Expected),
        checksum: &Checksum,
        part: u64,
    ) -> Result<Sent, StoreError> {
        let mut upload = self.local.start_upload(to).await?;
        let mut hasher = Hasher::new();
        let result = async {
            let mut ready: Option<Bytes> = None;
            loop {
                let reading = self.fill(&mut body, part as usize, &mut hasher);
                let next = match ready.take() {
                    None => reading.await?,
                    Some(full) => tokio::try_join!(reading, upload.part(full))?.0,
                };
                if next.is_empty() {
                    return Ok(());
                }
                ready = Some(next.freeze());
            }
        }
        .await;
        let found = hasher.finalize();
        match result {
            Ok(()) if found == *checksum => match upload.complete(expected).await {
                Ok(Completion::Confirmed(stored)) => Ok(Sent::Stored(stored)),
                Ok(Completion::Unproven(stored)) => Ok(Sent::Unproven(stored)),
                Err(error) => {
                    upload.abort().await;
                    self.written_meanwhile(to, error).await
                }
            },
            Ok(()) => {
                upload.abort().await;
                Ok(Sent::Wrong(found))
            }
            Err(error) => {
                upload.abort().await;
                self.written_meanwhile(to, error).await
            }
        }
    }

    /// Handles an object that is not the expected one: our own bytes, if an answer was lost and the
    /// request was sent again; otherwise another client's bytes, and then everything is judged once
    /// more.
    async fn written_meanwhile(&self, to: &str, error: StoreError) -> Result<Sent, StoreError> {
        if error.fault != StoreFault::Changed {
            return Err(error);
        }
        match self.local.reading().head(to).await? {
            Some(stored) => Ok(Sent::Unproven(stored)),
            None => Err(StoreError {
                fault: StoreFault::Unreachable,
                ..error
            }),
        }
    }

    /// Reads until `wanted` bytes are there or the body ends. Small chunks are copied together, so
    /// that their buffers are not held one by one.
    async fn fill(
        &self,
        body: &mut Download,
        wanted: usize,
        hasher: &mut Hasher,
    ) -> Result<BytesMut, StoreError> {
        let mut buffer = BytesMut::with_capacity(wanted);
        if let Some(rest) = body.take_kept() {
            hasher.update(&rest);
            buffer.extend_from_slice(&rest);
        }
        while buffer.len() < wanted {
            let Some(mut bytes) = body.next().await? else {
                break;
            };
            self.throttle.take(bytes.len()).await;
            let room = wanted - buffer.len();
            if bytes.len() > room {
                body.keep(bytes.split_off(room));
            }
            hasher.update(&bytes);
            buffer.extend_from_slice(&bytes);
        }
        Ok(buffer)
    }
}

/// Reads and hashes an object, within the bandwidth of `throttle` if there is one. None: it does not
/// exist.
pub(super) async fn hash(
    store: &Store,
    key: &str,
    throttle: Option<&Throttle>,
) -> Result<Option<(Checksum, Stored)>, StoreError> {
    let Some(mut body) = store.get(key).await? else {
        return Ok(None);
    };
    let mut hasher = Hasher::new();
    while let Some(bytes) = body.next().await? {
        if let Some(throttle) = throttle {
            throttle.take(bytes.len()).await;
        }
        hasher.update(&bytes);
    }
    Ok(Some((hasher.finalize(), body.stored)))
}

enum Sent {
    Stored(Stored),
    /// No answer confirmed it; it must be read back.
    Unproven(Stored),
    Wrong(Checksum),
}
