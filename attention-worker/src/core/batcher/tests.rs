//! Who runs, who waits, who gives way.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;

const LIMITS: Limits =
    Limits { pages: 4, chunk: 32, token_budget: 128, micro_batches: 1, micro_batch_rows: 1, waiting_max: 64 };

fn request(prompt: usize, max_tokens: usize) -> Request {
    Request { prompt: (0..prompt as u32).collect(), emitted: vec![], max_tokens, stop_tokens: vec![] }
}

/// A model whose next token depends on every token before it.
fn next_token(tokens: &[u32]) -> u32 {
    let mix = |hash: u32, &token: &u32| (hash ^ token).wrapping_mul(0x0100_0193).rotate_left(5);
    tokens.iter().fold(0x811c_9dc5, mix) % 1000
}

/// What the model generates for a request by itself.
fn expected(request: &Request) -> (Vec<u32>, Finish) {
    let mut tokens = request.prompt.clone();
    loop {
        let token = next_token(&tokens);
        tokens.push(token);
        let generated = tokens.len() - request.prompt.len();
        if request.stop_tokens.contains(&token) {
            return (tokens.split_off(request.prompt.len()), Finish::Stop);
        }
        if generated == request.max_tokens {
            return (tokens.split_off(request.prompt.len()), Finish::Length);
        }
    }
}

/// A cache that holds the tokens themselves, so that a row which reads a wrong or foreign page is noticed.
struct Model {
    batcher: Batcher,
    cache: Vec<u32>,
    flights: VecDeque<Vec<Part>>,
    emitted: BTreeMap<SequenceId, Vec<u32>>,
    ended: BTreeMap<SequenceId, Finish>,
}

impl Model {
    fn new(limits: Limits) -> Self {
        let cache = vec![u32::MAX; limits.pages as usize * PAGE_TOKENS];
        let (flights, emitted, ended) = Default::default();
        Self { batcher: Batcher::new(limits), cache, flights, emitted, ended }
    }

    fn submit(&mut self, request: Request) -> SequenceId {
        let id = self.batcher.submit(request).unwrap();
        self.emitted.insert(id, vec![]);
        id
    }

    /// Starts a micro-batch if there is something to run: its rows are written now, as the engine's are.
    fn start(&mut self) -> bool {
        let parts = self.batcher.form(self.batcher.limits.micro_batches);
        for part in &parts {
            for (i, &token) in part.tokens.iter().enumerate() {
                let at = part.start + i;
                self.cache[part.pages[at / PAGE_TOKENS] as usize * PAGE_TOKENS + at % PAGE_TOKENS] = token;
            }
        }
        let started = !parts.is_empty();
        if started {
            self.flights.push_back(parts);
        }
        started
    }

    /// Ends a micro-batch: what it draws comes from what its pages hold at the end.
    fn finish(&mut self, which: usize) {
        for part in self.flights.remove(which).unwrap() {
            let context = part.start + part.tokens.len();
            let at = |i: usize| self.cache[part.pages[i / PAGE_TOKENS] as usize * PAGE_TOKENS + i % PAGE_TOKENS];
            let token = part.draws.then(|| next_token(&(0..context).map(at).collect::<Vec<_>>()));
            let is_aborted = self.batcher.is_aborted(part.sequence);
            if let Some(token) = token.filter(|_| !is_aborted) {
                self.emitted.get_mut(&part.sequence).unwrap().push(token);
            }
            if let Some(finish) = self.batcher.complete(part.sequence, token) {
                self.ended.insert(part.sequence, finish);
            }
        }
    }
}

/// One row more or less decides; a chunk counts as its rows; never none, never more than allowed.
#[test]
fn there_are_as_many_micro_batches_as_can_be_filled() {
    let limits = Limits { pages: 64, micro_batches: 3, micro_batch_rows: 10, ..LIMITS };
    for (prompts, expected) in [
        (vec![], 1),
        (vec![1; 19], 1),
        (vec![1; 20], 2),
        (vec![1; 29], 2),
        (vec![1; 50], 3),
        (vec![500], 3),
        (vec![9, 9], 1),
    ] {
        let mut batcher = Batcher::new(limits);
        for prompt in &prompts {
            batcher.submit(request(*prompt, 1)).unwrap();
        }
        batcher.admit();
        assert_eq!(batcher.micro_batches(), expected, "{prompts:?}");
    }
}

#[test]
fn decode_goes_before_prefill_and_the_budget_holds() {
    let mut model = Model::new(Limits { token_budget: 10, chunk: 8, ..LIMITS });
    let old = model.submit(request(3, 9));
    assert!(model.start());
    model.finish(0);
    let young = model.submit(request(20, 9));
    let parts = model.batcher.form(1);
    let shape: Vec<_> = parts.iter().map(|p| (p.sequence, p.start, p.tokens.len(), p.draws)).collect();
    assert_eq!(shape, [(old, 3, 1, true), (young, 0, 8, false)]);
    assert!(model.batcher.form(1).is_empty(), "a sequence is in one micro-batch at a time");
}

#[test]
fn refusals_have_their_numbers() {
    let mut batcher = Batcher::new(Limits { waiting_max: 1, ..LIMITS });
    let too_large = batcher.submit(request(200, 57)).unwrap_err();
    assert_eq!(too_large, Refused::TooLarge { prompt: 200, max_tokens: 57, capacity: 256 });
    assert!(too_large.to_string().contains("257") && too_large.to_string().contains("256"), "{too_large}");
    batcher.submit(request(200, 56)).unwrap();
    assert_eq!(batcher.submit(request(1, 1)), Err(Refused::LineFull { limit: 1 }));
}

#[test]
fn the_youngest_gives_way_and_loses_nothing() {
    let mut model = Model::new(Limits { pages: 2, ..LIMITS });
    let requests = [request(60, 40), request(50, 30)];
    let ids = requests.clone().map(|r| model.submit(r));
    while model.start() {
        model.finish(0);
    }
    assert!(model.batcher.counts().preemptions > 0);
    for (id, request) in ids.iter().zip(&requests) {
        assert_eq!((model.emitted[id].clone(), model.ended[id]), expected(request));
    }
}

#[test]
fn an_abort_in_flight_takes_effect_when_the_rows_are_back() {
    let mut model = Model::new(LIMITS);
    let id = model.submit(request(10, 10));
    model.start();
    assert!(!model.batcher.abort(id));
    assert_eq!(model.batcher.counts().pages_free, 3);
    model.finish(0);
    assert_eq!((model.ended[&id], model.emitted[&id].len()), (Finish::Aborted, 0));
    assert_eq!(model.batcher.counts().pages_free, 4);
    assert!(!model.batcher.abort(id));
}

#[derive(Clone, Debug)]
enum Step {
    Submit(Request),
    Start,
    Finish(usize),
    Abort(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let request = (prop::collection::vec(0u32..1000, 1..150), 1usize..90, prop::collection::vec(0u32..1000, 0..8))
        .prop_map(|(prompt, max_tokens, stop_tokens)| Request { prompt, emitted: vec![], max_tokens, stop_tokens });
    let step = prop_oneof![
        2 => request.prop_map(Step::Submit),
        5 => Just(Step::Start),
        5 => (0usize..4).prop_map(Step::Finish),
        1 => (0usize..40).prop_map(Step::Abort),
    ];
    prop::collection::vec(step, 0..120)
}

fn limits() -> impl Strategy<Value = Limits> {
    (4u32..12, 1usize..80, 1usize..100, 1usize..4).prop_map(|(pages, chunk, token_budget, micro_batches)| Limits {
        pages,
        chunk,
        token_budget,
        micro_batches,
        micro_batch_rows: 1,
        waiting_max: 1000,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn every_request_ends_with_its_tokens_and_all_pages_come_back(limits in limits(), steps in steps()) {
        let mut model = Model::new(limits);
        let (mut requests, mut aborted) = (Vec::new(), BTreeMap::new());
        for step in steps {
            match step {
                Step::Submit(request) => {
                    let id = model.submit(request.clone());
                    requests.push((id, request));
                }
                Step::Start => {
                    if model.flights.len() < limits.micro_batches {
                        model.start();
                    }
                }
                Step::Finish(which) => {
                    if which < model.flights.len() {
                        model.finish(which);
                    }
                }
                Step::Abort(which) => {
                    if let Some((id, _)) = requests.get(which) {
                        model.batcher.abort(*id);
                        aborted.entry(*id).or_insert(model.emitted[id].len());
                    }
                }
            }
            for flight in &model.flights {
                prop_assert!(flight.iter().map(|p| p.tokens.len()).sum::<usize>() <= limits.token_budget);
                prop_assert!(flight.iter().all(|p| p.tokens.len() <= limits.chunk));
            }
        }
        // Liveness: the sum of all work is finite, and every turn does some of it.
        loop {
            while model.flights.len() < limits.micro_batches && model.start() {}
            if model.flights.is_empty() {
                break;
            }
            model.finish(0);
        }
        prop_assert!(model.batcher.is_empty());
        prop_assert_eq!(model.batcher.counts().pages_free, limits.pages as usize);
        for (id, request) in requests {
            let (tokens, finish) = expected(&request);
            match aborted.get(&id) {
                Some(&emitted) => {
                    prop_assert_eq!(model.emitted[&id].len(), emitted, "a token after the abort");
                    prop_assert_eq!(&model.emitted[&id][..], &tokens[..emitted]);
                }
                None => {
                    prop_assert_eq!(&model.emitted[&id], &tokens);
                    prop_assert_eq!(model.ended[&id], finish);
                }
            }
        }
    }
}
