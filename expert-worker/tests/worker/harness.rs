//! Workers of a fixture's experts, and the dispatcher that asks them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use moesaic_dispatch::{CombineOps, DispatchConfig, Dispatcher, Holder, Hub};
use moesaic_expert_worker::{Config, Context, run};
use moesaic_kernels::{Backend, Dtype, Numerics, Pool, add, combine_first, combine_next};
use moesaic_model::Checkpoint;
use moesaic_node::registry::embedded;
use moesaic_node::{Connector, Member, MemberSettings, Registry, handshake};
use moesaic_proto::v1::Role;
use moesaic_proto::{Epoch, LayerId, Placement, WorkerId};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Waits for a condition, and fails the test if it never comes true.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("{what} does not come"));
}

/// Of a layer call: what nobody serves fails by then.
pub const DEADLINE: Duration = Duration::from_secs(1);

pub fn worker_id(number: usize) -> WorkerId {
    WorkerId::new(&format!("e{number}")).unwrap()
}

pub struct Workers {
    pub checkpoint: Arc<Checkpoint>,
    pub registry: Arc<dyn Registry>,
    pub hub: Hub,
    pub stop: CancellationToken,
    pub tasks: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Workers {
    pub fn start(model: &Path, count: usize, config: Config) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(model).unwrap());
        let (registry, hub, stop) = (embedded(), Hub::default(), CancellationToken::new());
        let mut tasks = Vec::new();
        for number in 0..count {
            let mut config = config.clone();
            config.worker.member = MemberSettings::named(worker_id(number).as_str(), "test");
            config.worker.dtype = "f32".into();
            let context = Context {
                membership: registry.clone().into(),
                hub: Some(hub.clone()),
                backend: Backend::Cpu(f32_numerics(), Pool::new(2)),
                fabric: None,
                checkpoint: checkpoint.clone(),
                profile: Arc::default(),
            };
            tasks.push(tokio::spawn(run(config, context, stop.clone())));
        }
        Self { checkpoint, registry, hub, stop, tasks }
    }

    /// Expert e on worker `holder(e)`, in every layer.
    pub fn placement(&self, epoch: u32, count: usize, holder: impl Fn(usize) -> usize) -> Placement {
        let config = self.checkpoint.config();
        let holders: Vec<Vec<u32>> = (0..config.n_routed_experts).map(|e| vec![holder(e) as u32]).collect();
        let layers: BTreeMap<_, _> =
            config.moe_layers().into_iter().map(|layer| (LayerId(layer as u8), holders.clone())).collect();
        Placement::new(Epoch(epoch), (0..count).map(worker_id).collect(), layers).unwrap()
    }

    /// Puts a placement in force and waits until all its workers say that they have loaded it.
    pub async fn place(&self, placement: &Placement) {
        assert!(self.registry.publish(placement.clone()).await.unwrap());
        until("the loaded experts", || self.holders(placement).len() == placement.workers().len()).await;
    }

    /// Of the workers that have loaded the placement.
    pub fn holders(&self, placement: &Placement) -> BTreeMap<WorkerId, Holder> {
        let view = self.registry.view().borrow().clone();
        let loaded = view.of_role(Role::ExpertWorker).filter(|member| member.epoch_loaded == placement.epoch());
        let holder = |member: &Member| Holder { address: member.address.clone(), epoch_loaded: member.epoch_loaded };
        loaded.map(|member| (member.id.clone(), holder(member))).collect()
    }

    /// An attention worker's dispatcher, over the hub or over gRPC.
    pub async fn dispatcher(&self, placement: &Placement, local: bool) -> Dispatcher {
        let model = self.checkpoint.config();
        let id = WorkerId::new("a0").unwrap();
        let config = DispatchConfig {
            hidden: model.hidden_size,
            experts: model.n_routed_experts,
            groups: model.logical_groups(),
            source: 0,
            layer_deadline: DEADLINE,
            hello: handshake::hello("test", Role::AttentionWorker, &id, self.checkpoint.fingerprint(), "f32"),
            connector: Connector::default(),
            fabric: None,
            ops: CombineOps { first: combine_first, next: combine_next, add },
        };
        let dispatcher = Dispatcher::new(config, local.then(|| self.hub.clone()));
        dispatcher.set_view(Arc::new(placement.clone()), &self.holders(placement));
        until("the edges", || dispatcher.reachable()).await;
        dispatcher
    }
}

pub fn f32_numerics() -> Numerics {
    Numerics::detect(Dtype::F32)
}
