//! `softmax(Q K^T * scale) V` on x86-64 CPUs by kernels of this crate, with AVX-512 or AVX2; in C++, as tch has no way to tell
//! libtorch an operator's gradients.
//!
//! libtorch's own kernel multiplies small matrices by MKL, which on AMD's processors leaves half of AVX-512 unused. Whether these are
//! faster on Intel's was not measured. Among calls of this module a row of the output is the same to the last bit however many other
//! queries, threads or graphs there are.

use crate::{Error, Result};
use std::ffi::{c_char, c_void, CStr};
use std::sync::OnceLock;
use tch::{Device, Kind, TchError, Tensor};

/// Fewer queries or keys than this are libtorch's, as are wider heads: there is little to gain.
const FEWEST: i64 = 128;
const WIDEST: i64 = 256;

#[allow(unsafe_code)] // Declared here, see operator.cpp.
extern "C" {
    fn attention_distillation_attend(
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        scale: f64,
        lanes: i64,
        threads: i64,
        output: *mut *mut c_void,
    ) -> *mut c_char;
    fn attention_distillation_free_error(error: *mut c_char);
}

/// `None` where the kernels do not know the case, or this processor not the kernels. Without a mask.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: Option<f64>) -> Option<Result<Tensor>> {
    let kernel = Kernel::best()?;
    let [of_query, of_key, of_value] = [q, k, v].map(|x| <[i64; 4]>::try_from(x.size()).ok());
    let ([pictures, heads, queries, width], [_, _, keys, _]) = (of_query?, of_key?);
    let fits = of_key == of_value && of_key == Some([pictures, heads, keys, width]) && pictures > 0 && heads > 0;
    let large = queries >= FEWEST && keys >= FEWEST && (1..=WIDEST).contains(&width);
    let plain = [q, k, v].iter().all(|x| x.device() == Device::Cpu && x.f_kind().is_ok_and(|kind| kind == Kind::Float) && !x.is_sparse());
    let scale = scale.unwrap_or_else(|| 1.0 / (width as f64).sqrt());
    // Others turn the order of scores, or make the sums of the kernels' powers of two meaningless.
    let usual = scale.is_finite() && (scale as f32).is_normal() && scale > 0.0;
    (fits && large && plain && usual).then(|| kernel.attend(q, k, v, scale, i64::from(tch::get_num_threads())))
}

/// For one instruction set. There is none that this processor, or its system, lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kernel {
    /// Floats of a vector.
    lanes: i64,
}

impl Kernel {
    /// All there are here, the best first. What is asked for is what build/fused_attention.rs compiles them for.
    fn all() -> impl Iterator<Item = Self> {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        [(16, avx512 && avx2), (8, avx2)].into_iter().filter_map(|(lanes, there)| there.then_some(Self { lanes }))
    }

    fn best() -> Option<Self> {
        static BEST: OnceLock<Option<Kernel>> = OnceLock::new();
        *BEST.get_or_init(|| {
            let best = Self::all().next();
            tracing::debug!(kernel = ?best, "attention in f32 on this CPU, none: by libtorch");
            best
        })
    }

    /// By as many shares of the work as there are threads.
    ///
    /// # Errors
    /// [`Error::Torch`]: shapes or kinds that it does not know, no memory.
    #[allow(unsafe_code)]
    fn attend(self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, threads: i64) -> Result<Tensor> {
        let mut output: *mut c_void = std::ptr::null_mut();
        // SAFETY: three tensors that live as long as this call, whose kinds and shapes it checks; what it keeps of them for the gradients
        // it counts as libtorch does. The processor has the instructions, or there would be no `self`. It throws nothing.
        let error = unsafe {
            attention_distillation_attend(q.as_ptr().cast(), k.as_ptr().cast(), v.as_ptr().cast(), scale, self.lanes, threads, &mut output)
        };
        if error.is_null() {
            // SAFETY: without an error it is a tensor on the heap, which is handed over.
            return Ok(unsafe { Tensor::from_ptr(output.cast()) });
        }
        // SAFETY: an error is a text that ends with a 0 and is ours to free.
        let text = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
        // SAFETY: as above, and it is not looked at again.
        unsafe { attention_distillation_free_error(error) };
        Err(Error::Torch(TchError::Torch(text)))
    }
}

#[cfg(test)]
mod tests;
