//! `ControlNetModel`: a copy of a U-Net's first half that reads a picture, edges or depth or a pose, and steers the U-Net
//! by it.

use super::config::Config;
use super::control::check_strength;
use super::encoder::{Encoder, Levels, Start};
use super::layers::{Activation, Conv2d, Padding};
use super::seamless::{Borders, Restored, Seamless};
use super::transformer::Pass;
use super::weights::{Scope, Weights};
use super::{Condition, UNet};
use crate::scalar::WithNumber;
use crate::{Error, PlainAttention, Result};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// One ControlNet. Its own attention layers call no hook.
#[derive(Debug)]
pub struct ControlNet {
    path: PathBuf,
    encoder: Encoder,
    embedding: PictureEmbedding,
    down: Vec<Conv2d>,
    mid: Conv2d,
    bgr: bool,
    pooled: bool,
    borders: Borders,
}

/// What a ControlNet adds to a U-Net of its kind, see [`UNet::forward_with`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Residuals {
    /// One for each skip of the way down, first to last, `(batch, channels, height, width)`; height and width are 1 where
    /// the ControlNet pools them.
    pub down: Vec<Tensor>,
    /// For the middle's output.
    pub mid: Tensor,
}

impl ControlNet {
    /// From a folder with `config.json` and `diffusion_pytorch_model.safetensors` (one file or sharded, f16, bf16 or
    /// f32), its weights converted to `kind` on `device`: of Stable Diffusion 1 or 2, or SDXL.
    ///
    /// # Errors
    /// As [`UNet::open`]; [`Error::Config`] for a folder of another class than `ControlNetModel`.
    pub fn open(folder: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        if !path.is_file() {
            let reason = if folder.is_dir() {
                "has no config.json; a ControlNet's folder in diffusers layout holds it beside diffusion_pytorch_model.safetensors"
            } else {
                "there is no such folder; name a ControlNet's folder in diffusers layout"
            };
            return Err(Error::Config { path: folder.to_owned(), reason: reason.into() });
        }
        let config = Config::open(&path)?;
        let class = config.text("_class_name", "ControlNetModel")?;
        if class != "ControlNetModel" {
            return Err(config.bad(format!("`_class_name` is `{class}`; only a `ControlNetModel` is supported here")));
        }
        let weights = Weights::open(folder, "diffusion_pytorch_model", kind == Kind::Half, device, kind)?;
        let net = Self::build(path, &config, &weights.root(), device, kind)?;
        weights.report();
        Ok(net)
    }

    fn build(path: PathBuf, config: &Config, at: &Scope<'_>, device: Device, kind: Kind) -> Result<Self> {
        let encoder = Encoder::new(config, &Levels::read(config)?, at, device, kind)?;
        let zero = |at: Scope<'_>, channels: i64| Conv2d::new(&at, channels, channels, 1);
        let (first, last) = (encoder.skips().first().copied().unwrap_or(1), encoder.skips().last().copied().unwrap_or(1));
        let down = encoder.skips().iter().enumerate().map(|(i, &channels)| zero(at.at("controlnet_down_blocks").at(i), channels));
        Ok(Self {
            path,
            embedding: PictureEmbedding::new(config, &at.at("controlnet_cond_embedding"), first)?,
            down: down.collect::<Result<_>>()?,
            mid: zero(at.at("controlnet_mid_block"), last)?,
            bgr: config.choice("controlnet_conditioning_channel_order", "rgb", &[("rgb", false), ("bgr", true)])?,
            pooled: config.flag("global_pool_conditions", false)?,
            encoder,
            borders: at.borders(),
        })
    }

    /// Which borders of a picture meet, by default none: as with the U-Net that it steers. Pictures that were embedded
    /// before keep their borders.
    pub fn set_seamless(&mut self, seamless: Seamless) {
        self.borders.set(seamless);
    }

    /// For windows of pictures, until the guard is dropped: borders meet along these axes at most.
    pub(super) fn within_parts(&self, meet: Seamless) -> Restored<'_> {
        self.borders.within_parts(!meet.x(), !meet.y())
    }

    /// A control picture `(1 or batch, 3, height, width)` with values 0 to 1, as [`residuals`](Self::residuals) takes it:
    /// computed once per run, not once per step.
    ///
    /// # Errors
    /// [`Error::Shape`] unless both sides are multiples of 8.
    pub fn embed(&self, picture: &Tensor) -> Result<Tensor> {
        let (channels, factor) = (self.embedding.channels, self.embedding.factor());
        match picture.size().as_slice() {
            &[batch, c, h, w] if batch > 0 && c == channels && h > 0 && w > 0 && h % factor == 0 && w % factor == 0 => {}
            other => {
                let expected = format!("(1 or batch, {channels}, height, width), sides multiples of {factor}");
                return Err(Error::shape("control picture", expected, other.to_vec()));
            }
        }
        let picture = picture.f_to_device(self.encoder.device)?.f_to_kind(self.encoder.kind)?;
        self.embedding.forward(&if self.bgr { picture.f_flip([1])? } else { picture })
    }

    /// What it adds at one timestep, times `strength` (1 as it was trained). Latents and condition are those of the
    /// U-Net, `timestep` is `[]` or `(batch)`, `hint` an embedded picture; one of batch 1 serves any batch.
    ///
    /// # Errors
    /// [`Error::Shape`] for what does not fit; a strength that is negative or not finite; libtorch's.
    pub fn residuals(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition, hint: &Tensor, strength: f64) -> Result<Residuals> {
        check_strength(strength)?;
        let Start { x, time, text } = self.encoder.start(latents, timestep, condition)?;
        let (batch, channels, height, width) = x.size4()?;
        if !matches!(hint.size().as_slice(), &[b, c, h, w] if (b == 1 || b == batch) && (c, h, w) == (channels, height, width)) {
            let (factor, expected) = (self.embedding.factor(), format!("(1 or {batch}, {channels}, {height}, {width})"));
            let from = format!("{expected}, the embedding of a picture of {}x{} pixels", width * factor, height * factor);
            return Err(Error::shape("control's hint", from, hint.size()));
        }
        let x = x.f_add(&hint.f_to_device(self.encoder.device)?.f_to_kind(self.encoder.kind)?)?;
        let mut plain = PlainAttention;
        let (mid, skips) = self.encoder.forward(x, &time, &mut Pass::new(&text, &mut plain))?;
        let residual = |layer: &Conv2d, x: &Tensor| {
            let residual = layer.forward(x)?.times(strength)?;
            Ok(if self.pooled { residual.f_mean_dim(Some([2_i64, 3].as_slice()), true, None)? } else { residual })
        };
        let down = self.down.iter().zip(&skips).map(|(layer, skip)| residual(layer, skip)).collect::<Result<_>>()?;
        Ok(Residuals { down, mid: residual(&self.mid, &mid)? })
    }

    /// Whether it adds the same everywhere: means over height and width.
    pub(crate) fn pools(&self) -> bool {
        self.pooled
    }

    /// Whether it steers this U-Net, whose latents have a `factor`-th of a picture's sides.
    pub(crate) fn check_fits(&self, unet: &UNet, factor: i64) -> Result<()> {
        let (ours, theirs) = (&self.encoder, unet.encoder());
        let differs = |what: String| {
            let reason = format!("{what}; this ControlNet was made for another kind of model");
            Err(Error::Config { path: self.path.clone(), reason })
        };
        if ours.text_width() != theirs.text_width() {
            return differs(format!("takes text embeddings of width {}, the model's U-Net of width {}", ours.text_width(), theirs.text_width()));
        }
        if ours.pooled_width() != theirs.pooled_width() {
            let name = |width: Option<i64>| width.map_or("none".to_owned(), |width| format!("of width {width}"));
            return differs(format!("takes pooled text {}, the model's U-Net {}", name(ours.pooled_width()), name(theirs.pooled_width())));
        }
        if ours.in_channels() != theirs.in_channels() {
            return differs(format!("takes latents of {} channels, the model's U-Net of {}", ours.in_channels(), theirs.in_channels()));
        }
        if ours.skips() != theirs.skips() {
            return differs(format!("its layers have {:?} channels, those of the model's U-Net {:?}", ours.skips(), theirs.skips()));
        }
        if self.embedding.factor() != factor {
            return differs(format!("makes pictures smaller by {}, the model's autoencoder by {factor}", self.embedding.factor()));
        }
        // One pass of the model needs both.
        if ours.device != theirs.device {
            return Err(Error::argument("controlnet", format!("is on {:?}, the model on {:?}; open both on one device", ours.device, theirs.device)));
        }
        Ok(())
    }
}

impl Residuals {
    /// Both together.
    pub(crate) fn and(&self, other: &Self) -> Result<Self> {
        let down = self.down.iter().zip(&other.down).map(|(a, b)| Ok(a.f_add(b)?)).collect::<Result<_>>()?;
        Ok(Self { down, mid: self.mid.f_add(&other.mid)? })
    }

    /// The middle's output and the skips, with these.
    pub(crate) fn added_to(&self, mid: &Tensor, skips: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        if self.down.len() != skips.len() {
            return Err(Error::argument(
                "residuals",
                format!("{} are given for {} skips; they are of another network", self.down.len(), skips.len()),
            ));
        }
        let add = |x: &Tensor, residual: &Tensor| Ok(x.f_add(&residual.f_to_kind(x.f_kind()?)?)?);
        let skips = skips.iter().zip(&self.down).map(|(skip, residual)| add(skip, residual)).collect::<Result<_>>()?;
        Ok((add(mid, &self.mid)?, skips))
    }
}

/// Pixels to the size and channels of the first layer's output, by convolutions of which every second halves the sides.
#[derive(Debug)]
struct PictureEmbedding {
    conv_in: Conv2d,
    blocks: Vec<Conv2d>,
    conv_out: Conv2d,
    channels: i64,
}

impl PictureEmbedding {
    fn new(config: &Config, at: &Scope<'_>, outputs: i64) -> Result<Self> {
        let key = "conditioning_embedding_out_channels";
        let widths = if config.get(key).is_some() { config.counts(key)? } else { vec![16, 32, 96, 256] };
        if widths.len() > 16 {
            return Err(config.bad(format!("`{key}` names {} widths; at most 16 are possible", widths.len())));
        }
        let (first, last) = (widths.first().copied().unwrap_or(1), widths.last().copied().unwrap_or(1));
        config.require(&[("conditioning_channels", serde_json::json!(3))])?;
        let channels = 3;
        let mut blocks = vec![];
        for (&from, &to) in widths.iter().zip(widths.iter().skip(1)) {
            blocks.push(Conv2d::new(&at.at("blocks").at(blocks.len()), from, from, 3)?);
            blocks.push(Conv2d::strided(&at.at("blocks").at(blocks.len()), from, to, 3, 2, Padding::even(1))?);
        }
        Ok(Self {
            conv_in: Conv2d::new(&at.at("conv_in"), channels, first, 3)?,
            blocks,
            conv_out: Conv2d::new(&at.at("conv_out"), last, outputs, 3)?,
            channels,
        })
    }

    /// Pixels per latent, along each side.
    fn factor(&self) -> i64 {
        1 << (self.blocks.len() / 2)
    }

    fn forward(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(picture)?;
        for block in &self.blocks {
            x = block.forward(&Activation::Silu.forward(&x)?)?;
        }
        self.conv_out.forward(&Activation::Silu.forward(&x)?)
    }
}
