//! The flags that all examples share.

use attention_distillation::{device, tch, Result, Settings};
use std::{ops::Range, path::PathBuf};

/// Each maps to one field of the library; without a flag the model's or the library's default holds.
#[derive(Debug, clap::Args)]
pub struct Shared {
    /// Model folder in diffusers layout, or a Hugging Face repo id (with the `hub` feature); default: the bundled model
    #[arg(long, value_name = "DIR|HUB-ID", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/mini"), hide_default_value = true)]
    pub model: String,
    /// Autoencoder folder to use instead of the model's own, such as one that finetune_vae wrote
    #[arg(long, value_name = "DIR")]
    pub vae: Option<PathBuf>,
    /// The picture to write, PNG or JPEG by extension
    #[arg(long, value_name = "FILE", default_value = "out.png")]
    pub output: PathBuf,
    /// Output size in pixels; default: the content's (the target mask's, or the model's), rounded down to what the network can take
    #[arg(long, value_name = "WxH", value_parser = size)]
    pub size: Option<Size>,
    /// Timesteps; default: what the model or the task says
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Adam steps per timestep; default: what the model or the task says
    #[arg(long, value_name = "N")]
    pub iterations: Option<usize>,
    /// Adam's learning rate; default: what the model or the task says
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub lr: Option<f64>,
    /// How much of the content's layout stays, 0 (off) to 1; default: what the model or the task says
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub content_weight: Option<f64>,
    /// Match the latents' mean and deviation to the styles': in each step by sampling; by optimisation once, for start and content;
    /// default: what the model or the task says
    #[arg(long, overrides_with = "no_adain")]
    pub adain: bool,
    /// Leave the latents' statistics as they are
    #[arg(long, overrides_with = "adain")]
    pub no_adain: bool,
    /// Against patches of a second colour: how strongly places that are alike in the content share one part of the styles, 0 (off) to 1;
    /// default: what the model or the task says
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub smoothing: Option<f64>,
    /// Self-attention layers in execution order; default: the last six
    #[arg(long, value_name = "A..B", value_parser = layers)]
    pub layers: Option<Range<usize>>,
    /// The same seed gives the same picture on the same device; on a GPU up to roundings
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// cpu, cuda or cuda:N; default: CUDA where there is a working one, else the CPU
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Of the networks: f32, bf16 or f16; default: bf16 on CUDA, f32 on the CPU
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// Of the autoencoder; default: f32, since half precisions show a little, and in f16 SDXL's overflows. bf16 is faster and takes less memory
    #[arg(long, value_name = "DTYPE")]
    pub vae_dtype: Option<String>,
    /// Keep fewer activations and compute them anew: less memory, a fifth to a third slower
    #[arg(long)]
    pub low_memory: bool,
    /// Also write inputs and result side by side
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,
    /// Every N steps write the picture so far to the output file
    #[arg(long, value_name = "N")]
    pub preview: Option<std::num::NonZeroUsize>,
}

/// Height and width in pixels.
#[derive(Debug, Clone, Copy)]
pub struct Size(pub i64, pub i64);

impl Shared {
    pub fn device(&self) -> Result<tch::Device> {
        self.device.as_deref().map_or_else(|| Ok(device::best()), device::parse)
    }

    pub fn kind(&self, device: tch::Device) -> Result<tch::Kind> {
        self.dtype.as_deref().map_or_else(|| Ok(device::kind(device)), device::parse_kind)
    }

    /// A flag that does nothing may stand for a mistake.
    pub fn warn_without_content(&self, has_content: bool, advice: &str) {
        for (flag, value) in [("--content-weight", self.content_weight), ("--smoothing", self.smoothing)] {
            if !has_content && value.is_some_and(|value| value > 0.0) {
                tracing::warn!("{flag} is without effect here; {advice}");
            }
        }
    }

    /// The task's settings with the flags in their place.
    pub fn over(&self, mut settings: Settings) -> Result<Settings> {
        settings.steps = self.steps.unwrap_or(settings.steps);
        settings.iterations = self.iterations.unwrap_or(settings.iterations);
        settings.learning_rate = self.lr.unwrap_or(settings.learning_rate);
        settings.content_weight = self.content_weight.unwrap_or(settings.content_weight);
        settings.adain = self.adain || settings.adain && !self.no_adain;
        settings.smoothing = self.smoothing.unwrap_or(settings.smoothing);
        settings.layers = self.layers.clone().or(settings.layers);
        settings.size = self.size.map(|Size(height, width)| (height, width)).or(settings.size);
        settings.check()?;
        Ok(settings)
    }
}

pub fn size(text: &str) -> Result<Size, String> {
    let sides = text.split_once(['x', 'X']).and_then(|(width, height)| Some(Size(height.parse().ok()?, width.parse().ok()?)));
    sides.ok_or_else(|| "a size is WIDTHxHEIGHT in pixels, as in 512x384".into())
}

fn layers(text: &str) -> Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(start, end)| Some(start.parse().ok()?..end.parse().ok()?));
    ends.ok_or_else(|| "layers are FIRST..END, as in 10..16 (the end is not among them)".into())
}
