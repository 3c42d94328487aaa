//! The latent cache: what attention remembers of each token, in pages. Owns the storage; which page is whose is decided elsewhere.

use crate::linear::bf16_bits;
use crate::{Dtype, Numerics};

/// Tokens of a page. Part of the numerics: attention merges page by page.
pub const PAGE_TOKENS: usize = 64;

/// [layers, pages, PAGE_TOKENS, latent + rope], f32 or (in `bf16-dp`) bf16.
#[derive(Debug)]
pub struct LatentPages {
    values: Values,
    layers: usize,
    pages: usize,
    pub(crate) latent: usize,
    pub(crate) rope: usize,
    by_pairs: bool,
}

#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    /// Bits of bf16.
    Bf16(Vec<u16>),
}

/// One page of one layer: [PAGE_TOKENS, latent + rope].
#[derive(Clone, Copy)]
pub(crate) enum Page<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}

impl LatentPages {
    pub fn new(n: Numerics, layers: usize, pages: usize, latent: usize, rope: usize) -> Self {
        let len = layers * pages * PAGE_TOKENS * (latent + rope);
        // Zeroed memory that is not touched before it is written to.
        let values = match n.activations() {
            Dtype::F32 => Values::F32(vec![0.0; len]),
            Dtype::Bf16 => Values::Bf16(vec![0; len]),
        };
        Self { values, layers, pages, latent, rope, by_pairs: n.by_pairs() && (latent + rope).is_multiple_of(2) }
    }

    /// Bytes of one page in all layers.
    pub fn page_bytes(n: Numerics, layers: usize, latent: usize, rope: usize) -> usize {
        let size = match n.activations() {
            Dtype::F32 => size_of::<f32>(),
            Dtype::Bf16 => size_of::<u16>(),
        };
        layers * PAGE_TOKENS * (latent + rope) * size
    }

    /// Bytes of everything.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F32(v) => size_of_val(&v[..]),
            Values::Bf16(v) => size_of_val(&v[..]),
        }
    }

    pub fn pages(&self) -> usize {
        self.pages
    }

    /// What one token leaves in a layer: the normed latent and the rotated shared key.
    pub fn write(&mut self, layer: usize, page: u32, slot: usize, latent: &[f32], k_pe: &[f32]) {
        assert!(slot < PAGE_TOKENS, "slot {slot} of a page of {PAGE_TOKENS}");
        assert_eq!((latent.len(), k_pe.len()), (self.latent, self.rope), "widths of latent and k_pe");
        let width = self.width();
        let start = self.start(layer, page) + slot * width;
        let token = latent.iter().chain(k_pe);
        match &mut self.values {
            Values::F32(v) => v[start..start + width].iter_mut().zip(token).for_each(|(to, x)| *to = *x),
            Values::Bf16(v) => {
                v[start..start + width].iter_mut().zip(token).for_each(|(to, x)| *to = bf16_bits(*x) as u16)
            }
        }
    }

    /// Whether attention multiplies pairs (of an odd width it cannot: that is computed as in `bf16`).
    pub(crate) fn by_pairs(&self) -> bool {
        self.by_pairs
    }

    pub(crate) fn width(&self) -> usize {
        self.latent + self.rope
    }

    pub(crate) fn page(&self, layer: usize, page: u32) -> Page<'_> {
        let start = self.start(layer, page);
        let len = PAGE_TOKENS * self.width();
        match &self.values {
            Values::F32(v) => Page::F32(&v[start..start + len]),
            Values::Bf16(v) => Page::Bf16(&v[start..start + len]),
        }
    }

    fn start(&self, layer: usize, page: u32) -> usize {
        assert!(
            layer < self.layers && (page as usize) < self.pages,
            "layer {layer}, page {page} of {}, {}",
            self.layers,
            self.pages
        );
        (layer * self.pages + page as usize) * PAGE_TOKENS * self.width()
    }
}

#[cfg(test)]
mod tests;
