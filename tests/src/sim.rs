//! The whole cluster in one thread: the decisions of all roles as the product has them, on a clock, a network and an etcd
//! that are simulated, under faults drawn from a seed. A seed is one history; the same seed is the same history.
//!
//! After every event nothing wrong may have happened: a token that is not the model's own, a position twice or out of
//! order, a sum that lacks something, a placement of an older term, a request that ends with an error. Then everything
//! heals, and within a bounded time every request must have ended well and the cluster must be whole again.
//!
//! Reading order: `model` (tokens that are hashes), `net` (processes, streams, links), `etcd` and `registry`, the roles
//! (`client`, `coordinator`, `attention` with `dispatch`, `expert`, and the `lane` between those), `faults`.

mod attention;
mod client;
mod coordinator;
mod dispatch;
mod etcd;
mod expert;
pub mod faults;
mod lane;
mod messages;
mod model;
mod net;
mod registry;
mod report;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use moesaic_node::{Member, handshake};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;

use attention::Attention;
use client::Client;
use coordinator::Coordinator;
use etcd::Etcd;
use expert::Expert;
use faults::{Change, Fault};
use net::{Context, Input, Net, Node, Weather};
pub use report::{Report, run_all};

/// From the first request to the time when everything heals.
const STORM: Duration = Duration::from_secs(12);
/// What the requests that are left may take after that.
const REQUESTS_MAX: Duration = Duration::from_secs(45);
/// What being whole again may take after that: workers are waited for, loaded, and an old placement is let go.
const WHOLE_MAX: Duration = Duration::from_secs(60);

/// What a seed decides about a cluster.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    coordinators: u8,
    attention: u8,
    experts: u8,
    clients: u8,
    replicas: usize,
    pages: u32,
    chunk: usize,
    prompt_max: usize,
    tokens_max: usize,
    /// Whether a process that starts again has another address.
    moves: bool,
    weather: Weather,
    faults: Vec<Fault>,
}

/// What came of a history without violations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub requests: usize,
    pub tokens: usize,
    /// Streams that went on after a break.
    pub resumed: usize,
    pub events: u64,
    pub faults: usize,
    pub placements: usize,
    /// Slots and failures of lanes that were sent.
    pub slots: u64,
    pub lane_failures: u64,
    /// Of all that happened, in order.
    pub hash: u64,
}

/// A history in which something went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    pub at: Duration,
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, at, what } = self;
        write!(f, "seed {seed}, at {:.3} s: {what}\nreplay: ", at.as_secs_f64())?;
        write!(f, "cargo run --release -p moesaic-tests --bin sim -- --seed {seed} --trace")
    }
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
        let is_rough = rng.u32(0..3) == 0;
        let mut chance = |most: u32| if is_rough { rng.u32(0..=most) } else { 0 };
        let (late, lost, twice) = (chance(200), chance(10), chance(500));
        let weather = Weather {
            delay_min: Duration::from_micros(100),
            delay_max: Duration::from_micros(rng.u64(200..3_000)),
            late,
            lost,
            twice,
        };
        let mut plan = Self {
            seed,
            coordinators: rng.u8(1..=3),
            attention: rng.u8(1..=3),
            experts: rng.u8(2..=5),
            clients: rng.u8(2..=6),
            replicas: rng.usize(1..=2),
            pages: rng.u32(6..=24),
            chunk: rng.usize(8..=64),
            prompt_max: rng.usize(1..=120),
            tokens_max: rng.usize(8..=80),
            moves: rng.bool(),
            weather,
            faults: Vec::new(),
        };
        plan.faults = faults::draw(&plan, &mut rng);
        plan
    }

    fn nodes(&self) -> impl Iterator<Item = Node> + use<> {
        let Self { coordinators, attention, experts, clients, .. } = *self;
        let coordinators = (0..coordinators).map(Node::Coordinator);
        let workers = (0..attention).map(Node::Attention).chain((0..experts).map(Node::Expert));
        [Node::Etcd].into_iter().chain(coordinators).chain(workers).chain((0..clients).map(Node::Client))
    }
}

/// "e0:3" is the third process at expert worker 0's place, "e0:0" whoever is there.
fn address(node: Node, incarnation: Option<u32>) -> String {
    format!("{node:?}:{}", incarnation.unwrap_or(0))
}

fn node_of(address: &str) -> (Node, Option<u32>) {
    let (place, incarnation) = address.split_once(':').expect("addresses are made here");
    let number = place[1..].parse().expect("addresses are made here");
    let node = match &place[..1] {
        "c" => Node::Coordinator(number),
        "a" => Node::Attention(number),
        _ => Node::Expert(number),
    };
    let incarnation = incarnation.parse().expect("addresses are made here");
    (node, Some(incarnation).filter(|incarnation| *incarnation > 0))
}

/// The cluster.
struct World {
    plan: Plan,
    net: Net,
    etcd: Etcd,
    coordinators: BTreeMap<u8, Coordinator>,
    attention: BTreeMap<u8, Attention>,
    experts: BTreeMap<u8, Expert>,
    clients: BTreeMap<u8, Client>,
    events: u64,
    hash: u64,
    trace: bool,
}

/// Runs the history of a plan; with `trace`, every event is printed.
pub fn run(plan: Plan, trace: bool) -> Result<Outcome, Failure> {
    let mut world = World::new(plan, trace);
    world.run().map_err(|what| Failure { seed: world.plan.seed, at: world.net.now, what })?;
    let clients = world.clients.values();
    Ok(Outcome {
        requests: clients.clone().map(|client| client.completed).sum(),
        tokens: clients.clone().map(|client| client.tokens).sum(),
        resumed: clients.map(|client| client.resumed).sum(),
        events: world.events,
        faults: world.plan.faults.len(),
        placements: world.etcd.published.len(),
        slots: world.net.slots,
        lane_failures: world.net.lane_failures,
        hash: world.hash,
    })
}

impl World {
    fn new(plan: Plan, trace: bool) -> Self {
        let mut world = Self {
            net: Net::new(plan.seed, plan.weather),
            etcd: Etcd::default(),
            coordinators: BTreeMap::new(),
            attention: BTreeMap::new(),
            experts: BTreeMap::new(),
            clients: BTreeMap::new(),
            events: 0,
            hash: 0,
            trace,
            plan,
        };
        let nodes: Vec<Node> = world.plan.nodes().collect();
        nodes.into_iter().for_each(|node| world.start(node));
        world
    }

    fn run(&mut self) -> Result<(), String> {
        let mut changes = faults::changes(&self.plan.faults);
        changes.sort_by_key(|(at, _)| *at);
        for (at, change) in changes {
            self.run_until(at, |_| false)?;
            self.change(&change);
        }
        self.run_until(STORM, |_| false)?;
        self.heal();
        self.clients.values_mut().for_each(|client| client.is_ending = true);
        let is_served = |world: &Self| world.clients.values().all(Client::is_done);
        let mut is_done = false;
        while !is_done && self.net.now < STORM + REQUESTS_MAX {
            let next = self.net.now + Duration::from_millis(500);
            is_done = self.run_until(next, is_served)?;
            self.restart();
        }
        if !is_done {
            let waiting: Vec<String> = self.clients.values().filter_map(Client::waits_for).collect();
            return Err(format!("all is well again, and still waiting are {}", waiting.join("; ")));
        }
        let until = self.net.now + WHOLE_MAX;
        while let Some(lacking) = self.lacks() {
            if self.net.now >= until {
                return Err(format!("all is well again, and still {lacking}"));
            }
            let next = self.net.now + Duration::from_millis(500);
            self.run_until(next, |_| false)?;
            self.restart();
        }
        Ok(())
    }

    /// False if time ran out before it was `over`.
    fn run_until(&mut self, until: Duration, over: impl Fn(&Self) -> bool) -> Result<bool, String> {
        while !over(self) {
            let Some((node, incarnation, input)) = self.net.next(until) else {
                self.net.now = self.net.now.max(until);
                return Ok(over(self));
            };
            self.events += 1;
            self.note(node, &input);
            self.handle(node, incarnation, input);
            if let Some(violation) = self.net.violations.first() {
                return Err(violation.clone());
            }
        }
        Ok(true)
    }

    /// The history so far as a number, and as lines.
    fn note(&mut self, node: Node, input: &Input) {
        let kind = match input {
            Input::Started => 1,
            Input::Message { stream, .. } => 2 + stream.0 * 4,
            Input::Broken { stream } => 3 + stream.0 * 4,
            Input::Timer(timer) => 4 + timer.1 * 4,
        };
        let node_number = format!("{node:?}").bytes().fold(0, |hash, byte| hash * 131 + u64::from(byte));
        for number in [self.net.now.as_nanos() as u64, node_number, kind] {
            self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if self.trace {
            println!("{:10.6} {node:?} {input:?}", self.net.now.as_secs_f64());
        }
    }

    fn handle(&mut self, node: Node, incarnation: u32, input: Input) {
        let Self { net, etcd, coordinators, attention, experts, clients, .. } = self;
        net.handle(node, incarnation, |context| match node {
            Node::Etcd => etcd.on(context, input),
            Node::Coordinator(n) => with(coordinators, n, |role| role.on(context, input)),
            Node::Attention(n) => with(attention, n, |role| role.on(context, input)),
            Node::Expert(n) => with(experts, n, |role| role.on(context, input)),
            Node::Client(n) => with(clients, n, |role| role.on(context, input)),
        });
    }

    /// Starts a process anew.
    fn start(&mut self, node: Node) {
        let incarnation = self.net.start(node);
        let Plan { seed, moves, .. } = self.plan;
        let member = |role: Role, id: &WorkerId, on: &str| {
            let hello = handshake::hello("sim", role, id, "", "");
            let hello = moesaic_proto::v1::Hello { incarnation: u64::from(incarnation), ..hello };
            Member::new(hello, id.clone(), address(node, moves.then_some(incarnation)), Some(on))
        };
        let id = WorkerId::new(&format!("{node:?}")).expect("a node's name is an id");
        let Self { net, plan, coordinators, attention, experts, clients, .. } = self;
        net.handle(node, incarnation, |context| match node {
            Node::Etcd => {}
            Node::Coordinator(n) => {
                coordinators.insert(n, Coordinator::new(id.clone(), usize::from(plan.experts), plan.replicas));
                let member = member(Role::Coordinator, &id, id.as_str());
                with(coordinators, n, |role| role.start(context, member));
            }
            Node::Attention(n) => {
                attention.insert(n, Attention::new(id.clone(), plan.pages, plan.chunk));
                let member = member(Role::AttentionWorker, &id, id.as_str());
                with(attention, n, |role| role.start(context, member));
            }
            Node::Expert(n) => {
                experts.insert(n, Expert::new(id.clone()));
                let member = member(Role::ExpertWorker, &id, id.as_str());
                with(experts, n, |role| role.start(context, member));
            }
            Node::Client(n) => {
                let name = format!("r{n}-{incarnation}");
                let seed = name.bytes().fold(seed, |seed, byte| seed.wrapping_mul(31) ^ u64::from(byte));
                let client = Client::new(name, plan.coordinators, seed, plan.prompt_max, plan.tokens_max);
                clients.insert(n, client);
            }
        });
    }

    fn change(&mut self, change: &Change) {
        if self.trace && !matches!(change, Change::Start(node) if !self.net.is_down(*node)) {
            println!("{:10.6} === {change:?}", self.net.now.as_secs_f64());
        }
        match *change {
            Change::Crash(node) => self.net.crash(node),
            Change::Start(node) => {
                if self.net.is_down(node) {
                    self.start(node);
                }
            }
            Change::Freeze(node) => self.net.freeze(node),
            Change::Thaw(node) => self.net.thaw(node),
            Change::Cut(from, to) => self.net.cut(from, to),
            Change::Heal(from, to) => self.net.heal(from, to),
            Change::Stop(node) => self.tell(node, |world, context| match node {
                Node::Expert(n) => with(world.experts, n, |role| role.stop(context)),
                Node::Attention(n) => with(world.attention, n, |role| role.stop(context)),
                _ => {}
            }),
            Change::Slow(n, times) => with(&mut self.experts, n, |role| role.slowness = times),
            Change::Compact => self.etcd.compact(),
            Change::Rebalance => self.coordinators.values_mut().for_each(Coordinator::rebalance),
            Change::Cordon(node, cordon) => {
                let role = if matches!(node, Node::Attention(_)) { Role::AttentionWorker } else { Role::ExpertWorker };
                let id = WorkerId::new(&format!("{node:?}")).expect("a node's name is an id");
                self.tell(Node::Etcd, |world, context| world.etcd.set_cordon(context, role, id.clone(), cordon));
            }
        }
    }

    /// Has a process that runs do something from outside.
    fn tell(&mut self, node: Node, what: impl FnOnce(&mut Parts<'_>, &mut Context<'_>)) {
        if !self.net.is_running(node) {
            return;
        }
        let incarnation = self.net.incarnation(node);
        let Self { net, etcd, attention, experts, .. } = self;
        net.handle(node, incarnation, |context| what(&mut Parts { etcd, attention, experts }, context));
    }

    /// Ends all faults.
    fn heal(&mut self) {
        let nodes: Vec<Node> = self.plan.nodes().collect();
        for &from in &nodes {
            nodes.iter().for_each(|&to| self.net.heal(from, to));
            self.net.thaw(from);
            if let Node::Expert(n) = from {
                with(&mut self.experts, n, |role| role.slowness = 1);
            }
        }
        self.restart();
        for node in nodes.into_iter().filter(|node| matches!(node, Node::Expert(_) | Node::Attention(_))) {
            self.change(&Change::Cordon(node, None));
        }
        self.net.weather = Weather { late: 0, lost: 0, twice: 0, ..self.net.weather };
    }

    /// Starts what does not run.
    fn restart(&mut self) {
        self.plan.nodes().for_each(|node| self.change(&Change::Start(node)));
    }

    /// What keeps the cluster from being whole and idle.
    fn lacks(&self) -> Option<String> {
        if let Some(node) = self.plan.nodes().find(|node| !self.net.is_running(*node)) {
            return Some(format!("{node:?} does not run"));
        }
        let Some(placement) = self.etcd.placement() else { return Some("nothing is placed".into()) };
        let epoch = placement.epoch();
        for (layer, expert, holders) in placement.experts_of_layers() {
            let live = holders.iter().filter(|holder| {
                let id = &placement.workers()[**holder as usize];
                self.experts.values().any(|role| role.id == *id && role.holds(layer, expert))
            });
            let (live, wanted) = (live.count(), self.plan.replicas.min(usize::from(self.plan.experts)));
            if live < wanted {
                return Some(format!("layer {layer}, expert {expert} has {live} live holders of {wanted}"));
            }
        }
        for role in self.attention.values() {
            let (id, counts) = (&role.id, role.batcher.counts());
            if role.dispatch.epoch() != Some(epoch) || !role.dispatch.is_reachable(self.net.now) {
                return Some(format!("{id} uses {:?}, not {epoch}, or does not reach it", role.dispatch.epoch()));
            }
            if !role.is_idle() || role.dispatch.tracker.outstanding() > 0 {
                return Some(format!("{id} is at work for nobody: {counts:?}"));
            }
        }
        let busy = self.coordinators.values().find(|role| role.admission.sequences() > 0);
        busy.map(|role| format!("{} counts {} sequences", role.id, role.admission.sequences()))
    }
}

/// What is told something from outside.
struct Parts<'a> {
    etcd: &'a mut Etcd,
    attention: &'a mut BTreeMap<u8, Attention>,
    experts: &'a mut BTreeMap<u8, Expert>,
}

fn with<T>(roles: &mut BTreeMap<u8, T>, number: u8, what: impl FnOnce(&mut T)) {
    if let Some(role) = roles.get_mut(&number) {
        what(role);
    }
}
