//! What is done to a simulated cluster, and when.

use std::time::Duration;

use super::arithmetic::mix;

/// Hosts by name. A link is between two of them.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Killed: its sockets close, its lease goes on for a while.
    Crash(String),
    /// Started again, as another process.
    Bounce(String),
    /// What is on its way is lost, and all that follows, without a word to either end.
    Cut(String, String),
    /// The same in the direction from the first to the second alone.
    CutOneWay(String, String),
    Heal(String, String),
    /// Nothing arrives, and nothing is lost.
    Hold(String, String),
    /// What was held arrives at once.
    Release(String, String),
    /// From now on every message of any link cuts it with this probability, and then heals it again with that of `cluster::REPAIR`.
    Loss(f64),
}

/// In order of time, from when the load is on.
#[derive(Clone, Debug, Default)]
pub struct Schedule(pub Vec<(Duration, Fault)>);

impl Schedule {
    pub fn at(mut self, ms: u64, fault: Fault) -> Self {
        self.0.push((Duration::from_millis(ms), fault));
        self.0.sort_by_key(|(at, _)| *at);
        self
    }
}

pub fn crash(host: &str) -> Fault {
    Fault::Crash(host.into())
}

pub fn bounce(host: &str) -> Fault {
    Fault::Bounce(host.into())
}

pub fn cut(a: &str, b: &str) -> Fault {
    Fault::Cut(a.into(), b.into())
}

pub fn cut_one_way(from: &str, to: &str) -> Fault {
    Fault::CutOneWay(from.into(), to.into())
}

pub fn heal(a: &str, b: &str) -> Fault {
    Fault::Heal(a.into(), b.into())
}

pub fn hold(a: &str, b: &str) -> Fault {
    Fault::Hold(a.into(), b.into())
}

pub fn release(a: &str, b: &str) -> Fault {
    Fault::Release(a.into(), b.into())
}

/// Chance that can be had again.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed, 0xd1ce))
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = mix(self.0, 1);
        self.0 % bound
    }

    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    pub fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len() as u64) as usize]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.below(end as u64 + 1) as usize);
        }
    }
}

/// Some of these links, cut one after the other, and then healed in another order; nothing is cut at the end. Each is cut
/// in both directions, in one, or held.
pub fn swizzle(dice: &mut Dice, links: &[(&str, &str)], apart: Duration) -> Schedule {
    let mut links = links.to_vec();
    dice.shuffle(&mut links);
    links.truncate(dice.between(1, links.len() as u64 + 1) as usize);
    let step = |dice: &mut Dice| dice.between(1, apart.as_millis() as u64);
    let (mut schedule, mut at, mut healed) = (Schedule::default(), 0, Vec::new());
    for (a, b) in links {
        at += step(dice);
        let (fault, end) = match dice.below(4) {
            0 => (cut_one_way(a, b), heal(a, b)),
            1 => (cut_one_way(b, a), heal(a, b)),
            2 => (hold(a, b), release(a, b)),
            _ => (cut(a, b), heal(a, b)),
        };
        schedule = schedule.at(at, fault);
        healed.push(end);
    }
    dice.shuffle(&mut healed);
    for end in healed {
        at += step(dice);
        schedule = schedule.at(at, end);
    }
    schedule
}
