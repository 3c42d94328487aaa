//! All faults there are. Numbers that lack are of faults that are not injected into processes from outside.

use super::bench::{Bench, Fault};
use super::cluster::Shape;
use super::pressure::{OVERLOADED, SMALL_CACHE};
use super::{deaths, network, operations, pressure, slowness};

const PLAIN: Shape = Shape::PLAIN;
const NET: Shape = Shape { net: true, ..Shape::PLAIN };

macro_rules! fault {
    ($id:literal, $what:literal, $shape:expr, $run:path) => {
        Fault { id: $id, what: $what, shape: $shape, run: |bench: &mut Bench| Box::pin($run(bench)) }
    };
}

pub const ALL: [Fault; 18] = [
    fault!("F1", "kill -9 an expert worker", PLAIN, deaths::expert_worker),
    fault!("F2", "kill -9 each expert worker in turn", PLAIN, deaths::each_expert_worker),
    fault!("F3", "freeze an expert worker for 10 s", PLAIN, slowness::frozen),
    fault!("F4", "kill -9 both holders of experts", PLAIN, deaths::both_holders),
    fault!("F5", "kill -9 an attention worker", PLAIN, deaths::attention_worker),
    fault!("F6", "kill -9 the leading coordinator", PLAIN, deaths::leading_coordinator),
    fault!("F8", "cut an attention worker from an expert worker", NET, network::attention_from_expert),
    fault!("F9", "cut a coordinator from an attention worker", NET, network::coordinator_from_attention),
    fault!("F10", "kill -9 all of etcd", PLAIN, deaths::etcd),
    fault!("F12", "an expert worker ten times slower", PLAIN, slowness::slow),
    fault!("F13", "5 % of all packets lost", NET, network::loss),
    fault!("F16", "rolling update of everything", PLAIN, operations::rolling_update),
    fault!("F17", "rebalance, drain a worker, take it back", PLAIN, operations::placement),
    fault!("F18", "ten times more requests than can be served", OVERLOADED, pressure::overload),
    fault!("F19", "half of the clients vanish", PLAIN, pressure::vanishing_clients),
    fault!("F20", "clients that read a byte a second", PLAIN, pressure::slow_readers),
    fault!("F22", "less cache than sequences need", SMALL_CACHE, pressure::small_cache),
    fault!("F23", "an expert worker with half a checkpoint", PLAIN, operations::broken_checkpoint),
];
