//! What a network sees in a picture: Q, K, V and output of some of its self-attention layers.

use crate::{attention::scaled_dot_product, AttentionHook, AttentionKind, AttentionSite, Denoiser, Error, PlainAttention, Qkv, Result};
use std::cell::OnceCell;
use std::ops::Range;
use tch::Tensor;

/// One self-attention layer's queries, keys, values and output, each `(batch, heads, tokens, head_dim)` in the
/// network's kind.
#[derive(Debug)]
#[non_exhaustive]
pub struct LayerFeatures {
    /// Which layer, and its grid of tokens.
    pub site: AttentionSite,
    /// Q.
    pub query: Tensor,
    /// K.
    pub key: Tensor,
    /// V.
    pub value: Tensor,
    /// The network's own scale of the scores; none is `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    output: OnceCell<Tensor>,
}

impl LayerFeatures {
    /// `Attn(Q, K, V)`, before heads are merged and projected. A reference's, which the losses of the paper do not look at, is
    /// computed when it is first asked for.
    ///
    /// # Errors
    /// libtorch's.
    pub fn output(&self) -> Result<&Tensor> {
        if let Some(output) = self.output.get() {
            return Ok(output);
        }
        let output = scaled_dot_product(&self.query, &self.key, &self.value, None, self.scale)?;
        Ok(self.output.get_or_init(|| output))
    }

    fn try_map(&self, f: &mut impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let (query, key, value) = (f(&self.query)?, f(&self.key)?, f(&self.value)?);
        let output = self.output.get().map(f).transpose()?.map_or_else(OnceCell::new, OnceCell::from);
        Ok(Self { site: self.site, query, key, value, scale: self.scale, output })
    }
}

/// The recorded layers of one forward pass, in execution order.
#[derive(Debug, Default)]
pub struct Features(Vec<LayerFeatures>);

impl Features {
    /// One forward pass up to the last of `layers` (self-attention layers, counted in execution order from 0).
    /// Differentiable where `latents` is; under `tch::no_grad` no graph is kept.
    ///
    /// # Errors
    /// An empty range; [`Error::MissingLayers`] where the network has not so many; whatever the denoiser returns.
    pub fn extract<D: Denoiser + ?Sized>(
        denoiser: &D,
        latents: &Tensor,
        timestep: f64,
        condition: &D::Condition,
        layers: Range<usize>,
    ) -> Result<Self> {
        FeatureRecorder::new(layers).record(denoiser, latents, timestep, condition)
    }

    /// In execution order.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &LayerFeatures> {
        self.0.iter()
    }

    /// The layer recorded at this place of the network.
    pub fn at(&self, site: &AttentionSite) -> Option<&LayerFeatures> {
        self.0.iter().find(|layer| layer.site.index == site.index && layer.site.kind == site.kind)
    }

    /// All tensors that are there.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.0.iter().flat_map(|layer| [&layer.query, &layer.key, &layer.value].into_iter().chain(layer.output.get()))
    }

    /// How many layers.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no layer was recorded.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each tensor through `f`: to another device, into storage of its own, a slice of the batch. An output that is not
    /// [computed yet](LayerFeatures::output) will be that of the new queries, keys and values.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn try_map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        self.0.iter().map(|layer| layer.try_map(&mut f)).collect::<Result<_>>().map(Self)
    }

    /// The same features for some of the batch (views, no copies).
    ///
    /// # Errors
    /// A range outside of the batch.
    pub fn narrow(&self, batch: Range<i64>) -> Result<Self> {
        if batch.start < 0 || batch.end < batch.start {
            return Err(Error::argument("batch", format!("{}..{} is no range of it", batch.start, batch.end)));
        }
        self.try_map(|t| Ok(t.f_narrow(0, batch.start, batch.end - batch.start)?))
    }

    /// A second handle on the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let twin = |layer: &LayerFeatures| LayerFeatures {
            site: layer.site,
            query: layer.query.shallow_clone(),
            key: layer.key.shallow_clone(),
            value: layer.value.shallow_clone(),
            scale: layer.scale,
            output: layer.output.get().map(Tensor::shallow_clone).map_or_else(OnceCell::new, OnceCell::from),
        };
        Self(self.0.iter().map(twin).collect())
    }
}

pub(crate) fn check_layers(layers: &Range<usize>) -> Result<()> {
    if layers.is_empty() {
        return Err(Error::argument("layers", format!("{}..{} is empty", layers.start, layers.end)));
    }
    Ok(())
}

/// Records the self-attention layers in a range, then stops the pass.
#[derive(Debug)]
pub struct FeatureRecorder<H = PlainAttention> {
    layers: Range<usize>,
    features: Features,
    /// Self-attention layers that came by so far.
    network: usize,
    /// Whether outputs are left to be computed by whoever asks.
    without_outputs: bool,
    inner: H,
}

impl FeatureRecorder {
    /// For layers counted in execution order from 0.
    pub fn new(layers: Range<usize>) -> Self {
        Self { layers, features: Features::default(), network: 0, without_outputs: false, inner: PlainAttention }
    }

    /// For references: outputs are not kept, and the last layer's is not even computed.
    pub(crate) fn without_outputs(mut self) -> Self {
        self.without_outputs = true;
        self
    }

    /// One forward pass, as far as there are layers to record.
    pub(crate) fn record<D: Denoiser + ?Sized>(
        mut self,
        denoiser: &D,
        latents: &Tensor,
        timestep: f64,
        condition: &D::Condition,
    ) -> Result<Features> {
        check_layers(&self.layers)?;
        let outcome = denoiser.forward(latents, timestep, condition, &mut self);
        self.after(outcome)
    }
}

impl<H> FeatureRecorder<H> {
    /// Lets another hook compute the attention that is recorded.
    pub fn around<I: AttentionHook>(self, inner: I) -> FeatureRecorder<I> {
        let Self { layers, features, network, without_outputs, inner: _ } = self;
        FeatureRecorder { layers, features, network, without_outputs, inner }
    }

    /// Whether all layers of the range were recorded.
    pub fn is_complete(&self) -> bool {
        self.features.len() == self.layers.len()
    }

    /// What was recorded by a pass that ended so.
    ///
    /// # Errors
    /// The pass's own; [`Error::MissingLayers`].
    pub(crate) fn after<T>(self, outcome: Result<T>) -> Result<Features> {
        // A complete record is a success, however the pass ended: a downstream network may run on, or turn
        // `Stopped` into an error of its own.
        if self.is_complete() {
            return Ok(self.features);
        }
        drop(outcome?);
        Err(Error::MissingLayers { layers: self.layers, network: self.network })
    }

    /// What was recorded, complete or not.
    pub fn into_features(self) -> Features {
        self.features
    }
}

impl<H: AttentionHook> AttentionHook for FeatureRecorder<H> {
    fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
        if site.kind != AttentionKind::SelfAttention || self.is_complete() {
            return self.inner.attend(site, qkv);
        }
        // A foreign network that counts wrongly would otherwise pass for a complete record.
        let due = self.layers.start.saturating_add(self.features.len());
        let (again, skipped) = (site.index < self.network, site.index > due && self.network <= due);
        if again || skipped {
            let expected = if again { self.network } else { due };
            let reason = format!("layer {} came where layer {expected} was due; number the layers in execution order", site.index);
            return Err(Error::argument("attention site", reason));
        }
        self.network = site.index.saturating_add(1);
        if !self.layers.contains(&site.index) {
            return self.inner.attend(site, qkv);
        }
        let (_, _, tokens, _) = qkv.query.size4()?;
        if tokens != site.tokens() {
            return Err(Error::argument(
                "attention site",
                format!("layer {due} has {tokens} query tokens, its grid and prefix make {}", site.tokens()),
            ));
        }
        let (query, key, value) = (qkv.query.shallow_clone(), qkv.key.shallow_clone(), qkv.value.shallow_clone());
        let scale = qkv.scale;
        // One with a mask could not be computed later.
        let later = self.without_outputs && qkv.mask.is_none();
        let last = self.features.len() + 1 == self.layers.len();
        let output = if later && last { None } else { Some(self.inner.attend(site, qkv)?) };
        let kept = output.as_ref().filter(|_| !later).map_or_else(OnceCell::new, |output| OnceCell::from(output.shallow_clone()));
        self.features.0.push(LayerFeatures { site: *site, query, key, value, scale, output: kept });
        match output {
            Some(output) if !last => Ok(output),
            _ => Err(Error::Stopped),
        }
    }
}
