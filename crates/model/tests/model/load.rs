//! Loading in parallel keeps the order and gives the first error.

use moesaic_model::{Checkpoint, ModelError, load};

use crate::support::fixture;

#[test]
fn results_come_in_the_order_of_the_items() {
    let checkpoint = Checkpoint::open(&fixture("tiny-r1")).unwrap();
    let items: Vec<(usize, usize)> = (1..5).flat_map(|layer| (0..32).map(move |expert| (layer, expert))).collect();
    let pack = |(layer, expert): (usize, usize)| {
        let block = checkpoint.expert(layer, expert)?;
        assert_eq!(block.bytes(), 3 * 64 * 128 * 2);
        Ok::<_, ModelError>(((layer, expert, block.up.to_f32()), block.bytes()))
    };
    let loaded = load::all("experts", items.clone(), pack).unwrap();
    let order: Vec<(usize, usize)> = loaded.iter().map(|(layer, expert, _)| (*layer, *expert)).collect();
    assert_eq!(order, items);
    assert_eq!(loaded[37].2, checkpoint.expert(2, 5).unwrap().up.to_f32());
}

#[test]
fn an_error_is_given_back() {
    let checkpoint = Checkpoint::open(&fixture("tiny-r1")).unwrap();
    let error =
        load::all("layers", (0..7).collect(), |i| checkpoint.layer(i).map(|block| ((), block.bytes()))).unwrap_err();
    assert!(error.to_string().ends_with("of 5: there is no such block"), "{error}");
}
