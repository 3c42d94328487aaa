//! A worker's experts where they are computed, on this processor or on a GPU.

use std::borrow::Cow;
use std::sync::Arc;

use moesaic_dispatch::{Activations, RequestFrame};
use moesaic_kernels::cuda::{Device, Experts as GpuExperts, GpuError, GpuFfn, Output, Workspace};
use moesaic_kernels::{Backend, Ffn, Pool, RowsRef, bf16, combine_first, combine_next, grouped_experts};
use moesaic_model::packed::Experts as Packed;
use moesaic_model::{Checkpoint, ModelError};
use moesaic_proto::ExpertId;

use crate::core::batch::{Chunk, Target};

/// An expert where it is computed.
#[derive(Clone, Debug)]
pub enum Expert {
    Cpu(Arc<Ffn>),
    Gpu(Arc<GpuFfn>),
}

impl Expert {
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(ffn) => ffn.bytes(),
            Self::Gpu(ffn) => ffn.bytes(),
        }
    }
}

/// Takes experts from the checkpoint to where they are computed.
pub enum Loader<'c> {
    Cpu(Packed<'c>),
    Gpu(&'c Checkpoint, Device),
}

impl<'c> Loader<'c> {
    pub fn of(backend: &Backend, checkpoint: &'c Checkpoint) -> Result<Self, ModelError> {
        Ok(match backend {
            Backend::Cpu(numerics, _) => Self::Cpu(Packed::open(checkpoint, *numerics)?),
            Backend::Gpu(device) => Self::Gpu(checkpoint, device.clone()),
        })
    }

    /// The expert, and how many bytes of the checkpoint it is.
    pub fn get(&self, layer: usize, expert: usize) -> Result<(Expert, u64), ModelError> {
        match self {
            Self::Cpu(packed) => packed.get(layer, expert).map(|(ffn, bytes)| (Expert::Cpu(Arc::new(ffn)), bytes)),
            Self::Gpu(checkpoint, device) => {
                let block = checkpoint.expert(layer, expert)?;
                let loaded = GpuFfn::load(device, &block.gate, &block.up, &block.down);
                let ffn = loaded.map_err(|error| {
                    ModelError::file(checkpoint.dir(), format!("layer {layer}, expert {expert}: {error}"))
                })?;
                checkpoint.release(block.matrices());
                Ok((Expert::Gpu(Arc::new(ffn)), block.bytes()))
            }
        }
    }
}

/// What calls are computed in, one at a time.
#[derive(Debug)]
pub enum Scratch {
    Cpu(Pool, Vec<f32>),
    Gpu(Box<Workspace>),
}

impl Scratch {
    pub fn of(backend: &Backend) -> Self {
        match backend {
            Backend::Cpu(_, pool) => Self::Cpu(pool.clone(), Vec::new()),
            Backend::Gpu(device) => Self::Gpu(Box::new(Workspace::new(device.clone()))),
        }
    }

    /// Computes a chunk's outputs into `answers`, by the additions of rule 1(c). `expert` finds those of the chunk.
    pub fn compute<'e>(
        &mut self,
        chunk: &Chunk,
        expert: impl Fn(ExpertId) -> &'e Expert,
        x: &Input<'_>,
        hidden: usize,
        answers: &mut [Vec<f32>],
    ) -> Result<(), GpuError> {
        match self {
            Self::Cpu(pool, results) => {
                let groups: Vec<(&Ffn, &[u32])> = groups(chunk, expert, |expert| match expert {
                    Expert::Cpu(ffn) => Some(&**ffn),
                    Expert::Gpu(_) => None,
                });
                results.resize(chunk.terms.len() * hidden, 0.0);
                grouped_experts(pool, &groups, x.rows(), results);
                add_up(chunk, results, hidden, answers);
            }
            Self::Gpu(workspace) => {
                let groups: Vec<(&GpuFfn, &[u32])> = groups(chunk, expert, |expert| match expert {
                    Expert::Gpu(ffn) => Some(&**ffn),
                    Expert::Cpu(_) => None,
                });
                // A single expert's row is wanted as it is.
                let weight = |target: &Target, weight: f32| if target.is_weighted { weight } else { 1.0 };
                let mut terms = Vec::with_capacity(chunk.terms.len());
                for target in &chunk.outputs {
                    let own = chunk.terms[target.terms.clone()].iter();
                    terms.extend(own.map(|term| (term.row, weight(target, term.weight))));
                }
                let outputs: Vec<Output<'_>> =
                    chunk.outputs.iter().map(|target| Output { terms: &terms[target.terms.clone()] }).collect();
                let sums = GpuExperts { groups: &groups, x: &x.bf16(), outputs: &outputs }.run(workspace)?;
                for (target, sum) in chunk.outputs.iter().zip(sums.chunks_exact(hidden)) {
                    answers[target.frame][target.output * hidden..][..hidden].copy_from_slice(sum);
                }
            }
        }
        Ok(())
    }
}

fn groups<'c, 'e: 'c, T>(
    chunk: &'c Chunk,
    expert: impl Fn(ExpertId) -> &'e Expert,
    own: impl Fn(&'e Expert) -> Option<&'e T>,
) -> Vec<(&'e T, &'c [u32])> {
    let one = |(id, rows): &'c (ExpertId, Vec<u32>)| {
        (own(expert(*id)).expect("a worker's experts are all where it computes"), &rows[..])
    };
    chunk.experts.iter().map(one).collect()
}

/// All rows of a batch: one frame's activations as they are, or those of several one after the other.
pub enum Input<'a> {
    Shared(&'a Activations),
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl<'a> Input<'a> {
    pub fn of(frames: &[&'a RequestFrame], hidden: usize) -> Self {
        match (frames, frames[0].activations()) {
            ([_], activations) => Self::Shared(activations),
            (_, Activations::F32(_)) => Self::F32(gather(frames, hidden, |frame| match frame.activations() {
                Activations::F32(values) => values,
                Activations::Bf16(_) => &[],
            })),
            (_, Activations::Bf16(_)) => Self::Bf16(gather(frames, hidden, |frame| match frame.activations() {
                Activations::Bf16(values) => values,
                Activations::F32(_) => &[],
            })),
        }
    }

    fn rows(&self) -> RowsRef<'_> {
        match self {
            Self::Shared(Activations::F32(values)) => RowsRef::F32(values),
            Self::Shared(Activations::Bf16(values)) => RowsRef::Bf16(values),
            Self::F32(values) => RowsRef::F32(values),
            Self::Bf16(values) => RowsRef::Bf16(values),
        }
    }

    fn bf16(&self) -> Cow<'_, [bf16]> {
        match self.rows() {
            RowsRef::Bf16(values) => Cow::Borrowed(values),
            RowsRef::F32(values) => values.iter().map(|x| bf16::from_f32(*x)).collect(),
        }
    }
}

fn gather<'a, T: Copy + 'a>(
    frames: &[&'a RequestFrame],
    hidden: usize,
    values: impl Fn(&'a RequestFrame) -> &'a [T],
) -> Vec<T> {
    let mut x = Vec::with_capacity(frames.iter().map(|frame| frame.row_count() * hidden).sum());
    for frame in frames {
        let values = values(frame);
        for row in 0..frame.row_count() {
            x.extend_from_slice(&values[frame.position(row as u16) as usize * hidden..][..hidden]);
        }
    }
    x
}

/// The outputs of a chunk from its experts' results, by the additions of rule 1(c).
fn add_up(chunk: &Chunk, results: &[f32], hidden: usize, answers: &mut [Vec<f32>]) {
    let row = |row: u32| &results[row as usize * hidden..][..hidden];
    for target in &chunk.outputs {
        let y = &mut answers[target.frame][target.output * hidden..][..hidden];
        let terms = &chunk.terms[target.terms.clone()];
        let (first, rest) = terms.split_first().expect("an output has at least one term");
        if !target.is_weighted {
            y.copy_from_slice(row(first.row));
            continue;
        }
        combine_first(y, first.weight, row(first.row));
        for term in rest {
            combine_next(y, term.weight, row(term.row));
        }
    }
}
