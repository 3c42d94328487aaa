//! The real services over a simulated network with faults in it, each scenario for a list of seeds. What must hold: every
//! sum and every token exact, in its place, once; and everything done soon after the last fault. All times are the
//! simulation's own.
//!
//! A seed that fails prints the line that runs it again.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use moesaic_tests::wire::callers::Load;
use moesaic_tests::wire::cluster::{Cluster, Outcome};
use moesaic_tests::wire::faults::{
    Dice, Fault, Schedule, bounce, crash, cut, cut_one_way, heal, hold, release, swizzle,
};

type Counts = BTreeMap<&'static str, u64>;

/// Runs a scenario with each seed, with the first MOESAIC_WIRE_SEEDS, or with the one of MOESAIC_WIRE_SEED. What was
/// counted: sums, and of `stall_ms` and `epoch` the largest; nothing of one seed alone, which need not show all that the
/// list of them does.
fn each_seed(name: &str, seeds: u64, run: impl Fn(u64) -> Result<Outcome, String>) -> Option<Counts> {
    let number = |name| std::env::var(name).ok().map(|number| number.parse::<u64>().unwrap());
    let (only, seeds) = (number("MOESAIC_WIRE_SEED"), number("MOESAIC_WIRE_SEEDS").unwrap_or(seeds));
    let begun = std::time::Instant::now();
    let mut counts = Counts::new();
    for seed in only.map_or(0..seeds, |seed| seed..seed + 1) {
        let again = format!("MOESAIC_WIRE_SEED={seed} cargo test --release -p moesaic-tests --test wire {name}");
        let outcome = run(seed).unwrap_or_else(|error| panic!("{again}\n{error}"));
        for (what, count) in outcome.counts {
            let all = counts.entry(what).or_default();
            *all = if matches!(what, "stall_ms" | "epoch") { (*all).max(count) } else { *all + count };
        }
    }
    println!("{name}: {:.1} s, {counts:?}", begun.elapsed().as_secs_f64());
    only.is_none().then_some(counts)
}

/// Names the first line that differs.
fn assert_same(seed: u64, a: &Outcome, b: &Outcome) {
    for (line, (a, b)) in a.history.iter().zip(&b.history).enumerate() {
        assert_eq!(a, b, "seed {seed}, line {line}");
    }
    assert_eq!(a, b, "seed {seed}");
}

/// A layer call waits longer than any fault here takes.
const PATIENT: Duration = Duration::from_secs(30);

/// Three expert workers, every expert on two of them, and two callers.
fn callers(seed: u64, layer_deadline: Duration, may_fail: bool) -> Cluster {
    let load = Load { layer_deadline, may_fail, seed };
    Cluster::of_callers(seed, 3, 2, load, |expert| vec![expert as u32 % 3, (expert as u32 + 1) % 3])
}

/// Of calls that all had their sums: no frame is left over, and no answer was wrong.
fn assert_clean(counts: &Counts) {
    let strays =
        ["misdirected", "rejected", "outstanding", "failed"].map(|what| counts.get(what).copied().unwrap_or(0));
    assert!(strays == [0; 4] && counts["done"] > 1_000, "{counts:?}");
}

const EDGES: [(&str, &str); 6] = [("a0", "e0"), ("a0", "e1"), ("a0", "e2"), ("a1", "e0"), ("a1", "e1"), ("a1", "e2")];

// === Rows: attention workers' dispatch and expert workers ===

#[test]
fn an_expert_worker_is_killed_and_comes_back() {
    let Some(counts) = each_seed("an_expert_worker_is_killed_and_comes_back", 6, |seed| {
        let (mut dice, mut schedule) = (Dice::new(seed), Schedule::default());
        for (round, host) in ["e0", "e1", "e2"].into_iter().enumerate() {
            let at = round as u64 * 2_000 + dice.between(0, 500);
            schedule = schedule.at(at, crash(host)).at(at + dice.between(1, 1_000), bounce(host));
        }
        callers(seed, PATIENT, false).run(schedule)
    }) else {
        return;
    };
    assert_clean(&counts);
    assert!(counts["resent"] > 0 && counts["stall_ms"] < 400, "{counts:?}");
}

#[test]
fn an_expert_worker_is_cut_off_from_one_attention_worker() {
    let Some(counts) = each_seed("an_expert_worker_is_cut_off_from_one_attention_worker", 6, |seed| {
        let mut dice = Dice::new(seed);
        let (host, healed) = (dice.pick(&["e0", "e1", "e2"]), dice.between(100, 6_000));
        callers(seed, PATIENT, false).run(Schedule::default().at(0, cut("a0", host)).at(healed, heal("a0", host)))
    }) else {
        return;
    };
    assert_clean(&counts);
    assert!(counts["hedged"] > 0 && counts["stall_ms"] < 1_000, "{counts:?}");
}

#[test]
fn a_link_carries_one_direction_only() {
    let Some(counts) = each_seed("a_link_carries_one_direction_only", 6, |seed| {
        let mut dice = Dice::new(seed);
        let (host, healed) = (dice.pick(&["e0", "e1", "e2"]), dice.between(100, 6_000));
        let lost = if seed.is_multiple_of(2) { cut_one_way("a0", host) } else { cut_one_way(host, "a0") };
        callers(seed, PATIENT, false).run(Schedule::default().at(0, lost).at(healed, heal("a0", host)))
    }) else {
        return;
    };
    assert_clean(&counts);
    assert!(counts["hedged"] > 0 && counts["stall_ms"] < 1_000, "{counts:?}");
}

#[test]
fn a_frozen_expert_workers_late_answers_are_dropped_and_counted() {
    let Some(counts) = each_seed("a_frozen_expert_workers_late_answers_are_dropped_and_counted", 6, |seed| {
        let mut dice = Dice::new(seed);
        let (host, thawed) = (dice.pick(&["e0", "e1", "e2"]), dice.between(500, 2_500));
        let schedule = Schedule::default().at(0, hold("a0", host)).at(0, hold("a1", host));
        callers(seed, PATIENT, false).run(schedule.at(thawed, release("a0", host)).at(thawed, release("a1", host)))
    }) else {
        return;
    };
    assert_clean(&counts);
    assert!(counts["unmatched"] > 0 && counts["hedged"] >= counts["unmatched"], "{counts:?}");
    assert!(counts["resent"] == 0 && counts["stall_ms"] < 1_000, "{counts:?}");
}

#[test]
fn rows_pass_a_network_that_loses_connections() {
    let Some(counts) = each_seed("rows_pass_a_network_that_loses_connections", 6, |seed| {
        let rate = [0.0002, 0.001][seed as usize % 2];
        callers(seed, PATIENT, false).run(Schedule::default().at(0, Fault::Loss(rate)).at(5_000, Fault::Loss(0.0)))
    }) else {
        return;
    };
    assert_clean(&counts);
    assert!(counts["resent"] > 0 && counts["hedged"] > 0, "{counts:?}");
}

/// e0 and e1 are all holders of every third expert.
fn both_holders_away(away: u64) -> Schedule {
    Schedule::default().at(0, crash("e0")).at(0, crash("e1")).at(away, bounce("e1")).at(away, bounce("e0"))
}

#[test]
fn rows_wait_for_a_holder() {
    let Some(counts) = each_seed("rows_wait_for_a_holder", 5, |seed| {
        callers(seed, PATIENT, false).run(both_holders_away(Dice::new(seed).between(2_000, 8_000)))
    }) else {
        return;
    };
    assert_clean(&counts);
    assert!((2_000..11_000).contains(&counts["stall_ms"]), "{counts:?}");
}

#[test]
fn rows_that_wait_too_long_fail_by_name() {
    let deadline = Duration::from_secs(1);
    let Some(counts) = each_seed("rows_that_wait_too_long_fail_by_name", 5, |seed| {
        callers(seed, deadline, true).run(both_holders_away(4_000))
    }) else {
        return;
    };
    assert!(counts["failed"] > 0 && counts["done"] > 1_000 && counts["outstanding"] == 0, "{counts:?}");
    assert!((1_000..1_050).contains(&counts["stall_ms"]), "{counts:?}");
}

#[test]
fn rows_survive_links_that_are_cut_and_healed_in_any_order() {
    let Some(counts) = each_seed("rows_survive_links_that_are_cut_and_healed_in_any_order", 12, |seed| {
        callers(seed, PATIENT, false).run(swizzle(&mut Dice::new(seed), &EDGES, Duration::from_millis(800)))
    }) else {
        return;
    };
    assert_clean(&counts);
    assert!(counts["hedged"] > 0, "{counts:?}");
}

/// Not so for requests: h2 forgets reset streams by the real clock, and every answer's end resets one.
#[test]
fn the_same_seed_is_the_same_history_of_rows() {
    for seed in 0..3 {
        let swizzle = || swizzle(&mut Dice::new(seed), &EDGES, Duration::from_millis(800));
        let run = || callers(seed, PATIENT, false).run(swizzle()).unwrap();
        assert_same(seed, &run(), &run());
    }
}

// === Requests: clients, coordinators, attention workers, expert workers ===

/// All that a request's way passes.
fn links() -> Vec<(&'static str, &'static str)> {
    let inside = ["a0", "a1", "a2"].into_iter().flat_map(|a| ["c0", "c1", "e0", "e1", "e2"].map(|other| (a, other)));
    let doors = ["u0", "u1"].into_iter().flat_map(|u| ["c0", "c1"].map(|c| (u, c)));
    inside.chain(doors).collect()
}

/// Clients take no UNAVAILABLE for an answer, except where they are to be patient.
fn whole(seed: u64) -> Cluster {
    Cluster::whole(seed, 3, 3, false)
}

#[test]
fn an_attention_worker_is_killed_and_its_sequences_move() {
    let Some(counts) = each_seed("an_attention_worker_is_killed_and_its_sequences_move", 4, |seed| {
        let mut dice = Dice::new(seed);
        let (at, host) = (dice.between(0, 1_000), dice.pick(&["a0", "a1", "a2"]));
        whole(seed).run(Schedule::default().at(at, crash(host)).at(at + dice.between(1, 2_000), bounce(host)))
    }) else {
        return;
    };
    assert!(counts["moved"] > 0 && !counts.contains_key("resumed") && counts["stall_ms"] < 600, "{counts:?}");
}

#[test]
fn a_coordinator_is_cut_off_from_an_attention_worker() {
    let Some(counts) = each_seed("a_coordinator_is_cut_off_from_an_attention_worker", 4, |seed| {
        let mut dice = Dice::new(seed);
        let (door, host) = (dice.pick(&["c0", "c1"]), dice.pick(&["a0", "a1", "a2"]));
        whole(seed).run(Schedule::default().at(0, cut(door, host)).at(5_000, heal(door, host)))
    }) else {
        return;
    };
    assert!(counts["moved"] > 0 && !counts.contains_key("resumed") && counts["stall_ms"] < 7_000, "{counts:?}");
}

#[test]
fn a_frozen_attention_workers_sequences_move() {
    let Some(counts) = each_seed("a_frozen_attention_workers_sequences_move", 4, |seed| {
        let mut dice = Dice::new(seed);
        let (host, thawed) = (dice.pick(&["a0", "a1", "a2"]), dice.between(2_500, 6_000));
        let mut schedule = Schedule::default();
        for other in ["c0", "c1", "e0", "e1", "e2"] {
            schedule = schedule.at(0, hold(host, other)).at(thawed, release(host, other));
        }
        whole(seed).run(schedule)
    }) else {
        return;
    };
    assert!(counts["moved"] > 0 && !counts.contains_key("resumed") && counts["stall_ms"] < 4_000, "{counts:?}");
}

#[test]
fn a_coordinator_is_killed_and_its_clients_go_on_at_the_other_one() {
    let Some(counts) = each_seed("a_coordinator_is_killed_and_its_clients_go_on_at_the_other_one", 4, |seed| {
        let mut dice = Dice::new(seed);
        let (at, door) = (dice.between(0, 1_000), dice.pick(&["c0", "c1"]));
        let schedule = Schedule::default().at(at, crash(door)).at(at + dice.between(1, 3_000), bounce(door));
        Cluster::whole(seed, 3, 3, true).run(schedule)
    }) else {
        return;
    };
    assert!(counts["resumed"] > 0 && counts["stall_ms"] < 2_000, "{counts:?}");
}

#[test]
fn requests_survive_an_expert_worker_that_is_gone_for_good() {
    let Some(counts) = each_seed("requests_survive_an_expert_worker_that_is_gone_for_good", 2, |seed| {
        let host = Dice::new(seed).pick(&["e0", "e1", "e2"]);
        whole(seed).run(Schedule::default().at(0, crash(host)).at(18_000, bounce(host)).at(22_000, heal("c0", "c1")))
    }) else {
        return;
    };
    assert!(counts["epoch"] == 3 && counts["stall_ms"] < 500, "placed, without it, with it again: {counts:?}");
}

#[test]
fn experts_whose_holders_have_all_died_are_loaded_elsewhere() {
    let Some(counts) = each_seed("experts_whose_holders_have_all_died_are_loaded_elsewhere", 4, |seed| {
        let schedule = Schedule::default().at(0, crash("e0")).at(0, crash("e1")).at(8_000, bounce("e0"));
        Cluster::whole(seed, 3, 3, true).run(schedule)
    }) else {
        return;
    };
    assert!(counts["epoch"] >= 2 && counts["stall_ms"] < 4_000, "{counts:?}");
}

#[test]
fn requests_pass_a_network_that_loses_connections() {
    let Some(counts) = each_seed("requests_pass_a_network_that_loses_connections", 5, |seed| {
        let schedule = Schedule::default().at(0, Fault::Loss(0.001)).at(5_000, Fault::Loss(0.0));
        Cluster::whole(seed, 3, 3, true).run(schedule)
    }) else {
        return;
    };
    assert!(counts["resumed"] > 0 && counts["moved"] > 0, "{counts:?}");
}

#[test]
fn requests_survive_links_that_are_cut_and_healed_in_any_order() {
    let Some(counts) = each_seed("requests_survive_links_that_are_cut_and_healed_in_any_order", 8, |seed| {
        let schedule = swizzle(&mut Dice::new(seed), &links(), Duration::from_millis(400));
        Cluster::whole(seed, 3, 3, true).run(schedule)
    }) else {
        return;
    };
    assert!(counts["resumed"] > 0 && counts["moved"] > 0, "{counts:?}");
}

/// One after the other each kind of host is killed, while links are cut and messages are lost.
#[test]
fn requests_survive_everything_at_once() {
    let Some(counts) = each_seed("requests_survive_everything_at_once", 8, |seed| {
        let mut dice = Dice::new(seed);
        let mut schedule = swizzle(&mut dice, &links(), Duration::from_millis(400)).at(0, Fault::Loss(0.0001));
        let mut hosts = ["a0", "a1", "c0", "c1", "e0", "e1"];
        dice.shuffle(&mut hosts);
        let mut at = 0;
        for host in hosts.into_iter().take(4) {
            at += dice.between(100, 1_500);
            schedule = schedule.at(at, crash(host)).at(at + dice.between(1, 1_500), bounce(host));
        }
        Cluster::whole(seed, 3, 3, true).run(schedule)
    }) else {
        return;
    };
    assert!(counts["resumed"] > 0 && counts["moved"] > 0, "{counts:?}");
}
