//! A control picture on its way into a model: by which ControlNet, how strongly, and when.

use super::controlnet::Residuals;
use super::{Condition, ControlNet, StableDiffusion};
use crate::{image, Error, Guidance, Result};
use std::ops::RangeInclusive;
use tch::Tensor;

/// A picture as one ControlNet of a [`StableDiffusion`] sees it, from [`StableDiffusion::control`]; of use to that model
/// only. A [`Condition`] takes any number: what they add to the network sums up.
#[derive(Debug)]
#[non_exhaustive]
pub struct Control {
    net: usize,
    hint: Tensor,
    strength: f64,
    /// Whether its ControlNet pools what it sees: it was trained to steer the prompt alone.
    pooled: bool,
    /// From the lowest timestep to the highest.
    timesteps: RangeInclusive<f64>,
}

impl Control {
    /// Before a model is opened: what [`with_strength`](Self::with_strength) and [`between`](Self::between) would refuse, whatever
    /// the timesteps.
    ///
    /// # Errors
    /// [`Error::Argument`] as theirs.
    pub fn check(strength: f64, start: f64, end: f64) -> Result<()> {
        check_strength(strength)?;
        if 0.0 <= start && start < end && end <= 1.0 {
            return Ok(());
        }
        Err(Error::argument("control", format!("it begins at {start} and ends at {end} of the steps; 0 <= start < end <= 1 is possible")))
    }

    /// Times what the ControlNet adds; 1 without this, as it was trained, and 0 is without effect.
    ///
    /// # Errors
    /// [`Error::Argument`] for a strength that is negative or not finite.
    pub fn with_strength(mut self, strength: f64) -> Result<Self> {
        check_strength(strength)?;
        self.strength = strength;
        Ok(self)
    }

    /// In a part of a run only: `start` and `end` are fractions of its steps, 0 to 1, and of `n` steps the `i`-th, from 0,
    /// has the control unless `i / n < start` or `(i + 1) / n > end`.
    ///
    /// What it comes to is a range of timesteps, for a [`Denoiser`](crate::Denoiser) is told the timestep, not the step:
    /// `timesteps` are those of the run, and all from the first to the last that has the control, and between, have it. A
    /// range from 0 or to 1 is open at that end.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `0 <= start < end <= 1`, and for timesteps that are none or not finite.
    pub fn between(mut self, start: f64, end: f64, timesteps: &[f64]) -> Result<Self> {
        Self::check(self.strength, start, end)?;
        if timesteps.is_empty() || !timesteps.iter().all(|t| t.is_finite()) {
            return Err(Error::argument("timesteps", "are none, or not all of them finite"));
        }
        let count = timesteps.len() as f64;
        let acts = |i: usize| !((i as f64) / count < start || (i as f64 + 1.0) / count > end);
        let acting = timesteps.iter().enumerate().filter(|(i, _)| acts(*i)).map(|(_, &t)| t);
        let (low, high) = acting.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), t| (t.min(low), t.max(high)));
        if low > high {
            tracing::warn!(start, end, steps = timesteps.len(), "no step lies within this part of the run: the control is without effect");
        }
        let open_high = start == 0.0 && low <= high;
        let open_low = end == 1.0 && low <= high;
        self.timesteps = if open_low { f64::NEG_INFINITY } else { low }..=if open_high { f64::INFINITY } else { high };
        Ok(self)
    }

    /// Which ControlNet, as [`StableDiffusion::add_controlnet`] numbered it.
    pub fn net(&self) -> usize {
        self.net
    }

    /// See [`with_strength`](Self::with_strength).
    pub fn strength(&self) -> f64 {
        self.strength
    }

    /// Whether it has an effect at this timestep.
    pub fn acts_at(&self, timestep: f64) -> bool {
        self.strength > 0.0 && self.timesteps.contains(&timestep)
    }

    /// A second handle on the same tensor.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self { hint: self.hint.shallow_clone(), timesteps: self.timesteps.clone(), ..*self }
    }

    /// Whether both do the same to the same latents.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let settings = |control: &Self| (control.net, control.strength, control.timesteps.clone());
        settings(self) == settings(other) && self.hint.data_ptr() == other.hint.data_ptr() && self.hint.size() == other.hint.size()
    }

    /// How many pictures it is of; 1 serves any batch.
    pub(crate) fn batch(&self) -> i64 {
        self.hint.size().first().copied().unwrap_or(1)
    }

    /// For latents that are there twice, one batch after the other.
    pub(crate) fn doubled(&self) -> Result<Self> {
        let mut control = self.shallow_clone();
        if control.hint.size4()?.0 != 1 {
            control.hint = Tensor::f_cat(&[&self.hint, &self.hint], 0)?;
        }
        Ok(control)
    }
}

pub(crate) fn check_strength(strength: f64) -> Result<()> {
    if strength.is_finite() && strength >= 0.0 {
        Ok(())
    } else {
        Err(Error::argument("strength", format!("{strength} of a control; it must be a finite number of at least 0")))
    }
}

fn unknown(net: usize, nets: &[Option<ControlNet>]) -> Error {
    let count = nets.iter().flatten().count();
    Error::argument("ControlNet", format!("ControlNet {net} is not in the model: it has {count}, by the numbers that `add_controlnet` returned"))
}

impl Guidance<Condition> {
    /// With one control picture more, for the prompt and the negative, as diffusers' pipelines have it: both are then one
    /// batch. That of a ControlNet that pools what it sees (shuffle) steers the prompt alone.
    #[must_use]
    pub fn with_control(mut self, control: &Control) -> Self {
        self.prompt = self.prompt.with_control(control.shallow_clone());
        if !control.pooled {
            self.negative = self.negative.map(|negative| negative.with_control(control.shallow_clone()));
        }
        self
    }
}

impl StableDiffusion {
    /// Takes a ControlNet in and returns its number, for [`control`](Self::control). Its borders meet where the
    /// [model's](Self::set_seamless) do.
    ///
    /// # Errors
    /// [`Error::Config`] for one of another kind of model, as SDXL's for Stable Diffusion 1.5; one on another device.
    pub fn add_controlnet(&mut self, mut net: ControlNet) -> Result<usize> {
        net.check_fits(&self.unet, self.vae.factor())?;
        net.set_seamless(self.seamless);
        self.controlnets.push(Some(net));
        Ok(self.controlnets.len() - 1)
    }

    /// Takes the ControlNet of this number out again, to free its memory or to add it to another model. The others keep their numbers, and
    /// its own is not used again: what was made by [`control`](Self::control) with it is refused from here on.
    ///
    /// # Errors
    /// [`Error::Argument`] for a number that is not known.
    pub fn remove_controlnet(&mut self, net: usize) -> Result<ControlNet> {
        let found = self.controlnets.get_mut(net).and_then(Option::take);
        found.ok_or_else(|| unknown(net, &self.controlnets))
    }

    /// What steers pictures of `(height, width)` pixels by a control picture `(1 or batch, 3, height, width)` with values 0
    /// to 1, such as [`image::canny`] draws, through the ControlNet of this number: for [`Guidance::with_control`].
    ///
    /// The size is cut as by [`fit`](Self::fit). A picture of another size is scaled to it, which `tracing` reports.
    ///
    /// # Errors
    /// A number that is not known; what is not a picture; as [`fit`](Self::fit).
    pub fn control(&self, net: usize, picture: &Tensor, size: (i64, i64)) -> Result<Control> {
        let network = self.controlnet(net)?;
        let (wanted, found) = (self.fit(size)?, image::size(picture)?);
        if found != wanted {
            let pixels = |(height, width): (i64, i64)| format!("{width}x{height}");
            tracing::warn!(
                picture = pixels(found),
                output = pixels(wanted),
                "the control picture has another size than the output and is scaled to it"
            );
        }
        let hint = tch::no_grad(|| network.embed(&image::resize(picture, wanted)?))?;
        Ok(Control { net, hint, strength: 1.0, pooled: network.pools(), timesteps: f64::NEG_INFINITY..=f64::INFINITY })
    }

    fn controlnet(&self, net: usize) -> Result<&ControlNet> {
        self.controlnets.get(net).and_then(Option::as_ref).ok_or_else(|| unknown(net, &self.controlnets))
    }

    /// What the condition's controls add at this timestep, which is there as a number and as a tensor.
    pub(super) fn residuals(&self, latents: &Tensor, timestep: (f64, &Tensor), condition: &Condition) -> Result<Option<Residuals>> {
        let mut sum: Option<Residuals> = None;
        for control in &condition.controls {
            let net = self.controlnet(control.net)?;
            if control.acts_at(timestep.0) {
                let residuals = net.residuals(latents, timestep.1, condition, &control.hint, control.strength)?;
                sum = Some(match sum {
                    Some(sum) => sum.and(&residuals)?,
                    None => residuals,
                });
            }
        }
        Ok(sum)
    }
}
