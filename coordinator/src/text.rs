//! Text and tokens: the checkpoint's tokenizer and chat template, and what turns a stream of tokens into the text that
//! a client sees. Everything here is plain data and functions; nothing waits, and nothing is logged.

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
