//! An opened checkpoint: config and headers checked, files mapped, nothing read until a worker asks for its part.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use moesaic_kernels::{Matrix, MatrixData};

use crate::names::{self, LayerNames};
use crate::shards::Shards;
use crate::typed::Typed;
use crate::{Config, FfnBlock, LayerBlock, ModelError, fingerprint};

#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    name: String,
    config: Config,
    shards: Shards,
    fingerprint: OnceLock<String>,
}

impl Checkpoint {
    /// Checks config.json, every file's header, and that each tensor of the main model is there with its shape.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let config = Config::read(dir)?;
        let (shards, mut problems) = Shards::open(dir);
        if !problems.is_empty() {
            return Err(problems.swap_remove(0));
        }
        let typed = Typed { dir, config: &config, shards: &shards };
        names::main_model(&config).try_for_each(|spec| typed.check(&spec))?;
        Ok(Self::new(dir, config, shards))
    }

    pub(crate) fn new(dir: &Path, config: Config, shards: Shards) -> Self {
        let named = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let name = named.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
        Self { dir: dir.to_owned(), name, config, shards, fingerprint: OnceLock::new() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// 32 hex digits; the same for the same model in one file or many. Computed when first asked for.
    pub fn fingerprint(&self) -> &str {
        self.fingerprint.get_or_init(|| fingerprint::of(&self.config, &self.shards))
    }

    /// [vocab, hidden]
    pub fn embedding(&self) -> Result<Matrix<'_>, ModelError> {
        self.typed().matrix(&names::embedding(&self.config))
    }

    /// [hidden]
    pub fn final_norm(&self) -> Result<Vec<f32>, ModelError> {
        self.typed().vector(&names::final_norm(&self.config))
    }

    /// [vocab, hidden]; the embedding if the config ties them.
    pub fn head(&self) -> Result<Matrix<'_>, ModelError> {
        if self.config.tie_word_embeddings {
            return self.embedding();
        }
        self.typed().matrix(&names::head(&self.config))
    }

    pub fn layer(&self, layer: usize) -> Result<LayerBlock<'_>, ModelError> {
        let layers = self.config.num_hidden_layers;
        if layer >= layers {
            return Err(ModelError::NoLayer { layer, layers });
        }
        self.typed().layer(layer)
    }

    pub fn expert(&self, layer: usize, expert: usize) -> Result<FfnBlock<'_>, ModelError> {
        let (layers, experts) = (self.config.num_hidden_layers, self.config.n_routed_experts);
        if layer >= layers || expert >= experts || !self.config.is_moe(layer) {
            return Err(ModelError::NoExpert { layer, layers, expert, experts });
        }
        let (typed, names) = (self.typed(), LayerNames { config: &self.config, layer });
        let specs = names.expert(expert);
        // A layer's experts are one call of the kernels.
        names.expert(0).iter().zip(&specs).try_for_each(|(first, own)| typed.check_alike(first, own))?;
        typed.ffn(&specs)
    }

    /// Some matrices have been read and are not needed any more: they no longer count as this process's memory.
    pub fn release<'m>(&self, matrices: impl IntoIterator<Item = &'m Matrix<'m>>) {
        for matrix in matrices {
            match &matrix.data {
                MatrixData::F32(bytes) | MatrixData::F16(bytes) | MatrixData::Bf16(bytes) => self.shards.release(bytes),
                MatrixData::Fp8 { q, .. } => self.shards.release(q),
            }
        }
    }

    pub(crate) fn shards(&self) -> &Shards {
        &self.shards
    }

    pub(crate) fn typed(&self) -> Typed<'_> {
        Typed { dir: &self.dir, config: &self.config, shards: &self.shards }
    }
}
