//! What a GPU can do at most, measured: the roofs that speeds are held against.

use std::time::{Duration, Instant};

use super::gpu::{Device, GpuError};
use super::rows::random_bf16;

/// Rates of one GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuRoof {
    /// Bytes a second that a large copy reads and writes.
    pub copy: f64,
    /// Multiply-adds a second of a large product of bf16 by the vendor's library, where that is installed.
    pub fma: Option<f64>,
}

/// What is copied: far more than caches hold.
const COPY_BYTES: usize = 1 << 30;
/// Rows and columns of the product.
const PRODUCT: usize = 8192;
const ROUNDS: u32 = 20;

impl GpuRoof {
    pub fn measure(device: &Device) -> Result<Self, GpuError> {
        let (n, copy) = (PRODUCT as f64, copy_rate(device)?);
        let values = |seed| random_bf16(device, PRODUCT * PRODUCT, 1.0, seed);
        let (x, y, z) = (values(1)?, values(2)?, values(3)?);
        let time = time_of(device, ROUNDS, || device.queue_vendor_product(PRODUCT, &x, &y, &z)).ok();
        Ok(Self { copy, fma: time.map(|time| n * n * n / time.as_secs_f64()) })
    }
}

fn copy_rate(device: &Device) -> Result<f64, GpuError> {
    let (from, to) = (device.zeros::<u8>(COPY_BYTES)?, device.zeros::<u8>(COPY_BYTES)?);
    let time = time_of(device, ROUNDS, || device.queue_copy(&to, &from))?;
    Ok(2.0 * COPY_BYTES as f64 / time.as_secs_f64())
}

/// Of one of `rounds` that are queued one after the other, after as many that are not measured.
pub fn time_of(
    device: &Device,
    rounds: u32,
    mut queue: impl FnMut() -> Result<(), GpuError>,
) -> Result<Duration, GpuError> {
    let mut all = || (0..rounds).try_for_each(|_| queue());
    all()?;
    device.finish()?;
    let start = Instant::now();
    all()?;
    device.finish()?;
    Ok(start.elapsed() / rounds)
}
