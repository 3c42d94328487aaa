//! The same operations on an NVIDIA GPU, in bf16: weights as the checkpoint has them (FP8 or BF16), rows in bf16, sums in f32.
//!
//! Reading order: `gpu` (what is asked of a GPU, and what its memory is), `device` (a real one, by the driver), `compile` (the
//! kernels of `cuda/*.cu`, made for it by NVRTC), `pack` (weights in the order in which its lanes read them), `grouped` (many
//! products at once), and what is made of them: `experts`, `linear`, `attention`, `rows`, `draw`; `bytes`, which several hold, and
//! `split`, for whom rows are; `lent`, what others have of the GPU; `late`, what goes back to the arena.
//!
//! Driver and NVRTC are opened when a GPU is asked for: nothing here needs them to be built, and a machine without them is told
//! what it lacks.

mod attention;
mod bytes;
mod choice;
mod compile;
mod device;
mod draw;
mod experts;
mod gpu;
mod grouped;
mod late;
mod lent;
mod linear;
mod mark;
mod pack;
mod pinned;
mod recording;
mod roof;
mod rows;
mod split;
mod vendor;

pub use attention::{Append, Attend, Pages, Rotate, append, attend, room, rotate};
pub use bytes::{Addend, GpuBytes, Kind, add_up, pick_rows};
pub use choice::{DeviceChoice, UnknownDevice};
pub use compile::{ARCHITECTURES, Compiled, Source, compile};
pub use device::{Missing, is_present};
pub use draw::{Drawn, draw};
pub use experts::{Experts, GpuFfn, NotLoaded, Output, Recorded, Sent, Workspace, X};
pub use gpu::{Address, Buffer, Device, Gpu, GpuError, Kernel, Launch, Parcel, Part, Properties, Returned, View};
pub use lent::{Lent, QUARTERS};
pub use linear::{GpuLinear, GpuPerHead, Strides};
pub use mark::Mark;
pub use pack::Unfit;
pub use roof::{GpuRoof, time_of};
pub use rows::{Normed, Routed, can_route, embed, gate, norm, random_bf16, route};
pub use split::{NOBODY, Split, split_rows};

/// All kernels, by the file that they are in.
pub fn kernels() -> [(Source, Vec<Kernel>); 5] {
    [
        (Source::Experts, experts::kernels()),
        (Source::Linear, linear::kernels()),
        (Source::Attention, attention::KERNELS.to_vec()),
        (Source::Rows, [&rows::KERNELS[..], &bytes::KERNELS, &[split::SPLIT]].concat()),
        (Source::Draw, draw::KERNELS.to_vec()),
    ]
}
