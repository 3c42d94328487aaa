use crate::{LatentPages, Pool};
/// One query row: `q` is [heads, latent + rope] (absorbed nope part, then roped part); attends to positions 0..context.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    pub q: &'a [f32],
    pub pages: &'a [u32],
    pub context: usize,
}
/// out [rows, heads, latent]
pub fn mla_attend(
    _pool: &Pool,
    _cache: &LatentPages,
    _layer: usize,
    _queries: &[Query<'_>],
    _heads: usize,
    _scale: f32,
    _out: &mut [f32],
) {
    unimplemented!()
}
