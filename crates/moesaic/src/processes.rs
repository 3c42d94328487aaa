//! A cluster of child processes of this program, over gRPC and etcd.

use std::ffi::OsString;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use moesaic_dispatch::nccl::{QUEUES, QUEUES_MAX};
use moesaic_node::membership::Settings;
use moesaic_node::telemetry::FILTER_VARIABLE;
use moesaic_proto::v1::Role;
use serde::Serialize;
use serde_json::Value;
use tokio::process::Command;

use crate::node::{self, Node};
use crate::plan::Plan;
use crate::up::Cluster;
use crate::{certs, etcd, roles};

pub async fn start(plan: &Plan) -> Result<Cluster> {
    let mut nodes = Vec::new();
    let spec = match &plan.args.registry {
        Some(spec) => spec.clone(),
        None => own_etcd(plan, &mut nodes)?,
    };
    let operator = plan.args.tls.as_deref().map(certs::operator_folder);
    let settings = Settings {
        cluster: &plan.cluster,
        role: Role::Operator,
        id: None,
        registry: &spec,
        tls: operator.as_deref(),
        registry_ca: None,
    };
    let membership = if nodes.is_empty() {
        settings.open().await?
    } else {
        tokio::select! {
            opened = etcd::wait(&settings) => opened?,
            failure = node::first_failure(&mut nodes) => return Err(failure),
        }
    };
    for flags in plan.expert_workers(&spec) {
        nodes.push(child(plan, "expert-worker", flags.id.as_deref(), &flags)?);
    }
    for flags in plan.attention_workers(&spec) {
        nodes.push(child(plan, "attention-worker", flags.id.as_deref(), &flags)?);
    }
    let address = match plan.args.listen {
        listen if listen.port() == 0 => SocketAddr::new(listen.ip(), etcd::free_port()?.port()),
        listen => listen,
    };
    let flags = plan.coordinator(&spec, address);
    nodes.push(child(plan, "coordinator", flags.id.as_deref(), &flags)?);
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

/// A role in a process of its own. Workers that die are started again; without its coordinator `up` has nothing to serve.
fn child(plan: &Plan, role: &str, id: Option<&str>, flags: &impl Serialize) -> Result<Node> {
    let name = format!("{} {}", role.replace('-', " "), id.unwrap_or_default());
    let mut command = own_program()?;
    if plan.shares_gpu() {
        // NCCL connects two ranks of one GPU only if it takes them for ranks of different hosts.
        command.env("NCCL_HOSTID", &name).env("NCCL_SOCKET_IFNAME", "lo").env("NCCL_IB_DISABLE", "1");
        command.env(QUEUES, QUEUES_MAX.to_string());
    }
    command.arg(role).args(arguments(flags)?).arg(roles::STOP_WITH_STDIN);
    if role == "coordinator" { Node::child(name, command) } else { Node::supervised(name, command) }
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

/// A role's flags as they stand on a command line: a key `cache_tokens` is the flag `--cache-tokens`.
fn arguments(flags: &impl Serialize) -> Result<Vec<OsString>> {
    let Value::Object(flags) = serde_json::to_value(flags)? else { return Ok(Vec::new()) };
    let argument = |(key, value): (String, Value)| {
        let value = match value {
            Value::String(text) => text,
            other => other.to_string(),
        };
        OsString::from(format!("--{}={value}", key.replace('_', "-")))
    };
    Ok(flags.into_iter().filter(|(_, value)| !value.is_null()).map(argument).collect())
}
