//! Leadership: one key under a lease, created by who comes first. Its creation revision is the term.
//!
//! A leader that has not heard from etcd for its lease's time steps down by itself, before etcd gives the lead to
//! another: a lease never runs out there before it has here.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, Error, PutOptions, Txn, TxnOp};
use moesaic_proto::{WorkerId, v1};
use prost::Message;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{BACKOFF_MAX, BACKOFF_MIN, beat, call};
use crate::registry::{Campaign, RegistryError, View};

pub fn campaign(client: Client, key: String, id: WorkerId, ttl: i64, view: watch::Receiver<Arc<View>>) -> Campaign {
    let (term, elected) = watch::channel(None);
    let stop = CancellationToken::new();
    let candidate = Candidate { client, key, id, ttl, lease: 0, term };
    let task = tokio::spawn(candidate.run(view, stop.clone()));
    Campaign { term: elected, task, stop: stop.drop_guard() }
}

struct Candidate {
    client: Client,
    key: String,
    id: WorkerId,
    ttl: i64,
    /// 0 for none.
    lease: i64,
    term: watch::Sender<Option<u64>>,
}

impl Candidate {
    async fn run(mut self, mut view: watch::Receiver<Arc<View>>, stop: CancellationToken) {
        stop.run_until_cancelled(self.campaign(&mut view)).await;
        self.step_down();
        if self.lease != 0 {
            let revoke = self.client.lease_revoke(self.lease);
            if let Err(error) = call(revoke).await {
                tracing::warn!(%error, "registry: the lead was not given up; it runs out by itself");
            }
        }
    }

    async fn campaign(&mut self, view: &mut watch::Receiver<Arc<View>>) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let is_free = |view: &Arc<View>| view.leader.is_none() && view.is_current;
            if view.wait_for(is_free).await.is_err() {
                return;
            }
            let asked = Instant::now();
            match self.run_for_it().await {
                Ok(Some(term)) => {
                    tracing::info!(term, "this coordinator leads");
                    self.term.send_replace(Some(term));
                    let reason = self.lead(asked).await;
                    tracing::warn!(term, %reason, "this coordinator does not lead any more");
                    self.step_down();
                    backoff = BACKOFF_MIN;
                }
                // Somebody was first, and the view will say so.
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "registry: no election"),
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    fn step_down(&self) {
        self.term.send_if_modified(|term| term.take().is_some());
    }

    /// The term, if this coordinator was first.
    async fn run_for_it(&mut self) -> Result<Option<u64>, RegistryError> {
        let lease = call(self.client.lease_grant(self.ttl, None)).await?.id();
        let record = v1::LeaderRecord { id: self.id.as_str().to_owned() }.encode_to_vec();
        let nobody = Compare::create_revision(self.key.clone(), CompareOp::Equal, 0);
        let put = TxnOp::put(self.key.clone(), record, Some(PutOptions::new().with_lease(lease)));
        let txn = self.client.txn(Txn::new().when([nobody]).and_then([put]));
        let answer = call(txn).await?;
        if !answer.succeeded() {
            // Runs out by itself where this fails.
            let _ = call(self.client.lease_revoke(lease)).await;
            return Ok(None);
        }
        self.lease = lease;
        Ok(answer.header().map(|header| header.revision().unsigned_abs()))
    }

    /// Keeps the lease, over one connection after the other, and says why it is lost. It was asked for at `heard`, from
    /// when on it may run.
    async fn lead(&mut self, mut heard: Instant) -> RegistryError {
        let ttl = Duration::from_secs(self.ttl.unsigned_abs());
        loop {
            let error = self.keep_alive(ttl, &mut heard).await;
            let has_run_out = matches!(&error, RegistryError::Etcd(Error::LeaseKeepAliveError(_)));
            if has_run_out || heard.elapsed() >= ttl {
                return error;
            }
            sleep(BACKOFF_MIN).await;
        }
    }

    /// Keeps the lease until that fails. `heard`: when what etcd has confirmed last was sent.
    async fn keep_alive(&mut self, ttl: Duration, heard: &mut Instant) -> RegistryError {
        let silent = || RegistryError::Timeout { seconds: ttl.as_secs() };
        let (mut keeper, mut answers) = match timeout_at(*heard + ttl, self.client.lease_keep_alive(self.lease)).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return error.into(),
            Err(_) => return silent(),
        };
        loop {
            let sent = Instant::now();
            match timeout_at(*heard + ttl, beat(&mut keeper, &mut answers)).await {
                Ok(Ok(())) => *heard = sent,
                Ok(Err(error)) => return error.into(),
                Err(_) => return silent(),
            }
            sleep(ttl / 4).await;
        }
    }
}
