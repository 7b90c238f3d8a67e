//! Attention Distillation for libtorch: give it a reference picture, and it moves that picture's style, appearance or
//! texture into a new one, by optimising diffusion latents against attention features.
//!
//! The method is that of *Attention Distillation: A Unified Approach to Visual Characteristics Transfer* (CVPR 2025,
//! [arXiv 2502.20235](https://arxiv.org/abs/2502.20235)). This crate is an independent implementation.
//!
//! # A picture in another's style
#![cfg_attr(feature = "stable-diffusion", doc = "```no_run")]
#![cfg_attr(not(feature = "stable-diffusion"), doc = "```ignore")]
//! use attention_distillation::{device, image, Distiller, References, Result, StableDiffusion, Task};
//!
//! fn main() -> Result<()> {
//!     // A folder in diffusers layout: unet/ vae/ text_encoder/ tokenizer/ scheduler/
//!     let device = device::best();
//!     let model = StableDiffusion::open("models/stable-diffusion-v1-5", device, device::kind(device))?;
//!
//!     // Scaled to about 512 x 512 pixels, each in its own aspect ratio.
//!     let content = image::load_to_area("content.jpg", 512 * 512)?;
//!     let style = image::load_to_area("style.jpg", 512 * 512)?;
//!
//!     // The authors' settings, or what the model's folder says instead.
//!     let settings = model.settings(Task::StyleTransfer);
//!     let mut run = Distiller::style_transfer(
//!         model.extractor(image::size(&content)?)?,
//!         model.timesteps(settings.steps)?,
//!         References::style(model.encode(&style)?).with_content(model.encode(&content)?),
//!         settings.content_weight,
//!     )?
//!     .with_settings(&settings)?;
//!     while let Some(progress) = run.advance()? {
//!         eprint!("\r{}/{}", progress.step, progress.steps);
//!     }
//!     image::save(&model.decode(&run.latents)?, "result.png")
//! }
//! ```
//!
//! # Where to begin
//! - **To make pictures**: [`StableDiffusion`], [`mod@image`], [`device`], [`References`], [`Distiller`], [`GuidedSampler`],
//!   [`Guidance`], [`Windows`], [`Settings`], [`TotalLoss`].
//! - **To join a pipeline of your own**: [`Denoiser`], [`AttentionHook`], [`AttentionSite`], [`Qkv`], [`FeatureExtractor`],
//!   [`References`], [`AdLoss`], [`Adam`]. The network gets one changed line in its attention and an `impl Denoiser`; the
//!   example `foreign_pipeline` is what to copy. Without the feature `stable-diffusion` nothing else is built.
//! - **To judge what came out**, without a network: [`metrics`].
//!
//! # The paper on one page
//! Latents `z` of the picture being made are seen through self-attention layers `l` of a frozen diffusion network, under
//! the null prompt, at timestep `t`: `Q`, `K`, `V` after projection and head split, `(batch, heads, tokens, head_dim)`.
//! `sg` stops the gradient; the index `s` means the style picture, `c` the content picture. Distances are means of absolute
//! differences.
//!
//! | in the paper | here |
//! |---|---|
//! | the layers: the last six of the network | [`FeatureExtractor::layers`](FeatureExtractor), [`StableDiffusion::last_layers`](crate::StableDiffusion) |
//! | features of `z` at `t`, one forward pass | [`FeatureExtractor::extract`], [`FeatureRecorder`] |
//! | `Attn(Q, K, V) = softmax(Q K^T / sqrt d) V` | [`Qkv::attend`] |
//! | `L_AD = sum_l abs(Attn(Q, K, V) - sg(Attn(Q, Ks, Vs)))` | [`AdLoss`] |
//! | several styles: their `K`, `V` joined along the tokens | [`References::styles`] |
//! | regions: tokens attend to style tokens of their label; soft maps, weights of styles: `softmax(Q Ks^T / sqrt d + ln c) Vs` | [`LabelMap`], [`References::with_labels`], [`Style`] |
//! | controlled textures: regions filled with pixels of the source | [`fill`] |
//! | `L_content = sum_l abs(Q - sg(Qc))` | [`ContentLoss`]; others that the authors tried are [`AttentionMapLoss`] and [`ContentValueLoss`] |
//! | `L = L_AD + beta L_content` | [`TotalLoss`], [`Distiller::style_transfer`] |
//! | `z <- Adam(z, dL/dz)` | [`FeatureExtractor::descend`], [`Adam`] |
//! | plain gradient steps (Fig. 12) | [`GradientDescent`] |
//! | optimisation over the timesteps `t` of DDIM | [`Distiller`], [`Ddim`] |
//! | sampling guided by the losses: `z <- DDIM(z, eps)`, then Adam at the next `t` | [`GuidedSampler`] |
//! | `eps = eps_neg + w (eps_prompt - eps_neg)`, classifier-free guidance | [`Guidance`], [`Denoiser::forward_guided`] |
//! | AdaIN of the latents, `(z - mean z) / std z * std s + mean s` | [`adain`], by weights and regions [`References::adain`], [`GuidedSampler::adain`](GuidedSampler), of an optimisation's start and content [`Distiller::adain`](Distiller) |
//! | references noised to `t`, `sqrt(a) s + sqrt(1 - a) n` | [`Scheduler::add_noise`], [`Noise`] |
//! | ControlNet: residuals in the noise prediction alone | [`Control`](crate::stable_diffusion::Control), [`ControlNet`](crate::stable_diffusion::ControlNet) |
//! | expansion to any size: MultiDiffusion's mean of overlapping views in each step | [`Windows`], [`GuidedSampler::with_windows`] |
//! | layout-edited textures: SDEdit, `z <- sqrt(a) edited + sqrt(1 - a) n` | [`GuidedSampler::edited`] |
//! | seamless tiles: convolutions that go on at the other border, windows that go around | [`Seamless`], [`Windows::wrap`](Windows) |
//! | improved decoding: the decoder tuned to the reference by L1 and Adam | [`DecoderTuning`](crate::stable_diffusion::DecoderTuning) |
//! | KV-injection, the baseline (Fig. 3) | [`KeyValueInjection`] |
//!
//! Optimisation: encode style and content (the posterior's mean); start from the content, or from noise ([`Distiller::adain`](Distiller)
//! first gives start and content the styles' statistics); for each timestep take the features of the clean references once, then
//! `iterations` steps of one Adam on `z`; decode. Not in the paper: a run at half the size, then the last timesteps at the whole
//! ([`Distiller::with_draft`]); queries of places that are alike in the content drawn together ([`References::smoothing`](References)).
//!
//! Sampling: start from noise; for each timestep predict the noise under prompt and negative prompt, step with DDIM, and then,
//! at the timestep that it led to, take the features of the noised references once, and `iterations` steps of a fresh Adam.
//!
//! # Conventions
//! - Pictures are `(batch, 3, height, width)` in f32, RGB, 0 to 1; sizes are `(height, width)` in pixels.
//! - Latents are `(batch, channels, height / factor, width / factor)` in f32, scaled as the network knows them.
//! - Networks compute in f32, bf16 or f16; losses, gradients' scaling and Adam in f32.
//! - Nothing panics, prints, downloads, or draws from a global generator on its own; every failure is an [`Error`].
//! - Models are `Send` but not `Sync`. So is a run that owns its model; a run that borrows one stays on the model's thread. Give each GPU one
//!   worker thread, which owns the model, makes the runs and interleaves them.
//! - A *descent* is one step of the optimizer: a pass of the network for the picture's features, the losses, a backward pass to the
//!   latents. *References* are the styles and the content; the *ideal* output of a layer is that of the picture's queries over the
//!   styles' keys and values, which [`AdLoss`] holds the picture's own output to.
//!
//! # Features
//! - `stable-diffusion` (default): networks from diffusers folders.
//! - `fused-attention` (default): on x86-64 CPUs attention by kernels of this crate in C++, in f32, for AVX-512 or AVX2 as found at run
//!   time; by AVX-512 on an AMD EPYC (Zen 5) some two and a half times as fast as libtorch's. For at least 128 queries and keys and
//!   heads of at most 256 numbers: without a mask with or without gradients; with one (f32, four dimensions, a number for each key,
//!   as regions and weights of styles make it) only where no gradients are kept. Half precisions, without a mask, are computed in f32 by
//!   them, unless the processor is Intel's. All else is libtorch's, as is everything on other
//!   processors, on Windows, and where the compiler is neither GCC nor Clang (`cargo build -vv` shows why they were not built).
//! - `hub`: model folders from the Hugging Face hub (`stable_diffusion::hub::Hub`).
//! - `cuda-graphs`: runs by CUDA graphs (module `cuda_graphs`).
//! - `download-libtorch`: tch fetches libtorch while it builds, the CPU's unless `TORCH_CUDA_VERSION` is set (`cu130`).
//! - `doc-only`: type checks and documentation without libtorch.
//!
//! # libtorch
//! tch 0.24 wants libtorch 2.11.0. CUDA is opened at run time by [`device::best`] and [`device::parse`], with no linker flags: ask
//! one of these before all else that is done with tch, seeds included.
//!
//! On a CPU begin with [`keep_freed_memory`]. Where other programs use it, too, run with `OMP_WAIT_POLICY=passive` and
//! `GOMP_SPINCOUNT=1000`: libtorch's threads otherwise spin while they wait, which there made runs one and a half times to twice as long.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods))]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod adain;
mod attention;
mod bias;
mod checkpoint;
mod denoiser;
mod distiller;
mod error;
mod extractor;
mod feature_cache;
mod features;
mod fill;
mod guided_sampler;
mod injection;
mod loss;
mod mask;
mod memory;
mod noise;
mod optimizer;
#[cfg(all(target_arch = "x86_64", any(feature = "stable-diffusion", fused_attention)))]
mod processor;
mod progress;
mod reference;
mod scalar;
mod scheduler;
mod seamless;
mod settings;
mod smoothing;
mod soundness;
mod tensor_file;
mod windows;

#[cfg(feature = "cuda-graphs")]
pub mod cuda_graphs;
pub mod device;
pub mod image;
pub mod metrics;
#[cfg(feature = "stable-diffusion")]
pub mod stable_diffusion;

pub use adain::adain;
pub use attention::{AttentionHook, AttentionKind, AttentionSite, DeferredHook, PlainAttention, Qkv};
pub use checkpoint::Checkpoint;
pub use denoiser::{Denoiser, Guidance};
pub use distiller::Distiller;
pub use error::{Error, Result};
pub use extractor::FeatureExtractor;
pub use feature_cache::FeatureCache;
pub use features::{FeatureRecorder, Features, LayerFeatures};
pub use fill::fill;
pub use guided_sampler::GuidedSampler;
pub use injection::KeyValueInjection;
pub use loss::{AdLoss, AttentionMapLoss, ContentLoss, ContentValueLoss, Loss, TotalLoss};
pub use mask::LabelMap;
pub use memory::keep_freed_memory;
pub use noise::Noise;
pub use optimizer::{Adam, AdamConfig, GradientDescent, Optimizer, OptimizerState};
pub use progress::Progress;
pub use reference::{References, Style};
pub use scheduler::{BetaSchedule, Ddim, DdimConfig, Prediction, Scheduler, Spacing};
pub use seamless::Seamless;
pub use settings::{Procedure, Settings, Task};
#[cfg(feature = "stable-diffusion")]
pub use stable_diffusion::StableDiffusion;

pub use windows::{View, Windows};

pub use ndarray;
pub use tch;

/// The README's programs are compiled, too.
#[cfg(all(doctest, feature = "stable-diffusion"))]
#[doc = include_str!("../README.md")]
struct Readme;
