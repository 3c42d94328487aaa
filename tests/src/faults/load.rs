//! Clients that keep a cluster busy: each asks its own request again and again until it is told to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};

use super::client::{Doors, Policy};
use super::judge::{End, History};
use super::requests::Request;

/// Longer than a request takes, whatever is done to the cluster meanwhile.
const PATIENCE: Duration = Duration::from_secs(150);
/// A client that has failed does not come again at once.
const AFTER_FAILURE: Duration = Duration::from_millis(250);
const POLL: Duration = Duration::from_millis(2);

pub struct Load {
    pub doors: Doors,
    /// Ends all clients if this is dropped.
    clients: JoinSet<Vec<History>>,
    handles: Vec<AbortHandle>,
    enough: Arc<AtomicBool>,
}

impl Load {
    pub fn start(requests: &[Request], urls: Vec<String>, policy: Policy) -> Result<Self> {
        let doors = Doors::new(urls)?;
        let enough = Arc::new(AtomicBool::new(false));
        let (mut clients, mut handles) = (JoinSet::new(), Vec::new());
        for (slot, request) in requests.iter().enumerate() {
            let (doors, request, enough) = (doors.clone(), request.clone(), enough.clone());
            handles.push(clients.spawn(async move {
                let mut histories = Vec::new();
                while histories.is_empty() || !enough.load(Ordering::Relaxed) {
                    let history = doors.ask(&request, slot + histories.len(), policy).await;
                    if history.end != End::Finished {
                        sleep(AFTER_FAILURE).await;
                    }
                    histories.push(history);
                }
                histories
            }));
        }
        Ok(Self { doors, clients, handles, enough })
    }

    /// Waits until so many tokens have come in all.
    pub async fn until_arrived(&self, tokens: usize) -> Result<()> {
        let begin = Instant::now();
        while self.doors.arrived.load(Ordering::Relaxed) < tokens {
            ensure!(begin.elapsed() < PATIENCE, "no {tokens} tokens within {PATIENCE:?}");
            sleep(POLL).await;
        }
        Ok(())
    }

    /// The first so many clients are gone, in the middle of an answer, and what they saw with them.
    pub fn vanish(&self, clients: usize) {
        self.handles.iter().take(clients).for_each(AbortHandle::abort);
    }

    /// Each client ends the answer that it reads.
    pub async fn finish(mut self) -> Result<Vec<History>> {
        self.enough.store(true, Ordering::Relaxed);
        let begin = Instant::now();
        let mut histories = Vec::new();
        loop {
            let rest = PATIENCE.saturating_sub(begin.elapsed());
            match tokio::time::timeout(rest, self.clients.join_next()).await {
                Ok(Some(Err(error))) if error.is_cancelled() => {}
                Ok(Some(client)) => histories.extend(client?),
                Ok(None) => return Ok(histories),
                Err(_) => anyhow::bail!("{} clients have not ended after {PATIENCE:?}", self.clients.len()),
            }
        }
    }
}

/// Each request once, a few at a time: what the others are compared to.
pub async fn each_once(requests: &[Request], urls: Vec<String>, at_a_time: usize) -> Result<Vec<History>> {
    let doors = Doors::new(urls)?;
    let mut lanes = Vec::new();
    for lane in 0..at_a_time {
        let mine: Vec<Request> = requests.iter().skip(lane).step_by(at_a_time).cloned().collect();
        let doors = doors.clone();
        let lane: JoinHandle<Vec<History>> = tokio::spawn(async move {
            let mut histories = Vec::new();
            for request in &mine {
                histories.push(doors.ask(request, request.index, Policy::Firm).await);
            }
            histories
        });
        lanes.push(lane);
    }
    let mut histories = Vec::new();
    for lane in lanes {
        histories.extend(lane.await?);
    }
    histories.sort_by_key(|history| history.request);
    Ok(histories)
}
