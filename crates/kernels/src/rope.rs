/// Rotary embedding of `dim` values; `yarn` as rope_scaling of the config.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RopeParams {
    pub dim: usize,
    pub theta: f64,
    pub yarn: Option<Yarn>,
}
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Yarn {
    pub factor: f64,
    pub original_positions: usize,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub mscale: f64,
    pub mscale_all_dim: f64,
}
#[derive(Clone, Debug)]
pub struct RopeTable {}
impl RopeTable {
    pub fn new(_p: &RopeParams, _positions: usize) -> Self {
        Self {}
    }
    /// Rotates the interleaved pairs (2i, 2i+1) of any number of consecutive heads of `dim`, in place.
    pub fn apply(&self, _position: usize, _x: &mut [f32]) {
        unimplemented!()
    }
}
/// (head_dim)^-0.5, times mscale_all_dim's factor squared under YaRN.
pub fn softmax_scale(_head_dim: usize, _p: &RopeParams) -> f32 {
    unimplemented!()
}
