//! Adam whose count of steps is a tensor, too, so that a graph can repeat a step.

use super::{copy, of_these_latents, same_shape, Adam, AdamConfig, Moments};
use crate::scalar::{number, WithNumber};
use crate::Result;
use tch::{Kind, Tensor};

/// [`Adam`] on tensors that stay where they are. The numbers are its, but that the corrections of both moments are computed in
/// f64 on the device, by another formula for the same power.
#[derive(Debug)]
pub(crate) struct CapturableAdam {
    config: AdamConfig,
    mean: Tensor,
    variance: Tensor,
    /// Steps done, `[]` in f64: beside tensors with dimensions its kind gives way.
    steps: Tensor,
}

impl CapturableAdam {
    /// For a parameter of this shape.
    ///
    /// # Errors
    /// Settings out of range.
    pub(crate) fn new(config: AdamConfig, parameter: &Tensor) -> Result<Self> {
        config.check()?;
        let steps = Tensor::f_zeros([0_i64; 0], (Kind::Double, parameter.device()))?;
        Ok(Self { config, mean: parameter.f_zeros_like()?, variance: parameter.f_zeros_like()?, steps })
    }

    /// Stands where `adam` stands; nothing is copied from the CPU.
    ///
    /// # Errors
    /// Moments of another shape.
    pub(crate) fn load(&mut self, adam: &Adam) -> Result<()> {
        let _guard = tch::no_grad_guard();
        match &adam.moments {
            Some(Moments { mean, variance }) => {
                of_these_latents(mean, &self.mean)?;
                self.mean.f_copy_(mean)?;
                self.variance.f_copy_(variance)?;
            }
            None => {
                let _ = (self.mean.f_zero_()?, self.variance.f_zero_()?);
            }
        }
        self.steps.f_copy_(&self.steps.f_ones_like()?.times(adam.steps as f64)?)?;
        Ok(())
    }

    /// Lets `adam` stand where this one stands, `steps` after [`load`](Self::load).
    ///
    /// # Errors
    /// libtorch's; `adam` is then as it was.
    pub(crate) fn store(&self, adam: &mut Adam, steps: usize) -> Result<()> {
        let moments = Moments { mean: copy(&self.mean)?, variance: copy(&self.variance)? };
        adam.moments = Some(moments);
        adam.steps = adam.steps.saturating_add(i64::try_from(steps).unwrap_or(i64::MAX));
        Ok(())
    }

    /// [`Optimizer::step`](super::Optimizer::step), by kernels alone.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn step(&mut self, parameter: &mut Tensor, gradient: &Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        same_shape(parameter, gradient)?;
        let AdamConfig { learning_rate, beta1, beta2, epsilon } = self.config;
        let (mean, variance, steps) = (&mut self.mean, &mut self.variance, &mut self.steps);
        let _ = mean.f_add_(&gradient.f_sub(mean)?.f_mul_(&number(1.0 - beta1)?)?)?;
        let _ = variance.f_mul_(&number(beta2)?)?.f_add_(&gradient.f_square()?.f_mul_(&number(1.0 - beta2)?)?)?;
        let _ = steps.f_add_(&number(1.0)?)?;
        // 1 - beta^steps, by exp(x) - 1, which is exact near 0.
        let correction = |beta: f64| -> Result<Tensor> { Ok(steps.times(beta.ln())?.f_expm1()?.f_neg()?) };
        let (correction1, correction2) = (correction(beta1)?, correction(beta2)?);
        let denominator = variance.f_sqrt()?.f_div_(&correction2.f_sqrt()?)?.f_add_(&number(epsilon)?)?;
        let size = correction1.f_reciprocal()?.times(-learning_rate)?;
        let _ = parameter.f_add_(&mean.f_div(&denominator)?.f_mul_(&size)?)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::*;
    use crate::{Noise, Optimizer};

    fn largest(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn the_steps_are_those_of_adam_from_any_place() -> Result<()> {
        tch::set_num_threads(1);
        let mut noise = Noise::seeded(3);
        let zeros = Tensor::f_zeros([2, 4, 5], (Kind::Float, tch::Device::Cpu))?;
        for (beta1, beta2, before) in [(0.9, 0.999, 0), (0.9, 0.999, 7), (0.0, 0.5, 1), (0.0, 0.0, 0)] {
            let config = AdamConfig { beta1, beta2, ..AdamConfig::default() };
            let (mut adam, mut ours) = (Adam::new(config), CapturableAdam::new(config, &zeros)?);
            let mut parameter = noise.draw(&zeros)?;
            for _ in 0..before {
                adam.step(&mut parameter, &noise.draw(&zeros)?)?;
            }
            let (mut other, start) = (parameter.copy(), parameter.copy());
            // What a warm-up leaves behind is overwritten.
            ours.step(&mut zeros.copy(), &noise.draw(&zeros)?)?;
            ours.load(&adam)?;
            let mut copied = Adam::new(config);
            copied.load_state(adam.state()?.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect())?;
            for _ in 0..20 {
                let gradient = noise.draw(&zeros)?;
                adam.step(&mut parameter, &gradient)?;
                ours.step(&mut other, &gradient)?;
            }
            // Factors that differ in the last place of f64 are the same in f32, but for one in some hundred million: then by
            // 6e-8 of a step of at most 0.5.
            assert!(largest(&parameter, &other) < 1e-6, "{beta1} {beta2} {before}: {}", largest(&parameter, &other));
            assert!((&parameter - &start).abs().max().double_value(&[]) > 0.1);
            ours.store(&mut copied, 20)?;
            for ((name, theirs), (_, stored)) in adam.state()?.iter().zip(copied.state()?) {
                assert_eq!((theirs.kind(), theirs.size()), (stored.kind(), stored.size()), "{name}");
                assert!(theirs.equal(&stored), "{name}");
            }
        }
        Ok(())
    }

    #[test]
    fn others_shapes_are_refused() -> Result<()> {
        tch::set_num_threads(1);
        let (small, large) = (Tensor::f_zeros([3], (Kind::Float, tch::Device::Cpu))?, Tensor::f_zeros([4], (Kind::Float, tch::Device::Cpu))?);
        let mut ours = CapturableAdam::new(AdamConfig::default(), &small)?;
        let mut adam = Adam::default();
        adam.step(&mut large.copy(), &large)?;
        assert!(matches!(ours.load(&adam), Err(crate::Error::Shape { .. })));
        assert!(CapturableAdam::new(AdamConfig { epsilon: -1.0, ..AdamConfig::default() }, &small).is_err());
        Ok(())
    }
}
