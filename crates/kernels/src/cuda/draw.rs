//! Drawing tokens where the logits are: `cuda/draw.cu`.

use bytemuck::{Pod, Zeroable};

use super::gpu::{Device, GpuError, Kernel, View};
use crate::draw::{Draw, Edit};

/// A [`Draw`] as the kernel has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Drawn {
    random: u64,
    top_p: u64,
    least_weight: u64,
    temperature: f32,
    top_k: u32,
    first_edit: u32,
    edits: u32,
}

impl Drawn {
    /// Its edits begin at `first_edit` of the call's.
    pub fn new(draw: &Draw, first_edit: usize) -> Self {
        Self {
            random: draw.random,
            top_p: draw.nucleus().unwrap_or(u64::MAX),
            least_weight: draw.least(),
            temperature: draw.temperature,
            top_k: u32::try_from(draw.top_k).unwrap_or(u32::MAX),
            first_edit: first_edit as u32,
            edits: draw.edits.len() as u32,
        }
    }
}

/// Queues the drawing of a token of each row of logits [rows, vocabulary], as [`crate::draw`] does; changes the logits.
/// Edits are of the vocabulary, and where their draws say.
pub fn draw(
    device: &Device,
    vocabulary: usize,
    logits: View<'_, f32>,
    draws: View<'_, Drawn>,
    edits: View<'_, Edit>,
    tokens: View<'_, u32>,
) -> Result<(), GpuError> {
    let rows = draws.len();
    let call = DrawCall {
        logits: logits.of_len(rows * vocabulary),
        draws: draws.of_len(rows),
        edits: edits.of_len(edits.len()),
        rows: rows as u32,
        vocabulary: vocabulary as u32,
        tokens: tokens.of_len(rows),
    };
    // SAFETY: the views are as large as the kernel takes them to be, if edits are what they should.
    unsafe { device.queue_launch(DRAW, &call) }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DrawCall {
    logits: u64,
    draws: u64,
    edits: u64,
    rows: u32,
    vocabulary: u32,
    tokens: u64,
}

const DRAW: Kernel = Kernel { name: "draw_tokens", threads: 1024, blocks_each: 1 };
pub(super) const KERNELS: [Kernel; 1] = [DRAW];
