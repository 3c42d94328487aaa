//! What the decoder asks of whatever computes its layers: a micro-batch's residual stream h, and what each layer adds to it.
//!
//! ```text
//! h = embed(tokens)
//! each layer:   h = h + mla(norm(h));  x = norm(h);  h = h + ffn(x)                      in a dense layer
//!                                                    h = h + (experts(x) + shared(x))    in one with experts
//! logits = head(norm(h))
//! ```
//! h, x and what is made of them stay in the micro-batch's buffers, wherever those are.

use moesaic_dispatch::{Addends, Rows};
use moesaic_kernels::cuda::{GpuBytes, Split};
use moesaic_kernels::{Choice, Draw, GateParams};
use moesaic_model::Config;

use crate::core::batcher::Part;

pub trait Arithmetic {
    /// What a micro-batch is computed in, kept from step to step.
    type Buffers;
    /// Of the device: after one it computes nothing more.
    type Failure: std::error::Error + Send + Sync + 'static;
    /// Whether a device does what is queued here, beside the processor.
    const QUEUES: bool;

    fn config(&self) -> &Config;
    fn gate_params(&self) -> &GateParams;
    /// The caller is the thread that computes.
    fn pin_caller(&self);
    fn buffers(&self) -> Result<Self::Buffers, Self::Failure>;

    fn embed(&self, parts: &[Part], b: &mut Self::Buffers) -> Result<(), Self::Failure>;
    /// h = h + mla(norm(h)). The rows' latents go to their pages.
    fn attend(&self, layer: usize, parts: &[Part], b: &mut Self::Buffers) -> Result<(), Self::Failure>;
    /// x = norm(h)
    fn norm(&self, layer: usize, b: &mut Self::Buffers) -> Result<(), Self::Failure>;
    /// Has the device choose the experts that each row of x goes to, if there is one.
    fn gate(&self, _layer: usize, _b: &mut Self::Buffers) -> Result<(), Self::Failure> {
        Ok(())
    }
    /// Has it split the rows of x by what it chooses, if it has room.
    fn split(&self, _split: &Split<'_>, _b: &mut Self::Buffers) -> Result<Option<GpuBytes>, Self::Failure> {
        Ok(None)
    }
    /// Has it send them here, and x, unless that `stays`.
    fn fetch(&self, _stays: bool, _b: &mut Self::Buffers) -> Result<(), Self::Failure> {
        Ok(())
    }
    /// Whether what was fetched has come.
    fn has_come(&self, _b: &Self::Buffers) -> Result<bool, Self::Failure> {
        Ok(true)
    }
    /// Appends the experts that each row of x goes to, once they have come.
    fn choose(&self, layer: usize, b: &mut Self::Buffers, choices: &mut Vec<Choice>) -> Result<(), Self::Failure>;
    /// x, for experts; after [`Arithmetic::choose`], where it was said whether it stays.
    fn rows<'a>(&'a self, stays: bool, b: &'a mut Self::Buffers) -> Rows<'a>;
    /// ffn(x), or shared(x) if there is any.
    fn dense(&self, layer: usize, b: &mut Self::Buffers) -> Result<(), Self::Failure>;
    /// h = h + what the layer's `dense` made, and experts(x).
    fn add(&self, layer: usize, experts: Option<Experts<'_>>, b: &mut Self::Buffers) -> Result<(), Self::Failure>;
    /// Of some rows, after the last layer, the tokens that are drawn, or the logits.
    fn read(&self, asked: &[Asked], b: &mut Self::Buffers) -> Result<Reading, Self::Failure>;
}

/// What makes up experts(x), and where the processor may add it up: [rows, hidden].
pub struct Experts<'a> {
    pub addends: Addends,
    pub room: &'a mut [f32],
}

impl<'a> Experts<'a> {
    /// experts(x)
    pub fn added_up(self) -> &'a mut [f32] {
        self.addends.add_up(self.room);
        self.room
    }
}

/// A row that is read after the last layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Of the micro-batch.
    pub row: usize,
    /// If a token is to be drawn.
    pub draw: Option<Draw>,
    /// Whether its logits are wanted, whatever is drawn.
    pub logits: bool,
}

/// What rows were read as.
#[derive(Debug)]
pub struct Reading {
    /// A row's token, where the arithmetic draws, and its logits are not wanted.
    pub tokens: Vec<Option<u32>>,
    /// Of the other rows, in order: [rows, vocabulary].
    pub logits: Vec<f32>,
}

pub fn tokens(parts: &[Part]) -> impl Iterator<Item = u32> {
    parts.iter().flat_map(|part| part.tokens.iter().copied())
}

/// Every row's part and position.
pub fn positions(parts: &[Part]) -> impl Iterator<Item = (&Part, usize)> {
    parts.iter().flat_map(|part| (part.start..part.start + part.tokens.len()).map(move |position| (part, position)))
}
