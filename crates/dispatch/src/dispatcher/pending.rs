//! What a caller has of a layer call: to wait for, and then to add up.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Answers, DispatchConfig, Inner};
use crate::combine::CombineOps;
use crate::error::DispatchError;
use crate::payload::Values;
use crate::plan::Recipe;
use crate::tracker::{CallId, Event};

/// A layer call on its way. Dropping it gives the call up.
pub struct Pending {
    inner: Arc<Inner>,
    call: CallId,
    answers: oneshot::Receiver<Answers>,
    recipe: Recipe,
}

impl Pending {
    pub(super) fn new(inner: Arc<Inner>, call: CallId, answers: oneshot::Receiver<Answers>, recipe: Recipe) -> Self {
        Self { inner, call, answers, recipe }
    }

    /// Waits for all answers, at most until the layer's deadline, and adds them up into `y` [rows, hidden],
    /// overwriting it. The additions run on the caller's thread.
    pub async fn combine(self, y: &mut [f32]) -> Result<(), DispatchError> {
        let expected = self.recipe.rows() * self.inner.config.hidden;
        if y.len() != expected {
            let detail = format!("y has {} values; expected {expected}", y.len());
            return Err(DispatchError::Input { detail });
        }
        self.addends().await?.add_up(y);
        Ok(())
    }

    /// Waits likewise, for what is to be added up.
    pub async fn addends(mut self) -> Result<Addends, DispatchError> {
        let DispatchConfig { hidden, ops, .. } = self.inner.config;
        let answers = (&mut self.answers).await.unwrap_or(Err(DispatchError::Stopped))?;
        let answers = answers.into_iter().map(|answer| answer.into_values(&ops, hidden)).collect();
        Ok(Addends { recipe: std::mem::take(&mut self.recipe), answers, hidden, ops })
    }
}

/// What a layer call comes to, before it is added up.
pub struct Addends {
    pub recipe: Recipe,
    pub answers: Vec<Values>,
    hidden: usize,
    ops: CombineOps,
}

impl Addends {
    /// Into `y` [rows, hidden], overwriting it.
    pub fn add_up(self, y: &mut [f32]) {
        let answers: Vec<_> = self.answers.into_iter().map(Values::brought).collect();
        self.recipe.combine(&self.ops, &answers, self.hidden, y);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.inner.core().waiting.remove(&self.call);
        self.inner.on(Event::Abandoned { call: self.call });
    }
}
