//! What a worker makes of choices is what the sender asks it.

use std::collections::BTreeSet;

use bytemuck::cast_slice;
use moesaic_proto::{Epoch, LayerId};
use proptest::prelude::*;

use super::super::{Output, RequestFrame, Shape};
use super::*;
use crate::dispatcher::Route;
use crate::plan::{Layout, Part, split};
use crate::tracker::NOWHERE;

const SHAPE: Shape = Shape { hidden: 2, experts: 12 };
const HEADER: Header =
    Header { epoch: Epoch(1), layer: LayerId(3), micro_batch: 0, flags: 0, source: 1, slot: 0, sequence: 9 };

/// Of the experts that are asked, with a row of values for each row of choices.
fn frame(top_k: u32, group_size: u32, asked: impl Iterator<Item = u16>, terms: &[Term]) -> v1::Frame {
    let mut experts = vec![0; SHAPE.experts.div_ceil(8)];
    asked.for_each(|expert| experts[usize::from(expert / 8)] |= 1 << (expert % 8));
    let rows = (terms.len() / top_k.max(1) as usize).max(1);
    let values: Vec<u16> = (0..(rows * SHAPE.hidden) as u16).collect();
    v1::Frame {
        header: Bytes::copy_from_slice(&HEADER.encode()),
        rows: Bytes::copy_from_slice(cast_slice(&values)),
        terms: Bytes::copy_from_slice(cast_slice(terms)),
        choices: Some(Choices { experts, top_k, group_size, room: 0 }),
        ..Default::default()
    }
}

fn decode(frame: v1::Frame) -> Result<RequestFrame, FrameError> {
    RequestFrame::decode(HEADER, frame, SHAPE)
}

fn asks(frame: &RequestFrame) -> Vec<(u32, Output, Vec<Term>)> {
    frame.outputs().map(|(output, terms)| (frame.position(output.row()), output, terms.to_vec())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn each_worker_is_asked_what_the_sender_splits_off(
        (top_k, chosen) in (1usize..5).prop_flat_map(|top_k| {
            (Just(top_k), prop::collection::vec(prop::collection::btree_set(0..SHAPE.experts as u16, top_k), 1..9))
        }),
        holders in prop::collection::vec(prop_oneof![0..3u32, Just(NOWHERE)], SHAPE.experts),
        group_size in 1usize..14,
    ) {
        let experts = chosen.iter().flat_map(BTreeSet::iter).map(|expert| ExpertId(*expert));
        let routes: Vec<Route> = experts.zip(1u8..).map(|(expert, w)| Route { expert, weight: w.into() }).collect();
        let terms: Vec<Term> = routes.iter().map(Term::from).collect();
        let holder = |ExpertId(expert)| holders[usize::from(expert)];
        let parts = split(&Layout::new(SHAPE.hidden, 2, group_size, top_k), &routes, holder).parts;
        let values: Vec<bf16> = vec![bf16::ZERO; chosen.len() * SHAPE.hidden];
        for worker in 0..3 {
            let asked = (0..SHAPE.experts as u16).filter(|expert| holder(ExpertId(*expert)) == worker);
            let taken = decode(frame(top_k as u32, group_size as u32, asked, &terms));
            match parts.iter().position(|part| part.worker == worker) {
                None => prop_assert!(matches!(taken, Err(FrameError::OutputCount { count: 0, .. })), "{taken:?}"),
                Some(at) => {
                    let Part { content, .. } = &parts[at];
                    let (rows, outputs, terms) = (content.rows.clone(), content.outputs.clone(), content.terms.clone());
                    let content = Content { rows, outputs, terms };
                    let sent = RequestFrame::new(HEADER, values.clone().into(), SHAPE.hidden, content);
                    let taken = taken.unwrap();
                    prop_assert_eq!(asks(&taken), asks(&sent));
                    prop_assert_eq!(taken.row_count(), sent.row_count());
                }
            }
        }
    }
}

#[test]
fn choices_that_fit_nothing_are_refused_by_name() {
    let term = |expert| Term::new(ExpertId(expert), 1.0);
    let good = || frame(2, 3, [1, 4].into_iter(), &[term(1), term(4), term(2), term(11)]);
    assert_eq!(decode(good()).map(|frame| (frame.row_count(), frame.output_count())), Ok((1, 2)));
    let with = |change: &dyn Fn(&mut Choices)| {
        let mut frame = good();
        frame.choices.iter_mut().for_each(change);
        decode(frame).unwrap_err().to_string()
    };
    let words = "choices: top_k is 3, of 2 rows with 4 terms; expected as many terms for each row";
    assert_eq!(with(&|choices| choices.top_k = 3), words);
    assert_eq!(with(&|choices| choices.top_k = 0), words.replace("is 3", "is 0"));
    let words = "choices.experts: 1 bytes; expected 2, a bit for each expert of a layer";
    assert_eq!(with(&|choices| choices.experts.truncate(1)), words);
    assert_eq!(
        with(&|choices| choices.group_size = 0),
        "choices.group_size is 0; expected the experts of a logical group"
    );
    let words = "outputs: 0; expected 1 to";
    assert!(with(&|choices| choices.experts = vec![0, 0]).starts_with(words));
    let unordered = frame(2, 3, [1].into_iter(), &[term(4), term(1)]);
    assert_eq!(decode(unordered).unwrap_err().to_string(), "outputs[0]: expert 1 after expert 4; experts must ascend");
    let unknown = frame(2, 3, [1].into_iter(), &[term(1), term(12)]);
    assert_eq!(decode(unknown).unwrap_err().to_string(), "outputs[0]: expert 12; the model has 12 a layer");
    let both = v1::Frame { outputs: Bytes::from_static(&[0; 4]), ..good() };
    assert_eq!(decode(both).unwrap_err().to_string(), "outputs: 1 beside choices; expected none");
}
