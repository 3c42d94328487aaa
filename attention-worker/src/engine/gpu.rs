//! The layers on a GPU, in bf16: everything is queued, and waited for where tokens are drawn. Where a layer's experts are chosen the
//! processor asks until they have come; other micro-batches are queued meanwhile. All tokens attend in the absorbed form.

mod weights;

use std::cell::RefCell;

use moesaic_dispatch::{Addends, Rows, Values};
use moesaic_kernels::cuda::{
    self, Append, Attend, Buffer, Device, Drawn, GpuBytes, GpuError, Mark, Normed, Pages, Parcel, Part as Place,
    Returned, Rotate, Routed, Split as Shares, Strides, View,
};
use moesaic_kernels::{Choice, Edit, GateParams, PAGE_TOKENS, bf16};
use moesaic_model::{Checkpoint, Config, ModelError};

use super::arithmetic::{Arithmetic, Asked, Experts, Reading, positions, tokens};
use super::thread::LOGITS_MAX;
use crate::core::batcher::Part;
use weights::{Mlp, Query, Weights};

pub struct Gpu {
    device: Device,
    weights: Weights,
    pages: Pages,
    limits: Limits,
    /// What attention is computed in: one micro-batch after the other.
    sums: Buffer<f32>,
    sum_weights: Buffer<f32>,
    /// What logits are computed in, borrowed for a call only.
    head: RefCell<Head>,
}

/// What buffers are made for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of the latent cache.
    pub pages: u32,
    /// Of a micro-batch.
    pub rows: usize,
}

struct Head {
    /// Rows, how tokens are drawn of them, and the edits.
    asked: Parcel,
    logits: Buffer<f32>,
    tokens: Buffer<u32>,
    returned_logits: Returned<f32>,
    returned_tokens: Returned<u32>,
}

/// Of all rows that are read at a time: a megabyte.
const EDITS_MAX: usize = 1 << 16;

/// What a micro-batch is computed in.
pub struct Buffers {
    /// The residual stream [rows, hidden], and what it is read as (rounded, and as it is) and changed by.
    h: Buffer<f32>,
    x: Buffer<u16>,
    exact: Buffer<f32>,
    y: Buffer<f32>,
    shared: Buffer<f32>,
    /// [rows, latent + rope]
    kv: Buffer<f32>,
    /// Low-rank queries before and after their norm.
    low: Buffer<f32>,
    low_x: Buffer<u16>,
    /// [rows, heads, nope + rope], then its first part [heads, rows, nope], absorbed [rows, heads, latent + rope].
    q: Buffer<f32>,
    plain: Buffer<u16>,
    absorbed: Buffer<u16>,
    /// [heads, rows, latent], then [rows, heads, v].
    o_latent: Buffer<u16>,
    o: Buffer<u16>,
    /// Of the widest network.
    wide: Buffer<u16>,
    gate: Buffer<f32>,
    routed: Buffer<Routed>,
    choices: Returned<Routed>,
    rows: Returned<u16>,
    experts: Parcel,
    /// Which rows go to which workers.
    picks: Option<Parcel>,
    owners: Option<Parcel>,
    /// Behind the choices, on their way here.
    fetched: Option<Mark>,
    /// What experts have answered on the GPU, and how it is added up, until that is through.
    answers: Vec<GpuBytes>,
    addends: Option<Parcel>,
    step: Option<Step>,
    /// What h has still to be changed by: the next norm does.
    pending: Pending,
}

#[derive(Clone, Copy)]
enum Pending {
    Nothing,
    /// y
    Own,
    /// The experts' sums, which are in y or else came from the processor, and what shared ones made.
    Experts {
        sums: Option<Place<f32>>,
        shared: bool,
    },
}

/// What a micro-batch is, on the GPU.
struct Step {
    sent: Parcel,
    rows: usize,
    longest: usize,
    tokens: Place<u32>,
    positions: Place<u32>,
    slots: Place<u32>,
    contexts: Place<u32>,
    firsts: Place<u32>,
    pages: Place<u32>,
}

impl Step {
    fn send(device: &Device, parts: &[Part], kept: Option<Parcel>) -> Result<Self, GpuError> {
        let rows: usize = parts.iter().map(|part| part.tokens.len()).sum();
        let page_count: usize = parts.iter().map(|part| part.pages.len()).sum();
        let room = Parcel::room(&[rows * 4, rows * 4, rows * 4, rows * 4, rows * 4, page_count * 4]);
        let mut sent = Parcel::at_least(kept, device, room)?;
        let slot = |(part, position): (&Part, usize)| {
            part.pages[position / PAGE_TOKENS] * PAGE_TOKENS as u32 + (position % PAGE_TOKENS) as u32
        };
        let mut next = 0;
        let firsts = parts.iter().flat_map(|part| {
            let first = next;
            next += part.pages.len() as u32;
            part.tokens.iter().map(move |_| first)
        });
        let firsts = sent.put_all(firsts);
        let step = Self {
            rows,
            longest: positions(parts).map(|(_, position)| position + 1).max().unwrap_or(1),
            tokens: sent.put_all(tokens(parts)),
            positions: sent.put_all(positions(parts).map(|(_, position)| position as u32)),
            slots: sent.put_all(positions(parts).map(slot)),
            contexts: sent.put_all(positions(parts).map(|(_, position)| position as u32 + 1)),
            firsts,
            pages: sent.put_all(parts.iter().flat_map(|part| part.pages.iter().copied())),
            sent,
        };
        step.sent.send(device)?;
        Ok(step)
    }

    fn view(&self, place: Place<u32>) -> View<'_, u32> {
        self.sent.view(place)
    }
}

impl Gpu {
    pub fn new(checkpoint: &Checkpoint, device: Device, limits: Limits) -> Result<Self, ModelError> {
        let weights = Weights::load(checkpoint, &device)?;
        let made = Self::with(weights, device, limits);
        made.map_err(|error| ModelError::file(checkpoint.dir(), error.to_string()))
    }

    /// With random weights and latents of a model's shape, made on the GPU: to measure with.
    pub fn random(config: &Config, device: Device, limits: Limits, seed: u64) -> Result<Self, GpuError> {
        let made = Self::with(Weights::random(config, &device, seed)?, device, limits)?;
        made.pages.fill_random(&made.device, seed)?;
        Ok(made)
    }

    fn with(weights: Weights, device: Device, limits: Limits) -> Result<Self, GpuError> {
        let c = weights.config();
        let (layers, latent) = (c.num_hidden_layers, c.kv_lora_rank);
        let [sums, sum_weights] = cuda::room(c.num_attention_heads, latent, c.max_position_embeddings);
        let rows = (LOGITS_MAX / c.vocab_size).clamp(1, limits.rows);
        let (draws, edits) = (rows * size_of::<Drawn>(), EDITS_MAX * size_of::<Edit>());
        let head = Head {
            asked: Parcel::new(&device, Parcel::room(&[rows * 4, draws, edits]))?,
            logits: device.buffer(rows * c.vocab_size)?,
            tokens: device.buffer(rows)?,
            returned_logits: device.returned(rows * c.vocab_size)?,
            returned_tokens: device.returned(rows)?,
        };
        Ok(Self {
            pages: Pages::new(&device, layers, limits.pages as usize, latent, c.qk_rope_head_dim)?,
            sums: device.buffer(sums)?,
            sum_weights: device.buffer(sum_weights)?,
            head: RefCell::new(head),
            device,
            weights,
            limits,
        })
    }

    /// Bytes of weights and of the latent cache.
    pub fn bytes(&self) -> (usize, usize) {
        (self.weights.bytes(), self.pages.bytes())
    }

    /// Rows whose logits can be asked for at a time.
    pub fn logit_rows(&self) -> usize {
        self.head.borrow().logits.len() / self.config().vocab_size
    }

    /// h = h + what is pending; of the rows, with a weight, x = norm(h) and, if it is wanted, that before rounding.
    fn norm_rows(
        &self,
        b: &mut Buffers,
        weight: Option<&Buffer<f32>>,
        pick: Option<View<'_, u32>>,
        rows: usize,
        wants_exact: bool,
    ) -> Result<(), GpuError> {
        let (y, shared) = match b.pending {
            Pending::Nothing => (None, None),
            Pending::Own => (Some(b.y.view()), None),
            Pending::Experts { sums, shared } => {
                let sums = sums.map_or(b.y.view(), |sums| b.experts.view(sums));
                (Some(sums), shared.then(|| b.shared.view()))
            }
        };
        let normed = Normed {
            y,
            shared,
            pick,
            weight: weight.map(Buffer::view),
            eps: self.config().rms_norm_eps,
            x: weight.is_some().then(|| b.x.view()),
            exact: wants_exact.then(|| b.exact.view()),
        };
        cuda::norm(&self.device, rows, self.config().hidden_size, b.h.view(), normed)?;
        b.pending = Pending::Nothing;
        Ok(())
    }

    /// Queues y = the experts' sums, if any of their answers lies on the GPU, and it has room for the others.
    fn add_there(&self, addends: &Addends, b: &mut Buffers) -> Result<bool, GpuError> {
        let is_there = addends.answers.iter().any(|answer| matches!(answer, Values::There(_)));
        Ok(is_there && GpuError::if_room(self.queue_sums(addends, b))?.is_some())
    }

    fn queue_sums(&self, Addends { recipe, answers, .. }: &Addends, b: &mut Buffers) -> Result<(), GpuError> {
        let there = |answer: &Values| match answer {
            Values::Here(values) => GpuBytes::of(&self.device, &values.bytes()),
            Values::There(bytes) => Ok(bytes.clone()),
        };
        b.answers = answers.iter().map(there).collect::<Result<_, _>>()?;
        let hidden = self.config().hidden_size;
        // The layer before is through: this one's gate was waited for.
        cuda::add_up(&self.device, &b.answers, recipe.addends(), recipe.ends(), hidden, &mut b.addends, b.y.view())
    }

    /// The experts' sums, added up by the processor.
    fn send_sums(&self, experts: Experts<'_>, b: &mut Buffers) -> Result<Place<f32>, GpuError> {
        // As above.
        b.experts.open();
        let sums = b.experts.put(experts.added_up());
        b.experts.send(&self.device)?;
        Ok(sums)
    }

    fn queries(&self, query: &Query, step: &Step, b: &Buffers) -> Result<(), GpuError> {
        let (device, rows) = (&self.device, step.rows);
        match query {
            Query::Direct(q) => q.queue(device, rows, b.x.view(), b.q.view()),
            Query::LowRank { a, norm, b: up } => {
                a.queue(device, rows, b.x.view(), b.low.view())?;
                let normed = Normed {
                    y: None,
                    shared: None,
                    pick: None,
                    weight: Some(norm.view()),
                    eps: self.config().rms_norm_eps,
                    x: Some(b.low_x.view()),
                    exact: None,
                };
                cuda::norm(device, rows, a.out_features(), b.low.view(), normed)?;
                up.queue(device, rows, b.low_x.view(), b.q.view())
            }
        }
    }
}

impl Arithmetic for Gpu {
    type Buffers = Buffers;
    type Failure = GpuError;
    const QUEUES: bool = true;

    fn config(&self) -> &Config {
        self.weights.config()
    }

    fn gate_params(&self) -> &GateParams {
        &self.weights.gate_params
    }

    fn pin_caller(&self) {}

    fn buffers(&self) -> Result<Buffers, GpuError> {
        let (c, device, rows) = (self.config(), &self.device, self.limits.rows);
        let (hidden, heads, latent) = (rows * c.hidden_size, rows * c.num_attention_heads, c.kv_lora_rank);
        let low = rows * c.q_lora_rank.unwrap_or(0);
        let wide = c.intermediate_size.max(c.n_shared_experts * c.moe_intermediate_size);
        Ok(Buffers {
            h: device.buffer(hidden)?,
            x: device.buffer(hidden)?,
            exact: device.buffer(hidden)?,
            y: device.buffer(hidden)?,
            shared: device.buffer(hidden)?,
            kv: device.buffer(rows * c.latent_width())?,
            low: device.buffer(low)?,
            low_x: device.buffer(low)?,
            q: device.buffer(heads * c.qk_head_dim())?,
            plain: device.buffer(heads * c.qk_nope_head_dim)?,
            absorbed: device.buffer(heads * c.latent_width())?,
            o_latent: device.buffer(heads * latent)?,
            o: device.buffer(heads * c.v_head_dim)?,
            wide: device.buffer(rows * wide)?,
            gate: device.buffer(rows * c.n_routed_experts)?,
            routed: device.buffer(rows * self.weights.choices_of_row())?,
            choices: device.returned(rows * self.weights.choices_of_row())?,
            rows: device.returned(hidden)?,
            experts: Parcel::new(device, Parcel::room(&[hidden * 4]))?,
            picks: None,
            owners: None,
            fetched: None,
            answers: Vec::new(),
            addends: None,
            step: None,
            pending: Pending::Nothing,
        })
    }

    fn embed(&self, parts: &[Part], b: &mut Buffers) -> Result<(), GpuError> {
        // What was sent for the step before is read no more.
        self.device.finish()?;
        b.answers.clear();
        let step = Step::send(&self.device, parts, b.step.take().map(|step| step.sent))?;
        let (table, hidden) = (self.weights.embedding.view(), self.config().hidden_size);
        cuda::embed(&self.device, step.view(step.tokens), table, hidden, b.h.view())?;
        b.step = Some(step);
        b.pending = Pending::Nothing;
        Ok(())
    }

    fn attend(&self, layer: usize, _: &[Part], b: &mut Buffers) -> Result<(), GpuError> {
        let (c, device, weights) = (self.config(), &self.device, &self.weights.layers[layer]);
        let mla = &weights.mla;
        let Some(step) = b.step.take() else { return Ok(()) };
        let (rows, heads, width, turns) =
            (step.rows, c.num_attention_heads, c.latent_width(), self.weights.turns.view());
        self.norm_rows(b, Some(&weights.input_norm), None, rows, false)?;
        mla.kv_a.queue(device, rows, b.x.view(), b.kv.view())?;
        let new = Append {
            kv: b.kv.view(),
            norm: mla.kv_a_norm.view(),
            eps: c.rms_norm_eps,
            turns,
            positions: step.view(step.positions),
            slots: step.view(step.slots),
        };
        cuda::append(device, &self.pages, layer, new)?;
        self.queries(&mla.q, &step, b)?;
        let rotate = Rotate {
            q: b.q.view(),
            turns,
            positions: step.view(step.positions),
            plain: b.plain.view(),
            absorbed: b.absorbed.view(),
        };
        cuda::rotate(device, &self.pages, heads, c.qk_nope_head_dim, rotate)?;
        let strides = Strides { row: heads * width, head: width };
        mla.absorb.queue(device, rows, b.plain.view(), b.absorbed.view(), strides)?;
        let attend = Attend {
            heads,
            scale: c.softmax_scale(),
            longest: step.longest,
            q: b.absorbed.view(),
            contexts: step.view(step.contexts),
            firsts: step.view(step.firsts),
            pages: step.view(step.pages),
            sums: self.sums.view(),
            weights: self.sum_weights.view(),
            o: b.o_latent.view(),
        };
        cuda::attend(device, &self.pages, layer, attend)?;
        let strides = Strides { row: heads * c.v_head_dim, head: c.v_head_dim };
        mla.value_up.queue(device, rows, b.o_latent.view(), b.o.view(), strides)?;
        mla.o.queue(device, rows, b.o.view(), b.y.view())?;
        b.pending = Pending::Own;
        b.step = Some(step);
        Ok(())
    }

    fn norm(&self, layer: usize, b: &mut Buffers) -> Result<(), GpuError> {
        let (weights, rows) = (&self.weights.layers[layer], b.row_count());
        self.norm_rows(b, Some(&weights.post_norm), None, rows, self.config().is_moe(layer))
    }

    fn gate(&self, layer: usize, b: &mut Buffers) -> Result<(), GpuError> {
        let Mlp::Moe { gate, bias, .. } = &self.weights.layers[layer].mlp else { return Ok(()) };
        let (c, device, rows) = (self.config(), &self.device, b.row_count());
        let experts = c.n_routed_experts;
        cuda::gate(device, rows, b.exact.view(), gate.view(), c.hidden_size, b.gate.view())?;
        let gate = &self.weights.gate_params;
        let bias = bias.as_ref().map(Buffer::view);
        cuda::route(device, rows, b.gate.view(), bias, (gate, experts), b.routed.view())
    }

    fn split(&self, split: &Shares<'_>, b: &mut Buffers) -> Result<Option<GpuBytes>, GpuError> {
        let rows = b.row_count();
        let shares = cuda::split_rows(&self.device, rows, b.x.view(), b.routed.view(), split, &mut b.owners);
        GpuError::if_room(shares)
    }

    fn fetch(&self, stays: bool, b: &mut Buffers) -> Result<(), GpuError> {
        let (device, rows) = (&self.device, b.row_count());
        device.queue_return(b.routed.view(), &mut b.choices, rows * self.weights.choices_of_row())?;
        if !stays {
            device.queue_return(b.x.view(), &mut b.rows, rows * self.config().hidden_size)?;
        }
        b.fetched = Some(device.mark()?);
        Ok(())
    }

    fn has_come(&self, b: &Buffers) -> Result<bool, GpuError> {
        b.fetched.as_ref().map_or(Ok(true), Mark::is_past)
    }

    fn choose(&self, _: usize, b: &mut Buffers, choices: &mut Vec<Choice>) -> Result<(), GpuError> {
        if let Some(fetched) = b.fetched.take() {
            fetched.wait()?;
        }
        b.answers.clear();
        let count = b.row_count() * self.weights.choices_of_row();
        choices.extend(b.choices.values()[..count].iter().map(|routed| Choice::from(*routed)));
        Ok(())
    }

    fn rows<'a>(&'a self, stays: bool, b: &'a mut Buffers) -> Rows<'a> {
        let len = b.row_count() * self.config().hidden_size;
        if stays {
            return Rows::There(&self.device, b.x.view().first(len), &mut b.picks);
        }
        let values = &b.rows.values()[..len];
        Rows::Bf16(values.iter().map(|bits| bf16::from_bits(*bits)).collect())
    }

    fn dense(&self, layer: usize, b: &mut Buffers) -> Result<(), GpuError> {
        let (ffn, y) = match &self.weights.layers[layer].mlp {
            Mlp::Dense(ffn) => (ffn, &b.y),
            Mlp::Moe { shared: Some(ffn), .. } => (ffn, &b.shared),
            Mlp::Moe { shared: None, .. } => return Ok(()),
        };
        ffn.queue(&self.device, b.row_count(), b.x.view(), b.wide.view(), y.view())
    }

    fn add(&self, layer: usize, experts: Option<Experts<'_>>, b: &mut Buffers) -> Result<(), GpuError> {
        b.pending = match &self.weights.layers[layer].mlp {
            Mlp::Dense(_) => Pending::Own,
            Mlp::Moe { shared, .. } => {
                let mut sums = None;
                if let Some(experts) = experts
                    && !self.add_there(&experts.addends, b)?
                {
                    sums = Some(self.send_sums(experts, b)?);
                }
                Pending::Experts { sums, shared: shared.is_some() }
            }
        };
        Ok(())
    }

    fn read(&self, asked: &[Asked], b: &mut Buffers) -> Result<Reading, GpuError> {
        let (device, vocabulary, count) = (&self.device, self.config().vocab_size, b.row_count());
        if !matches!(b.pending, Pending::Nothing) {
            self.norm_rows(b, None, None, count, false)?;
        }
        let head = &mut *self.head.borrow_mut();
        let Split { seen, drawn, draws, edits } = Split::new(asked);
        head.asked.open();
        let picks = head.asked.put_all(seen.iter().chain(&drawn).map(|i| asked[*i].row as u32));
        let (draws, edits) = (head.asked.put(&draws), head.asked.put(&edits));
        head.asked.send(device)?;
        self.norm_rows(b, Some(&self.weights.final_norm), Some(head.asked.view(picks)), asked.len(), false)?;
        self.weights.head.queue(device, asked.len(), b.x.view(), head.logits.view())?;
        let seen_len = seen.len() * vocabulary;
        if !drawn.is_empty() {
            let (logits, draws, edits) =
                (head.logits.view().from(seen_len), head.asked.view(draws), head.asked.view(edits));
            cuda::draw(device, vocabulary, logits, draws, edits, head.tokens.view())?;
        }
        device.queue_return(head.logits.view(), &mut head.returned_logits, seen_len)?;
        device.queue_return(head.tokens.view(), &mut head.returned_tokens, drawn.len())?;
        device.finish()?;
        let mut tokens = vec![None; asked.len()];
        for (i, token) in drawn.iter().zip(head.returned_tokens.values()) {
            tokens[*i] = Some(*token);
        }
        Ok(Reading { tokens, logits: head.returned_logits.values()[..seen_len].to_vec() })
    }
}

/// Rows that are asked for, by what comes back of them.
struct Split {
    /// Their logits.
    seen: Vec<usize>,
    /// A token that the GPU draws, and how.
    drawn: Vec<usize>,
    draws: Vec<Drawn>,
    edits: Vec<Edit>,
}

impl Split {
    /// A row whose edits find no room is drawn on the processor, which draws the same.
    fn new(asked: &[Asked]) -> Self {
        let mut split = Self { seen: Vec::new(), drawn: Vec::new(), draws: Vec::new(), edits: Vec::new() };
        for (i, asked) in asked.iter().enumerate() {
            let room = EDITS_MAX - split.edits.len();
            match asked.draw.as_ref().filter(|draw| !asked.logits && draw.edits.len() <= room) {
                None => split.seen.push(i),
                Some(draw) => {
                    split.drawn.push(i);
                    split.draws.push(Drawn::new(draw, split.edits.len()));
                    split.edits.extend(&draw.edits);
                }
            }
        }
        split
    }
}

impl Buffers {
    /// Of the step in hand.
    fn row_count(&self) -> usize {
        self.step.as_ref().map_or(0, |step| step.rows)
    }
}
