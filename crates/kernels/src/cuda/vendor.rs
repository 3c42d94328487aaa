//! The vendor's own matrix product, cuBLASLt: what a GPU can do, for roofs. Nothing that serves a model uses it: it takes
//! another way for another number of rows, and a token's bits would depend on its batch.

use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;

use super::compile::failed;
use super::gpu::{Address, GpuError};

/// z = x yᵀ of bf16 [n, n], ready to be queued.
#[derive(Debug)]
pub(super) struct Product {
    handle: sys::cublasLtHandle_t,
    description: sys::cublasLtMatmulDesc_t,
    layout: sys::cublasLtMatrixLayout_t,
    way: sys::cublasLtMatmulAlgo_t,
}

impl Product {
    /// With the GPU's context current.
    pub fn new(n: usize) -> Result<Self, GpuError> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(failed(WHAT, "libcublasLt.so is not found: install cuBLAS, or set LD_LIBRARY_PATH".into()));
        }
        let made = || -> Result<Self, CublasError> {
            let handle = result::create_handle()?;
            let (sums, values) = (sys::cudaDataType_t::CUDA_R_32F, sys::cudaDataType_t::CUDA_R_16BF);
            let description = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sums)?;
            let layout = result::create_matrix_layout(values, n as u64, n as u64, n as i64)?;
            let preference = result::create_matmul_pref()?;
            // Columns of one are multiplied with columns of the other.
            const CUBLAS_OP_T: i32 = 1;
            let transposed = CUBLAS_OP_T;
            let (at, bytes) = ((&raw const transposed).cast(), size_of_val(&transposed));
            // SAFETY: all handles are new, and the attribute is of this type.
            let way = unsafe {
                let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
                result::set_matmul_desc_attribute(description, which, at, bytes)?;
                let found =
                    result::get_matmul_algo_heuristic(handle, description, layout, layout, layout, layout, preference);
                result::destroy_matmul_pref(preference)?;
                found?.algo
            };
            Ok(Self { handle, description, layout, way })
        };
        made().map_err(|error| failed(WHAT, error.to_string()))
    }

    /// # Safety
    ///
    /// The addresses are of [n, n] bf16 each, and nothing else that is queued writes to them meanwhile.
    pub unsafe fn queue(&self, queue: CUstream, x: Address, y: Address, z: Address) -> Result<(), GpuError> {
        let (one, zero) = (1.0f32, 0.0f32);
        let at = |a: Address| a.0 as *const c_void;
        // SAFETY: the caller's promise; the factors are read before it returns.
        let queued = unsafe {
            result::matmul(
                self.handle,
                self.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                at(y),
                self.layout,
                at(x),
                self.layout,
                at(z),
                self.layout,
                at(z).cast_mut(),
                self.layout,
                &self.way,
                ptr::null_mut(),
                0,
                queue.cast(),
            )
        };
        queued.map_err(|error| failed(WHAT, error.to_string()))
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: they are this one's. Where this fails the context is lost, and they with it.
        unsafe {
            let _ = result::destroy_matrix_layout(self.layout);
            let _ = result::destroy_matmul_desc(self.description);
            let _ = result::destroy_handle(self.handle);
        }
    }
}

const WHAT: &str = "the vendor's matrix product";
