//! Watching a run for infinite or NaN latents, without making a GPU wait.

use crate::scalar::integer;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// On the CPU each step is looked at. On a GPU looking would cost a wait in each step, so there the answer stays on the
/// device until it is asked for, and steps after the first unsound one change nothing.
#[derive(Debug, Default)]
pub(crate) struct Soundness {
    /// 0 while all is sound, else the first step (from 1) that was not.
    unsound: Option<Tensor>,
    /// Tests defer on the CPU, too.
    always_deferred: bool,
}

impl Soundness {
    /// The latents to go on with after a step (counted from 1): `after` if it and the loss, where there is one, are sound.
    ///
    /// # Errors
    /// [`Error::NotFinite`], on the CPU.
    pub(crate) fn judge(&mut self, before: &Tensor, after: Tensor, loss: Option<&Tensor>, step: usize, timestep: f64) -> Result<Tensor> {
        if !(after.device().is_cuda() || self.always_deferred) {
            let at = |what| Error::NotFinite { what, step, timestep };
            if let Some(loss) = loss {
                if !loss.f_double_value(&[])?.is_finite() {
                    return Err(at("loss"));
                }
            }
            return if after.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1 { Ok(after) } else { Err(at("latents")) };
        }
        let mut sound = after.f_isfinite()?.f_all()?;
        if let Some(loss) = loss {
            sound = sound.f_logical_and(&loss.f_isfinite()?)?;
        }
        let now = sound.f_logical_not()?.f_to_kind(Kind::Int64)?.f_mul(&integer(i64::try_from(step).unwrap_or(i64::MAX))?)?;
        let unsound = match &self.unsound {
            Some(earlier) => now.f_where_self(&earlier.f_eq_tensor(&integer(0)?)?, earlier)?,
            None => now,
        };
        let kept = after.f_where_self(&unsound.f_eq_tensor(&integer(0)?)?, before)?;
        self.unsound = Some(unsound);
        Ok(kept)
    }

    /// The first unsound step, from 1, which is then forgotten. Waits for a GPU.
    pub(crate) fn first_unsound(&mut self) -> Result<Option<usize>> {
        let Some(unsound) = &self.unsound else { return Ok(None) };
        let step = usize::try_from(unsound.f_int64_value(&[])?).unwrap_or(0);
        if step == 0 {
            return Ok(None);
        }
        self.unsound = None;
        Ok(Some(step))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::scalar::WithNumber;
    use crate::{AttentionHook, AttentionSite, Denoiser, Qkv};
    use std::cell::Cell;

    /// As on a GPU.
    pub(crate) fn deferred() -> Soundness {
        Soundness { always_deferred: true, ..Soundness::default() }
    }

    /// A layer of attention among the pixels. In f64, so that two runs are the same up to a rounding of f32.
    #[derive(Default)]
    pub(crate) struct Net {
        /// At this timestep all is NaN.
        pub(crate) nan_at: Cell<Option<f64>>,
    }

    impl Denoiser for Net {
        type Condition = ();

        fn forward(&self, latents: &Tensor, timestep: f64, (): &(), hook: &mut dyn AttentionHook) -> Result<Tensor> {
            let (_, _, height, width) = latents.size4()?;
            let scale = if self.nan_at.get() == Some(timestep) { f64::NAN } else { 1.0 + timestep / 1000.0 };
            let tokens = latents.f_to_kind(Kind::Double)?.times(scale)?.f_flatten(2, 3)?.f_transpose(1, 2)?.f_unsqueeze(1)?;
            let qkv = Qkv::new(tokens.f_sin()?, tokens.f_cos()?, tokens);
            let attended = hook.attend(&AttentionSite::self_attention(0, (height, width)), qkv)?;
            Ok(attended.f_squeeze_dim(1)?.f_transpose(1, 2)?.f_reshape(latents.size())?.f_to_kind(Kind::Float)?)
        }
    }

    /// Of two runs that do the same work; NaN is like nothing.
    pub(crate) fn alike(a: &Tensor, b: &Tensor) -> Result<bool> {
        Ok(a.f_allclose(b, 0.0, 1e-5, false)?)
    }

    fn number(value: f32) -> Tensor {
        Tensor::from(value)
    }

    #[test]
    fn the_first_unsound_step_is_kept_and_later_ones_change_nothing() -> Result<()> {
        tch::set_num_threads(1);
        let mut watch = deferred();
        let one = watch.judge(&number(0.0), number(1.0), Some(&number(0.5)), 1, 901.0)?;
        assert_eq!(one.double_value(&[]), 1.0);
        assert_eq!(watch.first_unsound()?, None);
        for (step, after, loss) in [(2, f32::NAN, 0.5), (3, f32::INFINITY, f32::NAN), (4, 7.0, 0.5)] {
            let kept = watch.judge(&one, number(after), Some(&number(loss)), step, 801.0)?;
            assert_eq!(kept.double_value(&[]), 1.0, "step {step}");
        }
        assert_eq!(watch.first_unsound()?, Some(2));
        assert_eq!(watch.first_unsound()?, None, "forgotten once it was told");
        let without_loss = watch.judge(&one, number(f32::NAN), None, 5, 701.0)?;
        assert_eq!((without_loss.double_value(&[]), watch.first_unsound()?), (1.0, Some(5)));
        let loss_alone = watch.judge(&one, number(2.0), Some(&number(f32::NAN)), 5, 701.0)?;
        assert_eq!((loss_alone.double_value(&[]), watch.first_unsound()?), (1.0, Some(5)));
        Ok(())
    }

    #[test]
    fn on_the_cpu_the_step_itself_fails() {
        tch::set_num_threads(1);
        let mut watch = Soundness::default();
        let bad_loss = watch.judge(&number(0.0), number(1.0), Some(&number(f32::NAN)), 3, 701.0);
        assert!(matches!(bad_loss, Err(Error::NotFinite { what: "loss", step: 3, .. })));
        let bad_latents = watch.judge(&number(0.0), number(f32::INFINITY), Some(&number(1.0)), 4, 601.0);
        assert!(matches!(bad_latents, Err(Error::NotFinite { what: "latents", step: 4, .. })));
        assert!(watch.judge(&number(0.0), number(f32::NAN), None, 5, 501.0).is_err());
    }
}
