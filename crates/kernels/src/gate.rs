/// How a logit becomes a score.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scoring {
    Sigmoid,
    Softmax,
}
/// How a group of experts is scored from its members.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GroupScore {
    Max,
    TopTwoSum,
}
/// w = score; if normalize: w = w / (sum of chosen + 1e-20); then always w * scale.
/// (V3: normalize and scale. V2 with norm_topk_prob: scale 1; without: its routed_scaling_factor.)
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GateParams {
    pub scoring: Scoring,
    pub groups: usize,
    pub groups_kept: usize,
    pub top_k: usize,
    pub group_score: GroupScore,
    pub mask: f32,
    pub normalize: bool,
    pub scale: f32,
}
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    pub expert: u16,
    pub weight: f32,
}
/// One row: pushes `top_k` choices, ascending expert id.
pub fn route(_logits: &[f32], _bias: Option<&[f32]>, _p: &GateParams, _out: &mut Vec<Choice>) {
    unimplemented!()
}
