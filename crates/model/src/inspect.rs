//! What a folder is, in numbers, and everything that is wrong with it. Never stops at the first problem.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::names::{self, Owner};
use crate::shards::Shards;
use crate::typed::Typed;
use crate::{Checkpoint, Config, Family};

const TOKENIZER_FILE: &str = "tokenizer.json";
/// Lines that a person still reads; `Report::problems` has more.
const PROBLEMS_SHOWN_MAX: usize = 30;
/// Tensors that are reported one by one; a config may promise millions that no file has, and the rest are counted.
const TENSOR_PROBLEMS_MAX: usize = 10_000;
/// The latent cache is compared in this precision.
const CACHE_VALUE_BYTES: u64 = 2;

/// Values of the weights, without scales.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameters {
    /// Of the main model.
    pub total: u64,
    /// That one token is multiplied with: the chosen experts, and no embedding, which is looked up.
    pub active: u64,
    pub experts: u64,
    /// Of the multi-token prediction layers, beside `total`; their embedding and head are copies and not counted.
    pub mtp: u64,
}

impl Parameters {
    pub fn of(c: &Config) -> Self {
        let sum = |owner: Owner| names::main_model(c).filter(|s| s.owner == owner).map(|s| s.values()).sum::<u64>();
        let (attention, experts) = (sum(Owner::Attention), sum(Owner::Expert));
        let looked_up = if c.tie_word_embeddings { 0 } else { names::embedding(c).values() };
        let active_experts = match c.n_routed_experts as u64 {
            0 => 0,
            // Experts are of one size, so this divides.
            n => experts / n * c.num_experts_per_tok as u64,
        };
        let copies = 2 * names::embedding(c).values() * c.num_nextn_predict_layers as u64;
        let mtp = names::mtp(c).map(|s| s.values()).sum::<u64>();
        Self {
            total: attention + experts,
            active: attention - looked_up + active_experts,
            experts,
            mtp: mtp.saturating_sub(copies),
        }
    }
}

/// Bytes of cache a token takes in all layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cache {
    pub latent: u64,
    /// What keys and values of every head would take.
    pub multi_head: u64,
}

impl Cache {
    pub fn of(c: &Config) -> Self {
        let layers = c.num_hidden_layers as u64 * CACHE_VALUE_BYTES;
        let heads = c.num_attention_heads as u64;
        Self {
            latent: layers * c.latent_width() as u64,
            multi_head: layers * heads * (c.qk_head_dim() + c.v_head_dim) as u64,
        }
    }
}

/// Bytes of tensor data in the files, scales included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bytes {
    /// What an attention worker loads.
    pub attention: u64,
    /// What all expert workers load together.
    pub experts: u64,
    pub mtp: u64,
}

impl Bytes {
    fn of(&mut self, owner: Owner) -> &mut u64 {
        match owner {
            Owner::Attention => &mut self.attention,
            Owner::Expert => &mut self.experts,
            Owner::Mtp => &mut self.mtp,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Report {
    pub dir: PathBuf,
    /// None if config.json is wrong; then nothing that depends on it is known.
    pub config: Option<Config>,
    pub files: usize,
    pub tensors: usize,
    pub bytes: Bytes,
    pub fingerprint: Option<String>,
    /// Worth knowing, and no hindrance.
    pub notes: Vec<String>,
    /// What keeps the folder from being served.
    pub problems: Vec<String>,
}

pub fn report(dir: &Path) -> Report {
    let mut problems: Vec<String> = Vec::new();
    let config = Config::read_all(dir).map_err(|e| problems.extend(e.iter().map(ToString::to_string))).ok();
    let (shards, shard_problems) = Shards::open(dir);
    problems.extend(shard_problems.iter().map(ToString::to_string));
    let tokenizer = dir.join(TOKENIZER_FILE);
    if !tokenizer.is_file() {
        problems.push(format!("{}: is missing; the coordinator reads and writes text with it", tokenizer.display()));
    }
    let mut report = Report {
        dir: dir.to_owned(),
        config: config.clone(),
        files: shards.files().count(),
        tensors: shards.len(),
        bytes: Bytes::default(),
        fingerprint: None,
        notes: Vec::new(),
        problems,
    };
    if let Some(config) = config.filter(|_| shards.len() > 0) {
        report.examine_tensors(dir, &config, &shards);
        report.fingerprint = report.problems.is_empty().then(|| crate::fingerprint::of(&config, &shards));
        if report.problems.is_empty() {
            report.problems = value_problems(&Checkpoint::new(dir, config, shards));
        }
    }
    report
}

impl Report {
    pub fn parameters(&self) -> Option<Parameters> {
        self.config.as_ref().map(Parameters::of)
    }

    pub fn cache(&self) -> Option<Cache> {
        self.config.as_ref().map(Cache::of)
    }

    /// Every tensor's presence, dtype and shape; and the bytes by owner.
    fn examine_tensors(&mut self, dir: &Path, config: &Config, shards: &Shards) {
        let typed = Typed { dir, config, shards };
        let mut unread: BTreeSet<&str> = shards.names().collect();
        let mut wrong = 0usize;
        for spec in names::main_model(config).chain(names::mtp(config)) {
            let owned = self.bytes.of(spec.owner);
            for name in [&spec.name, &spec.scale_name()] {
                *owned += shards.get(name).map_or(0, |t| t.bytes.len() as u64);
                unread.remove(name.as_str());
            }
            let may_lack = spec.owner == Owner::Mtp && shards.get(&spec.name).is_none();
            if !may_lack && let Err(problem) = typed.check(&spec) {
                wrong += 1;
                if wrong <= TENSOR_PROBLEMS_MAX {
                    self.problems.push(problem.to_string());
                }
            }
        }
        if let Some(more @ 1..) = wrong.checked_sub(TENSOR_PROBLEMS_MAX) {
            self.problems.push(format!("{}: {more} more tensors are missing or do not fit", dir.display()));
        }
        if config.num_nextn_predict_layers > 0 && self.bytes.mtp == 0 {
            let layers = config.num_nextn_predict_layers;
            self.notes.push(format!("config.json has {layers} MTP layers, and the files have no tensors of them"));
        }
        if let Some(first) = unread.first() {
            self.notes.push(format!("{} tensors are read by no worker, {first} for one", unread.len()));
        }
    }
}

/// Scales, norms, gates and biases with values that cannot be computed with.
fn value_problems(c: &Checkpoint) -> Vec<String> {
    let config = c.config();
    let layers = (0..config.num_hidden_layers).into_par_iter().filter_map(|layer| c.layer(layer).err());
    let expert = |layer: usize| (0..config.n_routed_experts).into_par_iter().map(move |expert| (layer, expert));
    let experts = (0..config.num_hidden_layers)
        .into_par_iter()
        .filter(|&layer| config.is_moe(layer))
        .flat_map(expert)
        .filter_map(|(layer, expert)| c.expert(layer, expert).err());
    let top = [c.embedding().err(), c.head().err(), c.final_norm().err()].into_par_iter().flatten();
    top.chain(layers).chain(experts).map(|e| e.to_string()).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.dir.display())?;
        if let Some(config) = &self.config {
            write_model(f, config)?;
        }
        if self.tensors > 0 {
            let Bytes { attention, experts, mtp } = self.bytes;
            writeln!(f, "  files        {} with {} tensors", self.files, self.tensors)?;
            writeln!(
                f,
                "  bytes        attention worker {}, experts {}, MTP {}",
                size(attention),
                size(experts),
                size(mtp)
            )?;
        }
        if let Some(fingerprint) = &self.fingerprint {
            writeln!(f, "  fingerprint  {fingerprint}")?;
        }
        for note in &self.notes {
            writeln!(f, "  note         {note}")?;
        }
        if self.problems.is_empty() {
            return writeln!(f, "  problems     none");
        }
        writeln!(f, "  problems     {}", self.problems.len())?;
        for problem in self.problems.iter().take(PROBLEMS_SHOWN_MAX) {
            writeln!(f, "    {problem}")?;
        }
        match self.problems.len().checked_sub(PROBLEMS_SHOWN_MAX) {
            None | Some(0) => Ok(()),
            Some(more) => writeln!(f, "    and {more} more"),
        }
    }
}

fn write_model(f: &mut fmt::Formatter<'_>, c: &Config) -> fmt::Result {
    let family = match c.model_type {
        Family::DeepseekV2 => "deepseek_v2",
        Family::DeepseekV3 => "deepseek_v3",
    };
    let weights = match c.quantization {
        None => "not quantized".to_owned(),
        Some(q) => {
            format!("FP8 in blocks of {} x {}{}", q.block[0], q.block[1], if q.ue8m0 { ", ue8m0" } else { "" })
        }
    };
    let p = Parameters::of(c);
    let cache = Cache::of(c);
    let moe_layers = c.moe_layers().len();
    writeln!(f, "  family       {family}, {weights}")?;
    writeln!(
        f,
        "  layers       {} ({} dense, {moe_layers} of {} experts, {} of them and {} shared a token)",
        c.num_hidden_layers,
        c.num_hidden_layers - moe_layers,
        c.n_routed_experts,
        c.num_experts_per_tok,
        c.n_shared_experts
    )?;
    writeln!(
        f,
        "  parameters   {} total, {} active a token, {} in routed experts, {}",
        count(p.total),
        count(p.active),
        count(p.experts),
        if p.mtp > 0 { format!("{} in MTP layers", count(p.mtp)) } else { "no MTP layers".to_owned() }
    )?;
    writeln!(
        f,
        "  cache        {} bytes a token in bf16; ordinary multi-head attention {} bytes, {:.1} times as many",
        cache.latent,
        cache.multi_head,
        cache.multi_head as f64 / cache.latent as f64
    )
}

/// Three digits, as papers have them.
fn count(n: u64) -> String {
    let (value, unit) = if n >= 1_000_000_000 { (n as f64 / 1e9, "B") } else { (n as f64 / 1e6, "M") };
    let decimals = match value {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{value:.decimals$}{unit}")
}

fn size(bytes: u64) -> String {
    if bytes >= 1_000_000_000 {
        format!("{:.2} GB", bytes as f64 / 1e9)
    } else {
        format!("{:.2} MB", bytes as f64 / 1e6)
    }
}
