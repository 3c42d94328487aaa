//! The simulated cluster under a thousand seeds of faults.

use moesaic_tests::sim::{self, Plan, run_all};

/// Less than a minute on two cores.
const SEEDS: std::ops::Range<u64> = 0..1_000;

#[test]
fn no_request_is_lost_and_no_token_is_wrong_whatever_fails() {
    let report = run_all(SEEDS, false);
    println!("{report}");
    assert!(report.failures.is_empty(), "{report}");
    let outcome = report.outcome;
    // Else it would have shown nothing.
    assert!(outcome.tokens > 500_000 && outcome.faults > 3_000 && outcome.resumed > 10_000, "{outcome:?}");
    assert!(outcome.slots > 1_000_000 && outcome.lane_failures > 3_000, "{outcome:?}");
    assert!(outcome.placements > SEEDS.end as usize, "{outcome:?}");
}

#[test]
fn the_same_seed_is_the_same_history() {
    for seed in [3, 1_234_567] {
        let [first, second] = [(); 2].map(|()| sim::run(Plan::of(seed), false).expect("no violation"));
        assert_eq!(first, second);
        assert!(first.tokens > 0 && first.events > 1_000);
    }
    let other = sim::run(Plan::of(4), false).expect("no violation");
    assert_ne!(other.hash, sim::run(Plan::of(3), false).expect("no violation").hash);
}
