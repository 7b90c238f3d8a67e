//! Classifier-free guidance in one forward pass.

use super::{Condition, Control};
use crate::scalar::WithNumber;
use crate::{Denoiser, Guidance, PlainAttention, Result};
use tch::Tensor;

/// [`Denoiser::forward_guided`], negative and prompt in one batch, in this order; where their shapes do not allow it, or
/// their controls differ, one after the other.
pub(crate) fn forward<D>(network: &D, latents: &Tensor, timestep: f64, guidance: &Guidance<Condition>) -> Result<Tensor>
where
    D: Denoiser<Condition = Condition>,
{
    let pass = |latents: &Tensor, condition: &Condition| network.forward(latents, timestep, condition, &mut PlainAttention);
    let prompt = &guidance.prompt;
    let Some(negative) = guidance.negative.as_ref().filter(|_| guidance.scale != 1.0) else {
        return pass(latents, prompt);
    };
    let batch = latents.size().first().copied().unwrap_or(0);
    let (negative, prompt) = match joined(negative, prompt, batch)? {
        Some(both) => {
            let predicted = pass(&Tensor::f_cat(&[latents, latents], 0)?, &both)?;
            (predicted.f_narrow(0, 0, batch)?, predicted.f_narrow(0, batch, batch)?)
        }
        None => (pass(latents, negative)?, pass(latents, prompt)?),
    };
    let shift = prompt.f_sub(&negative)?.times(guidance.scale)?;
    Ok(negative.f_add(&shift)?)
}

/// Both conditions for a batch of latents that is there twice; none where they are not alike.
fn joined(first: &Condition, second: &Condition, batch: i64) -> Result<Option<Condition>> {
    let same_controls = first.controls.len() == second.controls.len() && first.controls.iter().zip(&second.controls).all(|(a, b)| a.same(b));
    let Some(text) = both(&first.text, &second.text, batch)?.filter(|_| same_controls) else { return Ok(None) };
    let (Some(pooled), Some(time_ids)) = (optional(&first.pooled, &second.pooled, batch)?, optional(&first.time_ids, &second.time_ids, batch)?)
    else {
        return Ok(None);
    };
    let controls = first.controls.iter().map(Control::doubled).collect::<Result<_>>()?;
    Ok(Some(Condition { text, pooled, time_ids, controls }))
}

/// `None` where only one is there, or they are not alike.
fn optional(first: &Option<Tensor>, second: &Option<Tensor>, batch: i64) -> Result<Option<Option<Tensor>>> {
    match (first, second) {
        (Some(first), Some(second)) => Ok(both(first, second, batch)?.map(Some)),
        (None, None) => Ok(Some(None)),
        _ => Ok(None),
    }
}

/// One after the other, each once per latents.
fn both(first: &Tensor, second: &Tensor, batch: i64) -> Result<Option<Tensor>> {
    let alike = |x: &Tensor| Ok::<_, crate::Error>((x.size().get(1..).map(<[i64]>::to_vec), x.f_kind()?, x.device()));
    let fits = |x: &Tensor| matches!(x.size().first(), Some(&rows) if rows == 1 || rows == batch);
    if !fits(first) || !fits(second) || alike(first)? != alike(second)? {
        return Ok(None);
    }
    let rows = |x: &Tensor| {
        let mut sides = vec![-1; x.dim()];
        if let Some(rows) = sides.first_mut() {
            *rows = batch;
        }
        x.f_expand(sides.as_slice(), false)
    };
    Ok(Some(Tensor::f_cat(&[rows(first)?, rows(second)?], 0)?))
}
