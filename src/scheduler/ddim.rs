//! DDIM (Song et al. 2021) with eta 0, on the settings of any diffusers scheduler.

use super::Scheduler;
use crate::scalar::{number, WithNumber};
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// More timesteps than any schedule has: beyond it is a slip or an attack.
const MOST_TIMESTEPS: usize = 100_000;

/// How the noise's variance grows over training timesteps.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum BetaSchedule {
    /// beta linear in t.
    Linear,
    /// sqrt(beta) linear in t: Stable Diffusion's.
    ScaledLinear,
    /// The squared cosine of Nichol and Dhariwal, beta at most 0.999.
    SquaredCosine,
    /// Given one by one.
    Trained(Vec<f64>),
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// `sqrt(a) noise - sqrt(1-a) clean`.
    Velocity,
    /// The clean latents.
    Sample,
}

/// Which of the training timesteps are visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Spacing {
    /// Multiples of `T / steps` from 0, plus the offset: Stable Diffusion's.
    Leading,
    /// Multiples of `T / steps` back from T.
    Trailing,
    /// Evenly from 0 to T - 1.
    Linspace,
}

/// The settings of a schedule. The defaults are Stable Diffusion's.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DdimConfig {
    /// T, the number of timesteps in training.
    pub train_timesteps: usize,
    /// The first beta.
    pub beta_start: f64,
    /// The last beta.
    pub beta_end: f64,
    /// What lies between.
    pub beta_schedule: BetaSchedule,
    /// What the network predicts.
    pub prediction: Prediction,
    /// Which timesteps are visited.
    pub spacing: Spacing,
    /// Added to the timesteps of [`Spacing::Leading`].
    pub steps_offset: usize,
    /// Whether the last step lands on clean latents (a = 1) instead of on timestep 0.
    pub set_alpha_to_one: bool,
    /// Limit of the predicted clean values (pixel models); none for latents.
    pub clip_sample: Option<f64>,
    /// Shift the schedule so that its last timestep is pure noise (Lin et al. 2023).
    pub rescale_zero_snr: bool,
}

impl Default for DdimConfig {
    fn default() -> Self {
        Self {
            train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction: Prediction::Epsilon,
            spacing: Spacing::Leading,
            steps_offset: 1,
            set_alpha_to_one: false,
            clip_sample: None,
            rescale_zero_snr: false,
        }
    }
}

/// A DDIM schedule of some number of steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Ddim {
    timesteps: Vec<f64>,
    /// Cumulative products of `1 - beta`, one per training timestep.
    alphas: Vec<f64>,
    final_alpha: f64,
    /// Training timesteps per step.
    stride: usize,
    prediction: Prediction,
    clip_sample: Option<f64>,
}

impl Ddim {
    /// `steps` of the schedule's timesteps.
    ///
    /// # Errors
    /// Steps of 0, or that reach beyond the schedule; betas outside of 0..1.
    pub fn new(config: &DdimConfig, steps: usize) -> Result<Self> {
        let total = config.train_timesteps;
        if total == 0 || total > MOST_TIMESTEPS {
            return Err(Error::argument("train_timesteps", format!("{total} is not in 1..={MOST_TIMESTEPS}")));
        }
        if steps == 0 || steps > total {
            return Err(Error::argument("steps", format!("{steps} is not in 1..={total}, the timesteps of the model's schedule")));
        }
        let timesteps = timesteps(config, steps);
        if timesteps.iter().any(|t| !(0.0..total as f64).contains(t)) {
            return Err(Error::argument(
                "steps",
                format!("{steps} steps with offset {} reach beyond the schedule's {total} timesteps; take fewer", config.steps_offset),
            ));
        }
        if let Some(limit) = config.clip_sample.filter(|limit| !(limit.is_finite() && *limit > 0.0)) {
            return Err(Error::argument("clip_sample", format!("{limit} is not a positive number")));
        }
        let alphas = alphas(config)?;
        if alphas.iter().any(|a| !a.is_finite()) {
            return Err(Error::argument("betas", "lead to no number"));
        }
        let final_alpha = if config.set_alpha_to_one { 1.0 } else { alphas.first().copied().unwrap_or(1.0) };
        Ok(Self { timesteps, alphas, final_alpha, stride: total / steps, prediction: config.prediction, clip_sample: config.clip_sample })
    }

    fn alpha(&self, timestep: f64) -> Result<f64> {
        let beyond = || Error::argument("timestep", format!("{timestep} is not in 0..{}", self.alphas.len()));
        if !(timestep.is_finite() && timestep >= 0.0) {
            return Err(beyond());
        }
        self.alphas.get(timestep as usize).copied().ok_or_else(beyond)
    }

    /// As an integer, and below 0 after the last step.
    fn previous(&self, index: usize) -> Result<f64> {
        let t = self
            .timesteps
            .get(index)
            .ok_or_else(|| Error::argument("step", format!("{index} is beyond the schedule's {} steps", self.timesteps.len())))?;
        Ok(t - self.stride as f64)
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn next_timestep(&self, index: usize) -> f64 {
        self.previous(index).map_or(0.0, |t| t.max(0.0))
    }

    fn add_noise(&self, clean: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let a = self.alpha(timestep)?;
        Ok(clean.times(a.sqrt())?.f_add(&noise.times((1.0 - a).sqrt())?)?)
    }

    fn step(&self, index: usize, prediction: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let previous = self.previous(index)?;
        let a = self.alpha(previous + self.stride as f64)?;
        let next = if previous >= 0.0 { self.alpha(previous)? } else { self.final_alpha };
        let (signal, noise) = (a.sqrt(), (1.0 - a).sqrt());
        let mix = |x: &Tensor, wx: f64, y: &Tensor, wy: f64| -> Result<Tensor> { Ok(x.times(wx)?.f_add(&y.times(wy)?)?) };
        let (mut clean, epsilon) = match self.prediction {
            // At pure noise (signal 0) the noise says nothing of the picture, and this is infinite, as in diffusers.
            Prediction::Epsilon => (mix(latents, 1.0 / signal, prediction, -noise / signal)?, prediction.shallow_clone()),
            Prediction::Sample => (prediction.shallow_clone(), mix(latents, 1.0 / noise, prediction, -signal / noise)?),
            Prediction::Velocity => (mix(latents, signal, prediction, -noise)?, mix(prediction, signal, latents, noise)?),
        };
        if let Some(limit) = self.clip_sample {
            clean = clean.within(-limit, limit)?;
        }
        mix(&clean, next.sqrt(), &epsilon, (1.0 - next).sqrt())
    }
}

fn timesteps(config: &DdimConfig, steps: usize) -> Vec<f64> {
    let total = config.train_timesteps as f64;
    match config.spacing {
        Spacing::Leading => {
            let stride = config.train_timesteps / steps;
            (0..steps).rev().map(|i| (i * stride) as f64 + config.steps_offset as f64).collect()
        }
        Spacing::Trailing => {
            // As numpy's arange gets there: a multiple of the difference of the first two, whose rounding decides some halves.
            let stride = (total - total / steps as f64) - total;
            (0..steps).map(|i| (total + i as f64 * stride).round_ties_even() - 1.0).collect()
        }
        Spacing::Linspace => {
            let gap = if steps > 1 { (total - 1.0) / (steps - 1) as f64 } else { 0.0 };
            (0..steps).rev().map(|i| (i as f64 * gap).round_ties_even()).collect()
        }
    }
}

/// Computed by libtorch in f32, as Python does: the roundings of a thousand factors add up.
fn alphas(config: &DdimConfig) -> Result<Vec<f64>> {
    let count = config.train_timesteps;
    for (name, beta) in [("beta_start", config.beta_start), ("beta_end", config.beta_end)] {
        if !(0.0..1.0).contains(&beta) {
            return Err(Error::argument(name, format!("{beta} is not in 0..1")));
        }
    }
    // On numbers that f32 holds, and on the CPU, this one cannot fail and so not panic (see `scalar`).
    #[allow(clippy::disallowed_methods)]
    let ramp = |start: f64, end: f64| Tensor::f_linspace(start, end, count as i64, (Kind::Float, Device::Cpu));
    let betas = match &config.beta_schedule {
        BetaSchedule::Linear => ramp(config.beta_start, config.beta_end)?,
        BetaSchedule::ScaledLinear => ramp(config.beta_start.sqrt(), config.beta_end.sqrt())?.f_square()?,
        BetaSchedule::SquaredCosine => {
            let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
            let at = |i: usize| i as f64 / count as f64;
            let betas: Vec<f64> = (0..count).map(|i| (1.0 - bar(at(i + 1)) / bar(at(i))).min(0.999)).collect();
            Tensor::f_from_slice(&betas)?.f_to_kind(Kind::Float)?
        }
        BetaSchedule::Trained(betas) if betas.len() == count => Tensor::f_from_slice(betas)?.f_to_kind(Kind::Float)?,
        BetaSchedule::Trained(betas) => {
            return Err(Error::argument("trained_betas", format!("{} values for {count} timesteps", betas.len())));
        }
    };
    let valid = betas.f_ge_tensor(&number(0.0)?)?.f_logical_and(&betas.f_lt_tensor(&number(1.0)?)?)?.f_all()?;
    if valid.f_int64_value(&[])? == 0 {
        return Err(Error::argument("betas", format!("{} .. {} lead outside of 0..1", config.beta_start, config.beta_end)));
    }
    let mut alphas = betas.f_neg()?.plus(1.0)?.f_cumprod(0, None)?;
    if config.rescale_zero_snr {
        alphas = rescaled_to_zero_snr(&alphas)?;
    }
    Ok(Vec::<f64>::try_from(alphas.f_to_kind(Kind::Double)?)?)
}

/// sqrt(a) shifted so that the last is 0 and scaled so that the first stays.
fn rescaled_to_zero_snr(alphas: &Tensor) -> Result<Tensor> {
    let roots = alphas.f_sqrt()?;
    let (first, last) = (roots.f_narrow(0, 0, 1)?, roots.f_narrow(0, -1, 1)?);
    let roots = roots.f_sub(&last)?.f_mul(&first.f_div(&first.f_sub(&last)?)?)?;
    // Through the betas and back, for the same roundings as in Python.
    let bar = roots.f_square()?;
    let count = bar.numel() as i64;
    let ratios = bar.f_narrow(0, 1, count - 1)?.f_div(&bar.f_narrow(0, 0, count - 1)?)?;
    let alphas = Tensor::f_cat(&[bar.f_narrow(0, 0, 1)?, ratios], 0)?;
    let betas = alphas.f_neg()?.plus(1.0)?;
    Ok(betas.f_neg()?.plus(1.0)?.f_cumprod(0, None)?)
}
