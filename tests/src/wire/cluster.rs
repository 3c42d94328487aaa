//! A simulated cluster: its hosts, the load on it and the faults in it, in one loop over virtual time.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic;
use std::sync::Once;
use std::time::Duration;

use moesaic_node::Registration;
use moesaic_proto::{Epoch, LayerId, Placement};
use turmoil::Sim;

use super::arithmetic::EXPERTS;
use super::faults::{Fault, Schedule};
use super::site::{Site, worker_id};
use super::{attention, callers, clients, coordinator, expert};

/// What the simulation's clock moves by.
const TICK: Duration = Duration::from_millis(1);
/// Latencies are drawn between these, mostly small ones.
const LATENCY_MIN: Duration = Duration::from_millis(0);
const LATENCY_MAX: Duration = Duration::from_millis(5);
/// A link that loss has cut is healed by every message with this probability.
const REPAIR: f64 = 0.2;
/// How long a killed process's entry stays in the registry.
const LEASE: Duration = Duration::from_secs(5);
/// The cluster is ready within it.
const START_MAX: Duration = Duration::from_secs(20);
/// The load runs so long before the first fault, and after the last one before it may end.
const BEFORE: Duration = Duration::from_millis(500);
const AFTER: Duration = Duration::from_secs(1);
/// After the last fault everything ends within it.
const CALM_MAX: Duration = Duration::from_secs(90);

/// Lines of the history that a failure shows.
const LAST: usize = 15;

pub struct Cluster {
    sim: Sim<'static>,
    site: Site,
    /// Entries of killed processes, and when they end.
    leases: Vec<(Duration, Registration)>,
    hosts: Vec<String>,
    /// Hosts that make load.
    clients: u64,
}

/// What a simulation came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// All that a client saw and that was done to the cluster, each line with its time.
    pub history: Vec<String>,
    pub counts: BTreeMap<&'static str, u64>,
}

impl Outcome {
    pub fn count(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }
}

impl Cluster {
    fn new(seed: u64) -> Self {
        count_panics();
        let sim = turmoil::Builder::new()
            .rng_seed(seed)
            .tick_duration(TICK)
            .simulation_duration(Duration::from_secs(600))
            .min_message_latency(LATENCY_MIN)
            .max_message_latency(LATENCY_MAX)
            .repair_rate(REPAIR)
            .tcp_capacity(1024)
            .build();
        Self { sim, site: Site::new(), leases: Vec::new(), hosts: Vec::new(), clients: 0 }
    }

    /// Expert workers e0, e1, ..., and callers a0, a1, ... in the attention workers' place. `holders(expert)` are numbers of
    /// expert workers.
    pub fn of_callers(
        seed: u64,
        experts: usize,
        callers: usize,
        load: callers::Load,
        holders: impl Fn(usize) -> Vec<u32>,
    ) -> Self {
        let mut cluster = Self::new(seed);
        cluster.add_experts(experts);
        let layers = cluster.site.checkpoint.config().moe_layers();
        let holders: Vec<Vec<u32>> = (0..EXPERTS).map(holders).collect();
        let layers = layers.into_iter().map(|layer| (LayerId(layer as u8), holders.clone())).collect();
        let workers = (0..experts).map(|number| worker_id(&format!("e{number}"))).collect();
        cluster.publish(Placement::new(Epoch(1), workers, layers).unwrap());
        for number in 0..callers {
            let (site, id) = (cluster.site.clone(), format!("a{number}"));
            cluster.sim.client(id.clone(), callers::run(site, id.clone(), load));
            cluster.hosts.push(id);
            cluster.clients += 1;
        }
        cluster
    }

    fn publish(&self, placement: Placement) {
        let published = futures::executor::block_on(self.site.registry.publish(placement));
        assert!(published.unwrap(), "nobody else publishes here");
    }

    /// Coordinators c0, c1, attention workers a0, a1, ..., expert workers e0, e1, ..., and hosts u0, u1 with clients.
    pub fn whole(seed: u64, attention: usize, experts: usize, is_patient: bool) -> Self {
        let mut cluster = Self::new(seed);
        cluster.add_experts(experts);
        for number in 0..attention {
            cluster.add(&format!("a{number}"), attention::run);
        }
        let doors = vec!["c0".to_owned(), "c1".to_owned()];
        for door in &doors {
            cluster.add(door, move |site, id| coordinator::run(site, id, experts));
        }
        for number in 0..2 {
            let (site, id) = (cluster.site.clone(), format!("u{number}"));
            let load = clients::Load { doors: doors.clone(), seed, is_patient };
            cluster.sim.client(id.clone(), clients::run(site, id.clone(), load));
            cluster.hosts.push(id);
            cluster.clients += 1;
        }
        cluster
    }

    fn add_experts(&mut self, count: usize) {
        for number in 0..count {
            self.add(&format!("e{number}"), expert::run);
        }
    }

    fn add<F>(&mut self, id: &str, run: impl Fn(Site, String) -> F + 'static)
    where
        F: Future<Output = turmoil::Result> + 'static,
    {
        let (site, host) = (self.site.clone(), id.to_owned());
        self.sim.host(id, move || run(site.clone(), host.clone()));
        self.hosts.push(id.to_owned());
    }

    /// Waits for the load to be on, does what the schedule says, heals everything, and waits until all clients are done.
    pub fn run(mut self, schedule: Schedule) -> Result<Outcome, String> {
        let panics = PANICS.get();
        let result = self.play(schedule);
        let result = result.and_then(|()| match PANICS.get() - panics {
            0 => Ok(()),
            count => Err(format!("{count} tasks have panicked")),
        });
        let journal = &self.site.journal;
        let outcome = Outcome { history: journal.lines(), counts: journal.counts() };
        let last = outcome.history[outcome.history.len().saturating_sub(LAST)..].join("\n");
        result.map_err(|error| format!("{error}\n{:?}\n{last}", outcome.counts)).map(|()| outcome)
    }

    fn play(&mut self, schedule: Schedule) -> Result<(), String> {
        let is_loaded = |cluster: &Self| cluster.site.journal.counts().get("ready") == Some(&cluster.clients);
        self.until("the load is on", START_MAX, is_loaded)?;
        self.pass(BEFORE)?;
        let begin = self.sim.elapsed();
        for (at, fault) in schedule.0 {
            self.pass((begin + at).saturating_sub(self.sim.elapsed()))?;
            self.inject(fault);
        }
        self.sim.set_fail_rate(0.0);
        for (number, a) in self.hosts.iter().enumerate() {
            self.hosts[..number].iter().for_each(|b| self.sim.repair(a.as_str(), b.as_str()));
        }
        self.pass(AFTER)?;
        self.site.is_calm.set(true);
        let end = self.sim.elapsed() + CALM_MAX;
        while !self.step()? {
            if self.sim.elapsed() > end {
                return Err(format!("not done {CALM_MAX:?} after the last fault"));
            }
        }
        Ok(())
    }

    fn inject(&mut self, fault: Fault) {
        self.site.journal.say(format!("{:?} {fault:?}", self.sim.elapsed()));
        match &fault {
            Fault::Crash(host) => {
                self.sim.crash(host.as_str());
                let until = self.sim.elapsed() + LEASE;
                self.leases.extend(self.site.lease(host).map(|lease| (until, lease)));
            }
            Fault::Bounce(host) => self.sim.bounce(host.as_str()),
            Fault::Cut(a, b) => self.sim.partition(a.as_str(), b.as_str()),
            Fault::CutOneWay(from, to) => self.sim.partition_oneway(from.as_str(), to.as_str()),
            Fault::Heal(a, b) => self.sim.repair(a.as_str(), b.as_str()),
            Fault::Hold(a, b) => self.sim.hold(a.as_str(), b.as_str()),
            Fault::Release(a, b) => self.sim.release(a.as_str(), b.as_str()),
            Fault::Loss(rate) => self.sim.set_fail_rate(*rate),
        }
    }

    fn until(&mut self, what: &str, bound: Duration, is_so: impl Fn(&Self) -> bool) -> Result<(), String> {
        let end = self.sim.elapsed() + bound;
        while !is_so(self) {
            self.step()?;
            if self.sim.elapsed() > end {
                return Err(format!("not within {bound:?}: {what}"));
            }
        }
        Ok(())
    }

    fn pass(&mut self, time: Duration) -> Result<(), String> {
        let end = self.sim.elapsed() + time;
        while self.sim.elapsed() < end {
            self.step()?;
        }
        Ok(())
    }

    /// One tick; true when all clients are done.
    fn step(&mut self) -> Result<bool, String> {
        let now = self.sim.elapsed();
        self.leases.retain(|(until, _)| *until > now);
        let is_over = self.sim.step().map_err(|error| error.to_string())?;
        match self.site.journal.fault() {
            Some(fault) => Err(fault),
            None => Ok(is_over),
        }
    }
}

thread_local! {
    static PANICS: Cell<u64> = const { Cell::new(0) };
}

/// A task that panics takes nobody with it: so they are counted, for each thread and so for each simulation.
fn count_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
}
