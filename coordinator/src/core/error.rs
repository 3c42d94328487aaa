//! Everything that can be wrong with a request, once for both front doors.

/// Why a request is refused or ended. The text is for the client: it names the field, the limit and the value given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    #[error(
        "This model's context has at most {context} tokens, and the prompt has {prompt}{}. Shorten the prompt{}.",
        asked(*max_tokens), if max_tokens.is_some() { " or max_tokens" } else { "" }
    )]
    ContextLength { context: usize, prompt: usize, max_tokens: Option<usize> },
    /// Known from the text's length alone, without tokenising it.
    #[error("This model's context has at most {context} tokens, and the prompt has at least {least}. Shorten it.")]
    TextLength { context: usize, least: usize },
    #[error(
        "The prompt{} needs {needed} tokens of cache, and the largest attention worker has {capacity}. Shorten it.",
        if *generated { " with max_tokens" } else { "" }
    )]
    CacheSize { needed: usize, capacity: usize, generated: bool },
    #[error("The request has more than {limit} bytes, the most that are read.")]
    TooLarge { limit: usize },
    #[error("The model {name:?} does not exist; this cluster serves {served:?}.")]
    UnknownModel { name: String, served: String },
    #[error("There is no {method} {path}.")]
    UnknownPath { method: String, path: String },
    #[error("{path} does not take {method}.")]
    Method { method: String, path: String },
    #[error("The request's body did not arrive within {seconds} s.")]
    SlowBody { seconds: u64 },
    #[error("request_id {request_id:?} is in use.")]
    Exists { request_id: String },
    #[error("The cluster is full: {reason}. Try again in {retry_after_s} s.")]
    Full { reason: String, retry_after_s: u64 },
    /// The caller's own limit, not the cluster's.
    #[error("Your limit is reached: {reason}. Try again in {retry_after_s} s.")]
    Quota { reason: String, retry_after_s: u64 },
    #[error("Who are you? {reason}.")]
    Unauthenticated { reason: String },
    #[error("Not allowed: {reason}.")]
    Forbidden { reason: String },
    #[error("The cluster cannot produce a token at present: {reason}.")]
    Unavailable { reason: String },
    #[error("The generation failed: {reason}.")]
    Failed { reason: String },
}

/// Characters of what a client gave that an error repeats.
const SHOWN_CHARS_MAX: usize = 200;

/// The beginning of what was given, for an error.
pub fn shortened(given: &str) -> String {
    given.chars().take(SHOWN_CHARS_MAX).collect()
}

fn asked(max_tokens: Option<usize>) -> String {
    max_tokens.map_or_else(String::new, |n| format!(" and max_tokens asks for {n} more"))
}

impl ApiError {
    /// Whether the same request may be taken a little later, or elsewhere.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Unavailable { .. } | Self::Exists { .. })
    }

    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }
}
