//! Routing of both model families against the plain reference, and the rules one by one.

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::Samples;

/// DeepSeek-V3: 256 experts in 8 groups.
const V3: GateParams = GateParams {
    scoring: Scoring::Sigmoid,
    groups: 8,
    groups_kept: 4,
    top_k: 8,
    group_score: GroupScore::TopTwoSum,
    mask: f32::NEG_INFINITY,
    normalize: true,
    scale: 2.5,
};

/// DeepSeek-V2 (group_limited_greedy): 160 experts in 8 groups.
const V2: GateParams = GateParams {
    scoring: Scoring::Softmax,
    groups: 8,
    groups_kept: 3,
    top_k: 6,
    group_score: GroupScore::Max,
    mask: 0.0,
    normalize: false,
    scale: 16.0,
};

/// DeepSeek-V2-Lite (greedy): 64 experts without groups.
const V2_LITE: GateParams = GateParams { groups: 1, groups_kept: 1, scale: 1.0, ..V2 };

/// A gate of few experts that takes groups, scores and biases as they are.
fn few(groups: usize, groups_kept: usize, top_k: usize) -> GateParams {
    GateParams { groups, groups_kept, top_k, scale: 1.0, ..V3 }
}

/// Routes on every instruction set; equal to the reference, in ascending order.
fn checked(logits: &[f32], bias: Option<&[f32]>, p: &GateParams) -> Vec<Choice> {
    let expected = reference::route(logits, bias, p);
    // A weight's bits, all NaN being one.
    let bits = |choices: &[Choice]| -> Vec<(u16, Option<u32>)> {
        choices.iter().map(|c| (c.expert, (!c.weight.is_nan()).then_some(c.weight.to_bits()))).collect()
    };
    for isa in Isa::available() {
        let mut out = Vec::new();
        route_on(isa, logits, bias, p, &mut out);
        assert_eq!(bits(&out), bits(&expected), "{isa:?}, {p:?}, {logits:?}, {bias:?}");
    }
    assert_eq!(expected.len(), p.top_k.min(logits.len()));
    assert!(expected.is_sorted_by(|a, b| a.expert < b.expert), "{expected:?}");
    expected
}

fn experts(choices: &[Choice]) -> Vec<u16> {
    choices.iter().map(|c| c.expert).collect()
}

/// Logits with the given scores under the sigmoid.
fn logits_of(scores: &[f32]) -> Vec<f32> {
    scores.iter().map(|s| (s / (1.0 - s)).ln()).collect()
}

fn any_params() -> impl Strategy<Value = (usize, GateParams)> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (1..9usize, 1..40usize, 0..9usize, 0..20usize, flags).prop_map(|(groups, members, kept, top_k, flags)| {
        let p = GateParams {
            scoring: if flags.0 { Scoring::Sigmoid } else { Scoring::Softmax },
            groups,
            groups_kept: kept.min(groups),
            top_k,
            group_score: if flags.1 { GroupScore::Max } else { GroupScore::TopTwoSum },
            mask: if flags.2 { 0.0 } else { f32::NEG_INFINITY },
            normalize: flags.3,
            scale: 2.5,
        };
        (groups * members, p)
    })
}

/// How logits are made: few different ones give ties, any bits give NaN and infinities.
#[derive(Clone, Copy, Debug)]
enum Logits {
    Ordinary,
    Ties,
    Any,
}

impl Logits {
    fn sample(self, s: &mut Samples) -> f32 {
        match self {
            Self::Ordinary => s.value(4.0),
            Self::Ties => s.below(5) as f32 - 2.0,
            Self::Any => f32::from_bits(s.bits() as u32 | if s.below(20) == 0 { 0x7f80_0000 } else { 0 }),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn equals_the_plain_reference(
        (count, p) in prop_oneof![2 => any_params(), 1 => Just((256, V3)), 1 => Just((160, V2)), 1 => Just((64, V2_LITE))],
        kind in prop_oneof![Just(Logits::Ordinary), Just(Logits::Ties), Just(Logits::Any)],
        biased in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut s = Samples::new(seed);
        let logits: Vec<f32> = (0..count).map(|_| kind.sample(&mut s)).collect();
        let bias: Vec<f32> = (0..count).map(|_| kind.sample(&mut s) / 4.0).collect();
        checked(&logits, biased.then_some(&bias[..]), &p);
    }

    #[test]
    fn weights_sum_to_the_scale_where_normalized(seed in any::<u64>()) {
        let logits = Samples::new(seed).values(256, 3.0);
        for p in [V3, GateParams { normalize: true, ..V2 }, GateParams { normalize: true, ..V2_LITE }] {
            let choices = checked(&logits, None, &p);
            let sum: f64 = choices.iter().map(|c| f64::from(c.weight)).sum();
            prop_assert!((sum / f64::from(p.scale) - 1.0).abs() < 1e-6, "{sum}, {p:?}");
        }
    }

    #[test]
    fn weights_are_scaled_scores_where_not_normalized(seed in any::<u64>()) {
        let logits = Samples::new(seed).values(160, 3.0);
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        for p in [V2, V2_LITE] {
            for c in checked(&logits, None, &p) {
                let exact = f64::from(logits[usize::from(c.expert)]).exp() / sum * f64::from(p.scale);
                prop_assert!((f64::from(c.weight) / exact - 1.0).abs() < 3e-6, "{c:?} {exact}");
            }
        }
    }
}

#[test]
fn groups_are_scored_as_each_family_does() {
    // The first group has the best expert, the second the best two, the third the best three but neither.
    let scores = [0.9, 0.1, 0.1, 0.7, 0.6, 0.1, 0.55, 0.55, 0.55];
    let by = |group_score, groups_kept| {
        let p = GateParams { group_score, ..few(3, groups_kept, 3) };
        experts(&checked(&logits_of(&scores), None, &p))
    };
    assert_eq!(by(GroupScore::Max, 1), [0, 1, 2]);
    assert_eq!(by(GroupScore::TopTwoSum, 1), [3, 4, 5]);
    assert_eq!(by(GroupScore::TopTwoSum, 2), [3, 4, 6]);
    assert_eq!(by(GroupScore::Max, 2), [0, 3, 4]);
    assert_eq!(by(GroupScore::Max, 3), [0, 3, 4]);
}

#[test]
fn a_group_of_one_is_scored_by_it() {
    let p = few(4, 2, 2);
    assert_eq!(experts(&checked(&logits_of(&[0.2, 0.8, 0.6, 0.4]), None, &p)), [1, 2]);
}

#[test]
fn the_bias_chooses_but_does_not_weigh() {
    let logits = logits_of(&[0.8, 0.4, 0.6, 0.2]);
    let choices = checked(&logits, Some(&[-0.5, 0.5, 0.0, 0.3]), &few(1, 1, 2));
    assert_eq!(experts(&choices), [1, 2]);
    for (choice, expected) in choices.iter().zip([0.4, 0.6]) {
        assert!((choice.weight - expected).abs() < 1e-6, "{choice:?} {expected}");
    }
}

/// A masked expert has to stay behind even those of kept groups whose biased scores are negative.
#[test]
fn negative_keys_of_a_kept_group_win_over_masked_groups() {
    let logits = logits_of(&[0.9, 0.3, 0.3, 0.3, 0.8, 0.2, 0.2, 0.2]);
    let bias = [1.0, -5.0, -6.0, -7.0, 0.0, 0.0, 0.0, 0.0];
    // A group's score is the sum of its two largest keys: 1.9 - 4.7 for the first, 1.0 for the second.
    assert_eq!(experts(&checked(&logits, Some(&bias), &few(2, 1, 3))), [4, 5, 6]);
    let by_max = GateParams { group_score: GroupScore::Max, ..few(2, 1, 3) };
    assert_eq!(experts(&checked(&logits, Some(&bias), &by_max)), [0, 1, 2]);
    // With a mask of 0 the lost group's experts would come in.
    let by_zero = GateParams { mask: 0.0, ..by_max };
    assert_eq!(experts(&checked(&logits, Some(&bias), &by_zero)), [0, 4, 5]);
}

#[test]
fn of_equals_the_lower_expert_and_the_lower_group() {
    assert_eq!(experts(&checked(&[1.0; 12], None, &few(1, 1, 5))), [0, 1, 2, 3, 4]);
    assert_eq!(experts(&checked(&[1.0; 12], None, &few(4, 2, 5))), [0, 1, 2, 3, 4]);
    assert_eq!(experts(&checked(&[0.0, 2.0, 1.0, 2.0, 1.0, 1.0], None, &few(1, 1, 3))), [1, 2, 3]);
    assert_eq!(experts(&checked(&[0.0, 0.0, 1.0, 2.0, 2.0, 1.0], None, &few(3, 1, 2))), [2, 3]);
    assert_eq!(experts(&checked(&[0.0; 160], None, &V2)), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn nan_comes_last_and_never_panics() {
    let nan = f32::NAN;
    let cases: [(&[f32], GateParams, &[u16]); 5] = [
        (&[nan, 1.0, nan, 0.0], few(1, 1, 2), &[1, 3]),
        (&[nan, 1.0, nan, 0.0], few(1, 1, 3), &[0, 1, 3]),
        (&[nan, 9.0, 1.0, 0.0, nan, nan], few(3, 1, 2), &[2, 3]),
        (&[nan; 6], few(3, 2, 4), &[0, 1, 2, 3]),
        // Here even the mask of 0 wins over them: the first expert of the first group that was not kept is 60.
        (&[nan; 160], V2, &[60, 61, 62, 63, 64, 65]),
    ];
    for (logits, p, expected) in cases {
        assert_eq!(experts(&checked(logits, None, &p)), expected, "{logits:?}");
    }
    // In a softmax one NaN is everybody's.
    let mut logits = vec![0.0; 160];
    logits[77] = nan;
    assert!(checked(&logits, None, &V2).iter().all(|c| c.weight.is_nan()));
}

#[test]
fn fewer_experts_than_choices_are_all_chosen() {
    assert_eq!(experts(&checked(&[1.0, 3.0, 2.0], None, &few(1, 1, 8))), [0, 1, 2]);
    assert_eq!(experts(&checked(&[1.0, 3.0, 2.0, 4.0], None, &few(2, 1, 8))), [0, 1, 2, 3]);
    assert_eq!(checked(&[], None, &few(1, 1, 8)), []);
    assert_eq!(checked(&[1.0, 2.0], None, &few(1, 1, 0)), []);
}

#[test]
fn choices_are_appended() {
    let before = Choice { expert: 7, weight: 0.25 };
    let mut out = vec![before];
    route(&[1.0, 3.0, 2.0], None, &few(1, 1, 2), &mut out);
    assert_eq!(out[0], before);
    assert_eq!(out[1..], checked(&[1.0, 3.0, 2.0], None, &few(1, 1, 2)));
}

#[test]
#[should_panic(expected = "10 experts in 4 groups")]
fn groups_have_to_be_equal() {
    route(&[0.0; 10], None, &few(4, 2, 2), &mut Vec::new());
}
