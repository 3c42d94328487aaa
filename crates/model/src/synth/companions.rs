//! What a folder has beside the tensors: `quantization_config`, and a tokenizer whose token 7 is the word "w7".

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::SynthDtype;
use super::plan::BLOCK;
use crate::folder::write_json;
use crate::{Config, ModelError};

const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// Messages one after the other: words of no trained model need no roles.
const CHAT_TEMPLATE: &str = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}";

/// Up to the first word of the vocabulary, which stands for unknown ones too.
const TOKENIZER_HEAD: &[u8] =
    br###"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,
"decoder":{"type":"WordPiece","prefix":"##","cleanup":false},
"model":{"type":"WordLevel","unk_token":"w0","vocab":{"w0":0"###;

/// As the public DeepSeek-V3 has it, or none.
pub(super) fn set_quantization(config: &mut Value, dtype: SynthDtype) {
    let Some(fields) = config.as_object_mut() else { return };
    fields.remove("quantization_config");
    if dtype == SynthDtype::Fp8 {
        let quantization = json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        });
        fields.insert("quantization_config".to_owned(), quantization);
    }
}

/// The tokenizer's files.
pub(super) fn write(folder: &Path, config: &Config) -> Result<(), ModelError> {
    let tokenizer = folder.join(TOKENIZER_FILE);
    write_tokenizer(&tokenizer, config.vocab_size).map_err(|e| ModelError::io(&tokenizer, e))?;
    let word = |id: u32| format!("w{id}");
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": config.bos_token_id.map(word),
        "eos_token": config.eos_token_ids.first().copied().map(word),
        "add_bos_token": false,
        "chat_template": CHAT_TEMPLATE,
    });
    write_json(&folder.join(TOKENIZER_CONFIG_FILE), &tokenizer_config)
}

/// Word by word: a vocabulary may have millions.
fn write_tokenizer(file: &Path, vocab_size: usize) -> std::io::Result<()> {
    let mut json = BufWriter::new(File::create(file)?);
    json.write_all(TOKENIZER_HEAD)?;
    for id in 1..vocab_size {
        write!(json, ",\"w{id}\":{id}")?;
    }
    json.write_all(b"}}}\n")?;
    json.flush()
}
