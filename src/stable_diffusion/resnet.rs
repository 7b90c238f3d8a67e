//! Residual blocks, and the convolutions that halve and double a picture's sides.

use super::layers::{Activation, Conv2d, GroupNorm, Padding};
use super::linear::Linear;
use super::weights::Scope;
use crate::scalar::WithNumber;
use crate::Result;
use tch::Tensor;

/// What all residual blocks of a network have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResnetStyle {
    pub(crate) groups: i64,
    pub(crate) epsilon: f64,
    pub(crate) activation: Activation,
    /// Width of the time embedding; none in a VAE.
    pub(crate) time: Option<i64>,
    /// The sum of both branches is divided by this.
    pub(crate) scale: f64,
}

/// norm, activation, convolution, twice, the time embedding added between; beside it the input.
#[derive(Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
    style: ResnetStyle,
}

impl Resnet {
    pub(crate) fn new(at: &Scope<'_>, inputs: i64, outputs: i64, style: ResnetStyle) -> Result<Self> {
        Ok(Self {
            norm1: GroupNorm::new(&at.at("norm1"), style.groups, inputs, style.epsilon)?,
            conv1: Conv2d::new(&at.at("conv1"), inputs, outputs, 3)?,
            time: style.time.map(|width| Linear::new(&at.at("time_emb_proj"), width, outputs)).transpose()?,
            norm2: GroupNorm::new(&at.at("norm2"), style.groups, outputs, style.epsilon)?,
            conv2: Conv2d::new(&at.at("conv2"), outputs, outputs, 3)?,
            shortcut: (inputs != outputs).then(|| Conv2d::new(&at.at("conv_shortcut"), inputs, outputs, 1)).transpose()?,
            style,
        })
    }

    /// `time` is the embedding after its activation, which all blocks share.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let activation = self.style.activation;
        let mut h = self.conv1.forward(&activation.forward(&self.norm1.forward(x)?)?)?;
        if let (Some(layer), Some(time)) = (&self.time, time) {
            h = h.f_add(&layer.forward(time)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let h = self.conv2.forward(&activation.forward(&self.norm2.forward(&h)?)?)?;
        let sum = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)?.f_add(&h)?,
            None => x.f_add(&h)?,
        };
        if self.style.scale == 1.0 {
            Ok(sum)
        } else {
            sum.over(self.style.scale)
        }
    }
}

/// A convolution of stride 2. Padding 0 means one row and column at the far sides only.
#[derive(Debug)]
pub(crate) struct Downsample {
    conv: Conv2d,
}

impl Downsample {
    pub(crate) fn new(at: &Scope<'_>, channels: i64, padding: i64) -> Result<Self> {
        let padding = if padding == 0 { Padding { before: 0, after: 1 } } else { Padding::even(padding) };
        Ok(Self { conv: Conv2d::strided(&at.at("conv"), channels, channels, 3, 2, padding)? })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(x)
    }
}

/// Each pixel repeated, then a convolution.
#[derive(Debug)]
pub(crate) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub(crate) fn new(at: &Scope<'_>, channels: i64) -> Result<Self> {
        Ok(Self { conv: Conv2d::new(&at.at("conv"), channels, channels, 3)? })
    }

    /// To `(height, width)`: twice the sides, or one less where the way down met an odd side.
    pub(crate) fn forward(&self, x: &Tensor, (height, width): (i64, i64)) -> Result<Tensor> {
        self.conv.forward(&x.f_upsample_nearest2d([height, width], None, None)?)
    }
}
