//! A worker's experts where they are computed, on this processor or on a GPU.

use std::borrow::Cow;
use std::sync::Arc;

use moesaic_dispatch::{Activations, Payload, RequestFrame, Values};
use moesaic_kernels::cuda::{Device, Experts as GpuExperts, GpuBytes, GpuError, GpuFfn, Output, Workspace, X};
use moesaic_kernels::{Backend, Ffn, Pool, RowsRef, bf16, combine_first, combine_next, grouped_experts};
use moesaic_model::packed::Experts as Packed;
use moesaic_model::{Checkpoint, ModelError};
use moesaic_proto::ExpertId;

use crate::core::batch::{self, Chunk, Target};

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

    /// What frames of one layer ask for, by the additions of rule 1(c). `expert` finds theirs. Rows that lie on the GPU are
    /// answered there, if it has room, before the answer is computed. One call of the kernels has at most `terms_max` terms.
    pub fn answers<'e>(
        &mut self,
        frames: &[&RequestFrame],
        expert: impl Fn(ExpertId) -> &'e Expert + Copy,
        hidden: usize,
        terms_max: usize,
    ) -> Result<Vec<Values>, GpuError> {
        let x = Input::of(frames, hidden, self.device())?;
        let chunks = batch::chunks(frames, terms_max);
        if let (Input::There(_), [chunk]) = (&x, &chunks[..])
            && let Some(sums) = self.compute_there(chunk, expert, &x)?
        {
            return Ok(parted(&sums, frames, hidden));
        }
        let mut answers: Vec<Vec<f32>> = frames.iter().map(|f| vec![0.0; f.output_count() * hidden]).collect();
        for chunk in &chunks {
            self.compute(chunk, expert, &x, hidden, &mut answers)?;
        }
        Ok(answers.into_iter().map(Values::from).collect())
    }

    /// Computes a chunk's outputs into `answers`.
    fn compute<'e>(
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
                let sums = with_call(chunk, expert, x, |call| call.run(workspace))?;
                for (target, sum) in chunk.outputs.iter().zip(sums.chunks_exact(hidden)) {
                    answers[target.frame][target.output * hidden..][..hidden].copy_from_slice(sum);
                }
            }
        }
        Ok(())
    }

    /// The same of a GPU's, where the outputs [outputs, hidden] stay; they may not be there yet. `None`: experts are not computed
    /// on one, or it has no room.
    fn compute_there<'e>(
        &mut self,
        chunk: &Chunk,
        expert: impl Fn(ExpertId) -> &'e Expert,
        x: &Input<'_>,
    ) -> Result<Option<GpuBytes>, GpuError> {
        let Self::Gpu(workspace) = self else { return Ok(None) };
        GpuError::if_room(with_call(chunk, expert, x, |call| call.run_there(workspace)))
    }

    /// Waits until what was answered is computed.
    pub fn finish(&mut self) -> Result<(), GpuError> {
        match self {
            Self::Cpu(..) => Ok(()),
            Self::Gpu(workspace) => workspace.finish(),
        }
    }

    /// Where experts are computed, if that is a GPU.
    fn device(&self) -> Option<&Device> {
        match self {
            Self::Cpu(..) => None,
            Self::Gpu(workspace) => Some(workspace.device()),
        }
    }
}

/// Each frame's answer, of those of all frames one after the other; brought here for those whose rows are here.
fn parted(sums: &GpuBytes, frames: &[&RequestFrame], hidden: usize) -> Vec<Values> {
    let own = sums.cut(frames.iter().map(|frame| frame.output_count() * hidden * size_of::<f32>()));
    let answer = |(frame, own): (&&RequestFrame, GpuBytes)| {
        let values = Values::There(own);
        if frame.activations().are_there() { values } else { values.brought().into() }
    };
    frames.iter().zip(own).map(answer).collect()
}

/// What a chunk is for a GPU.
fn with_call<'e, T>(
    chunk: &Chunk,
    expert: impl Fn(ExpertId) -> &'e Expert,
    x: &Input<'_>,
    run: impl FnOnce(GpuExperts<'_>) -> Result<T, GpuError>,
) -> Result<T, GpuError> {
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
    let here;
    let x = match x {
        Input::There(pieces) => X::There(pieces),
        _ => {
            here = x.bf16();
            X::Here(&here)
        }
    };
    run(GpuExperts { groups: &groups, x, outputs: &outputs })
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
    F32(Cow<'a, [f32]>),
    Bf16(Cow<'a, [bf16]>),
    /// On the GPU, in pieces.
    There(Vec<GpuBytes>),
}

impl<'a> Input<'a> {
    /// For experts that are computed on `device`, if they are on one.
    pub fn of(frames: &[&'a RequestFrame], hidden: usize, device: Option<&Device>) -> Result<Self, GpuError> {
        match (frames, frames[0].activations(), device) {
            (_, _, Some(device)) if frames.iter().any(|frame| frame.activations().are_there()) => {
                there(frames, hidden, device).map(Self::There)
            }
            ([_], Activations::F32(_), _) => f32s(frames[0].activations()).map(Self::F32),
            ([_], _, _) => bf16s(frames[0].activations()).map(Self::Bf16),
            (_, Activations::F32(_), _) => Ok(Self::F32(gather(frames, hidden, f32s)?.into())),
            _ => Ok(Self::Bf16(gather(frames, hidden, bf16s)?.into())),
        }
    }

    fn rows(&self) -> RowsRef<'_> {
        match self {
            Self::F32(values) => RowsRef::F32(values),
            Self::Bf16(values) => RowsRef::Bf16(values),
            Self::There(_) => RowsRef::Bf16(&[]),
        }
    }

    fn bf16(&self) -> Cow<'_, [bf16]> {
        match self.rows() {
            RowsRef::Bf16(values) => Cow::Borrowed(values),
            RowsRef::F32(values) => values.iter().map(|x| bf16::from_f32(*x)).collect(),
        }
    }
}

/// The rows of several frames, of their activations.
fn gather<'a, T: Copy + 'a>(
    frames: &[&'a RequestFrame],
    hidden: usize,
    values: impl Fn(&'a Activations) -> Result<Cow<'a, [T]>, GpuError>,
) -> Result<Vec<T>, GpuError> {
    let mut x = Vec::with_capacity(frames.iter().map(|frame| frame.row_count() * hidden).sum());
    for frame in frames {
        let values = values(frame.activations())?;
        for row in 0..frame.row_count() {
            x.extend_from_slice(&values[frame.position(row as u16) as usize * hidden..][..hidden]);
        }
    }
    Ok(x)
}

fn f32s(activations: &Activations) -> Result<Cow<'_, [f32]>, GpuError> {
    Ok(if let Activations::F32(values) = activations { Cow::Borrowed(values) } else { Cow::Borrowed(&[]) })
}

fn bf16s(activations: &Activations) -> Result<Cow<'_, [bf16]>, GpuError> {
    Ok(match activations {
        Activations::Bf16(values) => Cow::Borrowed(values),
        Activations::There(bytes) => bytes.read()?.into(),
        Activations::F32(_) => Cow::Borrowed(&[]),
    })
}

/// The rows of frames on the GPU, and those that are not there yet.
fn there(frames: &[&RequestFrame], hidden: usize, device: &Device) -> Result<Vec<GpuBytes>, GpuError> {
    let mut pieces = Vec::with_capacity(frames.len());
    for frame in frames {
        // One frame's rows are where its activations have them.
        match (frames, frame.activations()) {
            ([_], Activations::There(bytes)) => pieces.push(bytes.clone()),
            _ => match frame.rows(hidden) {
                Payload::There(own) => pieces.extend(own),
                Payload::Here(bytes) => pieces.push(GpuBytes::of(device, &bytes)?),
            },
        }
    }
    Ok(pieces)
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
