//! Whatever happens, in any order: each call ends once, rightly, and in time where that is possible.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const EXPERTS: usize = 6;

/// For each expert 1 to 3 of the workers, in any order.
fn holders() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let some = prop::sample::subsequence((0..WORKERS as u32).collect::<Vec<_>>(), 1..=3).prop_shuffle();
    prop::collection::vec(some, EXPERTS)
}

fn rows() -> impl Strategy<Value = Vec<[u16; TOP_K]>> {
    let experts = prop::sample::subsequence((0..EXPERTS as u16).collect::<Vec<_>>(), TOP_K);
    prop::collection::vec(experts.prop_map(|experts| [experts[0], experts[1]]), 0..4)
}

fn bench(holders: &[Vec<u32>]) -> Bench {
    Bench::new(&holders.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// What may happen next; numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    Call(Vec<[u16; TOP_K]>),
    Answer(usize),
    Misdirected(usize),
    Short(usize),
    OldEpoch(usize),
    Refused(usize, RefusalReason),
    NotSent(usize),
    EdgeDown(u64),
    Heard(u64),
    NewEdge(u64),
    Leave(u64),
    Ways(Vec<Vec<u32>>),
    Abandon(usize),
    /// So many ms; which workers speak at the end of them.
    Pass(u64, Vec<u64>),
}

fn step() -> impl Strategy<Value = Step> {
    use RefusalReason::*;
    let reason = prop::sample::select(vec![Malformed, Epoch, Busy, Busy, Stopping, NotHeld]);
    let speaking = prop::sample::subsequence((0..WORKERS).collect::<Vec<_>>(), 0..=WORKERS as usize);
    let time = prop_oneof![4 => 0u64..60, 1 => 300u64..800];
    prop_oneof![
        6 => rows().prop_map(Step::Call),
        8 => any::<usize>().prop_map(Step::Answer),
        1 => any::<usize>().prop_map(Step::Misdirected),
        1 => any::<usize>().prop_map(Step::Short),
        1 => any::<usize>().prop_map(Step::OldEpoch),
        2 => (any::<usize>(), reason).prop_map(|(sent, reason)| Step::Refused(sent, reason)),
        1 => any::<usize>().prop_map(Step::NotSent),
        2 => (0..WORKERS).prop_map(Step::EdgeDown),
        3 => (0..WORKERS).prop_map(Step::Heard),
        1 => (0..WORKERS).prop_map(Step::NewEdge),
        1 => (0..WORKERS).prop_map(Step::Leave),
        1 => holders().prop_map(Step::Ways),
        1 => any::<usize>().prop_map(Step::Abandon),
        6 => (time, speaking).prop_map(|(time, speaking)| Step::Pass(time, speaking)),
    ]
}

/// A bench, and what the steps so far must have come to.
struct Model {
    bench: Bench,
    calls: u64,
    epoch: u32,
    abandoned: BTreeSet<u64>,
    /// Terms that were asked for twice while no worker was silent.
    late: u64,
}

const FIRST_CREDIT: f64 = 6.0;

impl Model {
    fn new(holders: &[Vec<u32>], first_sequence: u32) -> Self {
        let mut bench = bench(holders);
        (bench.tracker.next_sequence, bench.tracker.credit) = (first_sequence, FIRST_CREDIT);
        Self { bench, calls: 0, epoch: 5, abandoned: BTreeSet::new(), late: 0 }
    }

    fn step(&mut self, step: Step) {
        let Self { bench, .. } = self;
        let some = |any: usize| any % bench.sent.len().max(1);
        match step {
            Step::Call(rows) => {
                bench.call(self.calls, &rows);
                self.calls += 1;
            }
            Step::EdgeDown(number) => bench.edge_down(number),
            Step::Heard(number) => bench.heard(number),
            Step::NewEdge(number) => {
                bench.new_edge(number);
                bench.set_ways(self.epoch);
            }
            Step::Leave(number) => {
                bench.leave(number);
                bench.set_ways(self.epoch);
            }
            Step::Ways(holders) => {
                self.epoch += 1;
                bench.holders = holders;
                bench.set_ways(self.epoch);
            }
            Step::Abandon(any) if self.calls > 0 => {
                let call = any as u64 % self.calls;
                if !bench.ends.contains_key(&call) {
                    self.abandoned.insert(call);
                }
                bench.on(Event::Abandoned { call: CallId(call) });
            }
            Step::Pass(time, speaking) => self.pass(Duration::from_millis(time), &speaking),
            _ if bench.sent.is_empty() => {}
            Step::NotSent(any) => {
                let key = bench.key(some(any));
                bench.on(Event::NotSent { key, cause: Cause::QueueFull { limit: 1 } });
            }
            Step::Answer(any) => bench.answer(some(any)),
            Step::Refused(any, reason) => bench.refuse(some(any), reason),
            Step::Misdirected(any) => {
                let answer = bench.right_answer(some(any));
                bench.on(Event::Answer { worker: worker(WORKERS), answer });
            }
            Step::Short(any) => {
                let (worker, answer) = (bench.sent[some(any)].0.worker.clone(), bench.right_answer(some(any)));
                bench.on(Event::Answer { worker, answer: AnswerFrame { result: Ok(vec![7.0].into()), ..answer } });
            }
            Step::OldEpoch(any) => {
                let (worker, mut answer) = (bench.sent[some(any)].0.worker.clone(), bench.right_answer(some(any)));
                answer.header.epoch = Epoch(1);
                bench.on(Event::Answer { worker, answer });
            }
            Step::Abandon(_) => {}
        }
    }

    fn pass(&mut self, time: Duration, speaking: &[u64]) {
        let Self { bench, late, .. } = self;
        bench.now += time;
        let (tracker, now) = (&bench.tracker, bench.now);
        let is_loud = tracker.frames.values().all(|sent| tracker.health().rank(&sent.to, now) < Rank::Silent);
        let before = tracker.counts().terms_hedged;
        bench.on(Event::Tick);
        if is_loud {
            *late += bench.tracker.counts().terms_hedged - before;
        }
        speaking.iter().for_each(|&number| bench.heard(number));
    }

    /// Each part of an open call is answered, with workers, or waits for one; the others have ended.
    fn check(&self) {
        let (tracker, now) = (&self.bench.tracker, self.bench.now);
        let mut keys = BTreeSet::new();
        for call in tracker.calls.values() {
            assert!(call.missing > 0 && now < call.deadline);
            assert_eq!(call.missing, call.parts.iter().filter(|part| part.answer.is_none()).count());
            for part in &call.parts {
                let is_open = !part.tries.is_empty() || part.retry_at.is_some();
                assert_eq!(is_open, part.answer.is_none());
                let wanted = part.tries.iter().flat_map(|t| t.keys.iter().zip(&t.answers));
                let wanted: Vec<FrameKey> =
                    wanted.filter(|(_, answer)| answer.is_none()).map(|(key, _)| *key).collect();
                let workers: BTreeSet<_> = wanted.iter().map(|key| &tracker.frames[key].to.worker).collect();
                assert_eq!(workers.len(), wanted.len(), "a worker is asked twice at the same time");
                keys.extend(wanted.iter().map(|key| (key.micro_batch, key.sequence)));
            }
        }
        assert_eq!(keys, tracker.frames.keys().map(|key| (key.micro_batch, key.sequence)).collect());
        assert!(tracker.given_up.keys().all(|key| !tracker.frames.contains_key(key)));
        for call in 0..self.calls {
            let (open, ended) = (tracker.calls.contains_key(&CallId(call)), self.bench.ends.contains_key(&call));
            let states = [open, ended, self.abandoned.contains(&call)];
            assert_eq!(states.into_iter().filter(|&is| is).count(), 1, "call {call}: {states:?}");
        }
        let bound = FIRST_CREDIT + tracker.counts().terms as f64 * HEDGED_SHARE;
        assert!(self.late as f64 <= bound, "{} terms were late, at most {bound} may be asked for twice", self.late);
    }

    /// After the last deadline nothing is left, and what is done is right.
    fn finish(mut self) {
        self.pass(DEADLINE, &[]);
        self.check();
        let tracker = &self.bench.tracker;
        assert_eq!((tracker.outstanding(), tracker.next_tick(self.bench.now)), (0, None));
        self.bench.assert_sums();
    }
}

/// What a worker does with frames.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    AnswersAfter(u64),
    /// It says nothing at all.
    Frozen,
    Refuses(RefusalReason),
    Short,
    Down,
}

#[derive(Clone, Debug)]
enum Change {
    Mood(u64, Mood),
    Call(Vec<[u16; TOP_K]>),
    Ways(Vec<Vec<u32>>),
    Pass(u64),
}

fn change() -> impl Strategy<Value = Change> {
    use Mood::*;
    let mood = prop_oneof![
        3 => (1u64..40).prop_map(AnswersAfter),
        1 => Just(Frozen),
        1 => prop::sample::select(vec![Refuses(RefusalReason::Busy), Refuses(RefusalReason::Stopping), Short, Down]),
    ];
    prop_oneof![
        4 => (1..WORKERS, mood).prop_map(|(number, mood)| Change::Mood(number, mood)),
        4 => rows().prop_map(Change::Call),
        1 => holders().prop_map(Change::Ways),
        4 => (0u64..700).prop_map(Change::Pass),
    ]
}

/// Workers with moods. Worker 0 has everything, and always answers.
struct World {
    bench: Bench,
    moods: [Mood; WORKERS as usize],
    /// Frames that are with a worker, and since when.
    frames: Vec<(Duration, usize)>,
    seen: usize,
    calls: u64,
    epoch: u32,
}

fn with_worker_0(mut holders: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    for holders in holders.iter_mut().filter(|holders| !holders.contains(&0)) {
        holders.push(0);
    }
    holders
}

impl World {
    fn new(holders: Vec<Vec<u32>>) -> Self {
        let moods = [Mood::AnswersAfter(3); WORKERS as usize];
        Self { bench: bench(&with_worker_0(holders)), moods, frames: Vec::new(), seen: 0, calls: 0, epoch: 5 }
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Mood(number, mood) => {
                self.moods[number as usize] = mood;
                if mood == Mood::Down {
                    self.bench.edge_down(number);
                }
            }
            Change::Call(rows) => {
                self.bench.call(self.calls, &rows);
                self.calls += 1;
            }
            Change::Ways(holders) => {
                self.epoch += 1;
                self.bench.holders = with_worker_0(holders);
                self.bench.set_ways(self.epoch);
            }
            Change::Pass(time) => (0..time / 5).for_each(|_| self.pass()),
        }
    }

    fn pass(&mut self) {
        let mood = |number: u64| self.moods[number as usize];
        let speaks = |number: &u64| !matches!(mood(*number), Mood::Frozen | Mood::Down);
        let speaking: Vec<u64> = (0..WORKERS).filter(speaks).collect();
        self.bench.pass_with(Duration::from_millis(5), &speaking);
        let now = self.bench.now;
        while self.seen < self.bench.sent.len() {
            self.frames.push((now, self.seen));
            self.seen += 1;
        }
        for (at, sent) in std::mem::take(&mut self.frames) {
            let worker = self.bench.sent[sent].0.worker.clone();
            match self.moods[self.bench.number_of(sent) as usize] {
                Mood::AnswersAfter(time) if at + Duration::from_millis(time) <= now => self.bench.answer(sent),
                Mood::AnswersAfter(_) | Mood::Frozen => self.frames.push((at, sent)),
                Mood::Refuses(reason) => self.bench.refuse(sent, reason),
                Mood::Short => {
                    let answer = self.bench.right_answer(sent);
                    self.bench
                        .on(Event::Answer { worker, answer: AnswerFrame { result: Ok(vec![].into()), ..answer } });
                }
                Mood::Down => {
                    let key = self.bench.key(sent);
                    self.bench.on(Event::NotSent { key, cause: Cause::EdgeDown { reason: "it is down".into() } });
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn whatever_happens_each_call_ends_once_and_nothing_stays_outstanding(
        holders in holders(),
        steps in prop::collection::vec(step(), 0..80),
        first_sequence in prop_oneof![Just(0u32), (u32::MAX - 20)..=u32::MAX],
    ) {
        let mut model = Model::new(&holders, first_sequence);
        for step in steps {
            model.step(step);
            model.check();
        }
        model.finish();
    }

    /// Long before the deadline, whatever the others do.
    #[test]
    fn a_call_whose_experts_one_good_worker_has_is_done(
        holders in holders(),
        changes in prop::collection::vec(change(), 0..40),
    ) {
        let mut world = World::new(holders);
        for change in changes {
            world.change(change);
        }
        world.change(Change::Pass(2000));
        prop_assert!(world.bench.ends.values().all(Result::is_ok));
        world.bench.assert_done(&(0..world.calls).collect::<Vec<_>>());
        prop_assert_eq!(world.bench.tracker.outstanding(), 0);
    }
}
