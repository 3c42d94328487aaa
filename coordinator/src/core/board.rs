//! The cluster as the dashboard shows it: what a coordinator sees each second, turned into what has changed since the
//! second before, and into a log of what happened. One board for all who watch.

mod codes;
pub mod messages;
#[cfg(test)]
mod tests;
mod watch;
mod window;

use std::collections::{BTreeMap, VecDeque};

use moesaic_proto::v1::{EdgeState, LoadResponse};
use moesaic_proto::{Placement, WorkerId};

pub use codes::heats;
pub use window::Window;

use codes::{rate, rounded, time};
use messages::*;
use watch::{Edges, Totals};
use window::Rate;

/// Points that are kept: a quarter of an hour.
const HISTORY: usize = 900;
const EVENTS: usize = 200;
/// Requests that are listed, and new ones an update may have.
const LISTED: usize = 100;
const LISTED_NEW: usize = 20;

/// What the coordinator sees at one moment.
#[derive(Default)]
pub struct Look<'a> {
    /// Milliseconds since 1970.
    pub t: u64,
    pub status: Status,
    pub coordinators: Vec<Coordinator>,
    /// Without numbers, which the board gives; and what each answered last.
    pub attention: Vec<(Attention, Option<&'a LoadResponse>)>,
    pub experts: Vec<Expert>,
    /// Running here; numbered by whoever runs them, oldest first.
    pub sequences: Vec<Sequence>,
    /// Since the coordinator started.
    pub tokens: u64,
    pub requests: u64,
    pub refusals: u64,
    /// p50, p95, p99 in ms.
    pub first_token: [Option<f64>; 3],
    pub gap: [Option<f64>; 3],
    /// The leader's word on the placement in force, if it is this coordinator.
    pub why_placed: Option<String>,
}

type ByNumber<Own> = BTreeMap<u32, Worker<Own>>;

#[derive(Default)]
pub struct Board {
    numbers: BTreeMap<(char, String), u32>,
    attention: ByNumber<OfAttention>,
    experts: ByNumber<OfExpert>,
    loads: BTreeMap<u32, Load>,
    totals: BTreeMap<u32, Totals>,
    drawn: BTreeMap<u32, Rate>,
    counters: Counters,
    edges: Edges,
    status: Status,
    coordinators: Vec<Coordinator>,
    listed: BTreeMap<u64, Sequence>,
    total: usize,
    history: VecDeque<Point>,
    tokens: Rate,
    requests: Rate,
    events: VecDeque<Event>,
    next_event: u64,
    /// Nothing is news at the first look.
    has_looked: bool,
}

impl Board {
    /// A second has passed.
    pub fn tick(&mut self, look: Look<'_>) -> Update {
        let first_event = self.next_event;
        let point = self.point(&look);
        let mut update = Update { t: look.t, point, ..Update::default() };
        self.note_status(&look, &mut update);
        self.note_workers(&look, &mut update);
        self.note_loads(&look, &mut update);
        self.note_sequences(&look, &mut update);
        self.has_looked = true;
        update.events = self.events.iter().filter(|event| event.n >= first_event).cloned().collect();
        update
    }

    /// All of it, as of the newest tick.
    pub fn snapshot<'a>(&'a self, t: u64, model: &'a Model) -> Snapshot<'a> {
        Snapshot {
            t,
            model,
            status: &self.status,
            coordinators: &self.coordinators,
            attention: self.attention.values().collect(),
            experts: self.experts.values().collect(),
            load: self.loads.values().collect(),
            edges: self.edges.all(),
            trouble: self.edges.trouble(),
            counters: self.counters,
            history: self.history.iter().copied().collect(),
            requests: self.listed.values().collect(),
            requests_total: self.total,
            events: self.events.iter().collect(),
        }
    }

    /// Who holds what, by the board's numbers.
    pub fn placed(&mut self, placement: &Placement) -> Placed {
        let numbers: Vec<u32> = placement.workers().iter().map(|worker| self.number('e', worker.as_str())).collect();
        let number = |worker: &WorkerId| {
            let index = placement.workers().iter().position(|of| of == worker);
            index.map_or(0, |index| numbers[index])
        };
        Placed { epoch: placement.epoch().0, holders: codes::holders(placement, number) }
    }

    /// Given once.
    fn number(&mut self, side: char, id: &str) -> u32 {
        let next = self.numbers.len() as u32;
        *self.numbers.entry((side, id.to_owned())).or_insert(next)
    }

    fn tell(&mut self, t: u64, kind: Kind, subject: impl Into<String>, text: impl Into<String>) {
        let n = self.next_event;
        self.next_event += 1;
        self.events.push_back(Event { n, t, kind, subject: subject.into(), text: text.into() });
        if self.events.len() > EVENTS {
            self.events.pop_front();
        }
    }

    fn point(&mut self, look: &Look<'_>) -> Point {
        let t_s = look.t / 1000;
        let [ttft_p50, ttft_p95, ttft_p99] = look.first_token.map(|ms| ms.map(rounded));
        let [gap_p50, gap_p95, gap_p99] = look.gap.map(|ms| ms.map(rounded));
        let tokens = rounded(self.tokens.see(t_s, look.tokens).unwrap_or(0.0));
        let requests = rounded(self.requests.see(t_s, look.requests).unwrap_or(0.0));
        let point = Point(t_s, tokens, requests, ttft_p50, ttft_p95, ttft_p99, gap_p50, gap_p95, gap_p99);
        self.history.push_back(point);
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
        point
    }

    fn note_status(&mut self, look: &Look<'_>, update: &mut Update) {
        let (before, now) = (std::mem::replace(&mut self.status, look.status.clone()), &look.status);
        if self.has_looked {
            if before.leader != now.leader {
                let text =
                    if now.leader.is_empty() { "nobody leads".into() } else { format!("leads, term {}", now.term) };
                let subject = if now.leader.is_empty() { &before.leader } else { &now.leader };
                self.tell(look.t, Kind::Leader, subject, text);
            }
            if before.registry_reachable != now.registry_reachable {
                let text = if now.registry_reachable { "is back" } else { "is away; the last view is in force" };
                self.tell(look.t, Kind::Registry, "etcd", text);
            }
            if before.epoch != now.epoch {
                let text = look.why_placed.clone().unwrap_or_else(|| "is in force".into());
                self.tell(look.t, Kind::Placed, format!("epoch {}", now.epoch), text);
            }
        }
        if !self.has_looked || before != *now {
            update.status = Some(now.clone());
        }
        if self.coordinators != look.coordinators {
            self.coordinators = look.coordinators.clone();
            update.coordinators = Some(look.coordinators.clone());
        }
    }

    fn note_workers(&mut self, look: &Look<'_>, update: &mut Update) {
        let (before, rows) = (std::mem::take(&mut self.attention), look.attention.iter().map(|(row, _)| row));
        let (now, gone) = self.note_side('a', look.t, before, rows, &mut update.attention);
        self.attention = now;
        for (n, how) in gone {
            update.gone.push(("a", n, how));
            self.edges.drop_attention(n);
            self.loads.remove(&n);
            self.totals.remove(&n);
            self.drawn.remove(&n);
        }
        let (before, rows) = (std::mem::take(&mut self.experts), look.experts.iter());
        let (now, gone) = self.note_side('e', look.t, before, rows, &mut update.experts);
        self.experts = now;
        for (n, how) in gone {
            update.gone.push(("e", n, how));
            self.edges.drop_expert(n);
        }
    }

    /// The workers of a role that are there, by number, and those that are not any more, with how they went.
    fn note_side<'a, Own: Clone + PartialEq + 'a>(
        &mut self,
        side: char,
        t: u64,
        before: ByNumber<Own>,
        rows: impl Iterator<Item = &'a Worker<Own>>,
        changed: &mut Vec<Worker<Own>>,
    ) -> (ByNumber<Own>, Vec<(u32, &'static str)>) {
        let mut now = BTreeMap::new();
        for row in rows {
            let row = Worker { n: self.number(side, &row.id), ..row.clone() };
            let mut was = before.get(&row.n);
            if was != Some(&row) {
                changed.push(row.clone());
            }
            // One that came back within the second has died all the same.
            if let Some(one_before) = was.take_if(|was| was.incarnation != row.incarnation) {
                self.note_gone(t, one_before);
            }
            if self.has_looked {
                if was.is_none() {
                    self.tell(t, Kind::Joined, &row.id, format!("on node {}", row.node));
                }
                match (was.is_some_and(|was| was.cordoned), row.cordoned) {
                    (false, true) => self.tell(t, Kind::Cordoned, &row.id, "gets nothing new"),
                    (true, false) => self.tell(t, Kind::Uncordoned, &row.id, "is in use again"),
                    _ => {}
                }
            }
            now.insert(row.n, row);
        }
        let gone = before.into_iter().filter(|(n, _)| !now.contains_key(n));
        let gone = gone.map(|(n, row)| (n, self.note_gone(t, &row))).collect();
        (now, gone)
    }

    fn note_gone<Own>(&mut self, t: u64, worker: &Worker<Own>) -> &'static str {
        if worker.draining {
            self.tell(t, Kind::Left, &worker.id, "has stopped in order");
            return "left";
        }
        self.tell(t, Kind::Died, &worker.id, "its lease ran out, or it was stopped");
        "died"
    }

    fn note_loads(&mut self, look: &Look<'_>, update: &mut Update) {
        let before = self.counters;
        self.edges.begin(look.t);
        for (row, load) in &look.attention {
            let n = self.number('a', &row.id);
            let Some(load) = load else {
                self.loads.remove(&n);
                // What is known of its edges is old.
                self.edges.drop_attention(n);
                continue;
            };
            let (now, dispatch) = (Totals::of(load), load.dispatch.unwrap_or_default());
            let risen = now.since(self.totals.insert(n, now).as_ref());
            risen.add_to(&mut self.counters);
            if self.has_looked && risen.resent > 0 {
                self.tell(look.t, Kind::Resent, &row.id, format!("{} frames were sent again", risen.resent));
            }
            let rows_per_step =
                (risen.micro_batches > 0).then(|| rounded(risen.rows as f64 / risen.micro_batches as f64));
            let row = Load(
                n,
                load.pages_free,
                load.sequences_running,
                load.sequences_waiting,
                load.orphans,
                rows_per_step,
                self.drawn.entry(n).or_default().see(look.t / 1000, load.generated_tokens).map(rounded),
                load.preemptions,
                dispatch.resent,
                dispatch.hedged,
            );
            if self.loads.get(&n) != Some(&row) {
                update.load.push(row.clone());
                self.loads.insert(n, row);
            }
            for edge in &load.edges {
                let e = self.number('e', &edge.worker);
                self.edges.see((n, e), edge);
            }
        }
        self.counters.refusals = look.refusals;
        if self.counters != before {
            update.counters = Some(self.counters);
        }
        for change in self.edges.changes() {
            let (a, e) = (self.id_of('a', change.attention), self.id_of('e', change.expert));
            let subject = if change.all { format!("* → {e}") } else { format!("{a} → {e}") };
            let (kind, text) = match change.state {
                EdgeState::Live => (Kind::EdgeUp, "answers in time again".to_owned()),
                EdgeState::Slow => (Kind::EdgeSlow, "answers late; its rows go elsewhere".to_owned()),
                EdgeState::Silent => (Kind::EdgeSlow, "is silent; its rows go elsewhere".to_owned()),
                EdgeState::Down | EdgeState::Unspecified => (Kind::EdgeDown, change.detail),
            };
            self.tell(look.t, kind, subject, text);
        }
        update.edges = self.edges.news();
        update.trouble = self.edges.trouble_if_due();
    }

    fn id_of(&self, side: char, n: u32) -> String {
        let found = self.numbers.iter().find(|((of, _), number)| *of == side && **number == n);
        found.map_or_else(String::new, |((_, id), _)| id.clone())
    }

    fn note_sequences(&mut self, look: &Look<'_>, update: &mut Update) {
        let running: BTreeMap<u64, &Sequence> = look.sequences.iter().map(|sequence| (sequence.n, sequence)).collect();
        update.ended = self.listed.keys().filter(|n| !running.contains_key(n)).copied().collect();
        self.listed.retain(|n, _| running.contains_key(n));
        let mut moved: BTreeMap<String, usize> = BTreeMap::new();
        for (n, before) in &mut self.listed {
            let now = running[n];
            if before.worker != now.worker || before.state != now.state {
                if before.worker != now.worker && !before.worker.is_empty() && !now.worker.is_empty() {
                    *moved.entry(before.worker.clone()).or_default() += 1;
                }
                update.requests.push(now.clone());
            } else if before.emitted != now.emitted {
                update.progress.push((*n, now.emitted));
            }
            *before = now.clone();
        }
        for (worker, sequences) in moved {
            let noun = if sequences == 1 { "sequence goes" } else { "sequences go" };
            self.tell(look.t, Kind::Moved, worker, format!("{sequences} {noun} on elsewhere"));
        }
        let room = LISTED.saturating_sub(self.listed.len()).min(LISTED_NEW);
        let new: Vec<&Sequence> =
            running.into_values().filter(|s| !self.listed.contains_key(&s.n)).take(room).collect();
        for sequence in new {
            update.requests.push(sequence.clone());
            self.listed.insert(sequence.n, sequence.clone());
        }
        if self.total != look.sequences.len() {
            self.total = look.sequences.len();
            update.requests_total = Some(self.total);
        }
    }
}
