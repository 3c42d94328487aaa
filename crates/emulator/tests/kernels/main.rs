//! The kernels against plain loops with fresh inputs: on the emulator, or on the GPU that MOESAIC_TEST_DEVICE names.
#![allow(clippy::unwrap_used)]

mod attention;
mod bytes;
mod draw;
mod experts;
mod linear;
mod rows;
mod split;
mod support;
