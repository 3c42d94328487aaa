//! e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, one NaN of each sign, largest 448.

/// The f32 bits of a code.
pub(crate) const fn e4m3_bits(code: u8) -> u32 {
    let sign = (code as u32 & 0x80) << 24;
    let magnitude = code as u32 & 0x7f;
    sign | match magnitude {
        0x7f => 0x7fc0_0000,
        8.. => (magnitude << 20) + (120 << 23),
        // A denormal is magnitude * 2^-9.
        _ => (magnitude as f32 / 512.0).to_bits(),
    }
}

static VALUES: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = f32::from_bits(e4m3_bits(code as u8));
        code += 1;
    }
    table
};

pub fn e4m3_to_f32(code: u8) -> f32 {
    VALUES[usize::from(code)]
}

/// To nearest, ties to even, saturating at 448 (infinities too); NaN becomes the NaN of its sign.
pub fn f32_to_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    if magnitude >= 448.0 {
        return sign | 0x7e;
    }
    let code = if magnitude < 1.0 / 64.0 {
        // Eight steps of 2^-9; a rounding up to 8 is the smallest normal code.
        (magnitude * 512.0).round_ties_even() as u32
    } else {
        let bits = magnitude.to_bits();
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        (rounded >> 20) - (120 << 3)
    };
    sign | code.min(0x7e) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the format's definition, digit by digit.
    fn value(code: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa / 8.0 * 2f32.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if code & 0x80 != 0 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_code_is_read_and_written_back() {
        for code in 0..=255u8 {
            assert_eq!(e4m3_to_f32(code).to_bits(), value(code).to_bits(), "code {code:#04x}");
            assert_eq!(f32_to_e4m3(e4m3_to_f32(code)), code);
        }
    }

    #[test]
    fn rounds_to_nearest_even_between_every_two_codes() {
        for code in 0..0x7e_u8 {
            let (low, high) = (value(code), value(code + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(f32_to_e4m3(middle), if code % 2 == 0 { code } else { code + 1 }, "tie above {low}");
            assert_eq!(f32_to_e4m3(middle.next_down()), code);
            assert_eq!(f32_to_e4m3(middle.next_up()), code + 1);
            assert_eq!(f32_to_e4m3(-middle.next_up()), (code + 1) | 0x80);
        }
    }

    #[test]
    fn saturates() {
        for (x, code) in
            [(448.1, 0x7e), (1e30, 0x7e), (f32::INFINITY, 0x7e), (f32::NEG_INFINITY, 0xfe), (1e-30, 0), (-1e-30, 0x80)]
        {
            assert_eq!(f32_to_e4m3(x), code, "{x}");
        }
    }
}
