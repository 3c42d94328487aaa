//! The load of each expert, from what the attention workers have counted: rows since their start, asked for at intervals.

use std::collections::BTreeMap;

use moesaic_proto::v1::ExpertLoadResponse;
use moesaic_proto::{LayerId, WorkerId};

use super::placement::planner::Load;

/// Weight of the newest interval.
const NEWEST: f64 = 0.2;

#[derive(Default)]
pub struct ExpertLoad {
    last: BTreeMap<WorkerId, ExpertLoadResponse>,
    /// Rows of the interval that is being read.
    rows: Load,
    smoothed: Load,
}

impl ExpertLoad {
    /// What a worker has counted. Counts that have begun anew, with its process, are taken as they are.
    pub fn take(&mut self, worker: &WorkerId, counted: ExpertLoadResponse) {
        let last = self.last.get(worker).filter(|last| last.incarnation == counted.incarnation);
        for layer in &counted.layers {
            let Ok(id) = u8::try_from(layer.layer) else { continue };
            let before = last.and_then(|last| last.layers.iter().find(|l| l.layer == layer.layer));
            let sum = self.rows.entry(LayerId(id)).or_default();
            sum.resize(sum.len().max(layer.rows.len()), 0.0);
            for (expert, rows) in layer.rows.iter().enumerate() {
                let before = before.and_then(|before| before.rows.get(expert)).copied().unwrap_or(0);
                sum[expert] += rows.saturating_sub(before) as f64;
            }
        }
        self.last.insert(worker.clone(), counted);
    }

    /// All workers have been read: the interval is over. One without rows changes nothing.
    pub fn end_interval(&mut self) {
        let rows = std::mem::take(&mut self.rows);
        if rows.values().flatten().all(|rows| *rows == 0.0) {
            return;
        }
        for (layer, rows) in rows {
            let smoothed = self.smoothed.entry(layer).or_insert_with(|| rows.clone());
            smoothed.resize(rows.len(), 0.0);
            smoothed.iter_mut().zip(rows).for_each(|(old, new)| *old += NEWEST * (new - *old));
        }
    }

    /// Rows an interval, by layer and expert; empty until something was counted.
    pub fn smoothed(&self) -> &Load {
        &self.smoothed
    }
}

#[cfg(test)]
mod tests {
    use moesaic_proto::v1::LayerLoad;

    use super::*;

    fn counted(incarnation: u64, rows: &[u64]) -> ExpertLoadResponse {
        ExpertLoadResponse { layers: vec![LayerLoad { layer: 3, rows: rows.to_vec() }], incarnation }
    }

    #[test]
    fn counts_are_read_as_differences_of_each_worker_and_smoothed() {
        let (a, b) = (WorkerId::new("a").unwrap(), WorkerId::new("b").unwrap());
        let mut load = ExpertLoad::default();
        load.end_interval();
        assert!(load.smoothed().is_empty());
        load.take(&a, counted(1, &[10, 0]));
        load.take(&b, counted(1, &[5, 5]));
        load.end_interval();
        assert_eq!(load.smoothed()[&LayerId(3)], [15.0, 5.0]);
        load.take(&a, counted(1, &[20, 0]));
        // A new process counts from 0.
        load.take(&b, counted(2, &[0, 5]));
        load.end_interval();
        assert_eq!(load.smoothed()[&LayerId(3)], [14.0, 5.0]);
        load.take(&a, counted(1, &[20, 0]));
        load.end_interval();
        assert_eq!(load.smoothed()[&LayerId(3)], [14.0, 5.0], "nothing ran");
    }
}
