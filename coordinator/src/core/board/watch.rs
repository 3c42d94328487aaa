//! What attention workers count and how their edges stand, from one answer to the next.

use std::collections::BTreeMap;

use moesaic_proto::v1::{EdgeState, EdgeStatus, LoadResponse};

use super::messages::{Counters, Edge, Trouble};
use super::{rate, time};

/// Edges whose figures are told in one update; those whose state has changed are told all.
const TOLD_MAX: usize = 100;
/// By how much a code must differ from what was told.
const RATE_STEP: u32 = 2;
const TIME_STEP: u32 = 4;
const TROUBLE_MAX: usize = 50;
/// Between two lists of edges in trouble while nothing enters or leaves it.
const TROUBLE_INTERVAL_MS: u64 = 5000;

/// A worker's own counts, since it started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub micro_batches: u64,
    pub rows: u64,
    pub resent: u64,
    sent: u64,
    hedged: u64,
    unmatched: u64,
    misdirected: u64,
    rejected: u64,
    preemptions: u64,
}

impl Totals {
    pub fn of(load: &LoadResponse) -> Self {
        let dispatch = load.dispatch.unwrap_or_default();
        Self {
            micro_batches: load.micro_batches,
            rows: load.micro_batch_rows,
            resent: dispatch.resent,
            sent: dispatch.sent,
            hedged: dispatch.hedged,
            unmatched: dispatch.unmatched,
            misdirected: dispatch.misdirected,
            rejected: dispatch.rejected,
            preemptions: load.preemptions,
        }
    }

    /// What has come since; all of it if the worker has begun anew. Nothing at the first answer: it is not known since
    /// when it counts.
    pub fn since(&self, before: Option<&Self>) -> Self {
        let Some(before) = before else { return Self::default() };
        let has_begun_anew = self.sent < before.sent || self.micro_batches < before.micro_batches;
        let rise = |now: u64, before: u64| if has_begun_anew { now } else { now.saturating_sub(before) };
        Self {
            micro_batches: rise(self.micro_batches, before.micro_batches),
            rows: rise(self.rows, before.rows),
            resent: rise(self.resent, before.resent),
            sent: rise(self.sent, before.sent),
            hedged: rise(self.hedged, before.hedged),
            unmatched: rise(self.unmatched, before.unmatched),
            misdirected: rise(self.misdirected, before.misdirected),
            rejected: rise(self.rejected, before.rejected),
            preemptions: rise(self.preemptions, before.preemptions),
        }
    }

    pub fn add_to(&self, counters: &mut Counters) {
        counters.sent += self.sent;
        counters.resent += self.resent;
        counters.hedged += self.hedged;
        counters.unmatched += self.unmatched;
        counters.misdirected += self.misdirected;
        counters.rejected += self.rejected;
        counters.preemptions += self.preemptions;
    }
}

/// From an attention worker to an expert worker, by their numbers.
type Ends = (u32, u32);

#[derive(Default)]
pub struct Edges {
    edges: BTreeMap<Ends, Seen>,
    now_ms: u64,
    changed: Vec<Ends>,
    trouble_told_ms: u64,
    trouble_changed: bool,
}

struct Seen {
    state: EdgeState,
    detail: String,
    terms: u64,
    detours: Detours,
    /// When it came into this state.
    detours_before: Detours,
    seen_ms: u64,
    /// Since when it is in this state.
    since_ms: u64,
    /// As it is, and as it was told last.
    now: Edge,
    told: Option<Edge>,
    told_ms: u64,
}

/// What was done because of an expert worker.
#[derive(Clone, Copy, Default)]
struct Detours {
    hedged: u64,
    resent: u64,
    steered: u64,
}

/// An edge's new state.
pub struct Change {
    pub attention: u32,
    pub expert: u32,
    pub state: EdgeState,
    pub detail: String,
    /// All edges to that expert worker have gone the same way.
    pub all: bool,
}

impl Edges {
    /// A new look begins.
    pub fn begin(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    pub fn see(&mut self, ends: Ends, status: &EdgeStatus) {
        let (now_ms, state) = (self.now_ms, status.state());
        let new = || Seen {
            state,
            detail: String::new(),
            terms: status.terms,
            detours: Detours::default(),
            detours_before: Detours::default(),
            seen_ms: now_ms,
            since_ms: now_ms,
            now: Edge(ends.0, ends.1, state.into(), 0, 0),
            told: None,
            told_ms: 0,
        };
        let seen = self.edges.entry(ends).or_insert_with(new);
        let seconds = now_ms.saturating_sub(seen.seen_ms) as f64 / 1000.0;
        let terms = status.terms.saturating_sub(seen.terms) as f64;
        let per_second = if seconds > 0.0 { terms / seconds } else { 0.0 };
        if seen.state != state {
            (seen.since_ms, seen.detours_before) = (now_ms, seen.detours);
            self.changed.push(ends);
            self.trouble_changed = true;
        }
        (seen.state, seen.terms, seen.seen_ms) = (state, status.terms, now_ms);
        seen.detours = Detours { hedged: status.hedged, resent: status.resent, steered: status.steered };
        seen.detail.clone_from(&status.detail);
        seen.now = Edge(ends.0, ends.1, state.into(), rate(per_second), time(status.answer_us));
    }

    pub fn drop_attention(&mut self, attention: u32) {
        self.retain(|(a, _)| a != attention);
    }

    pub fn drop_expert(&mut self, expert: u32) {
        self.retain(|(_, e)| e != expert);
    }

    fn retain(&mut self, keep: impl Fn(Ends) -> bool) {
        let is_trouble = |(ends, seen): (&Ends, &Seen)| !keep(*ends) && seen.state != EdgeState::Live;
        self.trouble_changed |= self.edges.iter().any(is_trouble);
        self.edges.retain(|ends, _| keep(*ends));
        self.changed.retain(|ends| keep(*ends));
    }

    /// The states that have changed in this look; where all edges to an expert worker have changed alike, once.
    pub fn changes(&mut self) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        let changed = std::mem::take(&mut self.changed);
        for ends in &changed {
            let Some(seen) = self.edges.get(ends) else { continue };
            let (attention, expert, state) = (ends.0, ends.1, seen.state);
            let to_it = || self.edges.iter().filter(move |((_, e), _)| *e == expert);
            let alike = |(of, other): (&Ends, &Seen)| other.state == state && changed.contains(of);
            let all = to_it().count() > 1 && to_it().all(alike);
            if all && changes.iter().any(|change| change.all && change.expert == expert) {
                continue;
            }
            changes.push(Change { attention, expert, state, detail: seen.detail.clone(), all });
        }
        changes
    }

    /// Edges to tell: those with a new state, and of those whose figures have moved the ones that have waited longest.
    pub fn news(&mut self) -> Vec<Edge> {
        let is_far = |a: u32, b: u32, step: u32| a.abs_diff(b) >= step;
        let mut told: Vec<Ends> = Vec::new();
        let mut waiting: Vec<(u64, Ends)> = Vec::new();
        for (ends, seen) in &self.edges {
            match seen.told {
                Some(last) if last.2 == seen.now.2 => {
                    if is_far(last.3, seen.now.3, RATE_STEP) || is_far(last.4, seen.now.4, TIME_STEP) {
                        waiting.push((seen.told_ms, *ends));
                    }
                }
                _ => told.push(*ends),
            }
        }
        waiting.sort_unstable();
        told.extend(waiting.into_iter().take(TOLD_MAX).map(|(_, ends)| ends));
        let now_ms = self.now_ms;
        let tell = |ends: Ends| {
            let seen = self.edges.get_mut(&ends)?;
            (seen.told, seen.told_ms) = (Some(seen.now), now_ms);
            Some(seen.now)
        };
        told.into_iter().filter_map(tell).collect()
    }

    pub fn all(&self) -> Vec<Edge> {
        self.edges.values().map(|seen| seen.told.unwrap_or(seen.now)).collect()
    }

    /// Edges that are not live, those that have not been so longest first.
    pub fn trouble(&self) -> Vec<Trouble> {
        let mut trouble: Vec<_> = self.edges.iter().filter(|(_, seen)| seen.state != EdgeState::Live).collect();
        trouble.sort_by_key(|(_, seen)| seen.since_ms);
        let row = |((a, e), seen): (&Ends, &Seen)| {
            let (now, before) = (seen.detours, seen.detours_before);
            Trouble {
                a: *a,
                e: *e,
                since: seen.since_ms,
                detail: seen.detail.clone(),
                hedged: now.hedged.saturating_sub(before.hedged),
                resent: now.resent.saturating_sub(before.resent),
                steered: now.steered.saturating_sub(before.steered),
            }
        };
        trouble.into_iter().take(TROUBLE_MAX).map(row).collect()
    }

    /// The same, when it has changed, and now and then while there is any.
    pub fn trouble_if_due(&mut self) -> Option<Vec<Trouble>> {
        let trouble = self.trouble();
        let is_due = !trouble.is_empty() && self.now_ms >= self.trouble_told_ms + TROUBLE_INTERVAL_MS;
        if !std::mem::take(&mut self.trouble_changed) && !is_due {
            return None;
        }
        self.trouble_told_ms = self.now_ms;
        Some(trouble)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: EdgeState, terms: u64, answer_us: u32) -> EdgeStatus {
        EdgeStatus {
            worker: "e".into(),
            state: state.into(),
            detail: "why".into(),
            transport: "grpc".into(),
            terms,
            answer_us,
            ..EdgeStatus::default()
        }
    }

    type Looked = (Vec<(Ends, EdgeState, bool)>, Vec<Edge>, Option<usize>);

    /// One second further: the changes, what is told, and the trouble if it is.
    fn look(edges: &mut Edges, rows: &[(Ends, EdgeStatus)]) -> Looked {
        edges.begin(edges.now_ms + 1000);
        for (ends, status) in rows {
            edges.see(*ends, status);
        }
        let changes = edges.changes().into_iter().map(|c| ((c.attention, c.expert), c.state, c.all)).collect();
        (changes, edges.news(), edges.trouble_if_due().map(|trouble| trouble.len()))
    }

    #[test]
    fn states_are_told_at_once_and_figures_when_they_move() {
        let mut edges = Edges::default();
        let live = |terms, us| [((0, 1), status(EdgeState::Live, terms, us))];
        assert_eq!(look(&mut edges, &live(0, 1024)), (vec![], vec![Edge(0, 1, 2, 0, 80)], None));
        assert_eq!(look(&mut edges, &live(0, 1100)).1, []);
        assert_eq!(look(&mut edges, &live(1023, 1100)).1, [Edge(0, 1, 2, 40, 81)]);
        let slow = [((0, 1), status(EdgeState::Slow, 1023, 1100))];
        let (changes, told, trouble) = look(&mut edges, &slow);
        assert_eq!(
            (changes, told, trouble),
            (vec![((0, 1), EdgeState::Slow, false)], vec![Edge(0, 1, 4, 0, 81)], Some(1))
        );
        assert_eq!(look(&mut edges, &slow).2, None);
        assert_eq!(look(&mut edges, &live(1023, 1100)).2, Some(0));
    }

    #[test]
    fn the_death_of_a_worker_is_one_change() {
        let mut edges = Edges::default();
        let rows = |state| {
            [((0, 9), status(state, 0, 0)), ((1, 9), status(state, 0, 0)), ((1, 8), status(EdgeState::Live, 0, 0))]
        };
        look(&mut edges, &rows(EdgeState::Live));
        let (changes, _, trouble) = look(&mut edges, &rows(EdgeState::Down));
        assert_eq!((changes, trouble), (vec![((0, 9), EdgeState::Down, true)], Some(2)));
        edges.drop_expert(9);
        assert_eq!(edges.trouble_if_due().map(|trouble| trouble.len()), Some(0));
        assert_eq!(edges.all().len(), 1);
    }

    #[test]
    fn trouble_says_what_was_done_since_it_began() {
        let mut edges = Edges::default();
        let mut second = |state, hedged, steered| {
            look(&mut edges, &[((0, 1), EdgeStatus { hedged, steered, ..status(state, 0, 0) })]);
            edges.trouble().iter().map(|trouble| (trouble.hedged, trouble.steered)).collect::<Vec<_>>()
        };
        assert_eq!(second(EdgeState::Live, 5, 7), []);
        assert_eq!(second(EdgeState::Slow, 6, 7), [(1, 0)]);
        assert_eq!(second(EdgeState::Slow, 6, 90), [(1, 83)]);
    }

    #[test]
    fn counts_never_fall() {
        let load = |sent, resent| {
            let dispatch = moesaic_proto::v1::DispatchCounts { sent, resent, ..Default::default() };
            Totals::of(&LoadResponse { dispatch: Some(dispatch), ..Default::default() })
        };
        let mut counters = Counters::default();
        let mut last = None;
        for (now, expected) in
            [(load(100, 5), (0, 0)), (load(110, 6), (10, 1)), (load(3, 2), (13, 3)), (load(4, 2), (14, 3))]
        {
            now.since(last.as_ref()).add_to(&mut counters);
            last = Some(now);
            assert_eq!((counters.sent, counters.resent), expected);
        }
    }
}
