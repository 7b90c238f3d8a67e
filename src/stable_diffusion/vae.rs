//! `AutoencoderKL`: pictures to latents and back, from its `config.json`.

mod save;
mod tiles;
mod tuning;

pub use tiles::{Tiles, Tiling};
pub use tuning::{DecoderTuning, TuningConfig, TuningProgress};

use super::config::Config;
use super::layers::{merge_heads, split_heads, Activation, Conv2d, GroupNorm};
use super::linear::Linear;
use super::resnet::{Downsample, Resnet, ResnetStyle, Upsample};
use super::seamless::{Borders, Seamless};
use super::weights::{Scope, Weights};
use crate::scalar::WithNumber;
use crate::{image, Error, Qkv, Result};
use serde_json::json;
use std::{collections::BTreeMap, path::Path};
use tch::{Device, Kind, Tensor};
use tiles::Extent;

/// The autoencoder. Pixels are `(batch, 3, height, width)` in -1 to 1, latents are scaled as the U-Net knows them.
#[derive(Debug)]
pub struct AutoencoderKl {
    encoder: Encoder,
    decoder: Decoder,
    quant: Option<Conv2d>,
    post_quant: Option<Conv2d>,
    scaling_factor: f64,
    shift_factor: f64,
    pixel_channels: i64,
    latent_channels: i64,
    blocks: u32,
    kind: Kind,
    device: Device,
    config: Config,
    /// The very tensors that the layers hold.
    weights: BTreeMap<String, Tensor>,
    borders: Borders,
}

impl AutoencoderKl {
    /// From a folder with `config.json` and `diffusion_pytorch_model.safetensors`. Unless the configuration
    /// says `force_upcast: false`, half precisions may overflow and f32 is used instead of `kind`.
    ///
    /// # Errors
    /// As [`UNet::open`](super::UNet::open).
    pub fn open(folder: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        let config = Config::open(&folder.as_ref().join("config.json"))?;
        let kind = if config.flag("force_upcast", true)? { Kind::Float } else { kind };
        Self::with_config(config, folder.as_ref(), device, kind)
    }

    /// The same in this very `kind`, for [`StableDiffusion::set_vae`](super::StableDiffusion::set_vae): in bf16 half the memory and less time, as diffusers' pipelines have
    /// it, for pictures that are a little off. In f16 SDXL's overflows.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in(folder: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        Self::with_config(Config::open(&folder.as_ref().join("config.json"))?, folder.as_ref(), device, kind)
    }

    fn with_config(config: Config, folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let weights = Weights::open(folder, "diffusion_pytorch_model", kind == Kind::Half, device, kind)?;
        let mut vae = Self::build(&config, &weights.root(), (device, kind))?;
        weights.report();
        vae.weights = weights.into_taken();
        Ok(vae)
    }

    fn build(config: &Config, at: &Scope<'_>, (device, kind): (Device, Kind)) -> Result<Self> {
        config.require(&[("latents_mean", json!(null)), ("latents_std", json!(null))])?;
        let channels = config.counts("block_out_channels")?;
        let down = config.choices("down_block_types", &[("DownEncoderBlock2D", ())])?.len();
        let up = config.choices("up_block_types", &[("UpDecoderBlock2D", ())])?.len();
        if down != channels.len() || up != channels.len() || channels.len() > 16 {
            return Err(config.bad(format!("names {down} down and {up} up blocks for {} `block_out_channels` (at most 16)", channels.len())));
        }
        let groups = config.groups(&channels)?;
        let shape = Shape {
            layers: config.count("layers_per_block", 1)?,
            attention: config.flag("mid_block_add_attention", true)?,
            pixels: config.count("in_channels", 3)?,
            latents: config.count("latent_channels", 4)?,
            resnet: ResnetStyle { groups, epsilon: 1e-6, activation: config.choice("act_fn", "silu", Activation::NAMES)?, time: None, scale: 1.0 },
        };
        config.require(&[("out_channels", json!(shape.pixels))])?;
        let latents = shape.latents;
        let quant = config.flag("use_quant_conv", true)?.then(|| Conv2d::new(&at.at("quant_conv"), 2 * latents, 2 * latents, 1));
        let post_quant = config.flag("use_post_quant_conv", true)?.then(|| Conv2d::new(&at.at("post_quant_conv"), latents, latents, 1));
        Ok(Self {
            encoder: Encoder::new(&at.at("encoder"), &channels, shape)?,
            decoder: Decoder::new(&at.at("decoder"), &channels, shape)?,
            quant: quant.transpose()?,
            post_quant: post_quant.transpose()?,
            scaling_factor: config.positive("scaling_factor", 0.18215)?,
            shift_factor: config.number("shift_factor", 0.0)?,
            pixel_channels: shape.pixels,
            latent_channels: latents,
            blocks: u32::try_from(channels.len()).unwrap_or(1),
            kind,
            device,
            config: config.clone(),
            weights: BTreeMap::new(),
            borders: at.borders(),
        })
    }

    /// Which borders of a picture meet, by default none.
    pub fn set_seamless(&mut self, seamless: Seamless) {
        self.borders.set(seamless);
    }

    /// Pixels per latent, along each side: 8 in Stable Diffusion.
    pub fn factor(&self) -> i64 {
        1 << (self.blocks - 1)
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> i64 {
        self.latent_channels
    }

    /// The largest size within `(height, width)` pixels that it can take.
    ///
    /// # Errors
    /// A size that is empty, absurd, or smaller than the [factor](Self::factor).
    pub fn fit(&self, (height, width): (i64, i64)) -> Result<(i64, i64)> {
        image::check_size((height, width))?;
        let factor = self.factor();
        let (fit_height, fit_width) = (height / factor * factor, width / factor * factor);
        if fit_height == 0 || fit_width == 0 {
            return Err(Error::argument("size", format!("{width}x{height} is too small; the model needs at least {factor}x{factor} pixels")));
        }
        Ok((fit_height, fit_width))
    }

    /// The posterior's mean, `(mean - shift_factor) * scaling_factor`, in f32.
    ///
    /// # Errors
    /// [`Error::Shape`] unless both sides are multiples of [`factor`](Self::factor).
    pub fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        self.check_pixels(pixels)?;
        let mut moments = self.encoder.forward(&pixels.f_to_kind(self.kind)?)?;
        if let Some(quant) = &self.quant {
            moments = quant.forward(&moments)?;
        }
        let mean = moments.f_narrow(1, 0, self.latent_channels)?.f_to_kind(Kind::Float)?;
        mean.plus(-self.shift_factor)?.times(self.scaling_factor)
    }

    /// Pixels from scaled latents, in f32, not clamped to -1 to 1.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of channels.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.check_latents(latents)?;
        let mut x = latents.over(self.scaling_factor)?.plus(self.shift_factor)?.f_to_kind(self.kind)?;
        if let Some(post_quant) = &self.post_quant {
            x = post_quant.forward(&x)?;
        }
        Ok(self.decoder.forward(&x)?.f_to_kind(Kind::Float)?)
    }

    /// Whether it can stand in for another one of a model.
    pub(crate) fn check_replaces(&self, other: &Self) -> Result<()> {
        let shape = |vae: &Self| (vae.pixel_channels, vae.latent_channels, vae.factor());
        if shape(self) != shape(other) {
            let words = |(pixels, latents, factor): (i64, i64, i64)| format!("{pixels} and {latents} channels and factor {factor}");
            let reason = format!("an autoencoder of {}; the model's is of {}", words(shape(self)), words(shape(other)));
            return Err(self.config.bad(reason));
        }
        if self.device != other.device {
            return Err(Error::argument("vae", format!("is on {:?}, the model on {:?}; open both on one device", self.device, other.device)));
        }
        let scale = |vae: &Self| (vae.scaling_factor, vae.shift_factor);
        if scale(self) != scale(other) {
            let (ours, theirs) = (format!("{:?}", scale(self)), format!("{:?}", scale(other)));
            tracing::warn!(ours, theirs, "the autoencoder has another scaling and shift factor than the model's own; was it made for another model?");
        }
        Ok(())
    }

    /// Whether [`encode`](Self::encode) takes pictures of this shape.
    pub(crate) fn check_picture(&self, pixels: &Tensor) -> Result<()> {
        self.check_pixels(pixels).map(drop)
    }

    fn check_pixels(&self, pixels: &Tensor) -> Result<Extent> {
        let factor = self.factor();
        match pixels.size().as_slice() {
            &[batch, c, h, w] if batch > 0 && c == self.pixel_channels && h > 0 && w > 0 && h % factor == 0 && w % factor == 0 => {
                Ok(Extent { batch, height: h / factor, width: w / factor })
            }
            other => {
                let expected = format!("(batch, {}, height, width), sides multiples of {factor}", self.pixel_channels);
                Err(Error::shape("picture", expected, other.to_vec()))
            }
        }
    }

    fn check_latents(&self, latents: &Tensor) -> Result<Extent> {
        match latents.size().as_slice() {
            &[batch, c, height, width] if batch > 0 && c == self.latent_channels && height > 0 && width > 0 => Ok(Extent { batch, height, width }),
            other => Err(Error::shape("latents", format!("(batch, {}, height, width)", self.latent_channels), other.to_vec())),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    layers: i64,
    attention: bool,
    pixels: i64,
    latents: i64,
    resnet: ResnetStyle,
}

/// Residual blocks of one size, then a change of size.
#[derive(Debug)]
struct Level<S> {
    resnets: Vec<Resnet>,
    sampler: Option<S>,
}

fn resnets(at: &Scope<'_>, count: i64, inputs: i64, outputs: i64, style: ResnetStyle) -> Result<Vec<Resnet>> {
    (0..count).map(|i| Resnet::new(&at.at("resnets").at(i), if i == 0 { inputs } else { outputs }, outputs, style)).collect()
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level<Downsample>>,
    mid: Mid,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(at: &Scope<'_>, channels: &[i64], shape: Shape) -> Result<Self> {
        let (first, last) = ends(channels);
        let mut levels = vec![];
        let mut inputs = first;
        for (i, &outputs) in channels.iter().enumerate() {
            let at = at.at("down_blocks").at(i);
            let sampler = (i + 1 < channels.len()).then(|| Downsample::new(&at.at("downsamplers.0"), outputs, 0)).transpose()?;
            levels.push(Level { resnets: resnets(&at, shape.layers, inputs, outputs, shape.resnet)?, sampler });
            inputs = outputs;
        }
        Ok(Self {
            conv_in: Conv2d::new(&at.at("conv_in"), shape.pixels, first, 3)?,
            levels,
            mid: Mid::new(&at.at("mid_block"), last, shape)?,
            norm_out: GroupNorm::new(&at.at("conv_norm_out"), shape.resnet.groups, last, shape.resnet.epsilon)?,
            conv_out: Conv2d::new(&at.at("conv_out"), last, 2 * shape.latents, 3)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(downsample) = &level.sampler {
                x = downsample.forward(&x)?;
            }
        }
        let x = self.mid.forward(&x)?;
        // SiLU whatever the blocks' activation is.
        self.conv_out.forward(&Activation::Silu.forward(&self.norm_out.forward(&x)?)?)
    }
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid: Mid,
    levels: Vec<Level<Upsample>>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(at: &Scope<'_>, channels: &[i64], shape: Shape) -> Result<Self> {
        let (first, last) = ends(channels);
        let mut levels = vec![];
        let mut inputs = last;
        for (i, &outputs) in channels.iter().rev().enumerate() {
            let at = at.at("up_blocks").at(i);
            let sampler = (i + 1 < channels.len()).then(|| Upsample::new(&at.at("upsamplers.0"), outputs)).transpose()?;
            levels.push(Level { resnets: resnets(&at, shape.layers + 1, inputs, outputs, shape.resnet)?, sampler });
            inputs = outputs;
        }
        Ok(Self {
            conv_in: Conv2d::new(&at.at("conv_in"), shape.latents, last, 3)?,
            mid: Mid::new(&at.at("mid_block"), last, shape)?,
            levels,
            norm_out: GroupNorm::new(&at.at("conv_norm_out"), shape.resnet.groups, first, shape.resnet.epsilon)?,
            conv_out: Conv2d::new(&at.at("conv_out"), first, shape.pixels, 3)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.mid.forward(&self.conv_in.forward(x)?)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(upsample) = &level.sampler {
                let (_, _, height, width) = x.size4()?;
                x = upsample.forward(&x, (2 * height, 2 * width))?;
            }
        }
        // SiLU whatever the blocks' activation is.
        self.conv_out.forward(&Activation::Silu.forward(&self.norm_out.forward(&x)?)?)
    }
}

fn ends(channels: &[i64]) -> (i64, i64) {
    (channels.first().copied().unwrap_or(1), channels.last().copied().unwrap_or(1))
}

/// Residual, attention where there is any, residual.
#[derive(Debug)]
struct Mid {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl Mid {
    fn new(at: &Scope<'_>, channels: i64, shape: Shape) -> Result<Self> {
        Ok(Self {
            first: Resnet::new(&at.at("resnets.0"), channels, channels, shape.resnet)?,
            attention: shape.attention.then(|| Attention::new(&at.at("attentions.0"), channels, shape.resnet)).transpose()?,
            second: Resnet::new(&at.at("resnets.1"), channels, channels, shape.resnet)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x, None)
    }
}

/// One head over all pixels. No hook: the method looks at the U-Net's attention only.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    /// Stable Diffusion 1.5's checkpoints still carry the names that diffusers had at first.
    fn new(at: &Scope<'_>, channels: i64, style: ResnetStyle) -> Result<Self> {
        let linear = |name: &str, old: &str| {
            let name = if at.at(old).has("weight") { old } else { name };
            Linear::new(&at.at(name), channels, channels)
        };
        Ok(Self {
            norm: GroupNorm::new(&at.at("group_norm"), style.groups, channels, style.epsilon)?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.size4()?;
        let tokens = self.norm.forward(x)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let project = |layer: &Linear| split_heads(&layer.forward(&tokens)?, 1);
        let attended = Qkv::new(project(&self.to_q)?, project(&self.to_k)?, project(&self.to_v)?).attend()?;
        let out = self.to_out.forward(&merge_heads(&attended)?)?;
        Ok(x.f_add(&out.f_transpose(1, 2)?.f_unflatten(2, [height, width])?)?)
    }
}
