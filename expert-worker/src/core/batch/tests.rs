//! Chunks hold just what the frames asked for.

use moesaic_dispatch::frame::{Content, Header, Output, Term};
use moesaic_proto::{Epoch, LayerId};
use proptest::prelude::*;

use super::*;

const EXPERTS: u16 = 6;

/// For each output its row, and its experts with their weights.
type Asked = Vec<(u16, Vec<(u16, f32)>)>;

fn frame(rows: usize, asked: &Asked) -> RequestFrame {
    let header =
        Header { epoch: Epoch(1), layer: LayerId(1), micro_batch: 0, flags: 0, source: 0, slot: 0, sequence: 0 };
    let mut content = Content { rows: (0..rows as u32).collect(), ..Content::default() };
    for (row, terms) in asked {
        content.outputs.push(match terms.len() {
            1 => Output::single(*row),
            count => Output::sum(*row, count as u16),
        });
        content.terms.extend(terms.iter().map(|&(expert, weight)| Term::new(ExpertId(expert), weight)));
    }
    RequestFrame::new(header, vec![0.0f32; rows].into(), 1, content)
}

fn frames() -> impl Strategy<Value = Vec<(usize, Asked)>> {
    let terms = prop::collection::btree_map(0..EXPERTS, 0.1f32..2.0, 1..=4).prop_map(|map| map.into_iter().collect());
    let one = (1usize..5)
        .prop_flat_map(move |rows| (Just(rows), prop::collection::vec((0..rows as u16, terms.clone()), 1..8)));
    prop::collection::vec(one, 1..5)
}

proptest! {
    /// Every output of every frame is made once, in order, of just its terms; each result row is that of its expert
    /// and its frame's row; and no chunk is larger than it has to be.
    #[test]
    fn chunks_are_the_frames_regrouped(frames in frames(), terms_max in 1usize..12) {
        let built: Vec<RequestFrame> = frames.iter().map(|(rows, asked)| frame(*rows, asked)).collect();
        let built: Vec<&RequestFrame> = built.iter().collect();
        let bases = row_bases(&built);
        let mut made = Vec::new();
        for chunk in chunks(&built, terms_max) {
            prop_assert!(chunk.terms.len() <= terms_max || chunk.outputs.len() == 1);
            prop_assert!(chunk.experts.windows(2).all(|pair| pair[0].0 < pair[1].0));
            let results: Vec<(ExpertId, u32)> =
                chunk.experts.iter().flat_map(|(expert, rows)| rows.iter().map(|row| (*expert, *row))).collect();
            prop_assert_eq!(results.len(), chunk.terms.len());
            for target in &chunk.outputs {
                let terms = &chunk.terms[target.terms.clone()];
                let terms: Vec<_> = terms.iter().map(|term| (results[term.row as usize], term.weight)).collect();
                made.push((target.frame, target.output, target.is_weighted, terms));
            }
        }
        let mut expected = Vec::new();
        for (number, (_, asked)) in frames.iter().enumerate() {
            for (output, (row, terms)) in asked.iter().enumerate() {
                let row = bases[number] + u32::from(*row);
                let terms: Vec<_> = terms.iter().map(|&(expert, weight)| ((ExpertId(expert), row), weight)).collect();
                expected.push((number, output, terms.len() > 1, terms));
            }
        }
        prop_assert_eq!(made, expected);
    }
}
