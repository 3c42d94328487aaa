/// y = x / sqrt(mean(x²) + eps) * weight, for each row of weight.len().
pub fn rms_norm(_x: &[f32], _weight: &[f32], _eps: f32, _y: &mut [f32]) {
    unimplemented!()
}
