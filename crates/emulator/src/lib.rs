//! A GPU for tests: the kernels of `crates/kernels/cuda`, compiled for the processor, with a block's threads as fibers
//! that take turns in an order that a seed draws. It shows whether they compute what they should: indices, the order of sums,
//! waits that are missing, reads of what was never written. What is queued happens as late as it may: when it is waited for, or,
//! one thing after the other, when it is asked about. It says nothing of a GPU's speed, of its rounding inside the matrix
//! instruction, or of its memory's order.
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use moesaic_kernels::DtypeChoice;
use moesaic_kernels::cuda::{Address, Device, DeviceChoice, Gpu, GpuError, Kernel, Launch, Properties};

unsafe extern "C" {
    fn emulator_launch(
        name: *const c_char,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        call: *const c_void,
        call_bytes: u32,
        seed: u64,
    ) -> *const c_char;
}

/// Sets of kernels by their shared memory, as `build.rs` makes them.
const SUITES: [(&str, u32); 2] = [("large", 227 << 10), ("small", 99 << 10)];

/// Names the GPU that tests run on, as `cuda:0`, instead of the emulator.
pub const NAMED: &str = "MOESAIC_TEST_DEVICE";

/// What tests run on: the emulator, or the GPU that is named.
pub fn test_device(arena_bytes: usize, seed: u64) -> Device {
    let Ok(named) = std::env::var(NAMED) else { return device(arena_bytes, seed) };
    // Opened once: loading its kernels takes longer than most tests.
    static OPENED: OnceLock<Device> = OnceLock::new();
    let opened = OPENED.get_or_init(|| {
        let choice: DeviceChoice = named.parse().unwrap_or_else(|unknown| panic!("{NAMED}: {unknown}"));
        let opened = choice.open(DtypeChoice::Bf16, Some(0)).unwrap_or_else(|missing| panic!("{NAMED}: {missing}"));
        opened.unwrap_or_else(|| panic!("{NAMED} is {named}: no GPU"))
    });
    opened.with_arena(arena_bytes).unwrap_or_else(|error| panic!("{NAMED}: {error}"))
}

/// A GPU with 3 multiprocessors and an arena of `arena_bytes`, full of NaNs; the seed says which kind of GPU it is, too.
pub fn device(arena_bytes: usize, seed: u64) -> Device {
    let properties =
        Properties { name: "emulator".into(), architecture: "emulator", multiprocessors: 3, memory_free: arena_bytes };
    let suite = SUITES[(seed % 2) as usize];
    let gpu = Emulator {
        properties,
        suite,
        seed: AtomicU64::new(seed),
        memory: Mutex::default(),
        queue: Mutex::default(),
        recordings: Mutex::default(),
        next_recording: AtomicU64::new(0),
    };
    Device::new(Arc::new(gpu), arena_bytes).expect("the processor has so much memory")
}

#[derive(Debug)]
struct Emulator {
    properties: Properties,
    suite: (&'static str, u32),
    seed: AtomicU64,
    /// Lines of a cache, so that all is aligned.
    memory: Mutex<Vec<Box<[Line]>>>,
    queue: Mutex<Queue>,
    recordings: Mutex<HashMap<u64, Vec<Launch>>>,
    next_recording: AtomicU64,
}

/// What has been asked and not done yet.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Work>,
    /// Works that have been done.
    done: u64,
    /// What went wrong first: nothing is done any more.
    failed: Option<GpuError>,
}

#[derive(Debug)]
enum Work {
    /// Bytes from one place to another, here or there.
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Fill {
        to: u64,
        byte: u8,
        bytes: usize,
    },
    Launch(Launch),
}

#[repr(align(256))]
#[derive(Clone, Copy)]
struct Line(#[allow(dead_code, reason = "seen by its address")] [u8; 256]);

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

impl Emulator {
    fn take(&self, bytes: usize, byte: u8) -> *mut u8 {
        let mut taken = lines(bytes, byte);
        let at = taken.as_mut_ptr().cast();
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).push(taken);
        at
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, work: Work) -> Result<(), GpuError> {
        self.queue().waiting.push_back(work);
        Ok(())
    }

    /// Does what was queued until so many works are done.
    fn work_until(&self, end: impl FnOnce(&Queue) -> u64) -> Result<(), GpuError> {
        let mut queue = self.queue();
        let end = end(&queue);
        while queue.done < end {
            let Some(work) = queue.waiting.pop_front() else { break };
            queue.done += 1;
            if queue.failed.is_none() {
                // SAFETY: whoever queued it has promised what it needs until it is through.
                queue.failed = unsafe { self.work(work) }.err();
            }
        }
        queue.failed.clone().map_or(Ok(()), Err)
    }

    /// # Safety
    ///
    /// That of whoever asks for it.
    unsafe fn work(&self, work: Work) -> Result<(), GpuError> {
        match work {
            // SAFETY: the caller's promise.
            Work::Copy { to, from, bytes } => unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) },
            // SAFETY: the caller's promise.
            Work::Fill { to, byte, bytes } => unsafe { std::ptr::write_bytes(to as *mut u8, byte, bytes) },
            // SAFETY: the caller's promise.
            Work::Launch(launch) => return unsafe { self.launch(&launch) },
        }
        Ok(())
    }

    /// # Safety
    ///
    /// That of [`Gpu::queue_launch`].
    unsafe fn launch(&self, Launch { kernel, blocks, call }: &Launch) -> Result<(), GpuError> {
        let (suite, shared_bytes) = self.suite;
        let name = CString::new(format!("{suite} {}", kernel.name)).expect("a kernel's name has no zero");
        let shared_bytes = kernel.shared_bytes(shared_bytes as usize) as u32;
        // The argument is read as what it is: it has to be aligned.
        let mut aligned = vec![0u64; call.len().div_ceil(8)];
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the argument is copied; what its addresses hold is the caller's promise; the answer is read before the next call.
        let error = unsafe {
            std::ptr::copy_nonoverlapping(call.as_ptr(), aligned.as_mut_ptr().cast(), call.len());
            let call_bytes = call.len() as u32;
            let call = aligned.as_ptr().cast();
            let said = emulator_launch(name.as_ptr(), *blocks, kernel.threads, shared_bytes, call, call_bytes, seed);
            (!said.is_null()).then(|| CStr::from_ptr(said).to_string_lossy().into_owned())
        };
        error.map_or(Ok(()), |reason| Err(GpuError::Failed { what: kernel.name, reason }))
    }

    fn recordings(&self) -> MutexGuard<'_, HashMap<u64, Vec<Launch>>> {
        self.recordings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line_count(bytes: usize) -> usize {
    bytes.div_ceil(256).max(1)
}

fn lines(bytes: usize, byte: u8) -> Box<[Line]> {
    vec![Line([byte; 256]); line_count(bytes)].into_boxed_slice()
}

/// One at a time: it has one set of fibers.
static RUNNING: Mutex<()> = Mutex::new(());

// SAFETY: memory is this process's and lasts as long as the emulator; what is queued is done in its order.
unsafe impl Gpu for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize) -> Result<Address, GpuError> {
        Ok(Address(self.take(bytes, 0xff) as u64))
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, GpuError> {
        Ok(Box::leak(lines(bytes, 0)).as_mut_ptr().cast())
    }

    unsafe fn free_host(&self, at: *mut u8, bytes: usize) {
        // SAFETY: `allocate_host` leaked just these lines, for as many bytes.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(at.cast::<Line>(), line_count(bytes))) });
    }

    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.0 as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn queue_write(&self, to: Address, from: &[u8]) -> Result<(), GpuError> {
        self.push(Work::Copy { to: to.0, from: from.as_ptr() as u64, bytes: from.len() })
    }

    unsafe fn queue_read(&self, from: Address, to: &mut [u8]) -> Result<(), GpuError> {
        self.push(Work::Copy { to: to.as_mut_ptr() as u64, from: from.0, bytes: to.len() })
    }

    unsafe fn queue_fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), GpuError> {
        self.push(Work::Fill { to: to.0, byte, bytes })
    }

    unsafe fn queue_launch(&self, kernel: Kernel, blocks: u32, call: &[u8]) -> Result<(), GpuError> {
        self.push(Work::Launch(Launch { kernel, blocks, call: call.to_vec() }))
    }

    fn record(&self, launches: &[Launch]) -> Result<u64, GpuError> {
        let number = self.next_recording.fetch_add(1, Ordering::Relaxed);
        self.recordings().insert(number, launches.to_vec());
        Ok(number)
    }

    unsafe fn queue_recording(&self, number: u64) -> Result<(), GpuError> {
        let launches = self.recordings()[&number].clone();
        launches.into_iter().try_for_each(|launch| self.push(Work::Launch(launch)))
    }

    fn forget_recording(&self, number: u64) {
        self.recordings().remove(&number);
    }

    unsafe fn queue_copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), GpuError> {
        self.push(Work::Copy { to: to.0, from: from.0, bytes })
    }

    unsafe fn queue_vendor_product(&self, _: usize, _: Address, _: Address, _: Address) -> Result<(), GpuError> {
        Err(GpuError::Failed { what: "the vendor's matrix product", reason: "an emulator has none".into() })
    }

    fn finish(&self) -> Result<(), GpuError> {
        self.work_until(|queue| queue.done + queue.waiting.len() as u64)
    }

    fn mark(&self) -> Result<u64, GpuError> {
        let queue = self.queue();
        Ok(queue.done + queue.waiting.len() as u64)
    }

    unsafe fn is_past(&self, mark: u64) -> Result<bool, GpuError> {
        // A GPU works between two questions.
        self.work_until(|queue| queue.done + 1)?;
        Ok(self.queue().done >= mark)
    }

    unsafe fn wait_for(&self, mark: u64) -> Result<(), GpuError> {
        self.work_until(|_| mark)
    }

    unsafe fn forget_mark(&self, _: u64) {}
}
