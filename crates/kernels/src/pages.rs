use crate::Numerics;
pub const PAGE_TOKENS: usize = 64;
/// The latent cache: for each layer `pages` pages of PAGE_TOKENS x (latent + rope) values.
#[derive(Debug)]
pub struct LatentPages {}
impl LatentPages {
    pub fn new(_n: Numerics, _layers: usize, _pages: usize, _latent: usize, _rope: usize) -> Self {
        Self {}
    }
    /// Bytes of one page over all layers.
    pub fn page_bytes(_n: Numerics, _layers: usize, _latent: usize, _rope: usize) -> usize {
        unimplemented!()
    }
    pub fn bytes(&self) -> usize {
        unimplemented!()
    }
    pub fn write(&mut self, _layer: usize, _page: u32, _slot: usize, _latent: &[f32], _k_pe: &[f32]) {
        unimplemented!()
    }
}
