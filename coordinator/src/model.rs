//! What the coordinator needs to know of the checkpoint: limits, layers and defaults from `config.json` and
//! `generation_config.json`. It reads no weights; the workers validate the whole folder.

use std::path::{Path, PathBuf};

use moesaic_proto::LayerId;
use moesaic_proto::limits::{EOS_TOKENS_MAX, EXPERTS_MAX, LAYERS_MAX};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::core::error::shortened;
use crate::text::read_bounded;

/// As much of config.json as a worker reads.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read {}: {reason}", path.display())]
    Read { path: PathBuf, reason: String },
    #[error("{}: {reason}", path.display())]
    Parse { path: PathBuf, reason: String },
    #[error("{}: {field} is {value}; expected {expected}", path.display())]
    Field { path: PathBuf, field: &'static str, value: String, expected: String },
}

/// Facts of the served model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// For clients.
    pub name: String,
    /// "deepseek_v3", "deepseek_v2"
    pub family: String,
    pub vocabulary: u32,
    /// Prompt and output together, in tokens.
    pub context_max: usize,
    /// Tokens that end a sequence unless the request says otherwise.
    pub eos: Vec<u32>,
    /// Layers with routed experts, and how many each has.
    pub moe_layers: Vec<LayerId>,
    pub experts: usize,
    /// Experts that a row chooses in each of them.
    pub chosen: usize,
    /// Groups in which a layer's experts are summed: the gate's, or fixed blocks.
    pub groups: usize,
    pub defaults: Defaults,
}

/// A layer's experts are summed in so many blocks where the gate has no groups (ARCHITECTURE.md, rule 1).
const UNGROUPED_BLOCKS: u64 = 8;

/// Sampling where the request says nothing: from `generation_config.json`, else temperature 1 and no filter.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    pub temperature: f32,
    pub top_p: f32,
}

#[derive(Deserialize)]
struct ConfigFile {
    model_type: String,
    vocab_size: u64,
    max_position_embeddings: u64,
    num_hidden_layers: u64,
    #[serde(default)]
    n_routed_experts: Option<u64>,
    /// This one and the next two are read where there are experts only, as workers do.
    #[serde(default)]
    n_group: Json,
    #[serde(default)]
    first_k_dense_replace: Json,
    #[serde(default)]
    num_experts_per_tok: Json,
    #[serde(default)]
    moe_layer_freq: Option<u64>,
    #[serde(default)]
    eos_token_id: Option<OneOrMore>,
}

#[derive(Deserialize, Default)]
struct GenerationFile {
    eos_token_id: Option<OneOrMore>,
    temperature: Option<f32>,
    top_p: Option<f32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(u32),
    More(Vec<u32>),
}

impl OneOrMore {
    fn into_list(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::More(ids) => ids,
        }
    }
}

impl Model {
    /// Reads the folder's two files; the second may be missing.
    pub fn open(dir: &Path, served_name: Option<&str>) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let config: ConfigFile = read(&path)?;
        let generation_path = dir.join("generation_config.json");
        let generation: GenerationFile =
            if generation_path.exists() { read(&generation_path)? } else { GenerationFile::default() };

        let within = |field, value: u64, low: u64, high: u64| match value {
            v if (low..=high).contains(&v) => Ok(v),
            _ => {
                let (value, expected) = (value.to_string(), format!("{low} to {high}"));
                Err(ModelError::Field { path: path.clone(), field, value, expected })
            }
        };
        let layers = within("num_hidden_layers", config.num_hidden_layers, 1, LAYERS_MAX as u64)?;
        let experts = within("n_routed_experts", config.n_routed_experts.unwrap_or(0), 0, EXPERTS_MAX as u64)?;
        let every = within("moe_layer_freq", config.moe_layer_freq.unwrap_or(1), 1, LAYERS_MAX as u64)?;
        let of_experts = |field, given: &Json| match given.as_u64() {
            _ if experts == 0 || given.is_null() => Ok(0),
            Some(count) => Ok(count),
            None => {
                let (path, value) = (path.clone(), shortened(&given.to_string()));
                Err(ModelError::Field { path, field, value, expected: "a number".into() })
            }
        };
        let dense = of_experts("first_k_dense_replace", &config.first_k_dense_replace)?;
        let chosen = of_experts("num_experts_per_tok", &config.num_experts_per_tok)?;
        let groups = match of_experts("n_group", &config.n_group)? {
            0 | 1 => UNGROUPED_BLOCKS,
            groups => groups,
        };
        let is_moe = |layer: &u64| experts > 0 && *layer >= dense && layer.is_multiple_of(every);
        let vocabulary = within("vocab_size", config.vocab_size, 1, 1 << 24)? as u32;
        // Every request carries them, and a worker takes no others.
        let valid = |ids: &[u32]| ids.len() <= EOS_TOKENS_MAX && ids.iter().all(|id| *id < vocabulary);
        let eos = |given: Option<OneOrMore>, path: &Path| match given.map_or_else(Vec::new, OneOrMore::into_list) {
            ids if valid(&ids) => Ok(ids),
            ids => {
                let (path, field) = (path.to_owned(), "eos_token_id");
                let value = format!("{} ids, the largest {}", ids.len(), ids.iter().max().copied().unwrap_or(0));
                let expected = format!("at most {EOS_TOKENS_MAX} below vocab_size, {vocabulary}");
                Err(ModelError::Field { path, field, value, expected })
            }
        };
        let own_eos = eos(config.eos_token_id, &path)?;
        let eos = match generation.eos_token_id {
            None => own_eos,
            given => eos(given, &generation_path)?,
        };
        let defaults =
            Defaults { temperature: generation.temperature.unwrap_or(1.0), top_p: generation.top_p.unwrap_or(1.0) };
        let top_p_valid = defaults.top_p > 0.0 && defaults.top_p <= 1.0;
        if !((0.0..=2.0).contains(&defaults.temperature) && top_p_valid) {
            let value = format!("{} and {}", defaults.temperature, defaults.top_p);
            let expected = "0 to 2, and above 0 to 1".to_owned();
            return Err(ModelError::Field { path: generation_path, field: "temperature and top_p", value, expected });
        }
        Ok(Self {
            name: served_name.map_or_else(|| folder_name(dir), str::to_owned),
            vocabulary,
            context_max: within("max_position_embeddings", config.max_position_embeddings, 2, 1 << 28)? as usize,
            family: config.model_type,
            eos,
            moe_layers: (0..layers).filter(is_moe).map(|layer| LayerId(layer as u8)).collect(),
            experts: experts as usize,
            chosen: chosen as usize,
            groups: groups.min(experts.max(1)) as usize,
            defaults,
        })
    }
}

fn folder_name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let text = read_bounded(path, FILE_BYTES_MAX)
        .map_err(|e| ModelError::Read { path: path.to_owned(), reason: e.to_string() })?;
    let broken = |e: serde_json::Error| ModelError::Parse { path: path.to_owned(), reason: shortened(&e.to_string()) };
    serde_json::from_slice(&text).map_err(broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::fixtures::folder;

    #[test]
    fn reads_the_demo_model() {
        let model = Model::open(&folder(), None).unwrap();
        assert_eq!((model.name.as_str(), model.family.as_str()), ("tiny-r1", "deepseek_v3"));
        assert_eq!((model.vocabulary, model.context_max, model.experts), (288, 4096, 32));
        assert_eq!(model.eos, [1]);
        assert_eq!(model.moe_layers, [1, 2, 3, 4].map(LayerId));
        assert_eq!(model.defaults, Defaults { temperature: 1.0, top_p: 1.0 });
    }

    #[test]
    fn a_bad_field_is_named() {
        let good = r#"{"model_type":"deepseek_v3","vocab_size":8,"max_position_embeddings":64,"num_hidden_layers":2}"#;
        let table = [
            (good.replace("\"vocab_size\":8,", ""), "missing field `vocab_size`"),
            (good.replace(":64", ":0"), "max_position_embeddings is 0; expected 2 to"),
            (good.replace(":2}", ":300}"), "num_hidden_layers is 300; expected 1 to 256"),
            (good.replace(":8", ":\"8\""), "config.json: invalid type"),
            (good.replace(":2}", r#":2,"n_routed_experts":4,"n_group":"x"}"#), "n_group is \"x\"; expected a number"),
            (good.replace(":8", &format!(":{:?}", "y".repeat(5000))), "invalid type"),
        ];
        let dir = tempfile::tempdir().unwrap();
        for (text, expected) in table {
            std::fs::write(dir.path().join("config.json"), &text).unwrap();
            let error = Model::open(dir.path(), None).unwrap_err().to_string();
            assert!(error.contains(expected) && error.len() < 1000, "{error:?} does not contain {expected:?}");
        }
        std::fs::write(dir.path().join("config.json"), good).unwrap();
        std::fs::write(dir.path().join("generation_config.json"), r#"{"temperature":0.6,"eos_token_id":[1,2]}"#)
            .unwrap();
        let model = Model::open(dir.path(), Some("served")).unwrap();
        assert_eq!((model.name.as_str(), model.eos, model.defaults.temperature), ("served", vec![1, 2], 0.6));
    }
}
