//! Steps that are captured once and then repeated, by CUDA graphs: feature `cuda-graphs`.
//!
//! On a GPU a step is a thousand kernels and more; for a small picture, queueing them one by one takes longer than running
//! them. A graph queues all of them at once. [`Distiller::with_graphs`](crate::Distiller::with_graphs) and
//! [`GuidedSampler::with_graphs`](crate::GuidedSampler::with_graphs) make such runs:
#![cfg_attr(feature = "stable-diffusion", doc = "```no_run")]
#![cfg_attr(not(feature = "stable-diffusion"), doc = "```ignore")]
//! # use attention_distillation::{cuda_graphs::CudaGraphs, image, Distiller, References, Result, StableDiffusion};
//! # fn transfer(model: &StableDiffusion, references: References, size: (i64, i64)) -> Result<()> {
//! let run = Distiller::style_transfer(model.extractor(size)?, model.timesteps(200)?, references, 0.25)?;
//! let mut run = run.with_graphs(CudaGraphs::new()?);
//! let latents = run.finish()?;
//! # Ok(())
//! # }
//! ```
//!
//! On an H200 the pictures by graphs are those of the same run without, to 0.1 grey levels of 255: the bundled model at 64 px, optimisations in f32,
//! bf16 and f16, guided sampling in f32 (plain, guided, with regions, in windows), bf16 (guided) and f16 (in windows). Repetitions and six further
//! runs in windows took no further memory. Other GPUs and other networks than a U-Net have not been tried. On the CPU a [`Recorder`] that does the
//! work again instead of repeating it is tested with both procedures.
//!
//! # What it needs
//! The feature has a small C++ library, made while this crate is built, which wants a C++ compiler and NVIDIA's headers of any CUDA
//! 12 or 13, `cuda_runtime_api.h` and `crt/host_defines.h`: of a CUDA toolkit (`CUDA_HOME`, or `/usr/local/cuda`), or of the packages
//! `nvidia-cuda-runtime` and `nvidia-cuda-crt` beside libtorch, where `make libtorch` puts them. Without them the crate is built all the
//! same, and [`CudaGraphs::new`] says what is missing. The library is within the program and opened by [`CudaGraphs::new`] alone:
//! programs with this feature start where there is no CUDA.
//!
//! # What it does not do
//! Optimisations look at references with a [cache](crate::FeatureCache) as ever, as their features depend on what is in it. What guided
//! sampling does as ever is with [`GraphedSampler`].

mod capturable;
mod cuda;
mod distiller;
mod passes;
mod sampler;
mod shim;
mod statics;

#[cfg(feature = "stable-diffusion")]
pub(crate) use capturable::plain_gradient_at;
pub use capturable::Capturable;
pub use cuda::{CudaGraph, CudaGraphs};
pub use distiller::GraphedDistiller;
pub use sampler::GraphedSampler;

use crate::Result;
use tch::Device;

/// What repeats work on a device: CUDA's graphs, or a test's stand-in.
///
/// The work computes tensors from tensors which it finds, each time, at the same places of memory. It may be done any number
/// of times while it is captured: what it wrote is then overwritten. A graph knows places, not tensors, which is why its use is unsafe.
/// The tensors that the work makes for itself while it is captured are nobody's between one replay and the next: graphs of one recorder may
/// share memory for them, and then see to it that no two replays are under way at the same time.
#[allow(unsafe_code)] // Only declared here.
pub trait Recorder {
    /// What was captured.
    type Graph;

    /// Captures the kernels that `work` queues on `device`. The work is done at least once before, uncaptured: what it then makes and keeps, in memory
    /// of its own, it finds again in the capture.
    ///
    /// # Errors
    /// Those of `work`; what cannot be captured.
    ///
    /// # Safety
    /// Each tensor that `work` reads or writes and did not make itself must stay alive, in its place of memory, until the graph is dropped. What it makes
    /// while it is captured is not to be read afterwards, but by itself.
    unsafe fn capture(&mut self, device: Device, work: &mut dyn FnMut() -> Result<()>) -> Result<Self::Graph>;

    /// Queues what was captured once more. `work` is the same work, for recorders that do it again instead.
    ///
    /// # Errors
    /// The device's.
    ///
    /// # Safety
    /// As [`capture`](Self::capture), and the graph must be of this recorder.
    unsafe fn replay(&mut self, graph: &mut Self::Graph, work: &mut dyn FnMut() -> Result<()>) -> Result<()>;
}
