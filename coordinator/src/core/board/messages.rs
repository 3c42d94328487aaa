//! What the dashboard's page is sent: the types of `coordinator/dashboard/PROTOCOL.md`, which says what they mean.

use serde::Serialize;

pub const PROTOCOL: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Access {
    pub protocol: u32,
    pub keys: bool,
    pub key: Option<String>,
    pub infer: bool,
    pub operate: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Model {
    pub name: String,
    pub numerics: String,
    pub context_max: usize,
    pub layers: Vec<u8>,
    pub experts: usize,
    pub chosen: usize,
    pub replicas: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Status {
    pub coordinator: String,
    pub leader: String,
    pub term: u64,
    pub registry_reachable: bool,
    pub not_ready: String,
    pub epoch: u32,
    pub experts_lost: u32,
    pub experts_exposed: u32,
    pub sequences: usize,
    pub sequences_max: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Coordinator {
    pub id: String,
    pub address: String,
}

/// A worker, with what only its role has.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Worker<Own> {
    pub n: u32,
    pub id: String,
    pub address: String,
    pub node: String,
    pub cordoned: bool,
    pub draining: bool,
    #[serde(flatten)]
    pub own: Own,
    /// Tells the process from one before it; not for the page.
    #[serde(skip)]
    pub incarnation: u64,
}

pub type Attention = Worker<OfAttention>;
pub type Expert = Worker<OfExpert>;

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OfAttention {
    pub answers: bool,
    pub experts_reachable: bool,
    pub epoch: u32,
    pub pages_total: u32,
    pub page_tokens: u32,
    pub waiting_max: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OfExpert {
    pub epoch_loaded: u32,
    pub experts: u32,
    pub slots: u32,
}

/// `[n, pages_free, running, waiting, orphans, rows_per_step, tokens_per_s, preemptions, resent, hedged]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Load(
    pub u32,
    pub u32,
    pub u32,
    pub u32,
    pub u32,
    pub Option<f64>,
    pub Option<f64>,
    pub u64,
    pub u64,
    pub u64,
);

/// `[attention n, expert n, state, rate code, answer code]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Edge(pub u32, pub u32, pub i32, pub u32, pub u32);

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trouble {
    pub a: u32,
    pub e: u32,
    pub since: u64,
    pub detail: String,
    pub hedged: u64,
    pub resent: u64,
    pub steered: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    pub sent: u64,
    pub resent: u64,
    pub hedged: u64,
    pub unmatched: u64,
    pub misdirected: u64,
    pub rejected: u64,
    pub preemptions: u64,
    pub refusals: u64,
}

/// `[t_s, tokens_per_s, requests_per_s, ttft_p50, p95, p99, gap_p50, p95, p99]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Point(
    pub u64,
    pub f64,
    pub f64,
    pub Option<f64>,
    pub Option<f64>,
    pub Option<f64>,
    pub Option<f64>,
    pub Option<f64>,
    pub Option<f64>,
);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Placing,
    Prefill,
    Decode,
    Recovering,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sequence {
    pub n: u64,
    pub id: String,
    pub key: String,
    pub worker: String,
    pub prompt: u32,
    pub emitted: u32,
    pub started: u64,
    pub state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Joined,
    Left,
    Died,
    Cordoned,
    Uncordoned,
    Drained,
    EdgeDown,
    EdgeSlow,
    EdgeUp,
    Resent,
    Moved,
    Placed,
    Leader,
    Registry,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    pub n: u64,
    pub t: u64,
    pub kind: Kind,
    pub subject: String,
    pub text: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Snapshot<'a> {
    pub t: u64,
    pub model: &'a Model,
    pub status: &'a Status,
    pub coordinators: &'a [Coordinator],
    pub attention: Vec<&'a Attention>,
    pub experts: Vec<&'a Expert>,
    pub load: Vec<&'a Load>,
    pub edges: Vec<Edge>,
    pub trouble: Vec<Trouble>,
    pub counters: Counters,
    pub history: Vec<Point>,
    pub requests: Vec<&'a Sequence>,
    pub requests_total: usize,
    pub events: Vec<&'a Event>,
}

/// What is None or empty has not changed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Update {
    pub t: u64,
    pub point: Point,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<Counters>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coordinators: Option<Vec<Coordinator>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub attention: Vec<Attention>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<Expert>,
    /// `["a" or "e", n, "left" or "died"]`
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<(&'static str, u32, &'static str)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub load: Vec<Load>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub edges: Vec<Edge>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Vec<Trouble>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<Sequence>,
    /// `[n, emitted]`
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub progress: Vec<(u64, u32)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_total: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<Event>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Placed {
    pub epoch: u32,
    pub holders: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Heat {
    pub t: u64,
    pub load: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Bye {
    pub reason: String,
}
