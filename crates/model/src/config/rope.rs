//! `rope_theta` and `rope_scaling`, or the `rope_parameters` that newer files have in place of both.

use super::fields::Fields;
use super::{POSITIONS_MAX, YarnScaling};

const THETA_DEFAULT: f64 = 10_000.0;

pub(super) fn read(f: &Fields<'_>) -> (f64, Option<YarnScaling>) {
    let theta = |f: &Fields<'_>| f.number_or("rope_theta", THETA_DEFAULT, 1.5..=1e12);
    if let Some(parameters) = f.section("rope_parameters") {
        let theta = if parameters.given("rope_theta") { theta(&parameters) } else { theta(f) };
        return (theta, scaling(&parameters));
    }
    (theta(f), f.section("rope_scaling").and_then(|s| scaling(&s)))
}

/// None for the kind "default".
fn scaling(s: &Fields<'_>) -> Option<YarnScaling> {
    let kind = if s.given("rope_type") { "rope_type" } else { "type" };
    if !s.choice(kind, &[("yarn", true), ("default", false)], None) {
        return None;
    }
    // Another temperature than the one that mscale gives: no public model of these families has it.
    if s.given("attention_factor") {
        s.problem("attention_factor", "null");
    }
    let yarn = YarnScaling {
        factor: s.number("factor", 1.0..=1e6),
        original_max_position_embeddings: s.count("original_max_position_embeddings", 1..=POSITIONS_MAX),
        beta_fast: s.number_or("beta_fast", 32.0, 1e-3..=1e6),
        beta_slow: s.number_or("beta_slow", 1.0, 1e-3..=1e6),
        mscale: s.number_or("mscale", 1.0, 0.0..=100.0),
        mscale_all_dim: s.number_or("mscale_all_dim", 0.0, 0.0..=100.0),
    };
    if yarn.beta_fast < yarn.beta_slow {
        s.problem("beta_fast", &format!("at least beta_slow, {}", yarn.beta_slow));
    }
    Some(yarn)
}
