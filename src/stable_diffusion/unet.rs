//! `UNet2DConditionModel`: the noise predictor of Stable Diffusion, its fine-tunes and SDXL, from its `config.json`.

use super::block::{self, BlockShape, Layer};
use super::config::Config;
use super::controlnet::Residuals;
use super::encoder::{odd_kernel, Encoder, Levels, Start};
use super::layers::{Activation, Conv2d, GroupNorm};
use super::seamless::{Borders, Restored, Seamless};
use super::transformer::Pass;
use super::weights::{Scope, Weights};
use super::{guidance, Condition};
use crate::scalar::WithNumber;
use crate::{AttentionHook, Denoiser, Error, Guidance, Result};
use serde_json::json;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The network. Latents `(batch, in_channels, height, width)` of any sides.
#[derive(Debug)]
pub struct UNet {
    encoder: Encoder,
    up: Vec<Layer>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    activation: Activation,
    sample_size: Option<(i64, i64)>,
    factor: i64,
    borders: Borders,
}

/// Whether a block has attention, by the names of diffusers.
const UP: &[(&str, bool)] = &[("UpBlock2D", false), ("CrossAttnUpBlock2D", true)];

impl UNet {
    /// From a folder with `config.json` and `diffusion_pytorch_model.safetensors` (one file or sharded, f16, bf16 or
    /// f32), its weights converted to `kind` on `device`.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Weights`], [`Error::MissingTensor`], [`Error::TensorShape`], each naming file and
    /// key or tensor; [`Error::Argument`] for a kind that networks do not compute in, [`Error::Device`] for a GPU that is not there.
    pub fn open(folder: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let folder = folder.as_ref();
        let config = Config::open(&folder.join("config.json"))?;
        let weights = Weights::open(folder, "diffusion_pytorch_model", kind == Kind::Half, device, kind)?;
        let unet = Self::build(&config, &weights.root(), device, kind)?;
        weights.report();
        Ok(unet)
    }

    fn build(config: &Config, at: &Scope<'_>, device: Device, kind: Kind) -> Result<Self> {
        config.require(&[("mid_block_type", json!("UNetMidBlock2DCrossAttn"))])?;
        let levels = Levels::read(config)?;
        let blocks = levels.count();
        let types = config.choices("up_block_types", UP)?;
        if types.len() != blocks {
            return Err(config.bad(format!("names {} blocks in `up_block_types` for {blocks} `block_out_channels`", types.len())));
        }
        let depths = match config.get("reverse_transformer_layers_per_block") {
            Some(_) => config.per_block("reverse_transformer_layers_per_block", 1, blocks)?,
            None => levels.depths().iter().rev().copied().collect(),
        };
        let encoder = Encoder::new(config, &levels, at, device, kind)?;
        let (first, resnet) = (levels.channels(0), levels.resnet);
        let mut up = vec![];
        for (i, (attends, depth)) in types.into_iter().zip(depths).enumerate() {
            let level = blocks - 1 - i;
            let inputs = levels.channels((level + 1).min(blocks - 1));
            let transformer = attends.then(|| levels.transformer(level, depth));
            let shape = BlockShape { inputs, outputs: levels.channels(level), layers: levels.layers(level) + 1, resnet, transformer };
            up.extend(block::up(&at.at("up_blocks").at(i), shape, levels.channels(level.saturating_sub(1)), i + 1 < blocks)?);
        }
        Ok(Self {
            encoder,
            up,
            norm_out: GroupNorm::new(&at.at("conv_norm_out"), resnet.groups, first, resnet.epsilon)?,
            conv_out: Conv2d::new(&at.at("conv_out"), first, config.count("out_channels", 4)?, odd_kernel(config, "conv_out_kernel")?)?,
            activation: resnet.activation,
            sample_size: sample_size(config)?,
            factor: 1 << blocks.saturating_sub(1).min(62),
            borders: at.borders(),
        })
    }

    /// Which borders of a picture meet, by default none.
    pub fn set_seamless(&mut self, seamless: Seamless) {
        self.borders.set(seamless);
    }

    /// For windows of pictures, until the guard is dropped: borders meet along these axes at most.
    pub(super) fn within_parts(&self, meet: Seamless) -> Restored<'_> {
        self.borders.within_parts(!meet.x(), !meet.y())
    }

    /// How many self-attention layers it has: 16 in Stable Diffusion 1.5, 70 in SDXL.
    pub fn self_attention_layers(&self) -> usize {
        self.layers().map(Layer::self_attentions).sum()
    }

    /// Channels of the latents.
    pub fn in_channels(&self) -> i64 {
        self.encoder.in_channels()
    }

    /// Width of the text embeddings.
    pub fn cross_attention_dim(&self) -> i64 {
        self.encoder.text_width()
    }

    /// Height and width, in latents, of the pictures that it was trained on, where its configuration says so.
    pub fn sample_size(&self) -> Option<(i64, i64)> {
        self.sample_size
    }

    /// Latents, along each side, per place of its deepest layers: 8 in Stable Diffusion 1.5, 4 in SDXL.
    pub fn factor(&self) -> i64 {
        self.factor
    }

    /// Whether it wants pooled text and time ids beside the text, as SDXL does.
    pub fn wants_pooled_text(&self) -> bool {
        self.pooled_width().is_some()
    }

    /// From the first convolution's output to the input of the last norm.
    pub(crate) fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.encoder.layers().iter().chain(&self.up)
    }

    /// What a ControlNet has to have in common with it.
    pub(crate) fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Width of the pooled text that it wants, where it wants any.
    pub(crate) fn pooled_width(&self) -> Option<i64> {
        self.encoder.pooled_width()
    }

    /// Bytes of its first layer's output, for so many latents (height times width).
    pub(crate) fn activation_bytes(&self, latents: i64) -> i64 {
        let width = i64::try_from(self.encoder.kind.elt_size_in_bytes()).unwrap_or(4);
        latents.saturating_mul(self.encoder.skips().first().copied().unwrap_or(1)).saturating_mul(width)
    }

    /// As [`Denoiser::forward`], with the timestep as a tensor, `[]` or `(batch)`, on the network's device.
    ///
    /// # Errors
    /// [`Error::Shape`] for latents or conditions that do not fit; [`Error::Argument`] for a condition with controls; the
    /// hook's; libtorch's.
    pub fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        if !condition.controls.is_empty() {
            return Err(Error::argument("condition", "has controls, and a UNet has no ControlNets; use the StableDiffusion that made them"));
        }
        self.forward_with(latents, timestep, condition, None, hook)
    }

    /// As [`forward_at`](Self::forward_at), with what [`ControlNet`](super::ControlNet)s add. The condition's own controls
    /// are not looked at.
    ///
    /// # Errors
    /// As [`forward_at`](Self::forward_at); residuals of another network.
    pub fn forward_with(
        &self,
        latents: &Tensor,
        timestep: &Tensor,
        condition: &Condition,
        residuals: Option<&Residuals>,
        hook: &mut dyn AttentionHook,
    ) -> Result<Tensor> {
        let Start { x, time, text } = self.encoder.start(latents, timestep, condition)?;
        let mut pass = Pass::new(&text, hook);
        let (mut x, mut skips) = self.encoder.forward(x, &time, &mut pass)?;
        if let Some(residuals) = residuals {
            (x, skips) = residuals.added_to(&x, &skips)?;
        }
        for layer in &self.up {
            x = layer.forward(x, &time, &mut pass, &mut skips)?;
        }
        let x = self.conv_out.forward(&self.activation.forward(&self.norm_out.forward(&x)?)?)?;
        Ok(x.f_to_kind(latents.f_kind()?)?)
    }

    /// One number as the network takes it. Made on the device: copying it there would wait for all that is under way.
    pub(crate) fn timestep(&self, timestep: f64) -> Result<Tensor> {
        Tensor::f_ones([1], (Kind::Float, self.encoder.device))?.times(timestep)
    }
}

impl Denoiser for UNet {
    type Condition = Condition;

    fn forward(&self, latents: &Tensor, timestep: f64, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.forward_at(latents, &self.timestep(timestep)?, condition, hook)
    }

    /// Prompt and negative in one batch.
    fn forward_guided(&self, latents: &Tensor, timestep: f64, guidance: &Guidance<Condition>) -> Result<Tensor> {
        guidance::forward(self, latents, timestep, guidance)
    }

    fn seamless(&self) -> Seamless {
        self.borders.get()
    }

    fn with_borders(&self, meet: Seamless, passes: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let _restored = self.within_parts(meet);
        passes()
    }

    /// On a GPU two, such as a style and a content: no more than prompt and negative. One alone leaves it idle for much of the time.
    fn references_at_once(&self) -> usize {
        if self.encoder.device.is_cuda() {
            2
        } else {
            1
        }
    }

    fn condition_batch(&self, condition: &Condition) -> i64 {
        condition.batch()
    }
}

/// One number for both sides, or a pair.
fn sample_size(config: &Config) -> Result<Option<(i64, i64)>> {
    match config.get("sample_size") {
        None => Ok(None),
        Some(serde_json::Value::Array(_)) => match config.counts("sample_size")?.as_slice() {
            &[height, width] => Ok(Some((height, width))),
            other => Err(config.bad(format!("`sample_size` is {other:?}; it must be one number, or two"))),
        },
        Some(_) => config.count("sample_size", 64).map(|side| Some((side, side))),
    }
}
