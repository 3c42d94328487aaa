//! Steps of a plan that even out the load: moves and exchanges off a layer's most loaded host, and further copies.

use super::draft::{Draft, Layer};
use super::planner::{EVEN, EVEN_GOAL, MOVE_PAYS};

/// Loads this close are the same: rounding decides nothing.
const LEAST: f64 = 1e-9;

/// Experts of the most loaded host that are tried for a further copy.
const CANDIDATES: usize = 2;

/// A copy that leaves the most loaded host, and the one that comes back for it.
struct Step {
    expert: usize,
    to: usize,
    back: Option<usize>,
    /// What the more loaded of the two hosts is relieved of, less the price of the moves.
    profit: f64,
}

impl Draft {
    /// Evens out every layer whose greatest load is above `trigger`, as long as each copy that moves takes `pays` off
    /// it. Where that is not enough, the most loaded experts get further copies, the most uneven layers first; they
    /// share the free slots. True if anything has changed.
    pub fn balance(&mut self, trigger: f64, pays: f64) -> bool {
        let (mut has_changed, none) = (false, vec![false; self.hosts.len()]);
        for layer in 0..self.layers.len() {
            if self.layers[layer].peak() > trigger + LEAST {
                has_changed |= self.relieve(layer, EVEN_GOAL, pays, &none) > 0;
            }
        }
        loop {
            let is_uneven = |layer: &Layer| layer.is_measured && layer.peak() > EVEN + LEAST;
            let mut uneven: Vec<usize> = (0..self.layers.len()).filter(|l| is_uneven(&self.layers[*l])).collect();
            uneven.sort_by(|a, b| self.layers[*b].peak().total_cmp(&self.layers[*a].peak()));
            let slots = self.free().div_ceil(uneven.len().max(1));
            let mut has_copied = false;
            for layer in uneven {
                has_copied |= self.copy_hot(layer, slots, pays);
            }
            if !has_copied {
                return self.trim() || has_changed;
            }
            has_changed = true;
        }
    }

    /// Takes load off the hosts above a level, other than those `spared`: the most loaded one first, whichever that is,
    /// until there is none or it cannot be relieved at this price. Returns the moves.
    fn relieve(&mut self, layer: usize, level: f64, pays: f64, spared: &[bool]) -> usize {
        let mut moves = 0;
        loop {
            let it = &self.layers[layer];
            let above = (0..self.hosts.len()).filter(|host| it.loads[*host] > level + LEAST && !spared[*host]);
            let Some(from) = above.max_by(|a, b| it.loads[*a].total_cmp(&it.loads[*b])) else { return moves };
            let Some(step) = self.best_step(layer, from, pays) else { return moves };
            self.relocate(layer, step.expert, from, step.to);
            moves += 1;
            if let Some(back) = step.back {
                self.relocate(layer, back, step.to, from);
                moves += 1;
            }
        }
    }

    /// The step that takes most off a host, the price of its moves deducted.
    fn best_step(&self, layer: usize, from: usize, pays: f64) -> Option<Step> {
        let (it, spread) = (&self.layers[layer], self.spread_goal());
        let mut best: Option<Step> = None;
        for &expert in &it.held[from] {
            for to in (0..self.hosts.len()).filter(|to| it.loads[*to] < it.loads[from] - pays) {
                if !self.may_move(layer, expert, from, to, spread) {
                    continue;
                }
                let alone = (self.hosts[to].free > 0).then_some(None);
                for back in alone.into_iter().chain(it.held[to].iter().copied().map(Some)) {
                    let share = it.share(expert) - back.map_or(0.0, |back| it.share(back));
                    let after = (it.loads[from] - share / self.hosts[from].weight)
                        .max(it.loads[to] + share / self.hosts[to].weight);
                    let profit = it.loads[from] - after - if back.is_some() { 2.0 * pays } else { pays };
                    if profit > best.as_ref().map_or(LEAST, |best| best.profit)
                        && back.is_none_or(|back| self.may_move(layer, back, to, from, spread))
                    {
                        best = Some(Step { expert, to, back, profit });
                    }
                }
            }
        }
        best
    }

    /// Gives hot experts further copies, in up to so many free slots. Takes back those at the end that have not lowered
    /// the greatest load. True if some stay.
    fn copy_hot(&mut self, layer: usize, slots: usize, pays: f64) -> bool {
        let mut best = (self.hosts.clone(), self.layers[layer].clone());
        let (mut has_changed, none) = (false, vec![false; self.hosts.len()]);
        let free = self.free();
        while self.layers[layer].peak() > EVEN + LEAST && free - self.free() < slots.max(1) {
            if !self.copy_hottest(layer, pays) {
                break;
            }
            self.relieve(layer, EVEN_GOAL, pays, &none);
            if self.layers[layer].peak() <= best.1.peak() - MOVE_PAYS {
                best = (self.hosts.clone(), self.layers[layer].clone());
                has_changed = true;
            }
        }
        (self.hosts, self.layers[layer]) = best;
        has_changed
    }

    /// Gives one of the experts with most load for each copy, of those on the most loaded host, a further copy, and
    /// makes the moves that this asks for. Taken back unless it pays, and fewer hosts are as loaded as that one was.
    fn copy_hottest(&mut self, layer: usize, pays: f64) -> bool {
        let before = (self.hosts.clone(), self.layers[layer].clone());
        let it = &before.1;
        let (from, peak) = (it.hottest(), it.peak());
        let level = peak - MOVE_PAYS;
        let crowd = |layer: &Layer| layer.loads.iter().filter(|load| **load > level).count();
        let as_loaded: Vec<bool> = (0..self.hosts.len()).map(|host| host != from && it.loads[host] > level).collect();
        let mut experts = it.held[from].clone();
        experts.sort_by(|a, b| it.share(*b).total_cmp(&it.share(*a)));
        for expert in experts.into_iter().take(CANDIDATES) {
            let to = self.host_for_copy(layer, expert, true).or_else(|| self.host_for_copy(layer, expert, false));
            let Some((to, spare)) = to else { continue };
            if let Some(spare) = spare {
                self.remove(layer, spare, to);
            }
            self.add(layer, expert, to);
            let moves = 1 + self.relieve(layer, level, pays, &as_loaded);
            let now = &self.layers[layer];
            if now.peak() <= peak && crowd(now) < crowd(it) && peak - now.loads[from] >= pays * moves as f64 {
                return true;
            }
            (self.hosts, self.layers[layer]) = before.clone();
        }
        false
    }

    /// The least loaded host that can take a further copy, and the copy that it drops for it if it has no free slot.
    fn host_for_copy(&self, layer: usize, expert: usize, apart: bool) -> Option<(usize, Option<usize>)> {
        let it = &self.layers[layer];
        let share = it.load[expert] / (it.holders[expert].len() + 1) as f64;
        let mut hosts: Vec<usize> =
            (0..self.hosts.len()).filter(|host| self.may_add(layer, expert, *host, apart)).collect();
        let after = |host: usize| it.loads[host] + share / self.hosts[host].weight;
        hosts.sort_by(|a, b| after(*a).total_cmp(&after(*b)));
        let limit = EVEN.max(it.peak() - MOVE_PAYS);
        let spare = |host: usize| {
            it.held[host].iter().copied().find(|expert| self.is_spare(layer, *expert, host, self.replicas, limit))
        };
        let free = hosts.iter().copied().find(|host| self.hosts[*host].free > 0).map(|host| (host, None));
        free.or_else(|| hosts.iter().find_map(|host| spare(*host).map(|spare| (*host, Some(spare)))))
    }

    /// Drops copies beyond `replicas` where a layer is even enough without them.
    fn trim(&mut self) -> bool {
        let mut has_changed = false;
        for layer in 0..self.layers.len() {
            while self.layers[layer].peak() <= EVEN_GOAL {
                let it = &self.layers[layer];
                let copies =
                    (0..self.experts()).flat_map(|e| it.holders[e].iter().map(move |host| (e, *host as usize)));
                let Some((expert, host)) =
                    copies.into_iter().find(|(e, host)| self.is_spare(layer, *e, *host, self.replicas, EVEN_GOAL))
                else {
                    break;
                };
                self.remove(layer, expert, host);
                has_changed = true;
            }
        }
        has_changed
    }
}
