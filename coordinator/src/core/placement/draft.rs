//! A plan in the making: who holds what, how much room and load that gives, and the changes that keep both up to date.
//! Layers, experts and hosts are indices here.

use super::planner::{Goal, Host};

#[derive(Clone)]
pub(super) struct Draft {
    pub hosts: Vec<Place>,
    pub layers: Vec<Layer>,
    pub group_size: usize,
    pub replicas: usize,
    /// Nodes that have slots.
    pub nodes: usize,
}

/// A host, as far as it matters here.
#[derive(Clone)]
pub(super) struct Place {
    pub node: usize,
    pub weight: f64,
    pub slots: usize,
    /// Slots that are free; negative while it holds too much.
    pub free: isize,
}

#[derive(Clone)]
pub(super) struct Layer {
    /// By expert; their sum is the sum of the hosts' weights.
    pub load: Vec<f64>,
    /// False if the load is not known, and taken as even.
    pub is_measured: bool,
    /// expert -> hosts
    pub holders: Vec<Vec<u32>>,
    /// host -> experts, ascending
    pub held: Vec<Vec<usize>>,
    /// host -> its load over the mean: the holders of an expert share its load evenly.
    pub loads: Vec<f64>,
}

impl Draft {
    /// Nothing is placed. `load` gives each layer's rows by expert.
    pub fn new<'a>(goal: &Goal<'_>, hosts: &[&Host], load: impl Iterator<Item = Option<&'a [f64]>>) -> Self {
        let mut names: Vec<&str> = hosts.iter().map(|host| host.node.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let has_slots: Vec<&&Host> = hosts.iter().filter(|host| host.slots > 0).collect();
        let weight: f64 = has_slots.iter().map(|host| host.weight).sum();
        let nodes = names.iter().filter(|name| has_slots.iter().any(|host| host.node == **name)).count();
        let layers: Vec<Layer> = load.map(|rows| Layer::new(rows, goal.experts, hosts.len(), weight)).collect();
        let place = |host: &&Host| {
            // More than everything is no room: copies of an expert stand on different hosts.
            let slots = host.slots.min(goal.experts * layers.len());
            let node = names.partition_point(|name| *name < host.node.as_str());
            Place { node, weight: host.weight, slots, free: slots as isize }
        };
        let hosts = hosts.iter().map(place).collect();
        let group_size = goal.experts.div_ceil(goal.groups.max(1));
        Self { hosts, layers, group_size, replicas: goal.replicas.max(1), nodes }
    }

    pub fn experts(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.load.len())
    }

    pub fn copies(&self) -> usize {
        self.layers.iter().flat_map(|layer| &layer.holders).map(Vec::len).sum()
    }

    /// Slots that are free, of hosts that do not hold too much.
    pub fn free(&self) -> usize {
        self.hosts.iter().map(|host| host.free.max(0).unsigned_abs()).sum()
    }

    /// Hosts that hold nothing.
    pub fn idle(&self) -> Vec<usize> {
        let is_idle = |host: &usize| self.layers.iter().all(|layer| layer.held[*host].is_empty());
        (0..self.hosts.len()).filter(is_idle).collect()
    }

    /// Every expert of every layer.
    pub fn all(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let experts = self.experts();
        (0..self.layers.len()).flat_map(move |layer| (0..experts).map(move |expert| (layer, expert)))
    }

    /// What a host holds, as (layer, expert).
    pub fn copies_on(&self, host: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.layers
            .iter()
            .enumerate()
            .flat_map(move |(l, layer)| layer.held[host].iter().map(move |expert| (l, *expert)))
    }

    pub fn add(&mut self, layer: usize, expert: usize, host: usize) {
        self.hosts[host].free -= 1;
        self.layers[layer].holders[expert].push(host as u32);
        self.layers[layer].hold(host, expert);
        self.weigh(layer, expert, None);
    }

    pub fn remove(&mut self, layer: usize, expert: usize, host: usize) {
        self.hosts[host].free += 1;
        self.layers[layer].holders[expert].retain(|holder| *holder as usize != host);
        self.layers[layer].held[host].retain(|held| *held != expert);
        self.weigh(layer, expert, Some(host));
    }

    /// Moves one copy; the new holder takes the old one's turn.
    pub fn relocate(&mut self, layer: usize, expert: usize, from: usize, to: usize) {
        self.hosts[from].free += 1;
        self.hosts[to].free -= 1;
        let it = &mut self.layers[layer];
        it.holders[expert].iter_mut().filter(|holder| **holder as usize == from).for_each(|holder| *holder = to as u32);
        it.held[from].retain(|held| *held != expert);
        it.hold(to, expert);
        self.weigh(layer, expert, Some(from));
    }

    /// Sums the load of the expert's holders anew, and of one more host. Whole sums, so that they do not
    /// depend on the way that led here.
    fn weigh(&mut self, layer: usize, expert: usize, host: Option<usize>) {
        let it = &mut self.layers[layer];
        for host in it.holders[expert].iter().map(|holder| *holder as usize).chain(host) {
            it.loads[host] = it.held[host].iter().map(|e| it.share(*e)).sum::<f64>() / self.hosts[host].weight;
        }
    }

    /// Nodes that an expert's copies stand on.
    pub fn spread(&self, layer: usize, expert: usize) -> usize {
        self.spread_without(layer, expert, usize::MAX)
    }

    /// The same, not counting the copy on one host.
    pub fn spread_without(&self, layer: usize, expert: usize, host: usize) -> usize {
        let others = || self.holders_but(layer, expert, host).map(|holder| self.hosts[holder].node);
        others().enumerate().filter(|(i, node)| others().take(*i).all(|other| other != *node)).count()
    }

    /// Nodes that an expert's copies should stand on.
    pub fn spread_goal(&self) -> usize {
        self.replicas.min(self.nodes)
    }

    /// Whether a copy may move between two hosts: at most one copy on a host, and nodes as in `may_leave`.
    pub fn may_move(&self, layer: usize, expert: usize, from: usize, to: usize, spread: usize) -> bool {
        !self.layers[layer].holders[expert].contains(&(to as u32))
            && self.may_leave(layer, expert, from, self.hosts[to].node, spread)
    }

    /// Whether a copy may go to another node: where the expert stood on up to `spread` nodes, it must stand on no
    /// fewer.
    pub fn may_leave(&self, layer: usize, expert: usize, from: usize, to_node: usize, spread: usize) -> bool {
        let mut nodes = self.holders_but(layer, expert, from).map(|other| self.hosts[other].node);
        nodes.clone().all(|node| node != to_node)
            || nodes.any(|node| node == self.hosts[from].node)
            || self.spread_without(layer, expert, from) >= spread
    }

    /// Whether a host may get a further copy, room or not; `apart`: on a node that has none yet.
    pub fn may_add(&self, layer: usize, expert: usize, host: usize, apart: bool) -> bool {
        let mut holders = self.holders_but(layer, expert, usize::MAX);
        holders.all(|holder| holder != host && !(apart && self.hosts[holder].node == self.hosts[host].node))
    }

    fn holders_but(&self, layer: usize, expert: usize, host: usize) -> impl Iterator<Item = usize> + Clone + '_ {
        self.layers[layer].holders[expert].iter().map(|holder| *holder as usize).filter(move |holder| *holder != host)
    }

    /// Whether an expert has `copies` without this one, on as many nodes or on no fewer than with it, and no other
    /// holder's load goes above the limit.
    pub fn is_spare(&self, layer: usize, expert: usize, host: usize, copies: usize, limit: f64) -> bool {
        let it = &self.layers[layer];
        let left = it.holders[expert].len() - 1;
        if left < copies || self.spread_without(layer, expert, host) < self.spread(layer, expert).min(copies) {
            return false;
        }
        let rise = it.load[expert] / left as f64 - it.share(expert);
        let mut others = self.holders_but(layer, expert, host);
        others.all(|other| it.loads[other] + rise / self.hosts[other].weight <= limit)
    }

    /// Experts with fewer copies than there should be, or on fewer nodes than there could be.
    pub fn under_replicated(&self) -> usize {
        let lacks = |(layer, expert): &(usize, usize)| {
            self.layers[*layer].holders[*expert].len() < self.replicas
                || self.spread(*layer, *expert) < self.spread_goal()
        };
        self.all().filter(lacks).count()
    }

    /// Copies that `before` did not have.
    pub fn moved_since(&self, before: &Draft) -> usize {
        let had = |layer: usize, expert: usize| &before.layers[layer].holders[expert];
        let new = |(layer, expert): (usize, usize)| {
            self.layers[layer].holders[expert].iter().filter(|holder| !had(layer, expert).contains(holder)).count()
        };
        self.all().map(new).sum()
    }

    /// The layers' mean of the greatest load.
    pub fn imbalance(&self) -> f64 {
        self.layers.iter().map(Layer::peak).sum::<f64>() / self.layers.len() as f64
    }
}

impl Layer {
    fn new(rows: Option<&[f64]>, experts: usize, hosts: usize, weight: f64) -> Self {
        let rows = rows.unwrap_or_default().iter().map(|rows| if rows.is_finite() { rows.max(0.0) } else { 0.0 });
        let rows: Vec<f64> = rows.collect();
        let sum: f64 = rows.iter().sum();
        let is_measured = sum.is_finite() && sum > 0.0;
        let load = match is_measured {
            true => rows.iter().map(|rows| rows / sum * weight).collect(),
            false => vec![weight / experts as f64; experts],
        };
        let (holders, held) = (vec![Vec::new(); experts], vec![Vec::new(); hosts]);
        Self { load, is_measured, holders, held, loads: vec![0.0; hosts] }
    }

    /// What one copy of the expert carries.
    pub fn share(&self, expert: usize) -> f64 {
        self.load[expert] / self.holders[expert].len() as f64
    }

    fn hold(&mut self, host: usize, expert: usize) {
        let held = &mut self.held[host];
        held.insert(held.partition_point(|other| *other < expert), expert);
    }

    /// The most loaded host.
    pub fn hottest(&self) -> usize {
        (0..self.loads.len())
            .fold(0, |hottest, host| if self.loads[host] > self.loads[hottest] { host } else { hottest })
    }

    pub fn peak(&self) -> f64 {
        self.loads[self.hottest()]
    }
}
