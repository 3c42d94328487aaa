//! Whose turn it is: dispatchers ask holder `r % n` of the n holders of an expert in call r, so the order of the
//! holders decides how even the single calls are.

use std::collections::BTreeMap;

use super::planner::EVEN;

/// Loads whose difference is rounding.
const LEAST: f64 = 1e-9;

/// Orders each expert's holders so that every worker has the same load in each turn, as nearly as possible.
///
/// `load[expert]` over the mean load of a worker. Experts with different numbers of holders are independent of each
/// other. Those of a group with the same holders take turns together unless that leaves some worker with more than
/// `EVEN` allows.
pub(super) fn arrange(holders: &mut [Vec<u32>], load: &[f64], weights: &[f64], group_size: usize) {
    let most = holders.iter().map(Vec::len).max().unwrap_or(0);
    for copies in 2..=most {
        let experts: Vec<usize> = (0..holders.len()).filter(|expert| holders[*expert].len() == copies).collect();
        let mut turns = Turns { copies, load: vec![0.0; copies * weights.len()], weights };
        for expert in &experts {
            for (turn, holder) in holders[*expert].iter().enumerate() {
                turns.add(*holder, turn, load[*expert]);
            }
        }
        let mut units: BTreeMap<(usize, &[u32]), Vec<usize>> = BTreeMap::new();
        for expert in &experts {
            units.entry((expert / group_size, &holders[*expert])).or_default().push(*expert);
        }
        let units: Vec<Vec<usize>> = units.into_values().collect();
        turns.settle(&units, holders, load);
        if turns.are_uneven() {
            let single: Vec<Vec<usize>> = experts.into_iter().map(|expert| vec![expert]).collect();
            turns.settle(&single, holders, load);
        }
    }
}

/// Loads of the experts that have `copies` holders, by worker and turn, over the worker's weight.
struct Turns<'a> {
    copies: usize,
    load: Vec<f64>,
    weights: &'a [f64],
}

impl Turns<'_> {
    fn add(&mut self, worker: u32, turn: usize, load: f64) {
        self.load[worker as usize * self.copies + turn] += load / self.weights[worker as usize];
    }

    /// Half of what the sum of squares grows by if the worker takes `load` in another turn.
    fn rise(&self, worker: u32, load: f64, from: usize, to: usize) -> f64 {
        let (row, load) = (worker as usize * self.copies, load / self.weights[worker as usize]);
        load * (self.load[row + to] - self.load[row + from] + load)
    }

    /// Exchanges turns between two holders of a unit (experts with the same holders) while that lowers the sum of
    /// squares.
    fn settle(&mut self, units: &[Vec<usize>], holders: &mut [Vec<u32>], load: &[f64]) {
        let mut has_changed = true;
        while std::mem::take(&mut has_changed) {
            for unit in units {
                let load: f64 = unit.iter().map(|expert| load[*expert]).sum();
                for (i, j) in (0..self.copies).flat_map(|j| (0..j).map(move |i| (i, j))) {
                    let (a, b) = (holders[unit[0]][i], holders[unit[0]][j]);
                    if self.rise(a, load, i, j) + self.rise(b, load, j, i) < -LEAST * load {
                        for (worker, from, to) in [(a, i, j), (b, j, i)] {
                            self.add(worker, from, -load);
                            self.add(worker, to, load);
                        }
                        unit.iter().for_each(|expert| holders[*expert].swap(i, j));
                        has_changed = true;
                    }
                }
            }
        }
    }

    fn are_uneven(&self) -> bool {
        self.load.chunks(self.copies).any(|turns| {
            let mean = turns.iter().sum::<f64>() / self.copies as f64;
            turns.iter().any(|load| load - mean > EVEN - 1.0)
        })
    }
}
