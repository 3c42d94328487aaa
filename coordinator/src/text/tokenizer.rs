//! The checkpoint's tokenizer: text to ids, ids to the exact bytes that they stand for.
//!
//! Owns `tokenizer.json`. Adds nothing to a text by itself: beginning-of-sentence tokens come from the chat template or
//! from the caller's wish.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use tokenizers::ModelWrapper;
use tokenizers::decoders::DecoderWrapper;

/// Largest `tokenizer.json`: DeepSeek-V3's has 8 MB.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
/// Of what the library says of a file or a text: it may repeat all of it.
const REASON_CHARS_MAX: usize = 300;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read {}: {reason}", path.display())]
    Read { path: PathBuf, reason: String },
    #[error("{} has {bytes} bytes; at most {FILE_BYTES_MAX} are read", path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("{} is not a tokenizer: {reason}", path.display())]
    Parse { path: PathBuf, reason: String },
    #[error("the text cannot be encoded: {0}")]
    Encode(String),
}

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Exact bytes of each token, where tokens are bytes (byte-level BPE, as all of DeepSeek's are).
    bytes: Option<HashMap<u32, Box<[u8]>>>,
    /// Tokens that are markup and never text.
    special: HashMap<u32, String>,
    /// Bytes of the longest token: bounds how few tokens a text can have.
    longest: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in the folder.
    pub fn open(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let read = |e: std::io::Error| TokenizerError::Read { path: path.clone(), reason: e.to_string() };
        let bytes = std::fs::metadata(&path).map_err(read)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(TokenizerError::TooLarge { path, bytes });
        }
        let json = std::fs::read(&path).map_err(read)?;
        Self::from_json(&json).map_err(|reason| TokenizerError::Parse { path, reason })
    }

    fn from_json(json: &[u8]) -> Result<Self, String> {
        serde_json::from_slice::<IgnoredAny>(json).map_err(|e| e.to_string())?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json))?;
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some_and(|share| share != 0.0)
        {
            return Err("model.dropout is set; expected null, so that a text always has the same tokens".into());
        }
        // For batches of training: a prompt is never cut short and never filled up.
        inner.with_padding(None).with_truncation(None).map_err(|e| e.to_string())?;
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, t)| t.special).map(|(id, t)| (*id, t.content.clone())).collect();
        let vocabulary = inner.get_vocab(true);
        let longest = vocabulary.keys().map(String::len).max().unwrap_or(1).max(1);
        let bytes = inner.get_decoder().is_some_and(is_byte_level).then(|| {
            let table = byte_of_char();
            // By id, because ids may leave gaps of any size.
            vocabulary.values().map(|id| (*id, bytes_of(&inner.id_to_token(*id).unwrap_or_default(), &table))).collect()
        });
        Ok(Self { inner, bytes, special, longest })
    }

    /// The text's tokens. Special tokens written out in the text are recognised; `add_special` lets the tokenizer add
    /// its own (beginning of sentence, if its post-processor has one).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encode = || self.inner.encode_fast(text, add_special);
        let encoding = guarded(encode).map_err(TokenizerError::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The whole text of some tokens; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.bytes {
            Some(_) => {
                let text = ids.iter().filter(|id| !self.is_special(**id)).flat_map(|id| self.bytes_of(*id));
                String::from_utf8_lossy(&text.collect::<Vec<u8>>()).into_owned()
            }
            None => self.decode_window(ids),
        }
    }

    /// The bytes of one token as it would be shown alone, special tokens included. Empty if there is no such token.
    pub fn bytes_of(&self, id: u32) -> Vec<u8> {
        if let Some(content) = self.special.get(&id) {
            return content.as_bytes().to_vec();
        }
        match &self.bytes {
            Some(table) => table.get(&id).map_or_else(Vec::new, |bytes| bytes.to_vec()),
            None => self.decode_window(&[id]).into_bytes(),
        }
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains_key(&id)
    }

    /// The first special token that is written out in the text.
    pub fn find_special<'a>(&'a self, text: &str) -> Option<&'a str> {
        let found = self.special.values().filter_map(|token| text.find(token.as_str()).map(|at| (at, token.as_str())));
        found.min().map(|(_, token)| token)
    }

    /// Tokens that a text of so many bytes has at least.
    pub fn tokens_min(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.longest)
    }

    /// True if tokens stand for bytes, so that each has its text whatever stands before it.
    pub(super) fn has_byte_table(&self) -> bool {
        self.bytes.is_some()
    }

    pub(super) fn decode_window(&self, ids: &[u32]) -> String {
        // It fails where a decoder refuses its input; that text is empty for a client.
        guarded(|| self.inner.decode(ids, true)).unwrap_or_default()
    }
}

/// What the library is asked for, with an error where it fails or panics: it takes some files for right whose parts do
/// not fit each other, and finds out later.
fn guarded<T>(work: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, String> {
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "its parts do not fit each other".to_owned(),
    };
    Err(reason.chars().take(REASON_CHARS_MAX).collect())
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(sequence) => matches!(sequence.get_decoders(), [DecoderWrapper::ByteLevel(_)]),
        _ => false,
    }
}

/// Byte-level BPE writes each byte as a printable character: itself where it is one, else the next from U+0100 on.
fn byte_of_char() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let shifted = (0..=255u8).filter(|b| !printable(*b)).zip('\u{100}'..).map(|(b, c)| (c, b));
    (0..=255u8).filter(|b| printable(*b)).map(|b| (char::from(b), b)).chain(shifted).collect()
}

fn bytes_of(token: &str, table: &HashMap<char, u8>) -> Box<[u8]> {
    let mapped: Option<Vec<u8>> = token.chars().map(|c| table.get(&c).copied()).collect();
    mapped.unwrap_or_else(|| token.as_bytes().to_vec()).into_boxed_slice()
}

#[cfg(test)]
pub(crate) mod fixtures {
    use super::Tokenizer;

    /// The demo model's folder.
    pub fn folder() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/moesaic/models/tiny-r1")
    }

    pub fn byte_level() -> Tokenizer {
        Tokenizer::open(&folder()).unwrap()
    }

    /// Words joined by spaces: what a token adds depends on what stands before it.
    pub fn words() -> Tokenizer {
        let vocabulary: serde_json::Map<_, _> = (0..40).map(|i| (format!("w{i}"), i.into())).collect();
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
        });
        Tokenizer::from_json(&serde_json::to_vec(&json).unwrap()).unwrap()
    }

    /// Pieces with a space mark, and bytes for what has no piece.
    pub fn byte_fallback() -> Tokenizer {
        let mut vocabulary = vec!["<unk>".to_owned(), "▁".into(), "▁a".into(), "b".into(), "▁é".into(), "日".into()];
        vocabulary.extend((0..256).map(|b| format!("<0x{b:02X}>")));
        let vocabulary: Vec<_> = vocabulary.into_iter().map(|piece| serde_json::json!([piece, -1.0])).collect();
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": true},
        });
        Tokenizer::from_json(&serde_json::to_vec(&json).unwrap()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::fixtures::{byte_level, folder};
    use super::*;

    #[test]
    fn decodes_as_the_tokenizers_crate_does() {
        let tokenizer = byte_level();
        let text = "Ünïcode <think>\n日本 🦀 \u{0}";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        for ids in [vec![0, 3, 67, 4], vec![5, 6], vec![16 + 0xF0, 16 + 0x9F, 67], (0..272).collect()] {
            assert_eq!(tokenizer.decode(&ids), tokenizer.decode_window(&ids), "{ids:?}");
        }
    }

    #[test]
    fn tokens_have_their_exact_bytes() {
        let tokenizer = byte_level();
        let crab = tokenizer.encode("🦀", false).unwrap();
        assert_eq!(crab.iter().flat_map(|id| tokenizer.bytes_of(*id)).collect::<Vec<_>>(), "🦀".as_bytes());
        assert_eq!(tokenizer.bytes_of(1), "<｜end▁of▁sentence｜>".as_bytes());
        assert_eq!(tokenizer.bytes_of(280), b"", "an id of the model that the tokenizer does not have");
        assert_eq!(tokenizer.find_special("a <｜User｜> b"), Some("<｜User｜>"));
        assert_eq!(tokenizer.find_special("a <think> b"), None);
    }

    #[test]
    fn a_bad_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Tokenizer::open(dir.path()).err().unwrap().to_string();
        assert!(missing.contains("tokenizer.json") && missing.contains("cannot read"), "{missing}");
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        let broken = Tokenizer::open(dir.path()).err().unwrap().to_string();
        assert!(broken.contains("tokenizer.json is not a tokenizer"), "{broken}");
        assert!(folder().join("tokenizer.json").exists());
    }
}
