//! Timesteps as vectors.

use super::layers::Activation;
use super::linear::Linear;
use super::weights::Scope;
use crate::scalar::WithNumber;
use crate::Result;
use tch::{Kind, Tensor};

/// Sines and cosines of a number at geometrically falling frequencies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sinusoid {
    pub(crate) width: i64,
    /// Cosines first.
    pub(crate) flip_sin_to_cos: bool,
    /// How far the lowest frequency is from 1/10000.
    pub(crate) freq_shift: f64,
}

impl Sinusoid {
    /// `numbers (n)` to `(n, width)`, in f32.
    pub(crate) fn forward(&self, numbers: &Tensor) -> Result<Tensor> {
        let half = self.width / 2;
        let exponents = Tensor::f_ones([half], (Kind::Float, numbers.device()))?.f_cumsum(0, None)?.plus(-1.0)?.times(-(10_000.0_f64.ln()))?;
        let frequencies = exponents.over(half as f64 - self.freq_shift)?.f_exp()?;
        let angles = numbers.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_mul(&frequencies.f_unsqueeze(0)?)?;
        let (sin, cos) = (angles.f_sin()?, angles.f_cos()?);
        let both = if self.flip_sin_to_cos { Tensor::f_cat(&[cos, sin], -1)? } else { Tensor::f_cat(&[sin, cos], -1)? };
        Ok(if self.width % 2 == 1 { both.f_constant_pad_nd([0, 1])? } else { both })
    }
}

/// Two linear layers with an activation between.
#[derive(Debug)]
pub(crate) struct Embedding {
    first: Linear,
    second: Linear,
    activation: Activation,
    inputs: i64,
}

impl Embedding {
    pub(crate) fn new(at: &Scope<'_>, inputs: i64, outputs: i64, activation: Activation) -> Result<Self> {
        let (first, second) = (Linear::new(&at.at("linear_1"), inputs, outputs)?, Linear::new(&at.at("linear_2"), outputs, outputs)?);
        Ok(Self { first, second, activation, inputs })
    }

    pub(crate) fn inputs(&self) -> i64 {
        self.inputs
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.second.forward(&self.activation.forward(&self.first.forward(x)?)?)
    }
}
