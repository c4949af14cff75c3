//! Clients that take every connection of a server, and every one that a session of ours releases.

use super::Cluster;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

const PAUSE: Duration = Duration::from_millis(20);

/// The clients end when this is dropped.
pub struct Crowd {
    sessions: Arc<Mutex<Vec<Client>>>,
    task: JoinHandle<()>,
}

impl Crowd {
    /// Returns when there is no connection left.
    pub async fn gather(cluster: &Cluster) -> Crowd {
        let sessions = Arc::new(Mutex::new(Vec::new()));
        take_all(cluster, &sessions).await;
        let (cluster, taken) = (cluster.clone(), sessions.clone());
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(PAUSE).await;
                take_all(&cluster, &taken).await;
            }
        });
        Crowd { sessions, task }
    }

    /// Opens no further connections; the existing ones stay.
    pub fn settle(self) -> Vec<Client> {
        self.task.abort();
        std::mem::take(&mut self.sessions.lock().expect("the crowd's lock"))
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn take_all(cluster: &Cluster, sessions: &Mutex<Vec<Client>>) {
    while let Ok(session) = cluster.conn().await {
        sessions.lock().expect("the crowd's lock").push(session);
    }
}
