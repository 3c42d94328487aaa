//! Groups the rows of several frames by expert.
//!
//! All rows of a batch are one matrix x. A chunk lists, expert by expert, the rows of x to run it on, and says which
//! of the resulting rows make up which output. Neither the frames beside it nor the chunk that an output falls into
//! changes what is added to what.

use std::collections::BTreeMap;
use std::ops::Range;

use moesaic_dispatch::RequestFrame;
use moesaic_proto::ExpertId;

/// Outputs that are computed in one call of the kernels.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Experts ascending, each with the rows of x that it runs on. The kernels' result has a row for each, in this
    /// order.
    pub experts: Vec<(ExpertId, Vec<u32>)>,
    pub outputs: Vec<Target>,
    /// The outputs' terms, in order.
    pub terms: Vec<Source>,
}

/// One output of one frame.
#[derive(Debug)]
pub struct Target {
    pub frame: usize,
    /// Its number among the frame's outputs.
    pub output: usize,
    pub is_weighted: bool,
    /// In the chunk's terms.
    pub terms: Range<usize>,
}

/// One addend.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub weight: f32,
    /// The row of the kernels' result.
    pub row: u32,
}

/// Where each frame's rows begin in x: one after the other, unless there is one frame, whose activations are x as they
/// are.
pub fn row_bases(frames: &[&RequestFrame]) -> Vec<u32> {
    let mut next = 0;
    let base = |frame: &&RequestFrame| {
        let base = next;
        next += frame.row_count() as u32;
        base
    };
    frames.iter().map(base).collect()
}

/// Cuts the outputs of all frames, in order, into chunks of at most `terms_max` terms (an output is never cut).
pub fn chunks(frames: &[&RequestFrame], terms_max: usize) -> Vec<Chunk> {
    let bases = row_bases(frames);
    let mut chunks = Vec::new();
    let mut open = Open::default();
    for (number, frame) in frames.iter().enumerate() {
        for (output, (asked, terms)) in frame.outputs().enumerate() {
            if !open.terms.is_empty() && open.terms.len() + terms.len() > terms_max {
                chunks.push(std::mem::take(&mut open).close());
            }
            let row =
                if frames.len() == 1 { frame.position(asked.row()) } else { bases[number] + u32::from(asked.row()) };
            let start = open.terms.len();
            for term in terms {
                open.add(row, term.expert(), term.weight());
            }
            let terms = start..open.terms.len();
            open.outputs.push(Target { frame: number, output, is_weighted: asked.is_weighted(), terms });
        }
    }
    if !open.terms.is_empty() {
        chunks.push(open.close());
    }
    chunks
}

/// A chunk whose experts are not all known yet.
#[derive(Default)]
struct Open {
    experts: BTreeMap<ExpertId, Vec<u32>>,
    outputs: Vec<Target>,
    /// Expert, place among its rows, weight.
    terms: Vec<(ExpertId, u32, f32)>,
}

impl Open {
    fn add(&mut self, row: u32, expert: ExpertId, weight: f32) {
        let rows = self.experts.entry(expert).or_default();
        self.terms.push((expert, rows.len() as u32, weight));
        rows.push(row);
    }

    fn close(self) -> Chunk {
        let mut starts = BTreeMap::new();
        let mut next = 0;
        for (expert, rows) in &self.experts {
            starts.insert(*expert, next);
            next += rows.len() as u32;
        }
        let source = |(expert, place, weight)| Source { weight, row: starts[&expert] + place };
        let terms = self.terms.into_iter().map(source).collect();
        Chunk { experts: self.experts.into_iter().collect(), outputs: self.outputs, terms }
    }
}

#[cfg(test)]
mod tests;
