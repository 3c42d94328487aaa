//! The leader told what is there, at one time after another.

use moesaic_proto::ExpertId;

use super::*;

const LAYERS: [LayerId; 2] = [LayerId(1), LayerId(2)];
const EXPERTS: usize = 8;

struct Bench {
    leader: Leader,
    now: Duration,
    workers: Vec<Seen>,
    placement: Option<Placement>,
    load: Load,
}

fn id(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn worker(name: &str) -> Seen {
    let host = Host { id: id(name), node: name.into(), slots: 16, weight: 1.0 };
    Seen { host, epoch_loaded: Epoch(0), is_drained: false, is_stopping: false, is_cordoned: false, is_down: false }
}

impl Bench {
    /// Workers a, b, ... and every expert on two of them, loaded.
    fn new(names: &[&str]) -> Self {
        let policy = Policy { layers: LAYERS.to_vec(), experts: EXPERTS, groups: 4, replicas: 2, workers: names.len() };
        let (leader, workers) = (Leader::new(policy, Duration::ZERO), names.iter().map(|name| worker(name)).collect());
        let mut bench = Self { leader, now: Duration::ZERO, workers, placement: None, load: Load::new() };
        assert_eq!(bench.step(), Some(Why::First));
        bench.loaded();
        bench
    }

    /// One decision, which is carried out.
    fn step(&mut self) -> Option<Why> {
        let sight = Sight { workers: &self.workers, placement: self.placement.as_ref(), load: &self.load };
        let (plan, why) = self.leader.decide(self.now, &sight).unwrap()?;
        let epoch = self.placement.as_ref().map_or(1, |before| before.epoch().0 + 1);
        assert_eq!(plan.placement.epoch(), Epoch(epoch));
        assert_eq!(plan.placement.is_urgent(), why == Why::Lost);
        self.placement = Some(plan.placement);
        Some(why)
    }

    /// The first decision within so many milliseconds, and after how many it came.
    fn within(&mut self, ms: u64) -> Option<(Why, u64)> {
        for passed in (0..=ms).step_by(100) {
            if let Some(why) = self.step() {
                return Some((why, passed));
            }
            self.now += Duration::from_millis(100);
        }
        None
    }

    fn loaded(&mut self) {
        let epoch = self.placement.as_ref().unwrap().epoch();
        self.workers.iter_mut().for_each(|seen| seen.epoch_loaded = epoch);
    }

    fn seen(&mut self, name: &str) -> &mut Seen {
        self.workers.iter_mut().find(|seen| seen.host.id.as_str() == name).unwrap()
    }

    fn remove(&mut self, name: &str) -> Seen {
        let at = self.workers.iter().position(|seen| seen.host.id.as_str() == name).unwrap();
        self.workers.remove(at)
    }

    /// Copies of every expert, and who has them.
    fn check(&self, copies: usize, holders: &[&str]) {
        let placement = self.placement.as_ref().unwrap();
        for layer in LAYERS {
            for e in 0..EXPERTS {
                assert_eq!(placement.holders(layer, ExpertId(e as u16)).len(), copies);
            }
        }
        let held = |worker: &&WorkerId| placement.shard(worker).values().any(|experts| !experts.is_empty());
        let names: Vec<&str> = placement.workers().iter().filter(held).map(WorkerId::as_str).collect();
        assert_eq!(names, holders);
    }
}

#[test]
fn the_first_placement_waits_for_its_workers_and_then_nothing_changes() {
    let mut bench = Bench::new(&["a", "b", "c"]);
    bench.check(2, &["a", "b", "c"]);
    assert_eq!(bench.within(200_000), None);

    bench.leader.policy.workers = 4;
    bench.placement = None;
    assert_eq!(bench.within(10_000), None, "one is missing");
}

#[test]
fn a_worker_that_is_gone_is_given_time_and_then_its_experts_are_copied_again() {
    let mut bench = Bench::new(&["a", "b", "c", "d"]);
    let gone = bench.remove("b");
    assert_eq!(bench.within(9_000), None);
    bench.workers.push(gone);
    assert_eq!(bench.within(20_000), None, "it came back in time");
    bench.remove("b");
    assert_eq!(bench.within(20_000), Some((Why::Gone, 10_000)));
    bench.check(2, &["a", "c", "d"]);
    bench.loaded();
    assert_eq!(bench.within(50_000), None);

    // It comes back: an empty one, as any that joins.
    bench.workers.push(worker("b"));
    assert_eq!(bench.within(20_000), Some((Why::Joined, 2_000)));
    bench.check(2, &["a", "b", "c", "d"]);
}

#[test]
fn a_worker_that_nobody_reaches_is_gone_though_it_is_registered() {
    let mut bench = Bench::new(&["a", "b", "c", "d"]);
    bench.seen("b").is_down = true;
    assert_eq!(bench.within(20_000), Some((Why::Gone, 11_000)));
    bench.check(2, &["a", "c", "d"]);
}

#[test]
fn lost_experts_are_placed_at_once_even_while_others_load() {
    let mut bench = Bench::new(&["a", "b", "c", "d"]);
    let placement = bench.placement.clone().unwrap();
    let [first, second] = placement.holders(LAYERS[0], ExpertId(0)) else { panic!("two holders") };
    let pair = [first, second].map(|&w| placement.workers()[w as usize].as_str().to_owned());
    pair.iter().for_each(|name| drop(bench.remove(name)));
    assert_eq!(bench.within(5_000), Some((Why::Lost, 200)));
    let left: Vec<String> = bench.workers.iter().map(|seen| seen.host.id.as_str().to_owned()).collect();
    bench.check(2, &left.iter().map(String::as_str).collect::<Vec<_>>());

    // Before that is loaded one more dies: again at once.
    bench.workers.remove(0);
    assert_eq!(bench.within(5_000), None, "the other one has everything");
}

#[test]
fn what_leaves_is_moved_away_at_once_and_what_is_cordoned_gets_nothing_new() {
    let mut bench = Bench::new(&["a", "b", "c", "d"]);
    bench.seen("c").is_stopping = true;
    assert_eq!(bench.within(20_000), None, "others have what it has, and it may be back");
    bench.seen("c").is_drained = true;
    assert_eq!(bench.step(), Some(Why::Leaving));
    bench.check(2, &["a", "b", "d"]);
    assert_eq!(bench.within(5_000), None, "nothing while it is loaded");
    bench.loaded();
    (bench.seen("c").is_drained, bench.seen("c").is_stopping) = (false, false);
    bench.seen("c").is_cordoned = true;
    assert_eq!(bench.within(50_000), None, "a cordoned worker does not join");
    bench.seen("c").is_cordoned = false;
    assert_eq!(bench.within(5_000), Some((Why::Joined, 2_000)));
}

#[test]
fn a_worker_that_stops_and_has_experts_of_its_own_is_relieved_of_them() {
    let mut bench = Bench::new(&["a", "b", "c", "d"]);
    let placement = bench.placement.clone().unwrap();
    let [first, second] = placement.holders(LAYERS[0], ExpertId(0)) else { panic!("two holders") };
    let [first, second] = [first, second].map(|&w| placement.workers()[w as usize].as_str().to_owned());
    bench.remove(&first);
    bench.seen(&second).is_stopping = true;
    assert_eq!(bench.within(5_000), Some((Why::Leaving, 0)));
}

#[test]
fn a_load_that_another_placement_spreads_better_moves_experts_now_and_then() {
    let mut bench = Bench::new(&["a", "b", "c", "d"]);
    let mut rows = vec![1.0; EXPERTS];
    (rows[0], rows[1]) = (40.0, 40.0);
    bench.load = LAYERS.iter().map(|layer| (*layer, rows.clone())).collect();
    let (why, after) = bench.within(61_000).unwrap();
    assert_eq!(why, Why::Load);
    assert!(after <= 60_000, "{after}");
    bench.loaded();
    assert_eq!(bench.within(200_000), None, "it is as good as it gets");
    bench.leader.ask();
    assert_eq!(bench.within(1_000), None, "an operator cannot make it better either");
}

#[test]
fn a_plan_that_fails_is_an_error_once_in_a_while() {
    let mut bench = Bench::new(&["a", "b"]);
    bench.workers.iter_mut().for_each(|seen| seen.host.slots = 4);
    bench.remove("a");
    let mut errors = 0;
    for _ in 0..100 {
        let sight = Sight { workers: &bench.workers, placement: bench.placement.as_ref(), load: &bench.load };
        errors += usize::from(bench.leader.decide(bench.now, &sight).is_err());
        bench.now += Duration::from_millis(200);
    }
    assert!((1..=4).contains(&errors), "{errors} errors in 20 s");
}
