//! The attention worker's half of dispatch alone, under load: layer calls without a pause, each sum compared.

use std::rc::Rc;
use std::time::Duration;

use moesaic_attention_worker::shell::run::follow;
use moesaic_dispatch::{DispatchError, Dispatcher};
use moesaic_proto::ExpertId;
use moesaic_proto::v1::Role;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::arithmetic::{Call, LAYERS, mix};
use super::attention::{call, dispatcher};
use super::site::Site;

/// Calls in flight at a time.
const CALLERS: u64 = 3;
/// Each makes so many more when all is calm: there is progress after the last fault.
const CALM_CALLS: u64 = 20;
const PAUSE: Duration = Duration::from_millis(3);
/// Answers on their way are waited for, so that they can be counted.
const LATE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
pub struct Load {
    pub layer_deadline: Duration,
    /// Whether a call may fail: then it names its layer and the experts that it lacks.
    pub may_fail: bool,
    pub seed: u64,
}

/// Calls until all is calm, and then some more.
pub async fn run(site: Site, id: String, load: Load) -> turmoil::Result {
    let dispatcher = dispatcher(site.hello(Role::AttentionWorker, &id), load.layer_deadline);
    tokio::spawn(follow(site.registry.view(), site.checkpoint.clone(), dispatcher.clone()));
    while !dispatcher.reachable() {
        sleep(PAUSE).await;
    }
    site.journal.count("ready", 1);
    let id: Rc<str> = id.into();
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        callers.spawn_local(one(site.clone(), id.clone(), caller, load, dispatcher.clone()));
    }
    callers.join_all().await;
    sleep(LATE).await;
    let counts = dispatcher.counts();
    for (what, count) in [
        ("sent", counts.sent),
        ("resent", counts.resent),
        ("hedged", counts.hedged),
        ("unmatched", counts.unmatched),
        ("misdirected", counts.misdirected),
        ("rejected", counts.rejected),
        ("outstanding", dispatcher.outstanding() as u64),
    ] {
        site.journal.count(what, count);
    }
    Ok(())
}

async fn one(site: Site, id: Rc<str>, caller: u64, load: Load, dispatcher: Dispatcher) {
    let mut left = CALM_CALLS;
    let whose = id.bytes().fold(0, |hash, byte| mix(hash, u64::from(byte)));
    for number in 0.. {
        if site.is_calm.get() {
            if left == 0 {
                return;
            }
            left -= 1;
        }
        let layer = LAYERS[number as usize % LAYERS.len()];
        let asked = Call::of(layer, mix(mix(load.seed, caller), mix(whose, number)));
        let begun = Instant::now();
        let answer = timeout(load.layer_deadline * 2, call(&dispatcher, &asked)).await;
        site.journal.most("stall_ms", begun.elapsed().as_millis() as u64);
        let name = format!("{id}.{caller} call {number}");
        match answer {
            Err(_) => site.journal.fail(format!("{name}: neither an answer nor an error in twice its deadline")),
            Ok(Ok(y)) if y == asked.expected() => {
                site.journal.count("done", 1);
                site.journal.say(format!("{name}: {y:?}"));
            }
            Ok(Ok(y)) => site.journal.fail(format!("{name}: {y:?}; expected {:?}", asked.expected())),
            Ok(Err(error)) if load.may_fail && names(&error, &asked) => {
                site.journal.count("failed", 1);
                site.journal.say(format!("{name}: {error}"));
            }
            Ok(Err(error)) => site.journal.fail(format!("{name}: {error}")),
        }
        sleep(PAUSE).await;
    }
}

/// Whether an error says which layer, and which experts of the call, could not be had.
fn names(error: &DispatchError, call: &Call) -> bool {
    let (DispatchError::Unreachable { layer, experts, .. } | DispatchError::Lost { layer, experts, .. }) = error else {
        return false;
    };
    let is_asked = |expert: &ExpertId| call.routes.iter().any(|route| route.expert == *expert);
    let words = format!("layer {layer}, {experts}");
    *layer == call.layer && experts.as_slice().iter().all(is_asked) && error.to_string().starts_with(&words)
}
