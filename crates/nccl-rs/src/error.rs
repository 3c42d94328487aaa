//! What can go wrong, and NCCL's result codes.

use std::ffi::c_int;
use std::fmt;
use std::time::Duration;

use cudarc::nccl::sys::ncclResult_t;

use crate::library::Version;

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No NCCL could be opened; `tried` has each name with the linker's reason.
    #[error(
        "NCCL is not found (tried {tried}): install NVIDIA's libnccl2 package, or put the lib folder of the \
         nvidia-nccl wheel into LD_LIBRARY_PATH, or set NCCL_LIBRARY to the path of libnccl.so.2"
    )]
    Missing { tried: String },
    /// The library is older than what was asked of it.
    #[error("{function} needs NCCL {needs} or newer, and {loaded} is loaded")]
    Unsupported { function: &'static str, needs: Version, loaded: Version },
    /// Refused before NCCL saw it, so the communicators are as they were.
    #[error("{name}: {problem}")]
    Argument { name: &'static str, problem: String },
    /// `detail` is NCCL's last error text. It is one for the whole process, and may tell of an earlier failure.
    #[error("{function}: {code}: {detail}")]
    Nccl { function: &'static str, code: Code, detail: String },
    /// The GPU or its driver failed, in the driver's words, or is not there.
    #[error("{what}: {detail}")]
    Gpu { what: &'static str, detail: String },
    /// The communicator is aborted, except where it was aborting that took so long: that goes on in the background.
    #[error("rank {rank} of {size}: {action} took longer than {after:?}; the communicator is lost")]
    Timeout { action: &'static str, rank: usize, size: usize, after: Duration },
    /// Somebody has closed the communicator.
    #[error("rank {rank} of {size}: the communicator is aborted or finalized")]
    Aborted { rank: usize, size: usize },
}

/// Why NCCL failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Code {
    UnhandledCudaError,
    SystemError,
    InternalError,
    InvalidArgument,
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
        const UNHANDLED_CUDA: c_int = ncclResult_t::ncclUnhandledCudaError as c_int;
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
