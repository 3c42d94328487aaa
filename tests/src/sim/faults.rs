//! What is done to a cluster: drawn from the seed, a few faults at a time, each with its end.

use std::time::Duration;

use moesaic_proto::v1::Cordon;

use super::net::Node;
use super::{Plan, STORM};

/// Something that begins and ends.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: Kind,
    pub from: Duration,
    pub to: Duration,
}

#[derive(Clone, Debug)]
pub enum Kind {
    /// A process dies, and another one starts in its place.
    Crash(Node),
    /// It does nothing for a while.
    Freeze(Node),
    /// Nothing comes through in one direction.
    OneWay(Node, Node),
    Cut(Node, Node),
    /// A node is cut from several others, one after the other, and heals in another order.
    Swizzle(Node, Vec<Node>, Vec<Node>),
    /// An expert worker computes so many times slower.
    Slow(u8, u32),
    /// A worker is told to end in good order, and another one starts in its place.
    Stop(Node),
    /// An operator has a worker empty.
    Drain(Node),
    Rebalance,
    /// etcd forgets its history.
    Compact,
}

/// One step of a fault.
#[derive(Clone, Debug)]
pub enum Change {
    Crash(Node),
    Start(Node),
    Freeze(Node),
    Thaw(Node),
    Cut(Node, Node),
    Heal(Node, Node),
    Slow(u8, u32),
    Stop(Node),
    Cordon(Node, Option<Cordon>),
    Rebalance,
    Compact,
}

pub fn draw(plan: &Plan, rng: &mut fastrand::Rng) -> Vec<Fault> {
    let count = if rng.u32(0..5) == 0 { rng.usize(7..=20) } else { rng.usize(0..=6) };
    (0..count).map(|_| draw_one(plan, rng)).collect()
}

fn draw_one(plan: &Plan, rng: &mut fastrand::Rng) -> Fault {
    let from = Duration::from_millis(rng.u64(0..STORM.as_millis() as u64 - 1_000));
    // Some are over before anybody can notice, most are noticed, some last.
    let lasts = [50..500, 500..4_000, 500..4_000, 3_000..12_000][rng.usize(0..4)].clone();
    let to = from + Duration::from_millis(rng.u64(lasts));
    let kind = match rng.u32(0..17) {
        0..=2 => Kind::Crash(any(plan, rng)),
        3..=4 => Kind::Freeze(any(plan, rng)),
        5 => Kind::OneWay(any(plan, rng), any(plan, rng)),
        6..=7 => Kind::Cut(any(plan, rng), any(plan, rng)),
        8 => {
            let node = any(plan, rng);
            let mut others: Vec<Node> = plan.nodes().filter(|other| *other != node).collect();
            rng.shuffle(&mut others);
            others.truncate(rng.usize(1..=others.len()));
            let mut back = others.clone();
            rng.shuffle(&mut back);
            Kind::Swizzle(node, others, back)
        }
        9..=10 => Kind::Slow(rng.u8(0..plan.experts), rng.u32(5..40)),
        11..=12 => Kind::Stop(worker(plan, rng)),
        13 => Kind::Drain(worker(plan, rng)),
        14 => Kind::Rebalance,
        // Its requests are nobody's any more.
        15 => Kind::Crash(Node::Client(rng.u8(0..plan.clients))),
        _ => Kind::Compact,
    };
    Fault { kind, from, to }
}

/// Any process but a client.
fn any(plan: &Plan, rng: &mut fastrand::Rng) -> Node {
    let nodes: Vec<Node> = plan.nodes().filter(|node| !matches!(node, Node::Client(_))).collect();
    nodes[rng.usize(0..nodes.len())]
}

fn worker(plan: &Plan, rng: &mut fastrand::Rng) -> Node {
    let nodes: Vec<Node> = plan.nodes().filter(|node| matches!(node, Node::Attention(_) | Node::Expert(_))).collect();
    nodes[rng.usize(0..nodes.len())]
}

/// The steps of all faults, each with its time.
pub fn changes(faults: &[Fault]) -> Vec<(Duration, Change)> {
    faults.iter().flat_map(steps).filter(|(at, _)| *at < STORM).collect()
}

fn steps(Fault { kind, from, to }: &Fault) -> Vec<(Duration, Change)> {
    let (from, to) = (*from, *to);
    let both = |a: Node, b: Node, change: fn(Node, Node) -> Change| [change(a, b), change(b, a)];
    match kind {
        &Kind::Crash(node) => vec![(from, Change::Crash(node)), (to, Change::Start(node))],
        &Kind::Freeze(node) => vec![(from, Change::Freeze(node)), (to, Change::Thaw(node))],
        &Kind::OneWay(a, b) => vec![(from, Change::Cut(a, b)), (to, Change::Heal(a, b))],
        &Kind::Cut(a, b) => {
            let cuts = both(a, b, Change::Cut).map(|change| (from, change));
            cuts.into_iter().chain(both(a, b, Change::Heal).map(|change| (to, change))).collect()
        }
        Kind::Swizzle(node, others, back) => {
            let each = (to - from) / (others.len() as u32 * 2);
            let cut = |(i, other): (usize, &Node)| {
                both(*node, *other, Change::Cut).map(|change| (from + each * i as u32, change))
            };
            let heal = |(i, other): (usize, &Node)| {
                both(*node, *other, Change::Heal).map(|change| (to - each * i as u32, change))
            };
            others.iter().enumerate().flat_map(cut).chain(back.iter().enumerate().flat_map(heal)).collect()
        }
        &Kind::Slow(expert, times) => vec![(from, Change::Slow(expert, times)), (to, Change::Slow(expert, 1))],
        &Kind::Stop(node) => vec![(from, Change::Stop(node)), (to, Change::Start(node))],
        &Kind::Drain(node) => {
            let cordon = Cordon { drain: true };
            vec![(from, Change::Cordon(node, Some(cordon))), (to, Change::Cordon(node, None))]
        }
        Kind::Rebalance => vec![(from, Change::Rebalance)],
        Kind::Compact => vec![(from, Change::Compact)],
    }
}
