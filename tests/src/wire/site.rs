//! What all hosts of a simulation share, and what a test learns from them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use moesaic_model::Checkpoint;
use moesaic_node::{Member, Registration, Registry, handshake, registry};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::{Hello, Role};

use crate::fixtures;
use crate::wire::net;

pub const CLUSTER: &str = "wire";
/// Whose config, tokenizer and fingerprint the cluster goes by.
pub const MODEL: &str = "tiny-r1";

/// Clones share everything.
#[derive(Clone)]
pub struct Site {
    pub registry: Arc<dyn Registry>,
    pub checkpoint: Arc<Checkpoint>,
    pub journal: Rc<Journal>,
    /// No fault is in force or to come: whoever makes load may end it.
    pub is_calm: Rc<Cell<bool>>,
    leases: Rc<RefCell<BTreeMap<String, Registration>>>,
    incarnations: Rc<Cell<u64>>,
}

impl Site {
    pub fn new() -> Self {
        static CHECKPOINT: OnceLock<Arc<Checkpoint>> = OnceLock::new();
        let checkpoint = CHECKPOINT.get_or_init(|| Arc::new(Checkpoint::open(&fixtures::folder(MODEL)).unwrap()));
        Self {
            registry: registry::embedded(),
            checkpoint: checkpoint.clone(),
            journal: Rc::default(),
            is_calm: Rc::default(),
            leases: Rc::default(),
            incarnations: Rc::default(),
        }
    }

    /// What a process says of itself, another one at each start.
    pub fn hello(&self, role: Role, id: &str) -> Hello {
        self.incarnations.set(self.incarnations.get() + 1);
        let fingerprint = if role == Role::Coordinator { "" } else { self.checkpoint.fingerprint() };
        let incarnation = self.incarnations.get();
        Hello {
            incarnation,
            source: incarnation as u32,
            ..handshake::hello(CLUSTER, role, &worker_id(id), fingerprint, "f32")
        }
    }

    /// Makes a process known. Its entry outlives it until `expire`, or until its successor takes its place.
    pub async fn register(&self, hello: Hello) -> Member {
        let id = worker_id(&hello.id);
        let member = Member::new(hello, id.clone(), net::address(id.as_str()), None);
        let registration = self.registry.register(member.clone()).await.unwrap();
        self.leases.borrow_mut().insert(id.as_str().to_owned(), registration);
        member
    }

    pub fn update(&self, member: Member) {
        if let Some(registration) = self.leases.borrow().get(member.id.as_str()) {
            registration.update(member);
        }
    }

    /// A killed process's entry, to be dropped when its lease is over.
    pub fn lease(&self, id: &str) -> Option<Registration> {
        self.leases.borrow_mut().remove(id)
    }
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

pub fn worker_id(id: &str) -> WorkerId {
    WorkerId::new(id).unwrap()
}

/// Everything that happened at the edge of the system, in order: what must be equal when a seed runs again. And what
/// is counted on the way.
#[derive(Default)]
pub struct Journal {
    lines: RefCell<Vec<String>>,
    counts: RefCell<BTreeMap<&'static str, u64>>,
    /// The first thing that must not happen.
    fault: RefCell<Option<String>>,
}

impl Journal {
    pub fn say(&self, text: String) {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        self.lines.borrow_mut().push(format!("{:>9.3} {text}", at.as_secs_f64()));
    }

    pub fn count(&self, what: &'static str, by: u64) {
        *self.counts.borrow_mut().entry(what).or_default() += by;
    }

    /// Keeps the largest.
    pub fn most(&self, what: &'static str, value: u64) {
        let mut counts = self.counts.borrow_mut();
        let most = counts.entry(what).or_default();
        *most = (*most).max(value);
    }

    /// Ends the simulation.
    pub fn fail(&self, text: String) {
        self.say(text.clone());
        self.fault.borrow_mut().get_or_insert(text);
    }

    pub fn fault(&self) -> Option<String> {
        self.fault.borrow().clone()
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.borrow().clone()
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.borrow().clone()
    }
}
