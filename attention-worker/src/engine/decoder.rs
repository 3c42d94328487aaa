//! The model's layers over a micro-batch. One `async fn`: while a micro-batch awaits its experts, another one computes.
//!
//! Knows rows (a token at a position, with a page table) and nothing of sequences, requests or sampling, nor where its
//! arithmetic is done.

use std::sync::Arc;
use std::time::Instant;

use moesaic_dispatch::{DispatchError, Dispatcher, LayerCall, Pending, Route};
use moesaic_kernels::Choice;
use moesaic_model::Config;
use moesaic_node::trace::{Kind, Span as Trace};
use moesaic_proto::{ExpertId, LayerId};
use tokio::task::yield_now;

use super::arithmetic::{Arithmetic, Asked, Experts, Reading};
use super::expert_counts::ExpertCounts;
use super::profile::{Part as Time, Profile};
use crate::core::batcher::Part;

pub struct Decoder<A> {
    arithmetic: A,
    dispatcher: Dispatcher,
    profile: Arc<Profile>,
    experts: Arc<ExpertCounts>,
}

/// What a micro-batch is computed in, kept from step to step: its layers allocate nothing for their rows.
pub struct Buffers<B> {
    own: B,
    /// The experts' sums [rows, hidden].
    sums: Vec<f32>,
    choices: Vec<Choice>,
    /// Of each expert, whether any row has it.
    chosen: Vec<bool>,
    routes: Vec<Route>,
}

/// Why a micro-batch has no result.
#[derive(Debug, thiserror::Error)]
pub enum StepError<F> {
    /// Its experts did not answer.
    #[error(transparent)]
    Experts(DispatchError),
    /// The device has failed, for every micro-batch.
    #[error("the device has failed: {0}")]
    Device(F),
}

impl<A: Arithmetic> Decoder<A> {
    pub fn new(arithmetic: A, dispatcher: Dispatcher, profile: Arc<Profile>, experts: Arc<ExpertCounts>) -> Self {
        Self { arithmetic, dispatcher, profile, experts }
    }

    /// Whether all experts are called directly.
    pub fn is_local(&self) -> bool {
        self.dispatcher.is_local()
    }

    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    pub fn config(&self) -> &Config {
        self.arithmetic.config()
    }

    /// The caller is the thread that computes.
    pub fn pin_caller(&self) {
        self.arithmetic.pin_caller();
    }

    pub fn buffers(&self) -> Result<Buffers<A::Buffers>, A::Failure> {
        let own = self.arithmetic.buffers()?;
        Ok(Buffers { own, sums: Vec::new(), choices: Vec::new(), chosen: Vec::new(), routes: Vec::new() })
    }

    /// All layers over a micro-batch, whose hidden states are left in `b`. `micro_batch` tells those in flight apart; each
    /// layer is a part of `trace`.
    pub async fn forward(
        &self,
        micro_batch: u8,
        parts: &[Part],
        b: &mut Buffers<A::Buffers>,
        trace: &Trace,
    ) -> Result<(), StepError<A::Failure>> {
        let rows = parts.iter().map(|part| part.tokens.len()).sum();
        self.part(Time::Rest, |a| a.embed(parts, &mut b.own))?;
        for layer in 0..self.config().num_hidden_layers {
            let mut trace = trace.child(Kind::Internal, "layer");
            trace.set("moesaic.layer", layer as i64);
            self.part(Time::Attention, |a| a.attend(layer, parts, &mut b.own))?;
            self.part(Time::Rest, |a| a.norm(layer, &mut b.own))?;
            trace.event("attended");
            let mut experts = None;
            if self.config().is_moe(layer) {
                let away = self.send(micro_batch, layer, rows, b, &trace).await;
                let away = away.inspect_err(|error| trace.fail(error))?;
                if !A::QUEUES {
                    self.part(Time::Dense, |a| a.dense(layer, &mut b.own))?;
                }
                let start = Instant::now();
                let addends = away.addends().await;
                let addends = addends.inspect_err(|error| trace.fail(error)).map_err(StepError::Experts)?;
                self.profile.add(Time::Wait, start.elapsed());
                experts = Some(Experts { addends, room: &mut b.sums });
            } else {
                self.part(Time::Dense, |a| a.dense(layer, &mut b.own))?;
            }
            self.part(Time::Rest, |a| a.add(layer, experts, &mut b.own))?;
        }
        self.profile.count_step(rows);
        Ok(())
    }

    /// Does a part of a step.
    fn part<R>(&self, part: Time, work: impl FnOnce(&A) -> Result<R, A::Failure>) -> Result<R, StepError<A::Failure>> {
        self.profile.time(part, || work(&self.arithmetic)).map_err(StepError::Device)
    }

    /// Reads some rows of the micro-batch that `b` was last used for.
    pub fn read(&self, asked: &[Asked], b: &mut Buffers<A::Buffers>) -> Result<Reading, A::Failure> {
        self.profile.time(Time::Head, || self.arithmetic.read(asked, &mut b.own))
    }

    /// Chooses experts, and sends them their rows. Where a device does what is queued, shared experts are queued in between.
    async fn send(
        &self,
        micro_batch: u8,
        layer: usize,
        rows: usize,
        b: &mut Buffers<A::Buffers>,
        trace: &Trace,
    ) -> Result<Pending, StepError<A::Failure>> {
        let (stays, top_k) = (self.dispatcher.has_lanes(), self.arithmetic.gate_params().top_k);
        let traceparent = trace.traceparent();
        let call = LayerCall { layer: LayerId(layer as u8), micro_batch, top_k, traceparent };
        self.part(Time::Gate, |a| a.gate(layer, &mut b.own))?;
        let mut ahead = None;
        if stays {
            let split = |a: &A| self.dispatcher.send_ahead(&call, rows, |split| a.split(split, &mut b.own));
            ahead = self.part(Time::Dispatch, split)?;
        }
        self.part(Time::Gate, |a| a.fetch(stays, &mut b.own))?;
        if A::QUEUES {
            // The device has something to do while the choices come, and rows are sent off.
            self.part(Time::Dense, |a| a.dense(layer, &mut b.own))?;
        }
        let start = Instant::now();
        while !self.arithmetic.has_come(&b.own).map_err(StepError::Device)? {
            yield_now().await;
        }
        self.choose(layer, b).map_err(StepError::Device)?;
        self.profile.add(Time::Gate, start.elapsed());
        let len = rows * self.config().hidden_size;
        b.sums.reserve_exact(len.saturating_sub(b.sums.len()));
        b.sums.resize(len, 0.0);
        let dispatch = || {
            let rows = self.arithmetic.rows(stays, &mut b.own);
            self.dispatcher.dispatch_layer(&call, rows, &b.routes, ahead)
        };
        self.profile.time(Time::Dispatch, dispatch).map_err(StepError::Experts)
    }

    /// The experts that each row goes to.
    fn choose(&self, layer: usize, b: &mut Buffers<A::Buffers>) -> Result<(), A::Failure> {
        b.choices.clear();
        self.arithmetic.choose(layer, &mut b.own, &mut b.choices)?;
        b.routes.clear();
        b.routes.extend(b.choices.iter().map(|c| Route { expert: ExpertId(c.expert), weight: c.weight }));
        b.chosen.clear();
        b.chosen.resize(self.config().n_routed_experts, false);
        b.choices.iter().for_each(|choice| b.chosen[usize::from(choice.expert)] = true);
        self.experts.add(layer, b.choices.iter().map(|choice| choice.expert));
        self.profile.count_experts(b.chosen.iter().filter(|chosen| **chosen).count());
        Ok(())
    }
}

impl<B> Buffers<B> {
    /// What the arithmetic keeps.
    pub fn own(&self) -> &B {
        &self.own
    }

    /// What the rest grows to for each row of a micro-batch, in bytes.
    pub fn bytes_per_row(c: &Config) -> usize {
        // Lists double when they are full.
        let lists = 2 * c.num_experts_per_tok * (size_of::<Choice>() + size_of::<Route>());
        c.hidden_size * size_of::<f32>() + lists
    }

    /// What the rest takes.
    pub fn bytes(&self) -> usize {
        let lists = self.choices.capacity() * size_of::<Choice>() + self.routes.capacity() * size_of::<Route>();
        self.sums.capacity() * size_of::<f32>() + lists + self.chosen.capacity()
    }
}
