//! An expert worker: the real `Experts` service in front of a played host, which serves the newest two placements.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use moesaic_dispatch::frame::Term;
use moesaic_dispatch::{Activations, ExpertHost, Refusal, ReplySender, RequestFrame, Shape, grpc};
use moesaic_expert_worker::core::epochs::Epochs;
use moesaic_node::Member;
use moesaic_proto::v1::{RefusalReason, Role};
use moesaic_proto::{Epoch, Placement, WorkerId};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::arithmetic::{HIDDEN, OPS, SHAPE, expert_row, mix};
use super::net;
use super::site::Site;

/// From a placement to its experts being in memory.
const LOADING: Duration = Duration::from_millis(150);
/// A frame takes up to so many milliseconds.
const COMPUTING_MS: u64 = 4;

/// Lives until it is killed.
pub async fn run(site: Site, id: String) -> turmoil::Result {
    let hello = site.hello(Role::ExpertWorker, &id);
    let member = site.register(hello.clone()).await;
    let host = Arc::new(Host { id: member.id.clone(), placements: Mutex::default(), started: Instant::now() });
    let service = grpc::service(host.clone(), None, hello, CancellationToken::new());
    tokio::select! {
        served = net::serve(Routes::new(service)) => served,
        () = follow(&site, member, &host) => Ok(()),
    }
}

async fn follow(site: &Site, member: Member, host: &Host) {
    let mut view = site.registry.view();
    loop {
        let placement = view.borrow_and_update().placement.clone();
        if let Some(placement) = placement.filter(|placement| placement.epoch() > host.newest()) {
            sleep(LOADING).await;
            host.install(placement.clone());
            site.journal.most("epoch", u64::from(placement.epoch().0));
            site.update(Member { epoch_loaded: placement.epoch(), ..member.clone() });
            continue;
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

struct Host {
    id: WorkerId,
    /// The newest one, and the one before it.
    placements: Mutex<Epochs<Arc<Placement>>>,
    started: Instant,
}

impl Host {
    fn newest(&self) -> Epoch {
        self.placements.lock().unwrap().newest().map_or(Epoch(0), |(epoch, _)| epoch)
    }

    fn install(&self, placement: Arc<Placement>) {
        self.placements.lock().unwrap().install(self.started.elapsed(), placement.epoch(), placement);
    }

    fn refusal(&self, frame: &RequestFrame) -> Option<Refusal> {
        let (epoch, layer) = (frame.header.epoch, frame.header.layer);
        let placement = match self.placements.lock().unwrap().get(self.started.elapsed(), epoch) {
            Ok(placement) => placement,
            Err(refusal) => return Some(refusal),
        };
        let is_held = |term: &Term| {
            let holders = placement.holders(layer, term.expert());
            holders.iter().any(|&holder| placement.workers()[holder as usize] == self.id)
        };
        let missing = frame.terms().iter().find(|term| !is_held(term))?;
        Some(Refusal::new(RefusalReason::NotHeld, format!("expert {}", missing.expert())))
    }
}

impl ExpertHost for Host {
    fn shape(&self) -> Shape {
        SHAPE
    }

    fn submit(&self, frame: RequestFrame, reply: ReplySender) {
        if let Some(refusal) = self.refusal(&frame) {
            return reply.send(Err(refusal));
        }
        let takes = 1 + mix(u64::from(frame.header.sequence), u64::from(frame.header.source)) % COMPUTING_MS;
        tokio::spawn(async move {
            sleep(Duration::from_millis(takes)).await;
            reply.send(Ok(compute(&frame).into()));
        });
    }
}

fn compute(frame: &RequestFrame) -> Vec<f32> {
    let layer = frame.header.layer;
    let Activations::F32(values) = frame.activations() else { panic!("the callers send f32") };
    let mut y = Vec::new();
    for (output, terms) in frame.outputs() {
        let x = &values[frame.position(output.row()) as usize * HIDDEN..][..HIDDEN];
        if output.is_weighted() {
            let mut sum = [0.0; HIDDEN];
            terms.iter().for_each(|t| (OPS.next)(&mut sum, t.weight(), &expert_row(layer, t.expert(), x)));
            y.extend(sum);
        } else {
            y.extend(expert_row(layer, terms[0].expert(), x));
        }
    }
    y
}
