//! A GPU by its driver.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use super::compile::{cache_folder, compile, failed, shared_bytes, version};
use super::gpu::{Address, Gpu, GpuError, Kernel, Launch, Properties};
use super::vendor::Product;

/// Why there is no GPU.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    #[error("NVIDIA's driver is not found (libcuda.so)")]
    Driver,
    #[error("there is no GPU {asked}: the driver sees {seen}")]
    Number { asked: usize, seen: usize },
    #[error("{name} is of compute capability {major}.{minor}; kernels are made for 8.0 and newer")]
    Old { name: String, major: i32, minor: i32 },
    #[error("it computes bf16 in its own way; set dtype to bf16, or device to cpu")]
    Dtype,
    #[error(transparent)]
    Failed(#[from] GpuError),
}

/// Whether there is a driver, with a GPU.
pub fn is_present() -> bool {
    // SAFETY: only looks for the library; its functions are called once it is there.
    let has_driver = unsafe { sys::is_culib_present() };
    has_driver && result::init().is_ok() && result::device::get_count().is_ok_and(|count| count > 0)
}

/// GPU number `ordinal`, its kernels compiled and loaded.
pub fn open(ordinal: usize) -> Result<Arc<dyn Gpu>, Missing> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Missing::Driver);
    }
    let check = |what| move |error: DriverError| Missing::Failed(driver_failed(what, error));
    result::init().map_err(check("starting the driver"))?;
    let seen = result::device::get_count().map_err(check("counting GPUs"))? as usize;
    if ordinal >= seen {
        return Err(Missing::Number { asked: ordinal, seen });
    }
    let device = result::device::get(ordinal as i32).map_err(check("finding the GPU"))?;
    let name = result::device::get_name(device).map_err(check("the GPU's name"))?;
    // SAFETY: the device is one.
    let attribute =
        |which| unsafe { result::device::get_attribute(device, which) }.map_err(check("the GPU's properties"));
    let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
    let architecture = match (major, minor) {
        (8, 6) => "sm_86",
        (8, 9) => "sm_89",
        (8, _) => "sm_80",
        (9, _) => "sm_90a",
        (10, _) => "sm_100",
        (12, _) => "sm_120",
        _ => return Err(Missing::Old { name, major, minor }),
    };
    // SAFETY: the context is current on this thread before anything is asked of it, and kept to the end of the process.
    unsafe {
        let context = result::primary_ctx::retain(device).map_err(check("opening the GPU"))?;
        result::ctx::set_current(context).map_err(check("opening the GPU"))?;
        let (memory_free, _) = result::mem_get_info().map_err(check("the GPU's memory"))?;
        let queue = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(check("making a queue"))?;
        let (cache, shared_bytes) = (cache_folder(), shared_bytes(architecture));
        let properties = Properties { name, architecture, multiprocessors, memory_free };
        let mut gpu = CudaGpu {
            properties,
            context,
            queue,
            functions: HashMap::new(),
            recordings: Mutex::default(),
            next_recording: AtomicU64::new(0),
            product: Mutex::default(),
        };
        let driver = driver_version().map_err(check("the driver's version"))?;
        for (source, kernels) in super::kernels() {
            let image = compile(source, architecture, cache.as_deref())?.image;
            let module = result::module::load_data(image.as_ptr().cast()).map_err(|e| not_loaded(e, driver))?;
            for kernel in kernels {
                let bytes = kernel.shared_bytes(shared_bytes);
                gpu.load(module, kernel, bytes, driver).map_err(check("loading a kernel"))?;
            }
        }
        Ok(Arc::new(gpu))
    }
}

#[derive(Debug)]
struct CudaGpu {
    properties: Properties,
    context: sys::CUcontext,
    queue: sys::CUstream,
    functions: HashMap<&'static str, Function>,
    /// Graphs, ready to be launched.
    recordings: Mutex<HashMap<u64, sys::CUgraphExec>>,
    next_recording: AtomicU64,
    /// The one that was asked for last, by its size.
    product: Mutex<Option<(usize, Product)>>,
}

#[derive(Debug)]
struct Function {
    handle: sys::CUfunction,
    shared_bytes: usize,
}

// SAFETY: the driver's handles may be used from any thread on which the context is current, which every call sees to.
unsafe impl Send for CudaGpu {}
// SAFETY: as above.
unsafe impl Sync for CudaGpu {}

fn driver_failed(what: &'static str, error: DriverError) -> GpuError {
    let name = error.error_string().map(|s| s.to_string_lossy().into_owned());
    failed(what, name.unwrap_or_else(|_| format!("{error:?}")))
}

/// The newest CUDA that the driver knows: 12040 is 12.4.
fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: writes a number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map(|()| version)
}

/// From then on there is `cuFuncLoad`; drivers before that load a kernel with its module.
const LOADS_KERNELS: i32 = 12040;

/// A driver knows what compilers of its own major version make, and of those before.
fn not_loaded(error: DriverError, driver: i32) -> GpuError {
    let (known, known_minor) = (driver / 1000, driver % 1000 / 10);
    match (driver_failed("loading the kernels", error), version()) {
        (GpuError::Failed { what, reason }, Ok((major, minor))) if major > known => {
            let reason = format!(
                "{reason}: they are NVRTC {major}.{minor}'s, and the driver knows CUDA {known}.{known_minor}; \
                 install NVRTC {known} alone, or a newer driver"
            );
            GpuError::Failed { what, reason }
        }
        (other, _) => other,
    }
}

impl CudaGpu {
    unsafe fn load(
        &mut self,
        module: sys::CUmodule,
        kernel: Kernel,
        shared_bytes: usize,
        driver: i32,
    ) -> Result<(), DriverError> {
        let name = CString::new(kernel.name).expect("a kernel's name has no zero");
        // SAFETY: the module is loaded, and stays so.
        unsafe {
            let handle = result::module::get_function(module, name)?;
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(handle, most, shared_bytes as i32)?;
            // So that a multiprocessor holds as many blocks as the kernel was made for.
            let share = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            result::function::set_function_attribute(handle, share, 100)?;
            // Now, not at the first launch, which would wait for whatever runs on the GPU.
            if driver >= LOADS_KERNELS {
                sys::cuFuncLoad(handle).result()?;
            }
            self.functions.insert(kernel.name, Function { handle, shared_bytes });
        }
        Ok(())
    }

    fn function(&self, kernel: Kernel) -> Result<&Function, GpuError> {
        let function = self.functions.get(kernel.name);
        function.ok_or_else(|| failed("launching a kernel", format!("{} is not loaded", kernel.name)))
    }

    fn recordings(&self) -> MutexGuard<'_, HashMap<u64, sys::CUgraphExec>> {
        self.recordings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the context current.
    fn with<T>(&self, what: &'static str, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T, GpuError> {
        // SAFETY: the context is kept to the end of the process.
        unsafe { result::ctx::set_current(self.context) }.and_then(|()| call()).map_err(|e| driver_failed(what, e))
    }

    /// The same with so many bytes; of none the driver's documents say nothing.
    fn unless_empty(
        &self,
        what: &'static str,
        bytes: usize,
        call: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), GpuError> {
        if bytes == 0 { Ok(()) } else { self.with(what, call) }
    }
}

/// Each after the one before it.
///
/// # Safety
///
/// The graph is one, and the functions are the launches'.
unsafe fn add_nodes(graph: sys::CUgraph, launches: &[Launch], functions: &[&Function]) -> Result<(), DriverError> {
    let mut before: Option<sys::CUgraphNode> = None;
    for (launch, function) in launches.iter().zip(functions) {
        let mut arguments = [launch.call.as_ptr().cast_mut().cast::<c_void>()];
        let parameters = sys::CUDA_KERNEL_NODE_PARAMS {
            func: function.handle,
            gridDimX: launch.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: launch.kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: function.shared_bytes as u32,
            kernelParams: arguments.as_mut_ptr(),
            extra: std::ptr::null_mut(),
            kern: std::ptr::null_mut(),
            ctx: std::ptr::null_mut(),
        };
        let mut node = std::ptr::null_mut();
        let (after, count) = before.as_ref().map_or((std::ptr::null(), 0), |node| (&raw const *node, 1));
        // SAFETY: all pointers are to what lives here, and the driver copies what they point to.
        unsafe { sys::cuGraphAddKernelNode_v2(&mut node, graph, after, count, &parameters).result()? };
        before = Some(node);
    }
    Ok(())
}

// SAFETY: all memory is the driver's, and the queue is one stream.
unsafe impl Gpu for CudaGpu {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize) -> Result<Address, GpuError> {
        // SAFETY: asks for memory.
        self.with("taking the arena", || unsafe { result::malloc_sync(bytes.max(1)) }).map(Address)
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, GpuError> {
        // SAFETY: asks for memory, and makes it zeros.
        self.with("taking pinned memory", || unsafe {
            let at = result::malloc_host(bytes, 0)?.cast::<u8>();
            at.write_bytes(0, bytes);
            Ok(at)
        })
    }

    unsafe fn free_host(&self, at: *mut u8, _: usize) {
        // SAFETY: the caller's promise. Where it fails, the context is lost, and the memory with it.
        let _ = self.with("giving pinned memory back", || unsafe { result::free_host(at.cast()) });
    }

    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<(), GpuError> {
        // The copy returns when the bytes have left, before they have come: its stream, which no other waits for, is waited for.
        // SAFETY: the caller's promise.
        self.with("writing to the GPU", || unsafe {
            result::memcpy_htod_sync(to.0, from)?;
            result::stream::synchronize(std::ptr::null_mut())
        })
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<(), GpuError> {
        // SAFETY: the caller's promise. It returns when the bytes have come.
        self.with("reading from the GPU", || unsafe { result::memcpy_dtoh_sync(to, from.0) })
    }

    unsafe fn queue_write(&self, to: Address, from: &[u8]) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        self.unless_empty("writing to the GPU", from.len(), || unsafe {
            result::memcpy_htod_async(to.0, from, self.queue)
        })
    }

    unsafe fn queue_read(&self, from: Address, to: &mut [u8]) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        self.unless_empty("reading from the GPU", to.len(), || unsafe {
            result::memcpy_dtoh_async(to, from.0, self.queue)
        })
    }

    unsafe fn queue_fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        self.unless_empty("filling memory", bytes, || unsafe { result::memset_d8_async(to.0, byte, bytes, self.queue) })
    }

    unsafe fn queue_launch(&self, kernel: Kernel, blocks: u32, call: &[u8]) -> Result<(), GpuError> {
        let Function { handle, shared_bytes } = self.function(kernel)?;
        let mut arguments = [call.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the caller's promise; the driver copies the argument before it returns.
        self.with(kernel.name, || unsafe {
            let (grid, block) = ((blocks, 1, 1), (kernel.threads, 1, 1));
            result::launch_kernel(*handle, grid, block, *shared_bytes as u32, self.queue, &mut arguments)
        })
    }

    fn record(&self, launches: &[Launch]) -> Result<u64, GpuError> {
        let functions = launches.iter().map(|launch| self.function(launch.kernel)).collect::<Result<Vec<_>, _>>()?;
        // SAFETY: the driver copies arguments when they are added; the graph is not needed once it is made ready.
        let ready = self.with("recording", || unsafe {
            let mut graph = std::ptr::null_mut();
            sys::cuGraphCreate(&mut graph, 0).result()?;
            let added = add_nodes(graph, launches, &functions);
            let mut ready = std::ptr::null_mut();
            let made = added.and_then(|()| sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0).result());
            result::graph::destroy(graph)?;
            made.map(|()| ready)
        })?;
        let number = self.next_recording.fetch_add(1, Ordering::Relaxed);
        self.recordings().insert(number, ready);
        Ok(number)
    }

    unsafe fn queue_recording(&self, number: u64) -> Result<(), GpuError> {
        let ready = self.recordings().get(&number).copied();
        let ready = ready.ok_or_else(|| failed("replaying", format!("there is no recording {number}")))?;
        // SAFETY: it is kept until it is forgotten; the rest is the caller's promise.
        self.with("replaying", || unsafe { result::graph::launch(ready, self.queue) })
    }

    fn forget_recording(&self, number: u64) {
        if let Some(ready) = self.recordings().remove(&number) {
            // SAFETY: nobody has it any more; where it is queued, the driver keeps it until it is through. Where this fails, the
            // context is lost, and all graphs with it.
            let _ = self.with("forgetting a recording", || unsafe { result::graph::exec_destroy(ready) });
        }
    }

    unsafe fn queue_copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        self.with("copying", || unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.queue) })
    }

    unsafe fn queue_vendor_product(&self, n: usize, x: Address, y: Address, z: Address) -> Result<(), GpuError> {
        self.with("opening the GPU", || Ok(()))?;
        let mut kept = self.product.lock().unwrap_or_else(PoisonError::into_inner);
        let product = match kept.take() {
            Some((size, product)) if size == n => product,
            _ => Product::new(n)?,
        };
        let (_, product) = kept.insert((n, product));
        // SAFETY: the caller's promise.
        unsafe { product.queue(self.queue, x, y, z) }
    }

    fn finish(&self) -> Result<(), GpuError> {
        // SAFETY: the queue is alive.
        self.with("computing", || unsafe { result::stream::synchronize(self.queue) })
    }

    fn mark(&self) -> Result<u64, GpuError> {
        // SAFETY: the queue is alive; an event that was not recorded is given back.
        let event = self.with("marking", || unsafe {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            result::event::record(event, self.queue).map(|()| event).inspect_err(|_| {
                let _ = result::event::destroy(event);
            })
        })?;
        Ok(event as u64)
    }

    unsafe fn is_past(&self, mark: u64) -> Result<bool, GpuError> {
        // SAFETY: the caller's promise.
        self.with("computing", || match unsafe { sys::cuEventQuery(mark as sys::CUevent) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true),
        })
    }

    unsafe fn wait_for(&self, mark: u64) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        self.with("computing", || unsafe { result::event::synchronize(mark as sys::CUevent) })
    }

    unsafe fn forget_mark(&self, mark: u64) {
        // SAFETY: the caller's promise; the driver keeps it for streams that wait for it. Where this fails, the context is lost.
        let _ = self.with("forgetting a mark", || unsafe { result::event::destroy(mark as sys::CUevent) });
    }
}
