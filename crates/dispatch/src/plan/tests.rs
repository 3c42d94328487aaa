//! What is asked of whom, and in how many frames.

use std::collections::{BTreeMap, BTreeSet};

use half::bf16;
use moesaic_proto::{Epoch, LayerId};
use proptest::prelude::*;

use super::*;
use crate::fake::{OPS, answer, bits, expected};
use crate::frame::{Activations, Header, RequestFrame, Shape};
use crate::tracker::NOWHERE;

const EXPERTS: usize = 12;
const GROUP: usize = 3;
const HIDDEN: usize = 4;
const TOP_K: usize = 4;

const HEADER: Header =
    Header { epoch: Epoch(1), layer: LayerId(3), micro_batch: 0, flags: 0, source: 1, slot: 0, sequence: 0 };

/// f32 rows, and no limits that matter.
fn layout() -> Layout {
    Layout::new(HIDDEN, 4, GROUP, TOP_K)
}

/// Rows of chosen experts; each weight is different.
fn routes(rows: &[[u16; TOP_K]]) -> Vec<Route> {
    let experts = rows.iter().flatten().zip(1u8..);
    experts.map(|(&expert, weight)| Route { expert: ExpertId(expert), weight: f32::from(weight) }).collect()
}

/// An output in full.
#[derive(Clone, Debug, PartialEq)]
struct Ask {
    worker: u32,
    /// Of the call.
    row: u32,
    is_weighted: bool,
    terms: Vec<Term>,
}

/// What a plan asks for, by frame.
fn asks(plan: &Plan) -> Vec<Vec<Ask>> {
    let of_part = |part: &Part| {
        let mut terms = part.content.terms.iter().copied();
        let ask = |output: &Output| Ask {
            worker: part.worker,
            row: part.content.rows[usize::from(output.row())],
            is_weighted: output.is_weighted(),
            terms: terms.by_ref().take(output.terms()).collect(),
        };
        let asks = part.content.outputs.iter().map(ask).collect();
        assert_eq!(terms.next(), None);
        asks
    };
    plan.parts.iter().map(of_part).collect()
}

/// What must be asked, in order, read off the rule: a group's sum of the worker that holds all of the row's experts
/// of that group, else each expert by itself.
fn wanted(routes: &[Route], holder: impl Fn(ExpertId) -> u32) -> Vec<Ask> {
    let mut wanted = Vec::new();
    for (row, routes) in (0..).zip(routes.chunks(TOP_K)) {
        for group in 0..EXPERTS / GROUP {
            let of_group: Vec<&Route> = routes.iter().filter(|r| usize::from(r.expert.0) / GROUP == group).collect();
            let holders: BTreeSet<u32> = of_group.iter().map(|route| holder(route.expert)).collect();
            let terms = of_group.iter().map(|route| (holder(route.expert), Term::new(route.expert, route.weight)));
            match holders.len() {
                0 => {}
                1 => {
                    let terms = terms.map(|(_, term)| term).collect();
                    wanted.push(Ask { worker: holder(of_group[0].expert), row, is_weighted: true, terms });
                }
                _ => wanted.extend(terms.map(|(worker, term)| Ask {
                    worker,
                    row,
                    is_weighted: false,
                    terms: vec![term],
                })),
            }
        }
    }
    wanted
}

#[test]
fn a_group_is_summed_by_the_worker_that_has_all_of_the_rows_experts_of_it() {
    // Groups: 0-2, 3-5, 6-8, 9-11. Worker 1 has 2, 4 and the last six.
    let holder = |expert: ExpertId| u32::from(matches!(expert.0, 2 | 4 | 6..));
    let check = |row: [u16; TOP_K], expected: &[(u32, bool, &[u16])]| {
        let plan = split(&layout(), &routes(&[row]), holder);
        let mut asked: Vec<Ask> = asks(&plan).concat();
        asked.sort_by_key(|ask| ask.terms[0].expert());
        let asked: Vec<(u32, bool, Vec<u16>)> = asked
            .iter()
            .map(|ask| (ask.worker, ask.is_weighted, ask.terms.iter().map(|term| term.expert().0).collect()))
            .collect();
        let expected: Vec<_> =
            expected.iter().map(|(w, weighted, experts)| (*w, *weighted, experts.to_vec())).collect();
        assert_eq!(asked, expected, "{row:?}");
    };
    check([0, 1, 7, 8], &[(0, true, &[0, 1]), (1, true, &[7, 8])]);
    check([0, 1, 2, 9], &[(0, false, &[0]), (0, false, &[1]), (1, false, &[2]), (1, true, &[9])]);
    // Worker 1 has all that these rows need of the split groups.
    check([2, 4, 6, 9], &[(1, true, &[2]), (1, true, &[4]), (1, true, &[6]), (1, true, &[9])]);
    check([0, 3, 4, 5], &[(0, true, &[0]), (0, false, &[3]), (1, false, &[4]), (0, false, &[5])]);
}

#[test]
fn a_call_without_rows_sends_nothing() {
    let plan = split(&layout(), &[], |_| 0);
    assert_eq!((plan.parts.len(), plan.recipe.rows()), (0, 0));
}

#[test]
fn experts_without_a_holder_make_a_part_of_their_own() {
    let plan = split(&layout(), &routes(&[[0, 1, 4, 5], [2, 3, 7, 8]]), |e| if e.0 < 4 { 0 } else { NOWHERE });
    let asked: Vec<_> = plan.parts.iter().map(|part| (part.worker, part.content.terms.len())).collect();
    assert_eq!(asked, [(0, 4), (NOWHERE, 4)]);
}

#[test]
fn the_row_that_would_make_a_frame_too_large_begins_the_next() {
    let rows = [[0, 1, 2, 3]; 7];
    let sizes = |layout: &Layout, holder: fn(ExpertId) -> u32| {
        let plan = split(layout, &routes(&rows), holder);
        plan.parts.iter().map(|part| (part.worker, part.content.rows.len())).collect::<Vec<_>>()
    };
    let three = Layout { rows_max: 3, ..layout() };
    assert_eq!(sizes(&three, |_| 0), [(0, 3), (0, 3), (0, 1)]);
    assert_eq!(sizes(&three, |e| u32::from(e.0 == 2)), [(0, 3), (1, 3), (0, 3), (1, 3), (0, 1), (1, 1)]);
    // A row's answer, at the most: an output for each of its experts.
    let answer_bytes = HIDDEN * 4 * TOP_K;
    let two = Layout { bytes_max: 3 * answer_bytes - 1, ..layout() };
    assert_eq!(sizes(&two, |_| 0), [(0, 2), (0, 2), (0, 2), (0, 1)]);
    // A request of one output a row can be larger than its answer where hidden is small.
    let small = Layout { hidden: 1, bytes_max: 2 * (4 + TOP_K * 12), ..layout() };
    assert_eq!(sizes(&small, |_| 0), [(0, 2), (0, 2), (0, 2), (0, 1)]);
}

#[test]
fn published_models_keep_many_rows_in_a_frame() {
    // DeepSeek-V3: hidden 7168, 8 experts a row, in bf16.
    assert_eq!(Layout::new(7168, 2, 32, 8).frame_rows(), PAYLOAD_BYTES_MAX / (7168 * 4 * 8));
    // A tiny model: the limit on rows comes first.
    assert_eq!(Layout::new(64, 4, 4, 4).frame_rows(), FRAME_ROWS_MAX);
}

/// The parts as the frames that they become, read back by the receiver.
fn decoded(layout: &Layout, plan: Plan, rows: usize) -> Vec<RequestFrame> {
    let len = rows * HIDDEN;
    let activations: Activations = match layout.value_bytes {
        4 => (0..len).map(|i| i as f32).collect::<Vec<_>>().into(),
        _ => (0..len).map(|i| bf16::from_f32(i as f32)).collect::<Vec<_>>().into(),
    };
    let decode = |part: Part| {
        let frame = RequestFrame::new(HEADER, activations.clone(), HIDDEN, part.content);
        RequestFrame::decode(frame.header, frame.encode(HIDDEN), Shape { hidden: HIDDEN, experts: EXPERTS }).unwrap()
    };
    plan.parts.into_iter().map(decode).collect()
}

fn check_limits(layout: &Layout, part: &Part) {
    let Content { rows, outputs, terms } = &part.content;
    assert!(!rows.is_empty() && rows.len() <= layout.rows_max);
    assert!(rows.windows(2).all(|pair| pair[0] < pair[1]));
    let request = rows.len() * layout.hidden * layout.value_bytes
        + outputs.len() * size_of::<Output>()
        + terms.len() * size_of::<Term>();
    let answer = outputs.len() * layout.hidden * 4;
    assert!(request.max(answer) <= layout.bytes_max, "{request} and {answer} bytes; at most {}", layout.bytes_max);
}

/// Each row goes once to each worker that holds one of its experts, and to no other.
fn check_rows(plan: &Plan, wanted: &[Ask]) {
    let mut sent: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for part in &plan.parts {
        sent.entry(part.worker).or_default().extend(&part.content.rows);
    }
    let mut needed: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for ask in wanted {
        needed.entry(ask.worker).or_default().insert(ask.row);
    }
    let needed: BTreeMap<u32, Vec<u32>> = needed.into_iter().map(|(w, rows)| (w, rows.into_iter().collect())).collect();
    assert_eq!(sent, needed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_plan_asks_what_the_rule_says_within_the_limits_in_frames_that_are_valid(
        rows in prop::collection::vec(prop::collection::btree_set(0..EXPERTS as u16, TOP_K), 0..20),
        holders in prop::collection::vec(0u32..4, EXPERTS),
        rows_max in 1usize..8,
        // From the least that one row needs.
        bytes_max in (4 + 12) * TOP_K * HIDDEN..1200,
        value_bytes in prop_oneof![Just(2usize), Just(4)],
    ) {
        let rows: Vec<[u16; TOP_K]> = rows.iter().map(|set| std::array::from_fn(|i| *set.iter().nth(i).unwrap())).collect();
        let routes = routes(&rows);
        let holder = |expert: ExpertId| holders[usize::from(expert.0)];
        let layout = Layout { value_bytes, rows_max, bytes_max, ..layout() };
        let plan = split(&layout, &routes, holder);

        let wanted = wanted(&routes, holder);
        for (worker, asked) in [0, 1, 2, 3].map(|w| (w, asks(&plan).concat().into_iter().filter(move |ask| ask.worker == w))) {
            let wanted: Vec<Ask> = wanted.iter().filter(|ask| ask.worker == worker).cloned().collect();
            prop_assert_eq!(asked.collect::<Vec<_>>(), wanted);
        }
        check_rows(&plan, &wanted);
        plan.parts.iter().for_each(|part| check_limits(&layout, part));

        let asked = asks(&plan);
        let call_rows: Vec<Vec<u32>> = plan.parts.iter().map(|part| part.content.rows.clone()).collect();
        for ((frame, asked), call_rows) in decoded(&layout, plan, rows.len()).iter().zip(asked).zip(call_rows) {
            let outputs: Vec<_> = frame.outputs().map(|(o, terms)| (call_rows[usize::from(o.row())], terms.to_vec())).collect();
            prop_assert_eq!(outputs, asked.into_iter().map(|ask| (ask.row, ask.terms)).collect::<Vec<_>>());
            prop_assert_eq!(frame.row_count(), call_rows.len());
        }
    }

    /// A frame, what it asks for, and that of what it was split into, over any workers: always the same bits, within the
    /// limits.
    #[test]
    fn a_frame_that_is_split_again_and_again_gives_the_same_bits(
        rows in prop::collection::vec(prop::collection::btree_set(0..EXPERTS as u16, TOP_K), 1..9),
        holders in prop::collection::vec(prop::collection::vec(0u32..4, EXPERTS), 3),
        rows_max in 1usize..8,
    ) {
        let rows: Vec<[u16; TOP_K]> = rows.iter().map(|set| std::array::from_fn(|i| *set.iter().nth(i).unwrap())).collect();
        let routes = routes(&rows);
        let x: Vec<f32> = (0..rows.len() * HIDDEN).map(|i| i as f32 * 0.37 - 1.0).collect();
        let frames = |plan: &mut Plan| {
            let parts = std::mem::take(&mut plan.parts).into_iter();
            let activations = Activations::from(x.clone());
            parts.map(|part| RequestFrame::new(HEADER, activations.clone(), HIDDEN, part.content)).collect::<Vec<_>>()
        };
        let layout = Layout { rows_max, ..layout() };
        // What the frames of a plan come to, each split again by the holders that are left.
        fn sums(
            layout: &Layout,
            mut plan: Plan,
            frames: &impl Fn(&mut Plan) -> Vec<RequestFrame>,
            holders: &[Vec<u32>],
        ) -> Vec<f32> {
            plan.parts.iter().for_each(|part| check_limits(layout, part));
            let answers = frames(&mut plan).into_iter().map(|frame| match holders.split_first() {
                None => answer(&frame, HIDDEN),
                Some((holders, after)) => {
                    let again = resplit(layout, &frame, |expert| holders[usize::from(expert.0)]);
                    let sums = sums(layout, again, frames, after);
                    assert_eq!(bits(&sums), bits(&answer(&frame, HIDDEN)));
                    sums.into()
                }
            });
            let mut y = vec![f32::NAN; plan.recipe.rows() * HIDDEN];
            plan.recipe.combine(&OPS, &answers.collect::<Vec<_>>(), HIDDEN, &mut y);
            y
        }
        let plan = split(&layout, &routes, |expert| holders[0][usize::from(expert.0)]);
        let y = sums(&layout, plan, &frames, &holders[1..]);
        prop_assert_eq!(bits(&y), bits(&expected(&x, HIDDEN, TOP_K, GROUP, &routes)));
    }
}
