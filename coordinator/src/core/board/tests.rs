//! What a page is told, second by second.

use moesaic_proto::v1::{DispatchCounts, EdgeState, EdgeStatus, LoadResponse};
use serde_json::{Value, json};

use super::*;

fn attention(id: &str) -> Attention {
    let own = OfAttention { answers: true, ..Default::default() };
    Attention { id: id.into(), node: "n".into(), own, ..Default::default() }
}

fn expert(id: &str) -> Expert {
    Expert { id: id.into(), node: "n".into(), ..Default::default() }
}

fn load(edges: &[(&str, EdgeState)]) -> LoadResponse {
    let edge = |(worker, state): &(&str, EdgeState)| EdgeStatus {
        worker: (*worker).into(),
        state: (*state).into(),
        detail: "the connection was closed".into(),
        ..Default::default()
    };
    LoadResponse { edges: edges.iter().map(edge).collect(), pages_free: 7, ..Default::default() }
}

fn sequence(n: u64, worker: &str, emitted: u32, state: State) -> Sequence {
    let (id, key) = (format!("r{n}"), "ada".into());
    Sequence { n, id, key, worker: worker.into(), prompt: 5, emitted, started: 1, state }
}

/// One second further, as JSON.
fn tick(board: &mut Board, t_s: u64, look: Look<'_>) -> Value {
    serde_json::to_value(board.tick(Look { t: t_s * 1000, ..look })).unwrap()
}

fn kinds(update: &Value) -> Vec<String> {
    let events = update["events"].as_array().cloned().unwrap_or_default();
    let text = |event: &Value| {
        let of = |field: &str| event[field].as_str().unwrap().to_owned();
        format!("{} {}", of("kind"), of("subject"))
    };
    events.iter().map(text).collect()
}

#[test]
fn what_has_not_changed_is_not_told() {
    let mut board = Board::default();
    let load = load(&[("e0", EdgeState::Live)]);
    let look =
        || Look { attention: vec![(attention("a0"), Some(&load))], experts: vec![expert("e0")], ..Look::default() };
    let first = tick(&mut board, 1, look());
    assert_eq!(first["attention"][0]["id"], "a0");
    assert_eq!(
        (&first["load"], &first["edges"]),
        (&json!([[0, 7, 0, 0, 0, null, null, 0, 0, 0]]), &json!([[0, 1, 2, 0, 0]]))
    );
    assert!(first["events"].is_null(), "nothing is news at first: {first}");
    // Since when it counts is known now.
    assert_eq!(tick(&mut board, 2, look())["load"], json!([[0, 7, 0, 0, 0, null, 0.0, 0, 0, 0]]));
    let third = tick(&mut board, 3, look());
    let fields: Vec<&String> = third.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["point", "t"]);
    assert_eq!(third["point"], json!([3, 0.0, 0.0, null, null, null, null, null, null]));
}

#[test]
fn workers_come_and_go() {
    let mut board = Board::default();
    let look = |experts: &[&str]| Look { experts: experts.iter().map(|id| expert(id)).collect(), ..Look::default() };
    tick(&mut board, 1, look(&["e0", "e1"]));
    let update = tick(&mut board, 2, look(&["e0", "e2"]));
    assert_eq!(update["gone"], json!([["e", 1, "died"]]));
    assert_eq!((&update["experts"][0]["id"], &update["experts"][0]["n"]), (&json!("e2"), &json!(2)));
    assert_eq!(kinds(&update), ["joined e2", "died e1"]);
    // Who comes back is the same one.
    let update = tick(&mut board, 3, look(&["e0", "e1", "e2"]));
    assert_eq!(update["experts"][0]["n"], 1);

    let draining = Look {
        experts: vec![expert("e0"), Expert { draining: true, cordoned: true, ..expert("e1") }],
        ..Look::default()
    };
    assert_eq!(kinds(&tick(&mut board, 4, draining)), ["cordoned e1", "died e2"]);
    let update = tick(&mut board, 5, look(&["e0"]));
    assert_eq!((&update["gone"], kinds(&update)), (&json!([["e", 1, "left"]]), vec!["left e1".to_owned()]));
}

#[test]
fn who_is_back_within_the_second_has_died_all_the_same() {
    let mut board = Board::default();
    let look = |incarnation, draining| Look {
        experts: vec![Expert { incarnation, draining, ..expert("e0") }],
        ..Look::default()
    };
    tick(&mut board, 1, look(1, false));
    let update = tick(&mut board, 2, look(2, true));
    assert_eq!((kinds(&update), &update["gone"]), (vec!["died e0".to_owned(), "joined e0".to_owned()], &Value::Null));
    assert_eq!(kinds(&tick(&mut board, 3, look(3, false))), ["left e0", "joined e0"]);
    assert!(kinds(&tick(&mut board, 4, look(3, false))).is_empty());
}

#[test]
fn an_expert_worker_that_all_have_lost_is_one_event() {
    let mut board = Board::default();
    let both =
        |state| [load(&[("e0", state), ("e1", EdgeState::Live)]), load(&[("e0", state), ("e1", EdgeState::Live)])];
    let look = |loads: &'static [LoadResponse; 2]| Look {
        attention: vec![(attention("a0"), Some(&loads[0])), (attention("a1"), Some(&loads[1]))],
        experts: vec![expert("e0"), expert("e1")],
        ..Look::default()
    };
    tick(&mut board, 1, look(Box::leak(Box::new(both(EdgeState::Live)))));
    let update = tick(&mut board, 2, look(Box::leak(Box::new(both(EdgeState::Down)))));
    assert_eq!(kinds(&update), ["edge_down * → e0"]);
    assert_eq!(update["trouble"].as_array().unwrap().len(), 2);
    assert_eq!(update["edges"].as_array().unwrap().len(), 2);
    let update = tick(&mut board, 3, look(Box::leak(Box::new(both(EdgeState::Live)))));
    assert_eq!((kinds(&update), &update["trouble"]), (vec!["edge_up * → e0".to_owned()], &json!([])));
}

#[test]
fn sequences_are_followed_to_their_end() {
    let mut board = Board::default();
    let look = |sequences| Look { sequences, ..Look::default() };
    let update = tick(&mut board, 1, look(vec![sequence(0, "", 0, State::Placing)]));
    assert_eq!((&update["requests"][0]["state"], &update["requests_total"]), (&json!("placing"), &json!(1)));
    let update = tick(&mut board, 2, look(vec![sequence(0, "a0", 3, State::Decode)]));
    assert_eq!(update["requests"][0]["worker"], "a0");
    let update = tick(&mut board, 3, look(vec![sequence(0, "a0", 9, State::Decode)]));
    assert_eq!((&update["progress"], &update["requests"]), (&json!([[0, 9]]), &Value::Null));
    let update =
        tick(&mut board, 4, look(vec![sequence(0, "a1", 9, State::Decode), sequence(1, "", 0, State::Placing)]));
    assert_eq!(kinds(&update), ["moved a0"]);
    let update = tick(&mut board, 5, look(vec![sequence(1, "", 0, State::Placing)]));
    assert_eq!((&update["ended"], &update["requests_total"]), (&json!([0]), &json!(1)));
}

#[test]
fn rates_are_over_the_last_seconds() {
    let mut board = Board::default();
    let look = |tokens, requests| Look { tokens, requests, gap: [Some(12.345), None, None], ..Look::default() };
    for t in 1..=20 {
        tick(&mut board, t, look(t * 100, t * 2));
    }
    let point = tick(&mut board, 21, look(2100, 42))["point"].clone();
    assert_eq!(point, json!([21, 100.0, 2.0, null, null, null, 12.3, null, null]));
}

/// The bound that PROTOCOL.md gives: a megabyte a minute for a client of a cluster of 144 workers.
#[test]
fn a_large_cluster_is_told_in_a_megabyte_a_minute() {
    const ATTENTION: u64 = 16;
    const EXPERTS: u64 = 128;
    let mut random = fastrand(1);
    let mut board = Board::default();
    let experts: Vec<Expert> = (0..EXPERTS).map(|e| expert(&format!("expert-worker-{e}"))).collect();
    let mut loads: Vec<LoadResponse> = Vec::new();
    for _ in 0..ATTENTION {
        let edge = |e| EdgeStatus {
            worker: format!("expert-worker-{e}"),
            state: EdgeState::Live.into(),
            ..Default::default()
        };
        loads.push(LoadResponse { edges: (0..EXPERTS).map(edge).collect(), ..Default::default() });
    }
    let (mut bytes, mut first_sequence, mut emitted) = (0, 0_u64, 0);
    for t in 1..=60 {
        for load in &mut loads {
            let dispatch = load.dispatch.get_or_insert(DispatchCounts::default());
            dispatch.sent += 20_000;
            dispatch.hedged += random(3);
            load.pages_free = 1000 + random(100) as u32;
            load.sequences_running = 60 + random(9) as u32;
            load.micro_batches += 40;
            load.micro_batch_rows += 40 * (60 + random(9));
            for edge in &mut load.edges {
                edge.terms += 20_000 + random(8000);
                edge.answer_us = 500 + random(400) as u32;
            }
        }
        first_sequence += 15;
        emitted += 20;
        let sequences = (first_sequence..first_sequence + 100)
            .map(|n| sequence(n, "attention-worker-3", emitted, State::Decode))
            .collect();
        let look = Look {
            attention: (0..ATTENTION)
                .map(|a| (attention(&format!("attention-worker-{a}")), Some(&loads[a as usize])))
                .collect(),
            experts: experts.clone(),
            sequences,
            tokens: t * 30_000,
            ..Look::default()
        };
        let update = tick(&mut board, t, look);
        // What is told at first is part of the snapshot.
        bytes += if t == 1 { 0 } else { update.to_string().len() };
    }
    let model = Model::default();
    let snapshot = serde_json::to_string(&board.snapshot(60_000, &model)).unwrap().len();
    assert!(snapshot < 200_000, "a snapshot of {snapshot} bytes");
    let heat = heats(&(3..61).collect::<Vec<u8>>(), 256, &BTreeMap::new()).len() * 6;
    assert!(bytes + heat < 700_000, "{bytes} bytes of updates a minute, {heat} of heat maps");
}

/// Numbers below a bound, the same in every run.
fn fastrand(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}
