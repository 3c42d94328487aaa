//! Processes and the network between them, with a clock of their own: streams that are in order until they break, links
//! that delay, are cut in one direction or both, and heal, processes that crash, freeze and start again.
//!
//! A stream is a TCP connection as programs see it. What is sent over a cut link is held; when the link heals it comes,
//! or the stream has broken by then, at each end at its own time. A crashed process resets its streams if the link is
//! there. A frozen process gets everything when it thaws.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use super::messages::Message;

/// A place for a process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    Etcd,
    Coordinator(u8),
    Attention(u8),
    Expert(u8),
    Client(u8),
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Etcd => f.write_str("etcd"),
            Self::Coordinator(n) => write!(f, "c{n}"),
            Self::Attention(n) => write!(f, "a{n}"),
            Self::Expert(n) => write!(f, "e{n}"),
            Self::Client(n) => write!(f, "client{n}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// What a process asked to be woken for: a task, by its name, and which one of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timer(pub &'static str, pub u64);

/// What happens to a process.
#[derive(Clone, Debug)]
pub enum Input {
    Started,
    Message {
        stream: StreamId,
        message: Message,
    },
    /// Nothing more will come over a stream, and nothing that was sent and is not answered is sure to have arrived.
    Broken {
        stream: StreamId,
    },
    Timer(Timer),
}

/// What a process does.
#[derive(Debug)]
pub enum Effect {
    /// `incarnation`: the process that is meant; another one at the same place refuses.
    Open {
        stream: StreamId,
        to: Node,
        incarnation: Option<u32>,
    },
    Send {
        stream: StreamId,
        message: Message,
    },
    Close {
        stream: StreamId,
    },
    Wake {
        after: Duration,
        timer: Timer,
    },
    /// It ends by itself.
    Exit,
}

/// What a process has while it handles an input.
pub struct Context<'a> {
    pub now: Duration,
    pub node: Node,
    pub incarnation: u32,
    pub rng: &'a mut fastrand::Rng,
    next_stream: &'a mut u64,
    effects: Vec<Effect>,
    pub violations: &'a mut Vec<String>,
}

impl Context<'_> {
    pub fn open(&mut self, to: Node, message: Message) -> StreamId {
        self.open_to(to, None, message)
    }

    pub fn open_to(&mut self, to: Node, incarnation: Option<u32>, message: Message) -> StreamId {
        *self.next_stream += 1;
        let stream = StreamId(*self.next_stream);
        self.effects.push(Effect::Open { stream, to, incarnation });
        self.send(stream, message);
        stream
    }

    pub fn send(&mut self, stream: StreamId, message: Message) {
        self.effects.push(Effect::Send { stream, message });
    }

    pub fn close(&mut self, stream: StreamId) {
        self.effects.push(Effect::Close { stream });
    }

    pub fn wake(&mut self, after: Duration, task: &'static str, number: u64) {
        self.effects.push(Effect::Wake { after, timer: Timer(task, number) });
    }

    pub fn exit(&mut self) {
        self.effects.push(Effect::Exit);
    }

    /// Something has happened that must not.
    pub fn violated(&mut self, what: String) {
        self.violations.push(format!("{:?}: {what}", self.node));
    }
}

/// What the network does to messages.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    pub delay_min: Duration,
    pub delay_max: Duration,
    /// Of 10,000 messages: how many come much later, how many are the last of their stream, which then breaks, and how
    /// many frames come twice.
    pub late: u32,
    pub lost: u32,
    pub twice: u32,
}

#[derive(Debug)]
struct End {
    node: Node,
    /// Of the process; `None` until the first message arrives there.
    incarnation: Option<u32>,
    is_open: bool,
    /// When the last message to this end arrives.
    last: Duration,
    /// Messages to this end that wait for the link to heal. `None`: the other end has closed.
    held: VecDeque<Option<Message>>,
}

#[derive(Debug)]
struct Stream {
    /// Who opened it, and who was asked.
    ends: [End; 2],
    meant: Option<u32>,
    /// A packet was lost for good: it breaks soon.
    is_jammed: bool,
}

#[derive(Debug)]
enum State {
    Down,
    Running,
    /// What has come meanwhile.
    Frozen(VecDeque<Input>),
}

#[derive(Debug)]
struct Process {
    incarnation: u32,
    state: State,
}

#[derive(Debug)]
enum Happening {
    Deliver {
        stream: StreamId,
        end: usize,
        message: Option<Message>,
    },
    Break {
        stream: StreamId,
        end: usize,
    },
    /// A stream that stands still is noticed.
    Check {
        stream: StreamId,
    },
    Wake {
        node: Node,
        incarnation: u32,
        timer: Timer,
    },
}

/// See the module.
pub struct Net {
    pub now: Duration,
    pub rng: fastrand::Rng,
    pub weather: Weather,
    pub violations: Vec<String>,
    pub slots: u64,
    pub lane_failures: u64,
    queue: BTreeMap<(Duration, u64), Happening>,
    next: u64,
    next_stream: u64,
    streams: BTreeMap<StreamId, Stream>,
    processes: BTreeMap<Node, Process>,
    /// From, to.
    cut: BTreeSet<(Node, Node)>,
    /// Inputs that are due now, of processes that have thawed.
    due: VecDeque<(Node, Input)>,
}

/// After what time a stream that stands still is given up: keep-alive interval and timeout, the phase unknown.
const GIVEN_UP: std::ops::Range<u64> = 1_000..3_000;

impl Net {
    pub fn new(seed: u64, weather: Weather) -> Self {
        Self {
            now: Duration::ZERO,
            rng: fastrand::Rng::with_seed(seed),
            weather,
            violations: Vec::new(),
            slots: 0,
            lane_failures: 0,
            queue: BTreeMap::new(),
            next: 0,
            next_stream: 0,
            streams: BTreeMap::new(),
            processes: BTreeMap::new(),
            cut: BTreeSet::new(),
            due: VecDeque::new(),
        }
    }

    pub fn is_running(&self, node: Node) -> bool {
        self.processes.get(&node).is_some_and(|process| matches!(process.state, State::Running))
    }

    pub fn is_down(&self, node: Node) -> bool {
        self.processes.get(&node).is_none_or(|process| matches!(process.state, State::Down))
    }

    /// Of the process that is there, or was last.
    pub fn incarnation(&self, node: Node) -> u32 {
        self.processes.get(&node).map_or(0, |process| process.incarnation)
    }

    /// Makes the process's first input due; its incarnation.
    pub fn start(&mut self, node: Node) -> u32 {
        let process = self.processes.entry(node).or_insert(Process { incarnation: 0, state: State::Down });
        process.incarnation += 1;
        process.state = State::Running;
        self.due.push_back((node, Input::Started));
        process.incarnation
    }

    /// Ends a process at once.
    pub fn crash(&mut self, node: Node) {
        let Some(process) = self.processes.get_mut(&node) else { return };
        process.state = State::Down;
        self.due.retain(|(of, _)| *of != node);
        let mut resets = Vec::new();
        for (&id, stream) in &mut self.streams {
            for end in 0..2 {
                if stream.ends[end].node == node && stream.ends[end].incarnation.is_some() && stream.ends[end].is_open {
                    stream.ends[end].is_open = false;
                    resets.push((id, end));
                }
            }
        }
        for (stream, end) in resets {
            self.reset(stream, end);
        }
    }

    pub fn freeze(&mut self, node: Node) {
        if !self.is_running(node) {
            return;
        }
        self.processes.entry(node).and_modify(|process| process.state = State::Frozen(VecDeque::new()));
        self.check_streams(|stream| stream.ends.iter().any(|end| end.node == node));
    }

    pub fn thaw(&mut self, node: Node) {
        let Some(process) = self.processes.get_mut(&node) else { return };
        if let State::Frozen(pending) = &mut process.state {
            self.due.extend(std::mem::take(pending).into_iter().map(|input| (node, input)));
            process.state = State::Running;
        }
    }

    /// Nothing gets from one node to the other any more.
    pub fn cut(&mut self, from: Node, to: Node) {
        if self.cut.insert((from, to)) {
            self.check_streams(|stream| {
                let nodes = [stream.ends[0].node, stream.ends[1].node];
                nodes == [from, to] || nodes == [to, from]
            });
        }
    }

    pub fn heal(&mut self, from: Node, to: Node) {
        if !self.cut.remove(&(from, to)) {
            return;
        }
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            for end in 0..2 {
                let stream = self.streams.get_mut(&id).expect("just listed");
                if (stream.ends[1 - end].node, stream.ends[end].node) == (from, to) && !stream.is_jammed {
                    let held = std::mem::take(&mut stream.ends[end].held);
                    held.into_iter().for_each(|message| self.deliver(id, end, message));
                }
            }
        }
    }

    fn check_streams(&mut self, which: impl Fn(&Stream) -> bool) {
        let concerned: Vec<StreamId> =
            self.streams.iter().filter(|(_, stream)| which(stream)).map(|(&id, _)| id).collect();
        for stream in concerned {
            self.check_later(stream);
        }
    }

    fn check_later(&mut self, stream: StreamId) {
        let after = Duration::from_millis(self.rng.u64(GIVEN_UP));
        self.push(after, Happening::Check { stream });
    }

    fn push(&mut self, after: Duration, happening: Happening) {
        self.next += 1;
        self.queue.insert((self.now + after, self.next), happening);
    }

    fn delay(&mut self) -> Duration {
        let Weather { delay_min, delay_max, late, .. } = self.weather;
        let usual = Duration::from_micros(self.rng.u64(delay_min.as_micros() as u64..=delay_max.as_micros() as u64));
        if self.rng.u32(0..10_000) < late { usual + Duration::from_millis(self.rng.u64(5..400)) } else { usual }
    }

    /// This end is closed: the other end hears of it, now or when it gives the stream up.
    fn reset(&mut self, id: StreamId, end: usize) {
        let Some(stream) = self.streams.get(&id) else { return };
        if self.cut.contains(&(stream.ends[end].node, stream.ends[1 - end].node)) {
            return self.check_later(id);
        }
        let after = self.delay();
        self.push(after, Happening::Break { stream: id, end: 1 - end });
    }

    fn send(&mut self, id: StreamId, from: usize, message: Option<Message>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.ends[from].is_open {
            return;
        }
        if message.is_none() {
            stream.ends[from].is_open = false;
        }
        self.slots += u64::from(matches!(message, Some(Message::Slot(_))));
        self.lane_failures += u64::from(matches!(message, Some(Message::LaneFailed { .. })));
        let (is_cut, end) = (self.cut.contains(&(stream.ends[from].node, stream.ends[1 - from].node)), 1 - from);
        let is_lost = !stream.is_jammed && self.rng.u32(0..10_000) < self.weather.lost;
        stream.is_jammed |= is_lost;
        if is_cut || stream.is_jammed {
            if stream.ends[end].held.is_empty() {
                self.check_later(id);
            }
            return self.streams.get_mut(&id).expect("it was there above").ends[end].held.push_back(message);
        }
        let copy = match &message {
            Some(message) if message.may_come_twice() && self.rng.u32(0..10_000) < self.weather.twice => {
                Some(message.clone())
            }
            _ => None,
        };
        self.deliver(id, end, message);
        if let Some(copy) = copy {
            let after = self.delay() * 4;
            self.push(after, Happening::Deliver { stream: id, end, message: Some(copy) });
        }
    }

    fn deliver(&mut self, id: StreamId, end: usize, message: Option<Message>) {
        let delay = self.delay();
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let at = (self.now + delay).max(stream.ends[end].last);
        stream.ends[end].last = at;
        self.push(at - self.now, Happening::Deliver { stream: id, end, message });
    }

    /// The next input of a process, before `until`; the clock moves to it.
    pub fn next(&mut self, until: Duration) -> Option<(Node, u32, Input)> {
        loop {
            if let Some((node, input)) = self.due.pop_front() {
                if let Some(input) = self.offer(node, input) {
                    return Some(input);
                }
                continue;
            }
            let (&(at, _), _) = self.queue.first_key_value().filter(|((at, _), _)| *at < until)?;
            self.now = at;
            let (_, happening) = self.queue.pop_first()?;
            if let Some(input) = self.happen(happening) {
                return Some(input);
            }
        }
    }

    /// An input for a process as it is; kept if the process is frozen.
    fn offer(&mut self, node: Node, input: Input) -> Option<(Node, u32, Input)> {
        let process = self.processes.get_mut(&node)?;
        match &mut process.state {
            State::Down => None,
            State::Running => Some((node, process.incarnation, input)),
            State::Frozen(pending) => {
                pending.push_back(input);
                None
            }
        }
    }

    fn happen(&mut self, happening: Happening) -> Option<(Node, u32, Input)> {
        match happening {
            Happening::Wake { node, incarnation, timer } => {
                let is_it = self.processes.get(&node).is_some_and(|process| process.incarnation == incarnation);
                if is_it { self.offer(node, Input::Timer(timer)) } else { None }
            }
            Happening::Deliver { stream, end, message } => self.arrive(stream, end, message),
            Happening::Break { stream, end } => self.break_end(stream, end),
            Happening::Check { stream: id } => {
                let stream = self.streams.get(&id)?;
                let nodes = [stream.ends[0].node, stream.ends[1].node];
                let is_cut = self.cut.contains(&(nodes[0], nodes[1])) || self.cut.contains(&(nodes[1], nodes[0]));
                let is_frozen = |node| self.processes.get(&node).is_some_and(|p| matches!(p.state, State::Frozen(_)));
                let is_half = !stream.ends[0].is_open || !stream.ends[1].is_open;
                if !(is_cut || is_half || stream.is_jammed || nodes.iter().any(|node| is_frozen(*node))) {
                    return None;
                }
                let after = Duration::from_millis(self.rng.u64(0..500));
                self.push(after, Happening::Break { stream: id, end: 1 });
                self.break_end(id, 0)
            }
        }
    }

    fn break_end(&mut self, id: StreamId, end: usize) -> Option<(Node, u32, Input)> {
        let stream = self.streams.get_mut(&id)?;
        let (node, incarnation, was_open) = {
            let end = &mut stream.ends[end];
            (end.node, end.incarnation, std::mem::take(&mut end.is_open))
        };
        if !stream.ends[0].is_open && !stream.ends[1].is_open {
            self.streams.remove(&id);
        }
        let is_it = self.processes.get(&node).is_some_and(|process| Some(process.incarnation) == incarnation);
        if was_open && is_it { self.offer(node, Input::Broken { stream: id }) } else { None }
    }

    fn arrive(&mut self, id: StreamId, end: usize, message: Option<Message>) -> Option<(Node, u32, Input)> {
        let stream = self.streams.get_mut(&id)?;
        if !stream.ends[end].is_open {
            return None;
        }
        let node = stream.ends[end].node;
        let process = self.processes.get(&node);
        let there = process.filter(|process| !matches!(process.state, State::Down)).map(|process| process.incarnation);
        let meant = stream.ends[end].incarnation.or(if end == 1 { stream.meant } else { None });
        if there.is_none() || meant.is_some() && meant != there {
            // Refused, or reset by who does not know of it.
            stream.ends[end].is_open = false;
            self.reset(id, end);
            return None;
        }
        stream.ends[end].incarnation = there;
        match message {
            Some(message) => self.offer(node, Input::Message { stream: id, message }),
            None => self.break_end(id, end),
        }
    }

    /// Has a process handle an input, and does what it says.
    pub fn handle(&mut self, node: Node, incarnation: u32, on: impl FnOnce(&mut Context<'_>)) {
        let mut context = Context {
            now: self.now,
            node,
            incarnation,
            rng: &mut self.rng,
            next_stream: &mut self.next_stream,
            effects: Vec::new(),
            violations: &mut self.violations,
        };
        on(&mut context);
        for effect in context.effects {
            match effect {
                Effect::Open { stream, to, incarnation: meant } => {
                    let end = |node, incarnation| End {
                        node,
                        incarnation,
                        is_open: true,
                        last: Duration::ZERO,
                        held: VecDeque::new(),
                    };
                    let ends = [end(node, Some(incarnation)), end(to, None)];
                    self.streams.insert(stream, Stream { ends, meant, is_jammed: false });
                }
                Effect::Send { stream, message } => self.send_from(stream, node, incarnation, Some(message)),
                Effect::Close { stream } => self.send_from(stream, node, incarnation, None),
                Effect::Wake { after, timer } => self.push(after, Happening::Wake { node, incarnation, timer }),
                Effect::Exit => self.crash(node),
            }
        }
    }

    fn send_from(&mut self, id: StreamId, node: Node, incarnation: u32, message: Option<Message>) {
        let Some(stream) = self.streams.get(&id) else { return };
        let is_from = |end: &End| end.node == node && end.incarnation == Some(incarnation);
        if let Some(from) = stream.ends.iter().position(is_from) {
            self.send(id, from, message);
        }
    }
}
