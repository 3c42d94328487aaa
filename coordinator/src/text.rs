//! Text and tokens: the checkpoint's tokenizer and chat template, and what turns a stream of tokens into the text that
//! a client sees. Everything here is plain data and functions; nothing waits, and nothing is logged.

use std::fs::File;
use std::io::{Error, Read, Result};
use std::path::Path;

pub mod detokenizer;
pub mod reasoning;
pub mod stop;
pub mod template;
pub mod tokenizer;

pub use detokenizer::Detokenizer;
pub use reasoning::{ReasoningSplitter, Split};
pub use stop::StopMatcher;
pub use template::{ChatTemplate, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerError};

/// A whole file of the checkpoint; of a larger one no more than the limit is read.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(Error::other(format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}
