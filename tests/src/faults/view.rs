//! What coordinators and attention workers say of themselves, and whether that makes a whole cluster.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::TryFutureExt;
use moesaic_proto::v1::admin_client::AdminClient;
use moesaic_proto::v1::attention_worker_client::AttentionWorkerClient;
use moesaic_proto::v1::{DispatchCounts, EdgeState, LoadRequest, LoadResponse, StatusRequest, StatusResponse};
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// How long an answer about itself may take; a process that is frozen or cut off gives none.
const ANSWER_MAX: Duration = Duration::from_secs(1);

pub struct View {
    pub doors: Vec<Result<Door>>,
    pub loads: Vec<(&'static str, Result<LoadResponse>)>,
}

pub struct Door {
    pub healthy: bool,
    /// None where the program has no such service.
    pub status: Option<StatusResponse>,
}

pub async fn channel(url: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(ANSWER_MAX);
    endpoint.connect().await.with_context(|| format!("cannot connect to {url}"))
}

/// Whether it answers with 200.
pub async fn is_healthy(url: &str) -> bool {
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER_MAX).build();
    let Ok(client) = client else { return false };
    client.get(url).send().await.is_ok_and(|answer| answer.status() == 200)
}

pub async fn door(url: &str) -> Result<Door> {
    let healthy = is_healthy(&format!("{url}/health")).await;
    let mut client = AdminClient::new(channel(url).await?);
    let status = match timeout(ANSWER_MAX, client.status(StatusRequest {})).await.context("no answer")? {
        Ok(status) => Some(status.into_inner()),
        Err(error) if error.code() == Code::Unimplemented => None,
        Err(error) => return Err(error).context("no status"),
    };
    Ok(Door { healthy, status })
}

pub async fn load(url: &str) -> Result<LoadResponse> {
    let asked = channel(url).and_then(async |channel| {
        Ok(AttentionWorkerClient::new(channel).load(LoadRequest {}).await.context("no load")?.into_inner())
    });
    timeout(ANSWER_MAX, asked).await.context("no answer")?
}

impl View {
    pub fn why_not_whole(&self, expert_workers: usize) -> Option<String> {
        let doors = self.doors.iter().map(|door| match door {
            Ok(door) => door.check(expert_workers, self.loads.len()),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        });
        let loads = self.loads.iter().map(|(name, load)| match load {
            Ok(load) => check_load(load).context(*name),
            Err(error) => Err(anyhow::anyhow!("{name}: {error:#}")),
        });
        doors.chain(loads).find_map(Result::err).map(|error| format!("{error:#}"))
    }

    /// Those that answer.
    pub fn loads(&self) -> impl Iterator<Item = &LoadResponse> {
        self.loads.iter().filter_map(|(_, load)| load.as_ref().ok())
    }

    pub fn statuses(&self) -> impl Iterator<Item = &StatusResponse> {
        self.doors.iter().filter_map(|door| door.as_ref().ok()?.status.as_ref())
    }

    pub fn leader(&self) -> Option<&str> {
        self.statuses().map(|status| status.leader.as_str()).find(|leader| !leader.is_empty())
    }

    /// Sequences that attention workers have in hand.
    pub fn sequences(&self) -> u32 {
        self.loads().map(|load| load.sequences_running + load.sequences_waiting + load.orphans).sum()
    }

    pub fn pages_taken(&self) -> u32 {
        self.loads().map(|load| load.pages_total - load.pages_free).sum()
    }

    pub fn preemptions(&self) -> u64 {
        self.loads().map(|load| load.preemptions).sum()
    }

    /// Of all attention workers; None where the program does not count.
    pub fn dispatch(&self) -> Option<DispatchCounts> {
        let add = |sum: DispatchCounts, one: &DispatchCounts| DispatchCounts {
            terms: sum.terms + one.terms,
            terms_hedged: sum.terms_hedged + one.terms_hedged,
            ..sum
        };
        let counts: Option<Vec<&DispatchCounts>> = self.loads().map(|load| load.dispatch.as_ref()).collect();
        Some(counts?.into_iter().fold(DispatchCounts::default(), add))
    }

    /// From an attention worker to an expert worker; None where the program does not say.
    pub fn edge(&self, from: &str, to: &str) -> Option<EdgeState> {
        let load = self.loads.iter().find(|(name, _)| *name == from)?.1.as_ref().ok()?;
        Some(load.edges.iter().find(|edge| edge.worker == to)?.state())
    }
}

impl Door {
    fn check(&self, expert_workers: usize, attention_workers: usize) -> Result<()> {
        ensure!(self.healthy, "a coordinator's /health is not 200");
        let Some(status) = &self.status else { return Ok(()) };
        let name = &status.coordinator;
        ensure!(status.not_ready.is_empty(), "{name} is not ready: {}", status.not_ready);
        ensure!(status.registry_reachable, "{name} does not reach the registry");
        ensure!(!status.leader.is_empty(), "{name} knows no leader");
        let (lost, exposed) = (status.experts_lost, status.experts_exposed);
        ensure!(lost + exposed == 0, "{name} sees {lost} experts lost and {exposed} exposed");
        let (attention, experts) = (status.attention.len(), status.experts.len());
        ensure!(attention == attention_workers, "{name} sees {attention} attention workers");
        ensure!(experts == expert_workers, "{name} sees {experts} expert workers");
        let resting = status.experts.iter().find(|worker| worker.cordoned || worker.draining);
        ensure!(resting.is_none(), "{name} sees a cordon");
        Ok(())
    }
}

fn check_load(load: &LoadResponse) -> Result<()> {
    ensure!(load.experts_reachable, "experts are out of reach");
    ensure!(!load.draining, "it is stopping");
    let broken = load.edges.iter().find(|edge| matches!(edge.state(), EdgeState::Down | EdgeState::Silent));
    match broken {
        Some(edge) => anyhow::bail!("no way to {}: {}", edge.worker, edge.detail),
        None => Ok(()),
    }
}
