//! The latent cache: what attention remembers of each token, in pages. Owns the storage; which page is whose is decided elsewhere.

use crate::linear::bf16_bits;
use crate::{Dtype, Numerics};

/// Tokens of a page. Part of the numerics: attention merges page by page.
pub const PAGE_TOKENS: usize = 64;

/// [layers, pages, PAGE_TOKENS, latent + rope], bf16 where attention multiplies pairs of it, else f32.
#[derive(Debug)]
pub struct LatentPages {
    values: Values,
    layers: usize,
    pages: usize,
    pub(crate) latent: usize,
    pub(crate) rope: usize,
    /// What is written is rounded to it.
    activations: Dtype,
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

impl<'a> Page<'a> {
    #[inline(always)]
    pub fn f32(self) -> &'a [f32] {
        let Self::F32(kv) = self else { unreachable!("pages of bf16 are attended to by pairs") };
        kv
    }

    #[inline(always)]
    pub fn bf16(self) -> &'a [u16] {
        let Self::Bf16(kv) = self else { unreachable!("pairs are bf16") };
        kv
    }
}

impl LatentPages {
    pub fn new(n: Numerics, layers: usize, pages: usize, latent: usize, rope: usize) -> Self {
        let len = layers * pages * PAGE_TOKENS * (latent + rope);
        // Zeroed memory that is not touched before it is written to.
        let values = match stored(n, latent + rope) {
            Dtype::F32 => Values::F32(vec![0.0; len]),
            Dtype::Bf16 => Values::Bf16(vec![0; len]),
        };
        Self { values, layers, pages, latent, rope, activations: n.activations() }
    }

    /// Bytes of one page in all layers.
    pub fn page_bytes(n: Numerics, layers: usize, latent: usize, rope: usize) -> usize {
        layers * PAGE_TOKENS * (latent + rope) * stored(n, latent + rope).bytes()
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
            Values::F32(v) => {
                let kept = |x: f32| match self.activations {
                    Dtype::F32 => x,
                    Dtype::Bf16 => f32::from_bits(bf16_bits(x) << 16),
                };
                v[start..start + width].iter_mut().zip(token).for_each(|(to, x)| *to = kept(*x));
            }
            Values::Bf16(v) => {
                v[start..start + width].iter_mut().zip(token).for_each(|(to, x)| *to = bf16_bits(*x) as u16)
            }
        }
    }

    /// Whether attention multiplies pairs.
    pub(crate) fn by_pairs(&self) -> bool {
        matches!(self.values, Values::Bf16(_))
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

/// As what values are kept: of an odd width pairs cannot be multiplied, and bf16 is computed in f32.
fn stored(n: Numerics, width: usize) -> Dtype {
    if width.is_multiple_of(2) { n.activations() } else { Dtype::F32 }
}

#[cfg(test)]
mod tests;
