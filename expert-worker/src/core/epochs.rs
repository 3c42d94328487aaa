//! Which placement epochs the worker serves: the newest one and the one before, until nobody asks for it any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use moesaic_dispatch::Refusal;
use moesaic_proto::Epoch;
use moesaic_proto::v1::RefusalReason;

/// Epochs that are served side by side.
const EPOCHS_MAX: usize = 2;
/// An old epoch that no frame has named for this long is over: attention workers have long moved on.
const RETIRED_AFTER: Duration = Duration::from_secs(10);

/// What is held (`S`) in each epoch. `now` never runs backwards; what it counts from does not matter.
#[derive(Debug)]
pub struct Epochs<S> {
    served: BTreeMap<Epoch, Served<S>>,
}

#[derive(Debug)]
struct Served<S> {
    shard: Arc<S>,
    /// When a frame last named it.
    asked: Duration,
}

impl<S> Default for Epochs<S> {
    fn default() -> Self {
        Self { served: BTreeMap::new() }
    }
}

impl<S> Epochs<S> {
    /// Serves an epoch from now on, and no longer those before the one before it.
    pub fn install(&mut self, now: Duration, epoch: Epoch, shard: S) {
        self.served.insert(epoch, Served { shard: Arc::new(shard), asked: now });
        while self.served.len() > EPOCHS_MAX {
            self.served.pop_first();
        }
    }

    /// What is held in an epoch that a frame names.
    pub fn get(&mut self, now: Duration, epoch: Epoch) -> Result<Arc<S>, Refusal> {
        if let Some(served) = self.served.get_mut(&epoch) {
            served.asked = now;
            return Ok(served.shard.clone());
        }
        let served: Vec<String> = self.served.keys().map(Epoch::to_string).collect();
        let served = if served.is_empty() { "none".into() } else { served.join(" and ") };
        let detail = format!("header: epoch {epoch} is not served here; served: {served}");
        Err(Refusal::new(RefusalReason::Epoch, detail))
    }

    pub fn newest(&self) -> Option<(Epoch, &Arc<S>)> {
        self.served.last_key_value().map(|(epoch, served)| (*epoch, &served.shard))
    }

    /// Forgets the old epoch if nobody has asked for it lately, and says which.
    pub fn retire(&mut self, now: Duration) -> Option<Epoch> {
        let (&oldest, served) = self.served.first_key_value().filter(|_| self.served.len() > 1)?;
        if now < served.asked + RETIRED_AFTER {
            return None;
        }
        self.served.remove(&oldest);
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_epochs_are_served_and_the_old_one_until_nobody_asks_for_it() {
        let (mut epochs, at) = (Epochs::default(), Duration::from_secs);
        assert!(epochs.get(at(0), Epoch(1)).unwrap_err().to_string().contains("served: none"));
        epochs.install(at(0), Epoch(1), "one");
        epochs.install(at(1), Epoch(2), "two");
        assert_eq!(*epochs.get(at(9), Epoch(1)).unwrap(), "one");
        assert_eq!(epochs.retire(at(18)), None, "asked for 9 s ago");
        assert_eq!(epochs.retire(at(19)), Some(Epoch(1)));
        assert_eq!(epochs.retire(at(99)), None, "the newest one stays");
        epochs.install(at(99), Epoch(3), "three");
        epochs.install(at(99), Epoch(4), "four");
        let refusal = epochs.get(at(99), Epoch(2)).unwrap_err();
        assert_eq!(refusal.reason, RefusalReason::Epoch);
        assert!(refusal.to_string().contains("epoch 2 is not served here; served: 3 and 4"), "{refusal}");
        assert_eq!(epochs.newest(), Some((Epoch(4), &Arc::new("four"))));
    }
}
