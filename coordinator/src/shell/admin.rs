//! The gRPC service for operators: Status, Cordon, Rebalance. What only the leader can do is passed on to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use moesaic_node::{Connector, Member, Registry, View};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::admin_client::AdminClient;
use moesaic_proto::v1::admin_server::{Admin, AdminServer};
use moesaic_proto::v1::{
    AttentionStatus, Cordon, CordonRequest, CordonResponse, ExpertStatus, RebalanceRequest, RebalanceResponse, Role,
    StatusRequest, StatusResponse,
};
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use super::grpc::status;
use super::leader::Leading;
use super::service::Service;
use crate::core::exposure::Exposure;

/// What is passed on to the leader is answered within this time.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
/// A request that has been passed on says so, and is not passed on again.
const FORWARDED: &str = "moesaic-forwarded";
pub(super) const AUTHORIZATION: &str = "authorization";

#[derive(Clone)]
pub struct Operators {
    pub id: WorkerId,
    pub service: Arc<Service>,
    pub leading: Arc<Leading>,
    pub registry: Arc<dyn Registry>,
    /// To the leader.
    pub connector: Connector,
}

pub fn server(operators: Operators) -> AdminServer<Operators> {
    AdminServer::new(operators)
}

#[tonic::async_trait]
impl Admin for Operators {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.status_now()))
    }

    async fn cordon(&self, request: Request<CordonRequest>) -> Result<Response<CordonResponse>, Status> {
        let CordonRequest { worker, cordoned, drain } = request.into_inner();
        let view = self.registry.view().borrow().clone();
        let id = WorkerId::new(&worker).map_err(|error| Status::invalid_argument(format!("worker: {error}")))?;
        let roles = [Role::AttentionWorker, Role::ExpertWorker];
        let is_known = |role: &Role| {
            let key = (*role, id.clone());
            view.members.contains_key(&key) || view.cordons.contains_key(&key)
        };
        let Some(role) = roles.into_iter().find(is_known) else {
            return Err(Status::not_found(format!("worker: there is no attention or expert worker {worker:?}")));
        };
        let set = self.registry.set_cordon(role, id, cordoned.then_some(Cordon { drain }));
        set.await.map_err(|error| Status::unavailable(format!("the registry has not taken it: {error}")))?;
        tracing::info!(worker, cordoned, drain, "an operator's cordon");
        Ok(Response::new(CordonResponse {}))
    }

    async fn rebalance(&self, request: Request<RebalanceRequest>) -> Result<Response<RebalanceResponse>, Status> {
        if let Some(answer) = self.leading.rebalance(request.get_ref().dry_run) {
            return Ok(Response::new(answer.map_err(status)?));
        }
        if request.metadata().contains_key(FORWARDED) {
            return Err(Status::unavailable("no coordinator leads at present; try again in some seconds"));
        }
        self.forward(request).await
    }
}

impl Operators {
    /// The cluster as this coordinator sees it.
    pub fn status_now(&self) -> StatusResponse {
        let view = self.registry.view().borrow().clone();
        let Exposure { lost, exposed } = self.leading.exposure(&view);
        let is_cordoned = |role, id: &WorkerId| view.cordons.contains_key(&(role, id.clone()));
        let attention = self.service.workers.loads().into_iter().map(|(member, load)| AttentionStatus {
            cordoned: is_cordoned(Role::AttentionWorker, &member.id),
            id: member.hello.id,
            address: member.address,
            node: member.node,
            load,
        });
        let placed = view.placement.iter().flat_map(|p| p.workers().iter().cloned().zip(p.held_by_each()));
        let held: BTreeMap<WorkerId, usize> = placed.collect();
        let experts = view
            .of_role(Role::ExpertWorker)
            .map(|member| expert_status(member, &view, held.get(&member.id).copied().unwrap_or(0)));
        StatusResponse {
            coordinator: self.id.as_str().to_owned(),
            leader: view.leader.as_ref().map_or_else(String::new, |leader| leader.id.as_str().to_owned()),
            term: view.leader.as_ref().map_or(0, |leader| leader.term),
            registry_reachable: view.is_current,
            not_ready: self.service.workers.not_ready().borrow().clone().unwrap_or_default(),
            epoch: view.placement.as_ref().map_or(0, |placement| placement.epoch().0),
            experts_lost: lost,
            experts_exposed: exposed,
            attention: attention.collect(),
            experts: experts.collect(),
            sequences: self.service.sequences() as u32,
        }
    }

    /// Asks the leader, with the caller's key if it came with one: all coordinators know the same keys.
    async fn forward(&self, asked: Request<RebalanceRequest>) -> Result<Response<RebalanceResponse>, Status> {
        let view = self.registry.view().borrow().clone();
        let leader = view.leader.as_ref().ok_or_else(|| Status::unavailable("no coordinator leads at present"))?;
        let member = view.members.get(&(Role::Coordinator, leader.id.clone()));
        let unknown = || Status::unavailable(format!("{} leads, and has not said where it is", leader.id));
        let peer = member.ok_or_else(unknown)?.peer();
        let endpoint = peer.endpoint().map_err(|error| Status::unavailable(format!("{}: {error}", peer.address)))?;
        let key = asked.metadata().get(AUTHORIZATION).cloned();
        let mut request = Request::new(asked.into_inner());
        if let Some(key) = key {
            request.metadata_mut().insert(AUTHORIZATION, key);
        }
        request.metadata_mut().insert(FORWARDED, self.id.as_str().parse().map_err(|_| unknown())?);
        let ask = async {
            let connected = self.connector.connect(&peer, &endpoint).await;
            let channel = connected.map_err(|error| Status::unavailable(error.to_string()))?;
            AdminClient::new(channel).rebalance(request).await
        };
        timeout(FORWARD_TIMEOUT, ask).await.unwrap_or_else(|_| Err(Status::unavailable("the leader does not answer")))
    }
}

fn expert_status(member: &Member, view: &View, held: usize) -> ExpertStatus {
    ExpertStatus {
        id: member.hello.id.clone(),
        address: member.address.clone(),
        node: member.node.clone(),
        cordoned: view.cordons.contains_key(&(Role::ExpertWorker, member.id.clone())),
        draining: member.draining,
        epoch_loaded: member.epoch_loaded.0,
        experts: held as u32,
        slots: member.expert_slots,
    }
}
