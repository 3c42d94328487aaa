//! Steps of a plan that give every expert its copies: blocks at first, later what is missing, and a newcomer's share.

use std::cmp::Reverse;
use std::collections::VecDeque;

use super::draft::Draft;
use super::planner::EVEN;

/// Loads closer than this count as the same, so that rounding decides nothing.
const LOAD_STEPS: f64 = 1e6;

/// For hosts that can take a further copy.
struct Search {
    /// Copies that every expert is to have. Nobody is moved to fewer nodes than that for it.
    copies: usize,
    /// On a node that has none yet.
    apart: bool,
    /// Hosts of searches that failed: others would end there in vain too.
    stuck: Vec<bool>,
}

impl Search {
    fn new(copies: usize, apart: bool, hosts: usize) -> Self {
        Self { copies, apart, stuck: vec![false; hosts] }
    }
}

impl Draft {
    /// As many copies of everything as there is room for, in blocks: the hosts stand along a line on which all experts
    /// follow each other `copies` times, each host for a stretch of its share. A node's stretch is no longer than once
    /// all experts, so that no expert meets it twice. With one copy, and hosts alike, expert e of E is on host e * M /
    /// E.
    pub fn lay_out(&mut self) {
        let (experts, layers) = (self.experts(), self.layers.len());
        let slots: usize = self.hosts.iter().map(|host| host.slots).sum();
        let copies = self.replicas.min(slots / (experts * layers));
        let mut order: Vec<usize> = (0..self.hosts.len()).filter(|host| self.hosts[*host].slots > 0).collect();
        if copies > 1 {
            order.sort_by_key(|host| self.hosts[*host].node);
        } else {
            order.truncate(experts);
        }
        for layer in 0..layers {
            let room: Vec<f64> =
                order.iter().map(|host| self.allowance(*host, layers - layer).min(experts) as f64).collect();
            let (mut begin, mut sum) = (0, 0.0);
            for (host, share) in order.iter().zip(self.shares(&order, &room, (experts * copies) as f64)) {
                sum += share;
                let end = ((sum - 1e-6).ceil() as usize).min(experts * copies);
                for expert in (begin..end).map(|position| position % experts) {
                    if self.may_add(layer, expert, *host, true) {
                        self.add(layer, expert, *host);
                    }
                }
                begin = end;
            }
        }
    }

    /// Slots that a host can spend on each of so many layers.
    fn allowance(&self, host: usize, layers: usize) -> usize {
        self.hosts[host].free.max(0).unsigned_abs().div_ceil(layers)
    }

    /// How many of `total` copies of a layer each host takes: in proportion to its weight, at most its room, and at
    /// most all experts for each node. Less than `total` where that is all there is.
    fn shares(&self, order: &[usize], room: &[f64], total: f64) -> Vec<f64> {
        let experts = self.experts() as f64;
        let by = |level: f64| {
            let mut shares: Vec<f64> =
                order.iter().zip(room).map(|(host, room)| (level * self.hosts[*host].weight).min(*room)).collect();
            let mut of_node = vec![0.0; self.hosts.len()];
            order.iter().zip(&shares).for_each(|(host, share)| of_node[self.hosts[*host].node] += share);
            for (host, share) in order.iter().zip(&mut shares) {
                *share *= (experts / of_node[self.hosts[*host].node]).min(1.0);
            }
            shares
        };
        let lightest = order.iter().map(|host| self.hosts[*host].weight).fold(f64::INFINITY, f64::min);
        // The level at which they sum up to the total, by halving.
        let (mut low, mut high) = (0.0, experts / lightest);
        for _ in 0..64 {
            let level = (low + high) / 2.0;
            if by(level).iter().sum::<f64>() < total { low = level } else { high = level }
        }
        by(high)
    }

    /// Takes copies off hosts that hold too much: of the experts with most copies first, then of the coldest. True if
    /// there are any.
    pub fn shed(&mut self) -> bool {
        let overfull: Vec<usize> = (0..self.hosts.len()).filter(|host| self.hosts[*host].free < 0).collect();
        for host in &overfull {
            let rank = |(l, e): &(usize, usize)| (Reverse(self.layers[*l].holders[*e].len()), self.heat(*l, *e));
            let mut copies: Vec<(usize, usize)> = self.copies_on(*host).collect();
            copies.sort_by_key(rank);
            for (layer, expert) in copies.into_iter().take(self.hosts[*host].free.unsigned_abs()) {
                self.remove(layer, expert, *host);
            }
        }
        !overfull.is_empty()
    }

    /// Adds the copies that are missing: one of everything first, then second ones, and so on; the hottest experts
    /// first, and on different nodes first. Copies beyond that make room. True if anything has changed.
    pub fn fill(&mut self) -> bool {
        let mut has_changed = false;
        for copies in 1..=self.replicas.min(self.hosts.len()) {
            let lacks = |(layer, expert): &(usize, usize)| self.layers[*layer].holders[*expert].len() < copies;
            let mut missing: Vec<(usize, usize)> = self.all().filter(lacks).collect();
            // By expert before layer, so that few slots spread over the layers.
            missing.sort_by(|a, b| {
                let load = |(layer, expert): (usize, usize)| self.layers[layer].load[expert];
                load(*b).total_cmp(&load(*a)).then((a.1, a.0).cmp(&(b.1, b.0)))
            });
            let wanted = missing.len();
            self.add_each(&mut missing, &mut Search::new(copies, true, self.hosts.len()));
            if copies <= self.nodes {
                has_changed |= self.part_copies(&mut Search::new(copies, true, self.hosts.len()));
            }
            self.add_each(&mut missing, &mut Search::new(copies, false, self.hosts.len()));
            has_changed |= missing.len() < wanted;
        }
        has_changed
    }

    /// Adds a copy of each expert that a host can be found for, and keeps the others.
    fn add_each(&mut self, missing: &mut Vec<(usize, usize)>, search: &mut Search) {
        missing.retain(|(layer, expert)| {
            let host = self.find_host(*layer, *expert, search);
            if let Some(host) = host {
                self.add(*layer, *expert, host);
            }
            host.is_none()
        });
    }

    /// Moves copies that share a node to others, of experts that stand on fewer nodes than they could with `copies`.
    /// True if there are any.
    fn part_copies(&mut self, search: &mut Search) -> bool {
        let mut has_moved = false;
        for (layer, expert) in self.all() {
            for host in self.layers[layer].holders[expert].clone().into_iter().rev().map(|host| host as usize) {
                let spread = self.spread(layer, expert);
                if spread >= search.copies || self.spread_without(layer, expert, host) < spread {
                    continue;
                }
                // Its own slot can be part of the exchange.
                self.hosts[host].free += 1;
                let to = self.find_host(layer, expert, search);
                self.hosts[host].free -= 1;
                if let Some(to) = to {
                    self.relocate(layer, expert, host, to);
                    has_moved = true;
                }
            }
        }
        has_moved
    }

    /// A host with room for a further copy, the one that ends up least loaded; among equals the one that has most of
    /// the expert's group, then the one with most room. If none has room, others' copies move until one has.
    fn find_host(&mut self, layer: usize, expert: usize, search: &mut Search) -> Option<usize> {
        let it = &self.layers[layer];
        let share = it.load[expert] / (it.holders[expert].len() + 1) as f64;
        let group = expert / self.group_size;
        let rank = |host: &usize| {
            let place = &self.hosts[*host];
            let load = ((it.loads[*host] + share / place.weight) * LOAD_STEPS).round() as i64;
            let near = it.held[*host].iter().filter(|held| **held / self.group_size == group).count();
            (load, Reverse(near), Reverse(place.free))
        };
        let may = (0..self.hosts.len()).filter(|host| self.may_add(layer, expert, *host, search.apart));
        let best = may.filter(|host| self.hosts[*host].free > 0).min_by_key(rank);
        best.or_else(|| self.make_room(layer, expert, search))
    }

    /// Frees a slot on a host that may take a copy, by the shortest chain of moves that ends where there is room, or a
    /// copy beyond those that everybody is to have (an augmenting path).
    fn make_room(&mut self, layer: usize, expert: usize, search: &mut Search) -> Option<usize> {
        let may = |host: &usize| !search.stuck[*host] && self.may_add(layer, expert, *host, search.apart);
        let mut targets: Vec<usize> = (0..self.hosts.len()).filter(may).collect();
        targets
            .sort_by_cached_key(|host| self.spare_copy(*host, search.copies, &[]).map_or(i64::MAX, |(heat, ..)| heat));
        let mut seen = search.stuck.clone();
        targets.iter().for_each(|host| seen[*host] = true);
        // For each host that was reached: the copy (layer, expert) that would come to it, and from which host.
        let mut came: Vec<Option<(usize, usize, usize)>> = vec![None; self.hosts.len()];
        let mut queue = VecDeque::from(targets);
        while let Some(from) = queue.pop_front() {
            // An expert takes part once, so that the moves do not change what each other may do.
            let mut taken = vec![(layer, expert)];
            let mut host = from;
            while let Some((layer, expert, from)) = came[host] {
                taken.push((layer, expert));
                host = from;
            }
            if let Some((_, layer, expert)) = self.spare_copy(from, search.copies, &taken) {
                self.remove(layer, expert, from);
                return Some(self.follow(&came, from));
            }
            // What can go to no host of a node need not be tried with each of them.
            let mut leaves: Vec<Option<bool>> = vec![None; self.hosts.len()];
            for to in 0..self.hosts.len() {
                if seen[to] && self.hosts[to].free <= 0 {
                    continue;
                }
                let node = self.hosts[to].node;
                let may_leave = |(l, e): (usize, usize)| self.may_leave(l, e, from, node, search.copies);
                if !*leaves[node].get_or_insert_with(|| self.copies_on(from).any(may_leave)) {
                    continue;
                }
                let may = |(l, e): &(usize, usize)| self.may_move(*l, *e, from, to, search.copies);
                let movable = self.copies_on(from).find(|copy| may(copy) && !taken.contains(copy));
                let Some((layer, expert)) = movable else { continue };
                came[to] = Some((layer, expert, from));
                if self.hosts[to].free > 0 {
                    return Some(self.follow(&came, to));
                }
                seen[to] = true;
                queue.push_back(to);
            }
        }
        search.stuck = seen;
        None
    }

    /// The coldest copy (its load, layer and expert) on a host that leaves the expert with so many others, on as many
    /// nodes; of experts that are not `taken`.
    fn spare_copy(&self, host: usize, copies: usize, taken: &[(usize, usize)]) -> Option<(i64, usize, usize)> {
        let is_spare =
            |copy: &(usize, usize)| self.is_spare(copy.0, copy.1, host, copies, f64::INFINITY) && !taken.contains(copy);
        self.copies_on(host).filter(is_spare).map(|(layer, expert)| (self.heat(layer, expert), layer, expert)).min()
    }

    /// What a copy carries, as a number that can be ordered.
    fn heat(&self, layer: usize, expert: usize) -> i64 {
        (self.layers[layer].share(expert) * LOAD_STEPS) as i64
    }

    /// Makes the moves that lead to a host, the last first; returns the host where they begin, which has room then.
    fn follow(&mut self, came: &[Option<(usize, usize, usize)>], mut to: usize) -> usize {
        while let Some((layer, expert, from)) = came[to] {
            self.relocate(layer, expert, from, to);
            to = from;
        }
        to
    }

    /// Gives hosts that have nothing their share of every layer: from the most loaded hosts, until they have nearly the
    /// mean. True if anything was given.
    pub fn share_with(&mut self, idle: &[usize]) -> bool {
        let (layers, mut has_given) = (self.layers.len(), false);
        for layer in 0..layers {
            for to in idle {
                for _ in 0..self.allowance(*to, layers - layer) {
                    if self.layers[layer].loads[*to] >= 2.0 - EVEN || !self.give(layer, *to) {
                        break;
                    }
                    has_given = true;
                }
            }
        }
        has_given
    }

    /// Moves the copy of the most loaded host that can give one to `to`, which brings the two closest to each other.
    fn give(&mut self, layer: usize, to: usize) -> bool {
        let it = &self.layers[layer];
        let mut from: Vec<usize> = (0..self.hosts.len()).filter(|host| it.loads[*host] > it.loads[to]).collect();
        from.sort_by(|a, b| it.loads[*b].total_cmp(&it.loads[*a]));
        let best = from.into_iter().find_map(|from| {
            let after = |expert: usize| {
                let share = it.share(expert);
                (it.loads[from] - share / self.hosts[from].weight).max(it.loads[to] + share / self.hosts[to].weight)
            };
            let may =
                it.held[from].iter().filter(|expert| self.may_move(layer, **expert, from, to, self.spread_goal()));
            let pays = may.map(|expert| (*expert, after(*expert))).filter(|(_, after)| *after < it.loads[from] - 1e-6);
            pays.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(expert, _)| (expert, from))
        });
        best.map(|(expert, from)| self.relocate(layer, expert, from, to)).is_some()
    }
}
