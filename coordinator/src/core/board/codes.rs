//! Numbers made small for the page: logarithms in one byte, and lists in base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moesaic_proto::{Placement, WorkerId};

use crate::core::placement::planner::Load;

/// Rows times experts a second, in quarters of a doubling.
pub fn rate(per_second: f64) -> u32 {
    (4.0 * (1.0 + per_second.max(0.0)).log2()).round() as u32
}

/// A time, in eighths of a doubling; 0 for none.
pub fn time(microseconds: u32) -> u32 {
    match microseconds {
        0 => 0,
        us => (8.0 * f64::from(us).log2()).round().max(1.0) as u32,
    }
}

/// A load over its layer's mean, in sixteenths of a doubling around 128; 0 for none.
fn heat(over_mean: f64) -> u8 {
    if over_mean <= 0.0 { 0 } else { (128.0 + 16.0 * over_mean.log2()).round().clamp(1.0, 255.0) as u8 }
}

/// A byte for each of `experts` of each layer.
pub fn heats(layers: &[u8], experts: usize, load: &Load) -> String {
    let mut bytes = Vec::with_capacity(layers.len() * experts);
    for layer in layers {
        let rows = load.get(&moesaic_proto::LayerId(*layer)).map(Vec::as_slice).unwrap_or_default();
        let mean = rows.iter().sum::<f64>() / experts.max(1) as f64;
        let of = |expert: usize| rows.get(expert).copied().unwrap_or(0.0);
        bytes.extend((0..experts).map(|expert| if mean > 0.0 { heat(of(expert) / mean) } else { 0 }));
    }
    STANDARD.encode(bytes)
}

/// For each expert of each layer the number of its holders, and their numbers.
pub fn holders(placement: &Placement, number: impl Fn(&WorkerId) -> u32) -> String {
    let numbers: Vec<u32> = placement.workers().iter().map(number).collect();
    let mut bytes = Vec::new();
    for (_, _, holders) in placement.experts_of_layers() {
        leb128(&mut bytes, holders.len() as u32);
        for holder in holders {
            leb128(&mut bytes, numbers[*holder as usize]);
        }
    }
    STANDARD.encode(bytes)
}

fn leb128(bytes: &mut Vec<u8>, mut number: u32) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// To three digits, so that text stays short.
pub fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let scale = 10_f64.powi(2 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_protocol() {
        assert_eq!([rate(0.0), rate(1.0), rate(1023.0)], [0, 4, 40]);
        assert_eq!([time(0), time(1), time(2), time(1024)], [0, 1, 8, 80]);
        assert_eq!([heat(0.0), heat(1.0), heat(2.0), heat(0.5), heat(1e9), heat(1e-9)], [0, 128, 144, 112, 255, 1]);
    }

    #[test]
    fn numbers_are_leb128() {
        let encoded = |number| {
            let mut bytes = Vec::new();
            leb128(&mut bytes, number);
            bytes
        };
        assert_eq!(encoded(5), [5]);
        assert_eq!(encoded(300), [0xac, 0x02]);
        assert_eq!(encoded(1 << 21), [0x80, 0x80, 0x80, 0x01]);
    }

    #[test]
    fn three_digits_are_kept() {
        let table = [(1234.5, 1230.0), (0.012345, 0.0123), (9.996, 10.0), (0.0, 0.0), (-2.0, -2.0)];
        for (value, expected) in table {
            assert!((rounded(value) - expected).abs() < 1e-12, "{value}: {}", rounded(value));
        }
    }
}
