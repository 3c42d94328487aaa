//! The NCCL library: found by its names, opened once, its functions in a table.
//!
//! The functions are looked up here and not called through cudarc, which does not look for `libnccl.so.2` and panics
//! where the library or a function is missing.

use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclResult_t, ncclUniqueId};

use crate::config::RawConfig;
use crate::error::{Code, Error};

pub(crate) const SUCCESS: c_int = ncclResult_t::ncclSuccess as c_int;
pub(crate) const UNHANDLED_CUDA: c_int = ncclResult_t::ncclUnhandledCudaError as c_int;
pub(crate) const IN_PROGRESS: c_int = ncclResult_t::ncclInProgress as c_int;

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2 in 2.28.9.
    pub major: u32,
    /// 28 in 2.28.9.
    pub minor: u32,
    /// 9 in 2.28.9.
    pub patch: u32,
}

impl Version {
    /// From its three numbers.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Of NCCL's number, which has had two digits for the minor version since 2.9.
    const fn of(code: u32) -> Self {
        let major_unit = if code < 10_000 { 1000 } else { 10_000 };
        Self::new(code / major_unit, code % major_unit / 100, code % 100)
    }

    /// NCCL's number.
    pub(crate) const fn code(self) -> u32 {
        self.major * 10_000 + self.minor * 100 + self.patch
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The oldest NCCL that is used. Those before keep what a group or a connection does in memory of the thread that asked for
/// it, and use that wherever the communicator is ended later, when the thread may be gone.
pub(crate) const OLDEST: Version = Version::new(2, 27, 0);
const ALL_TO_ALL: Version = Version::new(2, 28, 0);

/// The version of the loaded library. Loads it on first use, which reads a file of some 200 MB.
pub fn version() -> Result<Version, Error> {
    Ok(api()?.version)
}

/// NCCL's functions. Results are integers, since a newer library may answer codes that cudarc's enum does not have.
pub(crate) struct Api {
    pub version: Version,
    pub last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    pub unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    pub init: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut RawConfig) -> c_int,
    pub split: unsafe extern "C" fn(ncclComm_t, c_int, c_int, *mut ncclComm_t, *mut RawConfig) -> c_int,
    pub shrink: unsafe extern "C" fn(ncclComm_t, *mut c_int, c_int, *mut ncclComm_t, *mut RawConfig, c_int) -> c_int,
    pub rank: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    pub size: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    pub async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    pub finalize: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub group_start: unsafe extern "C" fn() -> c_int,
    pub group_end: unsafe extern "C" fn() -> c_int,
    pub send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int,
    pub recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int,
    pub broadcast: CollectiveWith,
    pub reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, ncclComm_t, CUstream) -> c_int,
    pub all_reduce: CollectiveWith,
    pub reduce_scatter: CollectiveWith,
    pub all_gather: Collective,
    pub all_to_all: Option<Collective>,
}

pub(crate) type Collective =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, ncclComm_t, CUstream) -> c_int;
/// With a root, or a way to reduce, before the communicator.
pub(crate) type CollectiveWith =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int;

impl Api {
    pub fn all_to_all(&self) -> Result<Collective, Error> {
        let missing = Error::Unsupported { function: "ncclAlltoAll", needs: ALL_TO_ALL, loaded: self.version };
        self.all_to_all.ok_or(missing)
    }

    /// What a function answered, as a result. That it goes on in the background is no error.
    pub fn check(&self, function: &'static str, code: c_int) -> Result<(), Error> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: NCCL takes no communicator here, and answers a static buffer that always ends in zero.
        let detail = unsafe { CStr::from_ptr((self.last_error)(std::ptr::null_mut())) };
        Err(Error::Nccl { function, code: Code::of(code), detail: detail.to_string_lossy().trim().to_owned() })
    }
}

/// The library's functions. A failure is not remembered: the next call looks again.
pub(crate) fn api() -> Result<&'static Api, Error> {
    static API: OnceLock<Api> = OnceLock::new();
    match API.get() {
        Some(api) => Ok(api),
        None => load(&names(std::env::var_os("NCCL_LIBRARY"))).map(|api| API.get_or_init(|| api)),
    }
}

fn names(library: Option<OsString>) -> Vec<OsString> {
    match library.filter(|path| !path.is_empty()) {
        Some(path) => vec![path],
        None => vec!["libnccl.so.2".into(), "libnccl.so".into()],
    }
}

fn load(names: &[OsString]) -> Result<Api, Error> {
    let mut tried = Vec::new();
    for name in names {
        let opened = Library::open(name).and_then(|library| Ok((library.version(name)?, library)));
        match opened {
            Ok((version, library)) => return library.functions(version),
            Err(reason) => tried.push(reason),
        }
    }
    Err(Error::Missing { tried: tried.join("; ") })
}

/// Open to the end of the process.
struct Library(*mut c_void);

impl Library {
    fn open(name: &OsString) -> Result<Self, String> {
        let name =
            CString::new(name.clone().into_vec()).map_err(|_| format!("{}: has a zero in it", name.display()))?;
        // SAFETY: the name ends in zero; what NCCL does when it is opened is sound.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            // SAFETY: follows a failure on this thread, so there is a text (which has the name), until the next such
            // call.
            return Err(unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned());
        }
        Ok(Self(library))
    }

    fn version(&self, name: &OsString) -> Result<Version, String> {
        // SAFETY: this is its type.
        let ask: Option<unsafe extern "C" fn(*mut c_int) -> c_int> = unsafe { self.symbol(c"ncclGetVersion") };
        let mut code = 0;
        // SAFETY: writes the number.
        match ask.map(|ask| unsafe { ask(&mut code) }) {
            Some(SUCCESS) => Ok(Version::of(code.unsigned_abs())),
            _ => Err(format!("{}: is not NCCL, it answers no version", name.display())),
        }
    }

    /// # Safety
    ///
    /// `F` is the type of a pointer to the function of that name.
    unsafe fn symbol<F>(&self, name: &CStr) -> Option<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: the library stays open, and the name ends in zero.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        // SAFETY: an address of a function, and a pointer to one, says the caller.
        (!address.is_null()).then(|| unsafe { std::mem::transmute_copy(&address) })
    }

    fn functions(&self, version: Version) -> Result<Api, Error> {
        if version < OLDEST {
            return Err(Error::Unsupported { function: "nccl-rs", needs: OLDEST, loaded: version });
        }
        macro_rules! function {
            ($name:literal) => {{
                const NAME: &CStr = match CStr::from_bytes_with_nul(concat!($name, "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name has a zero in it"),
                };
                // SAFETY: the table has the types of NCCL's header.
                unsafe { self.symbol(NAME) }.ok_or(Error::Unsupported {
                    function: $name,
                    needs: OLDEST,
                    loaded: version,
                })?
            }};
        }
        Ok(Api {
            version,
            last_error: function!("ncclGetLastError"),
            unique_id: function!("ncclGetUniqueId"),
            init: function!("ncclCommInitRankConfig"),
            split: function!("ncclCommSplit"),
            shrink: function!("ncclCommShrink"),
            rank: function!("ncclCommUserRank"),
            size: function!("ncclCommCount"),
            async_error: function!("ncclCommGetAsyncError"),
            finalize: function!("ncclCommFinalize"),
            destroy: function!("ncclCommDestroy"),
            abort: function!("ncclCommAbort"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            send: function!("ncclSend"),
            recv: function!("ncclRecv"),
            broadcast: function!("ncclBroadcast"),
            reduce: function!("ncclReduce"),
            all_reduce: function!("ncclAllReduce"),
            reduce_scatter: function!("ncclReduceScatter"),
            all_gather: function!("ncclAllGather"),
            // SAFETY: the table has the type of NCCL's header.
            all_to_all: unsafe { self.symbol(c"ncclAlltoAll") },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        for (code, version) in [(2806, (2, 8, 6)), (20_906, (2, 9, 6)), (22_005, (2, 20, 5)), (23_203, (2, 32, 3))] {
            let (major, minor, patch) = version;
            assert_eq!(Version::of(code), Version::new(major, minor, patch));
        }
        assert!(Version::new(2, 9, 9) < Version::new(2, 20, 5));
        assert_eq!(Version::new(2, 28, 9).code(), 22_809);
    }

    #[test]
    fn what_is_too_old_is_refused() {
        let library = Library::open(&"libc.so.6".into()).expect("there is one");
        let Err(error) = library.functions(Version::new(2, 26, 5)) else { panic!("taken") };
        assert_eq!(error.to_string(), "nccl-rs needs NCCL 2.27.0 or newer, and 2.26.5 is loaded");
    }

    #[test]
    fn the_real_name_comes_first_and_a_path_alone() {
        assert_eq!(names(None), ["libnccl.so.2", "libnccl.so"]);
        assert_eq!(names(Some("".into())), names(None));
        assert_eq!(names(Some("/opt/nccl/libnccl.so.2".into())), ["/opt/nccl/libnccl.so.2"]);
    }

    #[test]
    fn what_is_no_nccl_is_missing() {
        let Err(Error::Missing { tried }) = load(&["libno-such-nccl.so.2".into(), "libc.so.6".into()]) else {
            panic!("found");
        };
        assert!(tried.contains("libno-such-nccl.so.2: "), "{tried}");
        assert!(tried.contains("libc.so.6: is not NCCL"), "{tried}");
    }
}
