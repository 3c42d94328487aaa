//! Chance that can be had again: the same seed injects the same faults.

pub struct Dice(u64);

impl Dice {
    /// Each fault has its own, so that which others run changes nothing.
    pub fn new(seed: u64, fault: &str) -> Self {
        let mut dice = Self(seed);
        for byte in fault.bytes() {
            dice.0 ^= u64::from(byte);
            dice.next();
        }
        dice
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` up to `high`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[(self.next() % from.len() as u64) as usize]
    }

    pub fn shuffled<'a>(&mut self, from: &[&'a str]) -> Vec<&'a str> {
        let mut rest = from.to_vec();
        (0..from.len()).map(|_| rest.swap_remove((self.next() % rest.len() as u64) as usize)).collect()
    }
}
