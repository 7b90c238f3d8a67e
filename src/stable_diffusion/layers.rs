//! The layers that networks are made of.

use super::seamless::{wrap, Borders};
use super::weights::Scope;
use crate::scalar::WithNumber;
use crate::Result;
use tch::Tensor;

/// A square convolution.
#[derive(Debug)]
pub(crate) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: Padding,
    borders: Borders,
}

/// Places laid before and after either axis: the other border's where opposite ones meet, else zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Padding {
    pub(crate) before: i64,
    pub(crate) after: i64,
}

impl Padding {
    pub(crate) fn even(places: i64) -> Self {
        Self { before: places, after: places }
    }
}

impl Conv2d {
    /// Stride 1, sides kept.
    pub(crate) fn new(at: &Scope<'_>, inputs: i64, outputs: i64, kernel: i64) -> Result<Self> {
        Self::strided(at, inputs, outputs, kernel, 1, Padding::even(kernel / 2))
    }

    pub(crate) fn strided(at: &Scope<'_>, inputs: i64, outputs: i64, kernel: i64, stride: i64, padding: Padding) -> Result<Self> {
        let weight = at.tensor("weight", &[outputs, inputs, kernel, kernel])?;
        Ok(Self { weight, bias: at.tensor("bias", &[outputs])?, stride, padding, borders: at.borders() })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Padding { before, after } = self.padding;
        let seamless = self.borders.get();
        let mut x = x.shallow_clone();
        let mut zeros = |meet: bool, axis: i64| -> Result<(i64, i64)> {
            if !meet {
                return Ok((before, after));
            }
            x = wrap(&x, axis, (before, after))?;
            Ok((0, 0))
        };
        let (left, right) = zeros(seamless.x(), 3)?;
        let (top, bottom) = zeros(seamless.y(), 2)?;
        // The convolution itself lays as many on either side.
        let own = if (left, top) == (right, bottom) {
            [top, left]
        } else {
            x = x.f_constant_pad_nd([left, right, top, bottom])?;
            [0, 0]
        };
        Ok(x.f_conv2d(&self.weight, Some(&self.bias), [self.stride, self.stride], own, [1, 1], 1)?)
    }
}

#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    epsilon: f64,
}

impl GroupNorm {
    pub(crate) fn new(at: &Scope<'_>, groups: i64, channels: i64, epsilon: f64) -> Result<Self> {
        Ok(Self { weight: at.tensor("weight", &[channels])?, bias: at.tensor("bias", &[channels])?, groups, epsilon })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.epsilon, true)?)
    }
}

#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    width: i64,
    epsilon: f64,
}

impl LayerNorm {
    pub(crate) fn new(at: &Scope<'_>, width: i64, epsilon: f64) -> Result<Self> {
        Ok(Self { weight: at.tensor("weight", &[width])?, bias: at.tensor("bias", &[width])?, width, epsilon })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_layer_norm([self.width], Some(&self.weight), Some(&self.bias), self.epsilon, true)?)
    }
}

/// Point by point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    Silu,
    Gelu,
    QuickGelu,
    Relu,
    Mish,
}

impl Activation {
    /// By the names of diffusers' convolutional networks.
    pub(crate) const NAMES: &'static [(&'static str, Self)] =
        &[("silu", Self::Silu), ("swish", Self::Silu), ("gelu", Self::Gelu), ("relu", Self::Relu), ("mish", Self::Mish)];

    pub(crate) fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Silu => x.f_silu()?,
            Self::Gelu => x.f_gelu("none")?,
            Self::QuickGelu => x.f_mul(&x.times(1.702)?.f_sigmoid()?)?,
            Self::Relu => x.f_relu()?,
            Self::Mish => x.f_mish()?,
        })
    }
}

/// `(batch, tokens, channels)` to `(batch, heads, tokens, channels / heads)`.
pub(crate) fn split_heads(x: &Tensor, heads: i64) -> Result<Tensor> {
    let (batch, tokens, channels) = x.size3()?;
    Ok(x.f_view([batch, tokens, heads, channels / heads])?.f_transpose(1, 2)?)
}

/// Back again.
pub(crate) fn merge_heads(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_transpose(1, 2)?.f_flatten(2, 3)?)
}
