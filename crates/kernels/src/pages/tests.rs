//! What is written is what is read, there and nowhere else.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::samples::{Samples, assert_bits};

fn read(cache: &LatentPages, layer: usize, page: u32) -> Vec<f32> {
    match cache.page(layer, page) {
        Page::F32(values) => values.to_vec(),
        Page::Bf16(values) => values.iter().map(|x| bf16::from_bits(*x).to_f32()).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_token_is_written_to_its_slot(
        (layers, pages, latent, rope) in (1..4usize, 1..5usize, 1..40usize, 0..20usize),
        writes in 1..60usize,
        seed in any::<u64>(),
    ) {
        for n in Numerics::all() {
            let stored = |x: f32| if n.activations() == Dtype::F32 { x } else { bf16::from_f32(x).to_f32() };
            let mut s = Samples::new(seed);
            let mut cache = LatentPages::new(n, layers, pages, latent, rope);
            let mut expected = vec![0.0; layers * pages * PAGE_TOKENS * (latent + rope)];
            prop_assert_eq!(cache.pages(), pages);
            prop_assert_eq!(cache.bytes(), pages * LatentPages::page_bytes(n, layers, latent, rope));
            for _ in 0..writes {
                let (layer, page, slot) = (s.below(layers), s.below(pages), s.below(PAGE_TOKENS));
                let token = s.values(latent + rope, 3.0);
                cache.write(layer, page as u32, slot, &token[..latent], &token[latent..]);
                let at = ((layer * pages + page) * PAGE_TOKENS + slot) * (latent + rope);
                expected[at..].iter_mut().zip(&token).for_each(|(to, x)| *to = stored(*x));
            }
            let places = (0..layers).flat_map(|layer| (0..pages).map(move |page| (layer, page as u32)));
            let got: Vec<f32> = places.flat_map(|(layer, page)| read(&cache, layer, page)).collect();
            assert_bits(&got, &expected, format_args!("{n:?}"));
        }
    }
}

fn write(layer: usize, page: u32, slot: usize, latent: usize, rope: usize) {
    LatentPages::new(Numerics::portable(Dtype::F32), 2, 3, 4, 2).write(
        layer,
        page,
        slot,
        &vec![1.0; latent],
        &vec![1.0; rope],
    );
}

#[test]
fn the_last_slot_of_the_last_page_is_there() {
    write(1, 2, PAGE_TOKENS - 1, 4, 2);
}

#[test]
#[should_panic(expected = "slot 64 of a page of 64")]
fn slots_end() {
    write(0, 0, PAGE_TOKENS, 4, 2);
}

#[test]
#[should_panic(expected = "layer 0, page 3 of 2, 3")]
fn pages_end() {
    write(0, 3, 0, 4, 2);
}

#[test]
#[should_panic(expected = "layer 2, page 0 of 2, 3")]
fn layers_end() {
    write(2, 0, 0, 4, 2);
}

#[test]
#[should_panic(expected = "widths of latent and k_pe")]
fn widths_are_fixed() {
    write(0, 0, 0, 5, 1);
}
