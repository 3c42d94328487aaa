//! A cluster of child processes of this program, over gRPC and etcd.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use moesaic_dispatch::nccl::{QUEUES, QUEUES_MAX};
use moesaic_node::MemberSettings;
use moesaic_node::telemetry::FILTER_VARIABLE;
use moesaic_proto::v1::Role;
use tokio::process::Command;

use crate::node::{self, Node};
use crate::plan::{NodeFlags, Plan};
use crate::up::Cluster;
use crate::{certs, etcd, roles};

pub async fn start(plan: &Plan) -> Result<Cluster> {
    let mut nodes = Vec::new();
    let spec = match &plan.args.registry {
        Some(spec) => spec.clone(),
        None => own_etcd(plan, &mut nodes)?,
    };
    let settings = MemberSettings {
        cluster: plan.cluster.clone(),
        registry: spec.clone(),
        tls: plan.args.tls.as_deref().map(certs::operator_folder),
        ..MemberSettings::default()
    };
    let membership = if nodes.is_empty() {
        settings.open(Role::Operator).await?
    } else {
        tokio::select! {
            opened = etcd::wait(&settings) => opened?,
            failure = node::first_failure(&mut nodes) => return Err(failure),
        }
    };
    for worker in plan.expert_workers(&spec).into_iter().chain(plan.attention_workers(&spec)) {
        nodes.push(Node::supervised(worker.title(), process(plan, &worker)?)?);
    }
    let address = match plan.args.listen {
        listen if listen.port() == 0 => SocketAddr::new(listen.ip(), etcd::free_port()?.port()),
        listen => listen,
    };
    // Workers that die are started again; without its coordinator `up` has nothing to serve.
    let coordinator = plan.coordinator(&spec, address);
    nodes.push(Node::child(coordinator.title(), process(plan, &coordinator)?)?);
    Ok(Cluster { nodes, membership, address })
}

fn own_etcd(plan: &Plan, nodes: &mut Vec<Node>) -> Result<String> {
    let (program, client, peer) = (etcd::find()?, etcd::free_port()?, etcd::free_port()?);
    let mut guard = own_program()?;
    guard.args(etcd::guard_arguments(program, client, peer, plan.args.tls.as_deref()));
    nodes.push(Node::child("etcd", guard)?);
    let scheme = if plan.args.tls.is_some() { "etcds" } else { "etcd" };
    Ok(format!("{scheme}://{client}"))
}

/// A node as a process of its own.
fn process(plan: &Plan, node: &NodeFlags) -> Result<Command> {
    let mut command = own_program()?;
    if plan.shares_gpu() {
        // NCCL connects two ranks of one GPU only if it takes them for ranks of different hosts.
        command.env("NCCL_HOSTID", node.title()).env("NCCL_SOCKET_IFNAME", "lo").env("NCCL_IB_DISABLE", "1");
        command.env(QUEUES, QUEUES_MAX.to_string());
    }
    command.arg(node.role).args(&node.flags).arg(roles::STOP_WITH_STDIN);
    Ok(command)
}

/// Children are as quiet as their parent.
fn own_program() -> Result<Command> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    if std::env::var_os(FILTER_VARIABLE).is_none() {
        command.env(FILTER_VARIABLE, "warn");
    }
    Ok(command)
}
