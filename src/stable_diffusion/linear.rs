//! Linear layers, by the library of libtorch's that is the faster on the processor at hand.

use super::weights::Scope;
use crate::Result;
use tch::{Device, Kind, Tensor};

/// Products of fewer numbers gain nothing by a convolution.
const LEAST: i64 = 1 << 24;

/// `x W^T + b` over the last axis.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(at: &Scope<'_>, inputs: i64, outputs: i64) -> Result<Self> {
        Ok(Self { weight: at.tensor("weight", &[outputs, inputs])?, bias: Some(at.tensor("bias", &[outputs])?) })
    }

    pub(crate) fn without_bias(at: &Scope<'_>, inputs: i64, outputs: i64) -> Result<Self> {
        Ok(Self { weight: at.tensor("weight", &[outputs, inputs])?, bias: None })
    }

    pub(crate) fn outputs(&self) -> i64 {
        self.weight.size().first().copied().unwrap_or(0)
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if mkl_lags() && self.gains_by_convolution(x, tch::get_num_threads()) {
            return self.by_convolution(x);
        }
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }

    /// Where [MKL lags](mkl_lags): libtorch multiplies in f32 by MKL, which keeps to AVX2 on processors that are not Intel's, and convolves
    /// by oneDNN, which does not: with AVX-512 it is twice as fast there. By one thread libtorch has MKL do such convolutions as well.
    fn gains_by_convolution(&self, x: &Tensor, threads: i32) -> bool {
        let (outputs, numbers) = (self.outputs(), i64::try_from(x.numel()).unwrap_or(0));
        x.dim() == 3
            && numbers.saturating_mul(outputs) >= LEAST
            // Smaller ones libtorch convolves without oneDNN.
            && numbers > 20_480
            && x.device() == Device::Cpu
            && [x, &self.weight].iter().all(|x| matches!(x.f_kind(), Ok(Kind::Float)))
            && !self.weight.requires_grad()
            && threads > 1
    }

    /// The same as a convolution of one place, of `(batch, tokens, channels)`.
    fn by_convolution(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.size3()?;
        // One row of pixels with channels innermost, which is how tokens lie.
        let row = x.f_contiguous()?.f_unsqueeze(1)?.f_permute([0, 3, 1, 2])?;
        let weight = self.weight.f_unsqueeze(-1)?.f_unsqueeze(-1)?;
        let row = row.f_conv2d(&weight, self.bias.as_ref(), [1, 1], [0, 0], [1, 1], 1)?;
        Ok(row.f_permute([0, 2, 3, 1])?.f_reshape([batch, tokens, self.outputs()])?)
    }
}

/// Whether the processor has AVX-512 and is not Intel's.
#[cfg(target_arch = "x86_64")]
fn mkl_lags() -> bool {
    static LAGS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *LAGS.get_or_init(|| is_x86_feature_detected!("avx512f") && !crate::processor::is_intel() && tch::utils::has_mkl() && tch::utils::has_mkldnn())
}

#[cfg(not(target_arch = "x86_64"))]
fn mkl_lags() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No random numbers: libtorch's generator is everybody's.
    fn numbers(shape: &[i64], pitch: f64) -> Result<Tensor> {
        let count = shape.iter().product::<i64>();
        Ok(((Tensor::f_arange(count, (Kind::Double, Device::Cpu))?.square() * pitch).sin()).to_kind(Kind::Float).f_view(shape)?)
    }

    #[test]
    fn convolutions_give_what_products_give() -> Result<()> {
        tch::set_num_threads(1);
        for (bias, batch, tokens) in [(true, 1, 64), (false, 2, 48), (true, 3, 1)] {
            let bias = bias.then(|| numbers(&[40], 0.7)).transpose()?;
            let linear = Linear { weight: numbers(&[40, 24], 0.013)?, bias };
            let leaf = numbers(&[batch, tokens, 24], 0.017)?.set_requires_grad(true);
            // As they come out of convolutions, too: channels outermost.
            for x in [leaf.shallow_clone(), leaf.f_transpose(1, 2)?.f_contiguous()?.f_transpose(1, 2)?] {
                let (theirs, ours) = (x.f_linear(&linear.weight, linear.bias.as_ref())?, linear.by_convolution(&x)?);
                assert_eq!(ours.size(), [batch, tokens, 40]);
                assert!(ours.is_contiguous(), "or the next layer copies");
                assert!(ours.allclose(&theirs, 1e-5, 1e-5, false));
                let gradient = |y: &Tensor| Tensor::run_backward(&[(y * y).sum(Kind::Float)], &[&leaf], false, false).remove(0);
                assert!(gradient(&ours).allclose(&gradient(&theirs), 1e-4, 1e-4, false));
            }
        }
        Ok(())
    }

    /// As it is done where MKL lags, by oneDNN, which takes one picture's by several threads alone.
    #[test]
    fn several_threads_give_what_one_gives() -> Result<()> {
        let linear = Linear { weight: numbers(&[320, 320], 0.013)?, bias: Some(numbers(&[320], 0.7)?) };
        let leaf = numbers(&[1, 1024, 320], 0.017)?.set_requires_grad(true);
        let by = |threads: i32| -> Result<[Tensor; 2]> {
            tch::set_num_threads(threads);
            assert_eq!(tch::get_num_threads(), threads, "or MKL is compared with itself");
            let y = if threads > 1 { linear.by_convolution(&leaf)? } else { linear.forward(&leaf)? };
            let gradient = Tensor::run_backward(&[(&y * &y).sum(Kind::Float)], &[&leaf], false, false).remove(0);
            Ok([y, gradient])
        };
        let (two, one) = (by(2)?, by(1)?);
        for (two, one) in two.iter().zip(&one) {
            let error = (two - one).norm().double_value(&[]) / one.norm().double_value(&[]);
            assert!(error < 2e-6, "{error}"); // f32's roundings, of sums over 320
        }
        Ok(())
    }

    #[test]
    fn only_where_it_gains() -> Result<()> {
        let linear = Linear { weight: numbers(&[256, 256], 0.013)?, bias: None };
        let large = numbers(&[1, 256, 256], 0.017)?;
        let gains = |x: &Tensor| linear.gains_by_convolution(x, 2);
        assert!(gains(&large) && !linear.gains_by_convolution(&large, 1));
        for other in [large.f_narrow(1, 0, 255)?, large.f_to_kind(Kind::Double)?, large.f_squeeze()?] {
            assert!(!gains(&other), "{other:?}");
        }
        let trained = Linear { weight: linear.weight.set_requires_grad(true), bias: None };
        assert!(!trained.gains_by_convolution(&large, 2));
        Ok(())
    }
}
