//! What is wrong with a checkpoint, in words that name the file, the field or tensor, and what was expected.

use std::path::PathBuf;

/// Characters of a tensor's name, and of what is wrong.
const SHOWN_CHARS_MAX: usize = 300;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{}: {cause}", file.display())]
    Io { file: PathBuf, cause: std::io::Error },
    #[error("{}: {field} is {value}, expected {expected}", file.display())]
    Field { file: PathBuf, field: String, value: String, expected: String },
    /// The file as a whole, or its header.
    #[error("{}: {detail}", file.display())]
    File { file: PathBuf, detail: String },
    #[error("{}: tensor {tensor} {detail}", file.display())]
    Tensor { file: PathBuf, tensor: String, detail: String },
    #[error("layer {layer} of {layers}, expert {expert} of {experts}: there is no such block")]
    NoExpert { layer: usize, layers: usize, expert: usize, experts: usize },
    #[error("layer {layer} of {layers}: there is no such block")]
    NoLayer { layer: usize, layers: usize },
    #[error("token {token} at position {position}: the vocabulary has {vocab_size}")]
    Token { token: u32, position: usize, vocab_size: usize },
}

impl ModelError {
    pub(crate) fn io(file: impl Into<PathBuf>, cause: std::io::Error) -> Self {
        Self::Io { file: file.into(), cause }
    }

    pub fn file(file: impl Into<PathBuf>, detail: impl Into<String>) -> Self {
        Self::File { file: file.into(), detail: shortened(detail.into()) }
    }

    pub(crate) fn tensor(file: impl Into<PathBuf>, tensor: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Tensor { file: file.into(), tensor: shortened(tensor.into()), detail: shortened(detail.into()) }
    }
}

/// Names and values of a file may be as long as the file.
fn shortened(text: String) -> String {
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
