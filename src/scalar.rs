//! Tensors and plain numbers.
//!
//! tch's own methods that take numbers (`f_mul_scalar` and its kin) panic when libtorch fails in them, out of memory for
//! one: the number is freed before the error is read, and the freeing finds it. Tensors without dimensions do the same
//! arithmetic, without that.

use crate::Result;
use tch::{Kind, Tensor};

/// A tensor without dimensions, on the CPU; libtorch takes it with tensors of any device and floating kind.
pub(crate) fn number(value: f64) -> Result<Tensor> {
    Ok(Tensor::f_from_data_size(&value.to_ne_bytes(), &[], Kind::Double)?)
}

/// The same for integers.
pub(crate) fn integer(value: i64) -> Result<Tensor> {
    Ok(Tensor::f_from_data_size(&value.to_ne_bytes(), &[], Kind::Int64)?)
}

/// Arithmetic of a floating tensor with a number; the kind stays.
pub(crate) trait WithNumber {
    fn times(&self, factor: f64) -> Result<Tensor>;
    fn over(&self, divisor: f64) -> Result<Tensor>;
    fn plus(&self, summand: f64) -> Result<Tensor>;
    fn within(&self, low: f64, high: f64) -> Result<Tensor>;
}

impl WithNumber for Tensor {
    fn times(&self, factor: f64) -> Result<Tensor> {
        beside(self, |x| Ok(x.f_mul(&number(factor)?)?))
    }

    fn over(&self, divisor: f64) -> Result<Tensor> {
        beside(self, |x| Ok(x.f_div(&number(divisor)?)?))
    }

    fn plus(&self, summand: f64) -> Result<Tensor> {
        beside(self, |x| Ok(x.f_add(&number(summand)?)?))
    }

    fn within(&self, low: f64, high: f64) -> Result<Tensor> {
        // Unlike the others, these two may not be on another device.
        let (low, high) = (number(low)?.f_to_device(self.device())?, number(high)?.f_to_device(self.device())?);
        beside(self, |x| Ok(x.f_clamp_tensor(Some(&low), Some(&high))?))
    }
}

/// A number gives way to a tensor with dimensions; beside one without any, its wider kind would win.
fn beside(tensor: &Tensor, operation: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if tensor.dim() == 0 {
        Ok(operation(&tensor.f_unsqueeze(0)?)?.f_squeeze_dim(0)?)
    } else {
        operation(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_numbers_and_kinds_as_libtorchs_own() -> Result<()> {
        tch::set_num_threads(1);
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
            for shape in [vec![], vec![1], vec![64, 3]] {
                let x = crate::Noise::seeded(1).draw(&Tensor::f_zeros(&shape, (Kind::Float, tch::Device::Cpu))?)?.f_to_kind(kind)?;
                for value in [0.1, -3.7, 65536.0] {
                    let pairs = [
                        (x.times(value)?, x.g_mul_scalar(value)),
                        (x.over(value)?, x.g_div_scalar(value)),
                        (x.plus(value)?, x.g_add_scalar(value)),
                        (x.within(-0.5, 0.5)?, x.clamp(-0.5, 0.5)),
                    ];
                    for (ours, theirs) in pairs {
                        assert_eq!((ours.kind(), ours.size()), (kind, theirs.size()));
                        assert!(ours.equal(&theirs), "{kind:?} {value}: {ours} {theirs}");
                    }
                }
            }
        }
        Ok(())
    }
}
