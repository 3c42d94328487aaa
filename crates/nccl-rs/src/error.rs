//! What can go wrong, and NCCL's result codes.

use std::ffi::c_int;
use std::fmt;
use std::time::Duration;

use cudarc::nccl::sys::ncclResult_t;

use crate::library::{UNHANDLED_CUDA, Version};

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No NCCL could be opened; `tried` has each name with the linker's reason.
    #[error(
        "NCCL is not found (tried {tried}): install NVIDIA's libnccl2 package, or put the lib folder of the \
         nvidia-nccl wheel into LD_LIBRARY_PATH, or set NCCL_LIBRARY to the path of libnccl.so.2"
    )]
    Missing {
        /// Each name, with why it was not opened.
        tried: String,
    },
    /// The library is older than what was asked of it.
    #[error("{function} needs NCCL {needs} or newer, and {loaded} is loaded")]
    Unsupported {
        /// What was asked for.
        function: &'static str,
        /// The oldest library that has it.
        needs: Version,
        /// The one that is there.
        loaded: Version,
    },
    /// Refused before NCCL saw it, so the communicators are as they were.
    #[error("{name}: {problem}")]
    Argument {
        /// The argument, or the variable of the environment.
        name: &'static str,
        /// What it is, and what it has to be.
        problem: String,
    },
    /// NCCL failed. The communicator is of no use any more.
    #[error("{function}: {code}: {}", if detail.is_empty() { "NCCL_DEBUG=WARN says more" } else { detail })]
    Nccl {
        /// What was called.
        function: &'static str,
        /// What it answered.
        code: Code,
        /// NCCL's last error text. It is one for the whole process, and may tell of an earlier failure.
        detail: String,
    },
    /// The GPU or its driver failed, in the driver's words, or is not there.
    #[error("{what}: {detail}")]
    Gpu {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        detail: String,
    },
    /// The communicator is being aborted, in the background.
    #[error(
        "rank {rank} of {size}: {action} took longer than {after:?}, and the communicator is lost: are its peers there, and \
         can they be reached? NCCL_DEBUG=INFO says what it waits for"
    )]
    Timeout {
        /// What took so long.
        action: &'static str,
        /// This rank.
        rank: usize,
        /// The number of ranks.
        size: usize,
        /// How long it could have taken.
        after: Duration,
    },
    /// Somebody has closed the communicator.
    #[error("rank {rank} of {size}: the communicator is aborted or finalized; connect anew")]
    Aborted {
        /// This rank.
        rank: usize,
        /// The number of ranks.
        size: usize,
    },
}

/// Why NCCL failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Code {
    /// A call to CUDA failed.
    UnhandledCudaError,
    /// A call to the operating system failed.
    SystemError,
    /// NCCL is not as it should be.
    InternalError,
    /// A value cannot be.
    InvalidArgument,
    /// A call cannot be at this place, or does not match the others'.
    InvalidUsage,
    /// A peer or the network failed.
    RemoteError,
    /// From 2.30 on.
    Timeout,
    /// A code that this crate does not know.
    Other(i32),
}

impl Code {
    pub(crate) fn of(code: c_int) -> Self {
        const SYSTEM: c_int = ncclResult_t::ncclSystemError as c_int;
        const INTERNAL: c_int = ncclResult_t::ncclInternalError as c_int;
        const ARGUMENT: c_int = ncclResult_t::ncclInvalidArgument as c_int;
        const USAGE: c_int = ncclResult_t::ncclInvalidUsage as c_int;
        const REMOTE: c_int = ncclResult_t::ncclRemoteError as c_int;
        match code {
            UNHANDLED_CUDA => Self::UnhandledCudaError,
            SYSTEM => Self::SystemError,
            INTERNAL => Self::InternalError,
            ARGUMENT => Self::InvalidArgument,
            USAGE => Self::InvalidUsage,
            REMOTE => Self::RemoteError,
            // Has no name in the bindings of libraries before 2.30.
            8 => Self::Timeout,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(code) => write!(f, "NCCL's code {code}"),
            named => write!(f, "nccl{named:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_say_what_to_do() {
        let (needs, loaded) = (Version::new(2, 27, 0), Version::new(2, 20, 5));
        let after = Duration::from_secs(10);
        let texts = [
            (Error::Missing { tried: "libnccl.so.2".into() }, "(tried libnccl.so.2): install NVIDIA's libnccl2"),
            (Error::Missing { tried: String::new() }, "set NCCL_LIBRARY"),
            (
                Error::Unsupported { function: "ncclCommShrink", needs, loaded },
                "ncclCommShrink needs NCCL 2.27.0 or newer, and 2.20.5 is loaded",
            ),
            (
                Error::Nccl { function: "ncclSend", code: Code::of(6), detail: String::new() },
                "ncclSend: ncclRemoteError: NCCL_DEBUG=WARN says more",
            ),
            (Error::Argument { name: "peer", problem: "9 of 4".into() }, "peer: 9 of 4"),
            (
                Error::Nccl { function: "ncclSend", code: Code::of(6), detail: "peer left".into() },
                "ncclSend: ncclRemoteError: peer left",
            ),
            (Error::Gpu { what: "counting GPUs", detail: "no device".into() }, "counting GPUs: no device"),
            (
                Error::Timeout { action: "connecting", rank: 3, size: 16, after },
                "rank 3 of 16: connecting took longer than 10s",
            ),
        ];
        for (error, text) in texts {
            assert!(error.to_string().contains(text), "{error}");
        }
        assert_eq!(Code::of(8).to_string(), "ncclTimeout");
        assert_eq!(Code::of(99).to_string(), "NCCL's code 99");
    }
}
