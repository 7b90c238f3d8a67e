//! The network as a measure of pictures: four calls make the method, and the runs are loops over them.

use crate::attention::without_cudnn_on;
use crate::scalar::WithNumber;
use crate::{Denoiser, Error, FeatureRecorder, Features, Loss, Optimizer, References, Result};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Gradients of a mean over a million features are below f16's smallest number; the loss is scaled by this at most
/// before the backward pass of an f16 network, and the gradient back afterwards, in f32.
const HALF_LOSS_SCALE: f64 = 65536.0;

/// A power of two, which rounds nothing. Those of a mean over few features, of a small layer, would be above f16's largest number on
/// their way through the network: they start from the losses' weights at most.
fn half_loss_scale(features: &Features) -> f64 {
    let fewest = features.layers().map(|layer| layer.query.numel()).min().unwrap_or(1).max(1);
    HALF_LOSS_SCALE.min(f64::from(1_u32 << fewest.ilog2().min(30)))
}

/// A network, seen through some of its self-attention layers under the null prompt.
#[derive(Debug)]
pub struct FeatureExtractor<D: Denoiser> {
    /// A network, or any pointer to one.
    pub denoiser: D,
    /// The null prompt.
    pub condition: D::Condition,
    /// Self-attention layers, counted in execution order from 0. The paper's are the last six.
    pub layers: Range<usize>,
}

impl<D: Denoiser> FeatureExtractor<D> {
    /// A network under its null prompt.
    pub fn new(denoiser: D, condition: D::Condition, layers: Range<usize>) -> Self {
        Self { denoiser, condition, layers }
    }

    /// The features of latents at a timestep: one forward pass that ends after the last of the layers. Differentiable
    /// where `latents` is.
    ///
    /// # Errors
    /// As [`Features::extract`].
    pub fn extract(&self, latents: &Tensor, timestep: f64) -> Result<Features> {
        check_timestep(timestep)?;
        without_cudnn_on(latents.device());
        Features::extract(&self.denoiser, latents, timestep, &self.condition, self.layers.clone())
    }

    /// The features of references, without a graph: one forward pass each, which ends before the last layer's
    /// [output](crate::LayerFeatures::output), and none for what is in a style's [cache](crate::FeatureCache). Styles of weight 0 are left out.
    /// Those of one size share passes where the network [takes several](Denoiser::references_at_once) and no style has a cache.
    ///
    /// # Errors
    /// As [`Features::extract`]; a cache that holds the features of another style.
    pub fn references(&self, latents: &References, timestep: f64) -> Result<References<Features>> {
        if let Some(features) = self.in_few_passes(latents, timestep)? {
            return Ok(features);
        }
        let mut features = latents.try_map_styles(|style| match &style.cache {
            Some(cache) => cache.features(&style.of, timestep, &self.layers, || self.reference(&style.of, timestep)),
            None => self.reference(&style.of, timestep),
        })?;
        features.content = latents.content.as_ref().map(|content| self.reference(content, timestep)).transpose()?;
        Ok(features)
    }

    /// The same with several references in a pass. None where the network does not take so many, or they do not go together.
    fn in_few_passes(&self, latents: &References, timestep: f64) -> Result<Option<References<Features>>> {
        let at_once = self.denoiser.references_at_once();
        let cached = latents.counted().any(|style| style.cache.is_some());
        let all: Vec<&Tensor> = latents.counted().map(|style| &style.of).chain(&latents.content).collect();
        let alike = all.windows(2).all(|pair| matches!(pair, [a, b] if a.size() == b.size() && a.f_kind().ok() == b.f_kind().ok()));
        if at_once < 2 || cached || !alike || all.len() < 2 || self.denoiser.condition_batch(&self.condition) != 1 {
            return Ok(None);
        }
        let batch = all.first().and_then(|one| one.size().first().copied()).unwrap_or(1);
        let mut parts = vec![];
        for some in all.chunks(at_once) {
            let features = self.reference(&Tensor::f_cat(some, 0)?, timestep)?;
            for (_, start) in some.iter().zip((0..).step_by(usize::try_from(batch).unwrap_or(1).max(1))) {
                parts.push(features.narrow(start..start + batch)?);
            }
        }
        let mut parts = parts.into_iter();
        latents.try_map_counted(|_| parts.next().ok_or_else(|| Error::argument("references", "are more than their features"))).map(Some)
    }

    /// The features of one reference.
    pub(crate) fn reference(&self, latents: &Tensor, timestep: f64) -> Result<Features> {
        check_timestep(timestep)?;
        without_cudnn_on(latents.device());
        let recorder = FeatureRecorder::new(self.layers.clone()).without_outputs();
        tch::no_grad(|| recorder.record(&self.denoiser, latents, timestep, &self.condition))
    }

    /// The loss (a scalar, still on its device) and its gradient by `latents` (in their shape and kind): one forward
    /// and one backward pass. Works inside `tch::no_grad`, too.
    ///
    /// # Errors
    /// As [`Features::extract`] and [`Loss::evaluate`].
    pub fn gradient(&self, latents: &Tensor, timestep: f64, references: &References<Features>, loss: &dyn Loss) -> Result<(Tensor, Tensor)> {
        check_timestep(timestep)?;
        without_cudnn_on(latents.device());
        let mut scale = 1.0;
        let mut evaluate = |features: &Features| {
            let value = loss.evaluate(features, references)?;
            if features.layers().any(|layer| matches!(layer.query.f_kind(), Ok(Kind::Half))) {
                scale = half_loss_scale(features);
                return value.times(scale);
            }
            Ok(value)
        };
        let (value, gradient) = self.denoiser.gradient(latents, timestep, &self.condition, self.layers.clone(), &mut evaluate)?;
        if scale == 1.0 {
            return Ok((value, gradient));
        }
        Ok((value.over(scale)?, gradient.over(scale)?))
    }

    /// One step of `optimizer` on `latents`, in place; returns the loss before it (a scalar, still on its device).
    ///
    /// # Errors
    /// As [`gradient`](Self::gradient) and [`Optimizer::step`]; the latents are then as they were. An optimizer that changes their
    /// shape: they then have their shape again, but perhaps other values.
    pub fn descend(
        &self,
        latents: &mut Tensor,
        timestep: f64,
        references: &References<Features>,
        loss: &dyn Loss,
        optimizer: &mut dyn Optimizer,
    ) -> Result<Tensor> {
        let (value, gradient) = self.gradient(latents, timestep, references, loss)?;
        let (before, size) = (latents.f_detach()?, latents.size());
        optimizer.step(latents, &gradient)?;
        if latents.size() != size {
            let found = latents.size();
            *latents = before;
            return Err(Error::shape("latents after the optimizer's step", format!("{size:?}, as before it"), found));
        }
        Ok(value)
    }
}

pub(crate) fn check_timestep(timestep: f64) -> Result<()> {
    if timestep.is_finite() {
        Ok(())
    } else {
        Err(Error::argument("timestep", format!("{timestep} is not a number")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionHook, AttentionSite, Qkv, Style};
    use tch::Device;

    /// One layer of attention among the pixels, for conditions of this batch.
    struct Net(Kind, i64);

    impl Denoiser for Net {
        type Condition = ();

        fn forward(&self, latents: &Tensor, timestep: f64, (): &(), hook: &mut dyn AttentionHook) -> Result<Tensor> {
            let (_, _, height, width) = latents.size4()?;
            let tokens = latents.times(1.0 + timestep / 1000.0)?.f_to_kind(self.0)?.f_flatten(2, 3)?.f_transpose(1, 2)?.f_unsqueeze(1)?;
            let (query, key) = (tokens.f_sin()?, tokens.f_cos()?);
            hook.attend(&AttentionSite::self_attention(0, (height, width)), Qkv::new(query, key, tokens))
        }

        fn references_at_once(&self) -> usize {
            2
        }

        fn condition_batch(&self, (): &()) -> i64 {
            self.1
        }
    }

    fn picture(batch: i64, phase: f64) -> Result<Tensor> {
        let numbers = Tensor::f_arange(batch * 4 * 6 * 5, (Kind::Float, Device::Cpu))?;
        Ok(numbers.times(0.7)?.plus(phase)?.f_sin()?.f_view([batch, 4, 6, 5])?)
    }

    /// Three, so in two passes, of pairs of pictures.
    #[test]
    fn passes_of_several_find_what_one_for_each_does() -> Result<()> {
        tch::set_num_threads(1);
        let extractor = FeatureExtractor::new(Net(Kind::Float, 1), (), 0..1);
        let unseen = Style::new(picture(2, 9.0)?).with_weight(0.0);
        let styles = [Style::new(picture(2, 0.0)?), unseen, Style::new(picture(2, 1.0)?).with_weight(0.5)];
        let references = References::styles(styles).with_content(picture(2, 2.0)?);
        let together = extractor.references(&references, 400.0)?;
        let alone = references.try_map_counted(|latents| extractor.reference(latents, 400.0))?;
        let all = |found: &References<Features>| -> Vec<Tensor> {
            let features = found.styles.iter().map(|style| &style.of).chain(&found.content);
            features.flat_map(Features::tensors).map(Tensor::shallow_clone).collect()
        };
        assert_eq!(together.styles.iter().map(|style| style.weight).collect::<Vec<_>>(), [1.0, 0.5]);
        let (together, alone) = (all(&together), all(&alone));
        assert_eq!((alone.len(), together.len()), (9, 9));
        for (ours, theirs) in together.iter().zip(&alone) {
            assert!(ours.f_allclose(theirs, 1e-6, 1e-6, false)?);
        }
        Ok(())
    }

    #[test]
    fn what_does_not_go_together_is_left_to_passes_of_its_own() -> Result<()> {
        tch::set_num_threads(1);
        let few = |batch, references: &References| {
            let extractor = FeatureExtractor::new(Net(Kind::Float, batch), (), 0..1);
            Ok::<_, Error>(extractor.in_few_passes(references, 400.0)?.is_some())
        };
        let pair = References::style(picture(2, 0.0)?).with_content(picture(2, 1.0)?);
        assert!(few(1, &pair)?);
        assert!(!few(2, &pair)?);
        assert!(!few(1, &References::style(picture(1, 0.0)?))?);
        assert!(!few(1, &References::style(picture(1, 0.0)?).with_content(picture(2, 1.0)?))?);
        assert!(!few(1, &References::style(picture(1, 0.0)?).with_content(picture(1, 1.0)?.f_to_kind(Kind::Double)?))?);
        let cached = Style::new(picture(1, 0.0)?).with_cache(crate::FeatureCache::new(1 << 20));
        assert!(!few(1, &References::styles([cached]).with_content(picture(1, 1.0)?))?);
        Ok(())
    }

    /// 65536 for all: with the 120 numbers of this layer, and a weight that a user may well choose, f16 has no number for it.
    #[test]
    fn gradients_of_small_layers_are_numbers_in_f16() -> Result<()> {
        tch::set_num_threads(1);
        let gradient = |kind| {
            let extractor = FeatureExtractor::new(Net(kind, 1), (), 0..1);
            let references = extractor.references(&References::default().with_content(picture(1, 2.0)?), 400.0)?;
            let loss = crate::TotalLoss::default().plus(200.0, crate::ContentLoss);
            Ok::<_, Error>(extractor.gradient(&picture(1, 1.0)?, 400.0, &references, &loss)?.1)
        };
        let (half, single) = (gradient(Kind::Half)?, gradient(Kind::Float)?);
        assert!(half.f_allclose(&single, 1e-2, 1e-3, false)?, "{half:?} {single:?}");
        Ok(())
    }
}
