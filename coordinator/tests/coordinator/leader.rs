//! When a coordinator leads.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use crate::cluster::{FINGERPRINT, model_dir, until};
use moesaic_coordinator::core::leader::Policy;
use moesaic_coordinator::model::Model;
use moesaic_coordinator::shell::leader::Leading;
use moesaic_coordinator::shell::workers::Workers;
use moesaic_node::{Connector, Member, handshake, registry};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;
use tokio::sync::watch;

/// A term may begin at any moment, also just when it was seen that there is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_term_that_begins_while_it_is_looked_for_is_led() {
    let registry = registry::open("embedded", "test").await.unwrap();
    let model = Model::open(&model_dir(), None).unwrap();
    let policy = Policy {
        layers: model.moe_layers.clone(),
        experts: model.experts,
        groups: model.groups,
        replicas: 1,
        workers: 1,
    };
    let expert = WorkerId::new("e-0").unwrap();
    let hello = handshake::hello("test", Role::ExpertWorker, &expert, FINGERPRINT, "f32");
    let _expert = registry.register(Member::new(hello, expert, "127.0.0.1:1".to_owned(), None)).await.unwrap();
    let name = WorkerId::new("c-0").unwrap();
    let workers = Arc::new(Workers::new("test", &name, &model, 1, &*registry, Connector::default()));
    let leading = Arc::new(Leading::new(workers, registry.clone(), policy));
    let campaign = registry.campaign(name);
    campaign.term.clone().wait_for(Option::is_some).await.unwrap();

    // Whoever reads the load keeps the leader from going on meanwhile.
    let (reading, (go_on, held)) = (leading.clone(), mpsc::sync_channel::<()>(1));
    let (begun, is_begun) = mpsc::sync_channel(1);
    let reader = thread::spawn(move || {
        reading.load(|_| {
            begun.send(()).unwrap();
            held.recv().unwrap();
        });
    });
    is_begun.recv().unwrap();
    let (term, seen) = watch::channel(None);
    tokio::spawn(leading.run(seen));
    tokio::time::sleep(Duration::from_millis(200)).await;
    term.send(*campaign.term.borrow()).unwrap();
    go_on.send(()).unwrap();
    reader.join().unwrap();
    until("experts are placed", Duration::from_secs(5), || registry.view().borrow().placement.is_some()).await;
}
