//! Attention Distillation for libtorch (placeholder front page).
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod attention;
mod checkpoint;
mod denoiser;
mod distiller;
mod error;
mod extractor;
mod features;
mod injection;
mod loss;
mod optimizer;
mod progress;
mod reference;
mod scheduler;
mod settings;
mod tensor_file;

pub mod device;
pub mod image;
#[cfg(feature = "stable-diffusion")]
pub mod stable_diffusion;

pub use attention::{AttentionHook, AttentionKind, AttentionSite, DeferredHook, PlainAttention, Qkv};
pub use checkpoint::Checkpoint;
pub use denoiser::{Denoiser, Guidance};
pub use distiller::Distiller;
pub use error::{Error, Result};
pub use extractor::FeatureExtractor;
pub use features::{FeatureRecorder, Features, LayerFeatures};
pub use injection::KeyValueInjection;
pub use loss::{AdLoss, ContentLoss, Loss, TotalLoss};
pub use optimizer::{Adam, AdamConfig, GradientDescent, Optimizer, OptimizerState};
pub use progress::Progress;
pub use reference::{References, Style};
pub use scheduler::{BetaSchedule, Ddim, DdimConfig, Prediction, Scheduler, Spacing};
pub use settings::Settings;
#[cfg(feature = "stable-diffusion")]
pub use stable_diffusion::StableDiffusion;

pub use tch;
