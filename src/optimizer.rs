//! What moves the latents: Adam as the authors use it, and plain gradient descent for the paper's comparison.

#[cfg(feature = "cuda-graphs")]
mod capturable;

#[cfg(feature = "cuda-graphs")]
pub(crate) use capturable::CapturableAdam;

use crate::scalar::{number, WithNumber};
use crate::{Error, Result};
use tch::{Device, Tensor};

/// An optimizer's memory by name, as in a state dict.
pub type OptimizerState = Vec<(String, Tensor)>;

/// Moves one tensor downhill.
pub trait Optimizer {
    /// Updates `parameter` in place, by its gradient of the same shape. Call outside of any graph that holds it.
    ///
    /// # Errors
    /// Settings out of range; shapes that changed since the last step. The parameter is then as it was.
    fn step(&mut self, parameter: &mut Tensor, gradient: &Tensor) -> Result<()>;

    /// Forgets everything learned from past steps.
    fn reset(&mut self);

    /// What was learned from past steps, for a checkpoint; empty before the first. The tensors share the optimizer's
    /// storage: write or copy them before the next step.
    ///
    /// # Errors
    /// libtorch's.
    fn state(&self) -> Result<OptimizerState>;

    /// Takes over a state of [`state`](Self::state), its tensors without copying them, so that going back needs no
    /// memory; an empty one is a [`reset`](Self::reset).
    ///
    /// # Errors
    /// A state that is not this optimizer's; it is then as it was.
    fn load_state(&mut self, state: OptimizerState) -> Result<()>;

    /// Whether steps of this parameter could go on from a state that [`load_state`](Self::load_state) would take. Runs ask before they
    /// resume a checkpoint; by default it is always so.
    ///
    /// # Errors
    /// A state of a parameter of another shape, or one that holds what is not finite.
    fn check_state(&self, _state: &[(String, Tensor)], _parameter: &Tensor) -> Result<()> {
        Ok(())
    }
}

impl<O: Optimizer + ?Sized> Optimizer for Box<O> {
    fn step(&mut self, parameter: &mut Tensor, gradient: &Tensor) -> Result<()> {
        (**self).step(parameter, gradient)
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn state(&self) -> Result<OptimizerState> {
        (**self).state()
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        (**self).load_state(state)
    }

    fn check_state(&self, state: &[(String, Tensor)], parameter: &Tensor) -> Result<()> {
        (**self).check_state(state, parameter)
    }
}

/// Adam's settings; the defaults are the authors'.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct AdamConfig {
    /// Step size; latents have about unit variance.
    pub learning_rate: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the latter.
    pub epsilon: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { learning_rate: 0.05, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

impl AdamConfig {
    /// The defaults with another learning rate.
    pub fn with_learning_rate(learning_rate: f64) -> Self {
        Self { learning_rate, ..Self::default() }
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_learning_rate(self.learning_rate)?;
        for (name, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::argument(name, format!("{value} is not in 0..1")));
            }
        }
        if !(self.epsilon.is_finite() && self.epsilon >= 0.0) {
            return Err(Error::argument("epsilon", format!("{} is not a number of at least 0", self.epsilon)));
        }
        Ok(())
    }
}

fn check_learning_rate(rate: f64) -> Result<()> {
    if rate.is_finite() && rate >= 0.0 {
        Ok(())
    } else {
        Err(Error::argument("learning rate", format!("{rate} is not a number of at least 0")))
    }
}

/// Adam (Kingma and Ba), the numbers of `torch.optim.Adam` without weight decay.
#[derive(Debug)]
pub struct Adam {
    /// May change between steps, for a schedule.
    pub config: AdamConfig,
    moments: Option<Moments>,
    steps: i64,
}

#[derive(Debug)]
struct Moments {
    mean: Tensor,
    variance: Tensor,
}

impl Adam {
    /// Before its first step.
    pub fn new(config: AdamConfig) -> Self {
        Self { config, moments: None, steps: 0 }
    }
}

impl Default for Adam {
    fn default() -> Self {
        Self::new(AdamConfig::default())
    }
}

impl Optimizer for Adam {
    fn step(&mut self, parameter: &mut Tensor, gradient: &Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        self.config.check()?;
        same_shape(parameter, gradient)?;
        let AdamConfig { learning_rate, beta1, beta2, epsilon } = self.config;
        let fresh;
        let Moments { mean, variance } = match &self.moments {
            Some(moments) => {
                of_these_latents(&moments.mean, gradient)?;
                moments
            }
            None => {
                fresh = Moments { mean: gradient.f_zeros_like()?, variance: gradient.f_zeros_like()? };
                &fresh
            }
        };
        // In torch's order: equal to it but for roundings. Into tensors of their own, so that an error in between leaves all as it was.
        let mean = mean.f_add(&gradient.f_sub(mean)?.f_mul_(&number(1.0 - beta1)?)?)?;
        let variance = variance.f_mul(&number(beta2)?)?.f_add_(&gradient.f_square()?.f_mul_(&number(1.0 - beta2)?)?)?;
        let steps = self.steps.saturating_add(1);
        let correction1 = 1.0 - beta1.powf(steps as f64);
        let correction2 = 1.0 - beta2.powf(steps as f64);
        let denominator = variance.f_sqrt()?.f_div_(&number(correction2.sqrt())?)?.f_add_(&number(epsilon)?)?;
        let _ = parameter.f_add_(&mean.f_div(&denominator)?.f_mul_(&number(-learning_rate / correction1)?)?)?;
        (self.moments, self.steps) = (Some(Moments { mean, variance }), steps);
        Ok(())
    }

    fn reset(&mut self) {
        self.moments = None;
        self.steps = 0;
    }

    fn state(&self) -> Result<OptimizerState> {
        let Some(Moments { mean, variance }) = &self.moments else { return Ok(vec![]) };
        let steps = Tensor::f_from_slice(&[self.steps])?;
        Ok(vec![("mean".into(), mean.shallow_clone()), ("variance".into(), variance.shallow_clone()), ("steps".into(), steps)])
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        if state.is_empty() {
            self.reset();
            return Ok(());
        }
        let find = |name: &str| match state.iter().find(|(n, _)| n == name) {
            Some((_, tensor)) => Ok(tensor.shallow_clone()),
            None => Err(Error::argument("optimizer state", format!("has no `{name}`; was it saved by Adam?"))),
        };
        let (mean, variance, steps) = (find("mean")?, find("variance")?, find("steps")?);
        if mean.size() != variance.size() {
            return Err(Error::shape("optimizer state `variance`", format!("{:?}, that of `mean`", mean.size()), variance.size()));
        }
        if steps.numel() != 1 {
            return Err(Error::shape("optimizer state `steps`", "one number", steps.size()));
        }
        let steps = steps.f_view([1])?.f_int64_value(&[0])?;
        if steps < 1 {
            return Err(Error::argument("optimizer state `steps`", format!("{steps} is not at least 1")));
        }
        self.steps = steps;
        self.moments = Some(Moments { mean, variance });
        Ok(())
    }

    fn check_state(&self, state: &[(String, Tensor)], parameter: &Tensor) -> Result<()> {
        let moments = state.iter().filter(|(name, _)| matches!(name.as_str(), "mean" | "variance"));
        moments.into_iter().try_for_each(|(name, moment)| {
            of_these_latents(moment, parameter)?;
            // A step takes the root of the variance.
            let used = if name == "variance" { moment.f_sqrt()? } else { moment.shallow_clone() };
            if bool::try_from(used.f_isfinite()?.f_all()?)? {
                Ok(())
            } else {
                Err(Error::argument("optimizer state", format!("its `{name}` has numbers that no step can go on from")))
            }
        })
    }
}

/// `parameter - learning_rate * gradient`: the hand-set guidance strength that the paper's ablation compares Adam with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientDescent {
    /// Step size.
    pub learning_rate: f64,
}

impl Optimizer for GradientDescent {
    fn step(&mut self, parameter: &mut Tensor, gradient: &Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        check_learning_rate(self.learning_rate)?;
        same_shape(parameter, gradient)?;
        let _ = parameter.f_sub_(&gradient.times(self.learning_rate)?)?;
        Ok(())
    }

    fn reset(&mut self) {}

    fn state(&self) -> Result<OptimizerState> {
        Ok(vec![])
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        if let Some((name, _)) = state.first() {
            return Err(Error::argument("optimizer state", format!("has `{name}`; gradient descent has none")));
        }
        Ok(())
    }
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    if a.size() == b.size() {
        Ok(())
    } else {
        Err(Error::shape("gradient", format!("{:?}, the parameter's", a.size()), b.size()))
    }
}

/// Moments of latents of another size are of no use.
fn of_these_latents(mean: &Tensor, parameter: &Tensor) -> Result<()> {
    if mean.size() == parameter.size() {
        Ok(())
    } else {
        let wanted = format!("{:?}, that of the latents; reset the optimizer where they change their size", parameter.size());
        Err(Error::shape("optimizer state `mean`", wanted, mean.size()))
    }
}

/// Into storage of its own; tch has no fallible `copy`.
pub(crate) fn copy(tensor: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let mut own = tensor.f_empty_like()?;
    own.f_copy_(tensor)?;
    Ok(own)
}

/// A state in storage of its own: what an undo needs.
pub(crate) fn copy_state(state: &[(String, Tensor)]) -> Result<OptimizerState> {
    state.iter().map(|(name, tensor)| Ok((name.clone(), copy(tensor)?))).collect()
}

/// A loaded state in storage of its own on the latents' device; host-side counts (one number) stay.
pub(crate) fn state_on(state: &[(String, Tensor)], device: Device) -> Result<OptimizerState> {
    let on = |tensor: &Tensor| if tensor.numel() == 1 { copy(tensor) } else { copy(&tensor.f_to_device(device)?) };
    state.iter().map(|(name, tensor)| Ok((name.clone(), on(tensor)?))).collect()
}
