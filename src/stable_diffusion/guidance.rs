//! Classifier-free guidance in one forward pass.

use super::{Condition, Control};
use crate::{Denoiser, Guidance, PlainAttention, Result};
use tch::Tensor;

/// [`Denoiser::forward_guided`] by [`in_one_pass`].
pub(crate) fn forward<D>(network: &D, latents: &Tensor, timestep: f64, guidance: &Guidance<Condition>) -> Result<Tensor>
where
    D: Denoiser<Condition = Condition>,
{
    in_one_pass(latents, guidance, |latents, condition| network.forward(latents, timestep, condition, &mut PlainAttention))
}

/// Negative and prompt in one batch, in this order; where their shapes do not allow it, or their controls differ, one after the
/// other.
pub(crate) fn in_one_pass(latents: &Tensor, guidance: &Guidance<Condition>, pass: impl Fn(&Tensor, &Condition) -> Result<Tensor>) -> Result<Tensor> {
    let prompt = &guidance.prompt;
    let Some(negative) = guidance.active_negative().filter(|negative| !negative.is(prompt)) else {
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
    guidance.combine(&prompt, &negative)
}

/// Both conditions for a batch of latents that is there twice; none where they are not alike.
fn joined(first: &Condition, second: &Condition, batch: i64) -> Result<Option<Condition>> {
    let Some(text) = both(&first.text, &second.text, batch)?.filter(|_| first.same_controls(second)) else { return Ok(None) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scalar::WithNumber;
    use crate::AttentionHook;
    use std::cell::RefCell;

    /// Notes how many latents each pass has.
    #[derive(Default)]
    struct Network(RefCell<Vec<i64>>);

    impl Denoiser for Network {
        type Condition = Condition;

        fn forward(&self, latents: &Tensor, _: f64, condition: &Condition, _: &mut dyn AttentionHook) -> Result<Tensor> {
            let batch = latents.size4()?.0;
            self.0.borrow_mut().push(batch);
            let text = condition.text.f_mean_dim(Some([1_i64, 2].as_slice()), false, None)?.f_view([-1, 1, 1, 1])?;
            Ok(latents.f_mul(&text)?)
        }
    }

    fn text(tokens: i64, value: f64) -> Result<Condition> {
        Ok(Condition::new(Tensor::f_ones([1, tokens, 2], (tch::Kind::Float, tch::Device::Cpu))?.times(value)?))
    }

    #[test]
    fn one_pass_where_it_can_be_one() -> Result<()> {
        tch::set_num_threads(1);
        let latents = Tensor::f_ones([2, 1, 1, 1], (tch::Kind::Float, tch::Device::Cpu))?;
        let ids = || Tensor::f_ones([1, 6], (tch::Kind::Float, tch::Device::Cpu));
        for (prompt, negative, scale, passes, wanted) in [
            (text(5, 3.0)?, Some(text(5, 1.0)?), 2.0, vec![4], 5.0),
            (text(5, 3.0)?, Some(text(5, 1.0)?), 0.5, vec![4], 2.0),
            (text(5, 3.0)?, Some(text(5, 1.0)?), 0.0, vec![4], 1.0),
            (text(5, 3.0)?, Some(text(6, 1.0)?), 2.0, vec![2, 2], 5.0),
            (text(5, 3.0)?, Some(text(5, 1.0)?.with_pooled(ids()?, ids()?)), 2.0, vec![2, 2], 5.0),
            (text(5, 3.0)?, Some(text(5, 1.0)?), 1.0, vec![2], 3.0),
            (text(5, 3.0)?, None, 2.0, vec![2], 3.0),
        ] {
            let network = Network::default();
            let predicted = forward(&network, &latents, 1.0, &Guidance { prompt, negative, scale })?;
            assert_eq!(Vec::<f32>::try_from(predicted.f_view([-1])?)?, [wanted, wanted]);
            assert_eq!(*network.0.borrow(), passes);
        }
        Ok(())
    }

    /// Known by their storage; equal numbers elsewhere are not looked at.
    #[test]
    fn a_negative_that_is_the_prompt_costs_nothing() -> Result<()> {
        tch::set_num_threads(1);
        let latents = Tensor::f_ones([1, 1, 1, 1], (tch::Kind::Float, tch::Device::Cpu))?;
        let prompt = text(5, 3.0)?;
        for (negative, passes) in [(prompt.shallow_clone(), vec![1]), (text(5, 3.0)?, vec![2])] {
            let network = Network::default();
            let predicted = forward(&network, &latents, 1.0, &Guidance::new(prompt.shallow_clone(), negative, 2.0)?)?;
            assert_eq!((predicted.f_double_value(&[0, 0, 0, 0])?, network.0.take()), (3.0, passes));
        }
        Ok(())
    }
}
