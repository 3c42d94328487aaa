//! CUDA C++ to machine code, by NVRTC; kept on disk, so that a worker compiles for a kind of GPU once.

use std::ffi::CStr;
use std::fs;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use cudarc::nvrtc::{result, sys};

use super::GpuError;

/// What kernels can be compiled for, with the bytes of shared memory that a block can have.
pub const ARCHITECTURES: [(&str, usize); 7] = [
    ("sm_80", 163 << 10),
    ("sm_86", 99 << 10),
    ("sm_89", 99 << 10),
    ("sm_90", 227 << 10),
    ("sm_90a", 227 << 10),
    ("sm_100", 227 << 10),
    ("sm_120", 99 << 10),
];

macro_rules! text {
    ($file:literal) => {
        match CStr::from_bytes_with_nul(concat!(include_str!($file), "\0").as_bytes()) {
            Ok(text) => text,
            Err(_) => panic!("a source has a zero in it"),
        }
    };
}

/// A file of kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    Experts,
    Linear,
    Attention,
    Rows,
    Draw,
}

impl Source {
    pub const ALL: [Self; 5] = [Self::Experts, Self::Linear, Self::Attention, Self::Rows, Self::Draw];

    fn file(self) -> (&'static CStr, &'static CStr) {
        match self {
            Self::Experts => (c"experts.cu", text!("../../cuda/experts.cu")),
            Self::Linear => (c"linear.cu", text!("../../cuda/linear.cu")),
            Self::Attention => (c"attention.cu", text!("../../cuda/attention.cu")),
            Self::Rows => (c"rows.cu", text!("../../cuda/rows.cu")),
            Self::Draw => (c"draw.cu", text!("../../cuda/draw.cu")),
        }
    }
}

const HEADERS: [(&CStr, &CStr); 3] = [
    (c"device.h", text!("../../cuda/device.h")),
    (c"tile.h", text!("../../cuda/tile.h")),
    (c"rows.h", text!("../../cuda/rows.h")),
];

/// The kernels of a file for one architecture.
pub struct Compiled {
    /// A CUBIN.
    pub image: Vec<u8>,
    /// What the compiler said: registers and spills of each kernel, if they were compiled just now.
    pub log: String,
}

/// Bytes of shared memory that a block can have; 0 for an architecture that is not known.
pub(super) fn shared_bytes(architecture: &str) -> usize {
    ARCHITECTURES.iter().find(|(name, _)| *name == architecture).map_or(0, |(_, bytes)| *bytes)
}

/// The kernels of `source` for one of [`ARCHITECTURES`], from `cache` if they are there.
pub fn compile(source: Source, architecture: &str, cache: Option<&Path>) -> Result<Compiled, GpuError> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        let reason = "libnvrtc.so is not found: install CUDA's runtime compiler (13.0 or 12.9), or set LD_LIBRARY_PATH";
        return Err(failed("compiling kernels", reason.into()));
    }
    // Who comes second finds it in the cache.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = cache.map(|_| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));
    let options = options(architecture, shared_bytes(architecture));
    let version = version()?;
    let file = cache.map(|folder| folder.join(file_name(source, architecture, &options, version)));
    if let Some(image) = file.as_ref().and_then(|file| fs::read(file).ok()) {
        return Ok(Compiled { image, log: String::new() });
    }
    let compiled = Program::new(source)?.compile(&options)?;
    if let Some(file) = file {
        keep(&file, &compiled.image);
    }
    Ok(compiled)
}

/// Where kernels are kept: $MOESAIC_KERNEL_CACHE, or the user's cache folder, if there is one.
pub fn cache_folder() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of("MOESAIC_KERNEL_CACHE")
        .or_else(|| Some(of("XDG_CACHE_HOME").or_else(|| Some(of("HOME")?.join(".cache")))?.join("moesaic/kernels")))
}

fn options(architecture: &str, shared_bytes: usize) -> Vec<String> {
    vec![
        format!("--gpu-architecture={architecture}"),
        format!("--define-macro=SHARED_BYTES={shared_bytes}"),
        "--std=c++17".into(),
        "--device-as-default-execution-space".into(),
        // Sums are fused where the sources say so, and nowhere else: a compiler that chose would choose differently for
        // tiles of different sizes.
        "--fmad=false".into(),
        "--ptxas-options=-v".into(),
    ]
}

fn file_name(source: Source, architecture: &str, options: &[String], (major, minor): (i32, i32)) -> String {
    let mut hash = DefaultHasher::new();
    (source.file(), HEADERS, options).hash(&mut hash);
    format!("{:016x}-{architecture}-nvrtc{major}.{minor}.cubin", hash.finish())
}

/// A cache that cannot be written to is none.
fn keep(file: &Path, image: &[u8]) {
    let kept = (|| {
        fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
        // Not the process's number, which is the same in all containers.
        let unique = RandomState::new().build_hasher().finish();
        let new = file.with_extension(format!("{unique:016x}.new"));
        fs::write(&new, image)?;
        fs::rename(new, file)
    })();
    drop(kept);
}

pub(super) fn version() -> Result<(i32, i32), GpuError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
        .result()
        .map_err(|error| failed("NVRTC's version", error.to_string()))?;
    Ok((major, minor))
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: Source) -> Result<Self, GpuError> {
        let mut program = std::ptr::null_mut();
        let headers = HEADERS.map(|(_, text)| text.as_ptr());
        let names = HEADERS.map(|(name, _)| name.as_ptr());
        let (name, text) = source.file();
        // SAFETY: all strings live as long as the process.
        let created = unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as i32,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        created.result().map_err(|error| failed("creating a program", error.to_string()))?;
        Ok(Self(program))
    }

    fn compile(&self, options: &[String]) -> Result<Compiled, GpuError> {
        // SAFETY: the program is alive.
        let done = unsafe { result::compile_program(self.0, options) };
        let log = self.log();
        done.map_err(|error| failed("compiling kernels", format!("{error}\n{log}")))?;
        let image = || {
            let mut len = 0;
            // SAFETY: the program is alive and compiled; the image has the length that it says.
            unsafe {
                sys::nvrtcGetCUBINSize(self.0, &mut len).result()?;
                let mut image = vec![0u8; len];
                sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()).result()?;
                Ok(image)
            }
        };
        let image = image().map_err(|error: result::NvrtcError| failed("taking the kernels", error.to_string()))?;
        Ok(Compiled { image, log })
    }

    fn log(&self) -> String {
        // SAFETY: the program is alive.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|c| *c != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is alive, and not used any more.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

pub(super) fn failed(what: &'static str, reason: String) -> GpuError {
    GpuError::Failed { what, reason }
}
