//! The fields of the gate and its experts, which depend on one another.

use super::fields::Fields;
use super::{EXPERTS_MAX, Family, INTERMEDIATE_MAX, ScoringFunc, TopkMethod};

const SHARED_MAX: usize = 64;

pub(super) struct Routing {
    pub experts: usize,
    pub shared: usize,
    pub width: usize,
    pub top_k: usize,
    pub groups: usize,
    pub groups_kept: usize,
    pub scale: f32,
    pub normalize: bool,
    pub scoring: ScoringFunc,
    pub method: TopkMethod,
}

impl Routing {
    pub fn read(f: &Fields<'_>, family: Family) -> Self {
        let v3 = family == Family::DeepseekV3;
        let scorings = [("sigmoid", ScoringFunc::Sigmoid), ("softmax", ScoringFunc::Softmax)];
        let methods = [
            ("greedy", TopkMethod::Greedy),
            ("group_limited_greedy", TopkMethod::GroupLimitedGreedy),
            ("noaux_tc", TopkMethod::NoauxTc),
        ];
        let experts = f.count_or("n_routed_experts", 0, 0..=EXPERTS_MAX);
        let mut routing = Self {
            experts,
            shared: 0,
            width: 0,
            top_k: 0,
            groups: 1,
            groups_kept: 1,
            scale: f.number_or("routed_scaling_factor", 1.0, 1e-6..=1e6) as f32,
            normalize: f.flag_or("norm_topk_prob", v3),
            scoring: f.choice(
                "scoring_func",
                &scorings,
                Some(if v3 { ScoringFunc::Sigmoid } else { ScoringFunc::Softmax }),
            ),
            method: f.choice("topk_method", &methods, Some(if v3 { TopkMethod::NoauxTc } else { TopkMethod::Greedy })),
        };
        if experts == 0 {
            if f.given("n_routed_experts") {
                f.problem("n_routed_experts", "at least 1, or null for a dense model");
            }
            return routing;
        }
        routing.shared = f.count_or("n_shared_experts", 0, 0..=SHARED_MAX);
        routing.width = f.count("moe_intermediate_size", 1..=INTERMEDIATE_MAX / SHARED_MAX);
        routing.groups = f.count_or("n_group", 1, 1..=experts);
        routing.groups_kept = f.count_or("topk_group", 1, 1..=routing.groups);
        routing.check_groups(f);
        routing.top_k = f.count("num_experts_per_tok", 1..=experts);
        let reachable = routing.reachable();
        if routing.top_k > reachable {
            f.problem("num_experts_per_tok", &format!("at most {reachable}, the experts of the groups that are kept"));
        }
        routing
    }

    fn check_groups(&self, f: &Fields<'_>) {
        if !self.experts.is_multiple_of(self.groups) {
            f.problem("n_group", &format!("a divisor of n_routed_experts, {}", self.experts));
        } else if self.method == TopkMethod::NoauxTc && self.groups > 1 && self.experts / self.groups < 2 {
            f.problem("n_group", "at least 2 experts a group, because noaux_tc scores a group by its best two");
        }
    }

    fn reachable(&self) -> usize {
        match self.method {
            TopkMethod::Greedy => self.experts,
            _ => self.experts / self.groups * self.groups_kept,
        }
    }
}
