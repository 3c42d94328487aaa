/// y = y + x
pub fn add(_y: &mut [f32], _x: &[f32]) {
    unimplemented!()
}
/// y = w * x
pub fn combine_first(_y: &mut [f32], _w: f32, _x: &[f32]) {
    unimplemented!()
}
/// y = fma(w, x, y)
pub fn combine_next(_y: &mut [f32], _w: f32, _x: &[f32]) {
    unimplemented!()
}
