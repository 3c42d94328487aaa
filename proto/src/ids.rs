//! Newtypes for the numbers and names that pass between nodes, so that one cannot be given for another.

use std::fmt;
use std::sync::Arc;

/// A decoder layer, counted from 0 (dense layers included).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub u8);

/// A routed expert of one layer, counted from 0: the checkpoint's own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId(pub u16);

/// A placement's version, counted from 1. 0 stands for "none yet".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

/// A node's id: unique for its role in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(Arc<str>);

impl WorkerId {
    /// Longest id, in bytes: a DNS label.
    pub const LEN_MAX: usize = 63;

    /// Takes 1 to 63 characters of `[a-z0-9-]`.
    pub fn new(id: &str) -> Result<Self, InvalidWorkerId> {
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if id.is_empty() || id.len() > Self::LEN_MAX || !id.chars().all(valid) {
            return Err(InvalidWorkerId { id: id.chars().take(80).collect() });
        }
        Ok(Self(id.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An id that is no DNS label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("id {id:?} is not 1 to 63 characters of a-z, 0-9 and -")]
pub struct InvalidWorkerId {
    pub id: String,
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
