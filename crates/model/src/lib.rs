//! A checkpoint as data and as a formula. Owns reading `config.json` and safetensors files of the DeepSeek-V2 and -V3
//! families, the plain reference of the whole model, `pack`, `quantize`, `synth` and `inspect`. Never talks to a network, and
//! never trusts a file.

mod blocks;
mod checkpoint;
pub mod config;
mod error;
mod fingerprint;
mod folder;
pub mod inspect;
mod json;
pub mod load;
mod names;
pub mod packed;
pub mod quantize;
pub mod reference;
mod safetensors;
mod shards;
pub mod synth;
mod typed;

pub use blocks::{FfnBlock, LayerBlock, MlaBlock, MlpBlock, QueryBlock};
pub use checkpoint::Checkpoint;
pub use config::{Config, Family, Quantization, ScoringFunc, TopkMethod, YarnScaling};
pub use error::ModelError;
