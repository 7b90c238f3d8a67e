//! The paper's losses: AD loss, content loss, and their weighted sum.

mod layout;

pub use layout::{AttentionMapLoss, ContentValueLoss};

use crate::scalar::WithNumber;
use crate::smoothing::{check_smoothing, smoothed};
use crate::{attention::scaled_dot_product, bias::Bias, Error, Features, LayerFeatures, References, Result};
use tch::{Kind, Reduction, Tensor};

/// A differentiable scalar: how far a picture's features are from its references'. Holds settings only; everything
/// that changes with the timestep comes as arguments.
///
/// It sees features, not latents: a term of the latents themselves, such as their total variation, goes into a loop of one's own, its
/// gradient added to that of [`FeatureExtractor::gradient`](crate::FeatureExtractor::gradient) before the optimizer's step. The crate's losses are means over
/// pictures as well, so a picture's gradient in a batch of two is half of its own alone: nothing to Adam, half a step to
/// [`GradientDescent`](crate::GradientDescent).
pub trait Loss {
    /// A scalar in f32 (shape `[]`), differentiable where `picture` is; never by the references.
    ///
    /// # Errors
    /// References that lack what the loss needs or do not fit the picture.
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor>;

    /// Whether it looks at the content among such references. Where it does not, [`Distiller`](crate::Distiller) spares the content's passes.
    /// It may say so without need, which is the default.
    fn uses_content(&self, _references: &References) -> bool {
        true
    }
}

impl<L: Loss + ?Sized> Loss for Box<L> {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        (**self).evaluate(picture, references)
    }

    fn uses_content(&self, references: &References) -> bool {
        (**self).uses_content(references)
    }
}

/// The attention distillation loss: `sum over layers of mean |Attn(Q, K, V) - sg(Attn(s Q, Ks, Vs))|`.
///
/// `Q`, `K`, `V` are the picture's own, `Ks`, `Vs` the styles' (joined along the tokens where there are several), `sg`
/// stops the gradient: it flows through the picture's own output alone. Regions and weights of the styles are a bias on the
/// scores of the second attention, and its queries may be smoothed by the content, see [`References`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct AdLoss {
    /// `s`; above 1 the ideal output, `Attn(s Q, Ks, Vs)`, attends to fewer style tokens, more sharply. 1 is the paper's.
    pub sharpness: f64,
}

impl Default for AdLoss {
    fn default() -> Self {
        Self { sharpness: 1.0 }
    }
}

impl AdLoss {
    /// The same with another sharpness.
    #[must_use]
    pub fn with_sharpness(mut self, sharpness: f64) -> Self {
        self.sharpness = sharpness;
        self
    }

    /// The terms of the sum, one scalar per layer.
    ///
    /// # Errors
    /// As [`Loss::evaluate`].
    pub fn per_layer(&self, picture: &Features, references: &References<Features>) -> Result<Vec<Tensor>> {
        if !(self.sharpness.is_finite() && self.sharpness > 0.0) {
            return Err(Error::argument("sharpness", format!("{} is not a positive number", self.sharpness)));
        }
        if references.counted().next().is_none() {
            return Err(Error::argument("styles", "the AD loss needs at least one, of a weight above 0"));
        }
        for style in &references.styles {
            same_layers("style", picture, &style.of)?;
        }
        check_smoothing(references.smoothing)?;
        if let Some(content) = smoothing_content(references) {
            same_layers("content", picture, content)?;
        }
        let mut bias = Bias::new(references)?;
        picture.layers().enumerate().map(|(i, layer)| mean_absolute(layer.output()?, &self.ideal(i, layer, references, bias.as_mut())?)).collect()
    }

    /// What the layer would put out if the picture were made of the styles.
    fn ideal(&self, i: usize, layer: &LayerFeatures, references: &References<Features>, bias: Option<&mut Bias<'_>>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let mut query = match smoothing_content(references).and_then(|content| content.layers().nth(i)) {
            Some(content) => smoothed(layer, content, references.smoothing)?,
            None => layer.query.shallow_clone(),
        };
        if self.sharpness != 1.0 {
            query = query.times(self.sharpness)?;
        }
        let key = joined(i, &query, references, |style| &style.key)?;
        let value = joined(i, &query, references, |style| &style.value)?;
        let bias = bias.map(|bias| bias.of(i, layer)).transpose()?;
        scaled_dot_product(&query, &key, &value, bias.as_ref(), layer.scale)
    }
}

/// Whose like places the queries are drawn together by, if they are.
fn smoothing_content(references: &References<Features>) -> Option<&Features> {
    references.content.as_ref().filter(|_| references.smoothing > 0.0)
}

/// The styles' tensors of layer `i`, one after the other along the tokens, for each picture of the batch.
fn joined(i: usize, query: &Tensor, references: &References<Features>, pick: fn(&LayerFeatures) -> &Tensor) -> Result<Tensor> {
    let (batch, ..) = query.size4()?;
    let there = references.counted().filter_map(|style| style.of.layers().nth(i));
    let parts = there.map(|layer| {
        serves("style", pick(layer), batch)?;
        Ok(pick(layer).f_expand([batch, -1, -1, -1], false)?)
    });
    let parts = parts.collect::<Result<Vec<_>>>()?;
    match parts.as_slice() {
        [one] => Ok(one.shallow_clone()),
        several => Ok(Tensor::f_cat(several, 2)?),
    }
}

/// One reference serves all pictures of a batch, or there is one for each.
pub(crate) fn serves(name: &'static str, reference: &Tensor, batch: i64) -> Result<()> {
    match reference.size().first() {
        Some(&own) if own == 1 || own == batch => Ok(()),
        _ => {
            let several = if name == "style" { "; several styles are several entries of `References::styles`" } else { "" };
            let wanted = format!("a batch of 1, or of {batch} as the pictures{several}");
            Err(Error::shape(name, wanted, reference.size()))
        }
    }
}

/// Whether a layer of the content has as many places as the picture's, in the same rows and columns.
pub(crate) fn same_grid(picture: &LayerFeatures, content: &LayerFeatures) -> Result<()> {
    let (ours, theirs) = (picture.query.size(), content.query.size());
    if ours.get(1..) == theirs.get(1..) && picture.site.grid == content.site.grid {
        return Ok(());
    }
    Err(Error::shape("content", format!("the picture's own size (queries {ours:?} in layer {})", picture.site.index), theirs))
}

impl Loss for AdLoss {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        sum(self.per_layer(picture, references)?.into_iter().map(Ok))
    }

    /// For smoothing alone.
    fn uses_content(&self, references: &References) -> bool {
        references.smoothing > 0.0
    }
}

/// The content loss: `sum over layers of mean |Q - sg(Qc)|`. Keeps the layout of the content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContentLoss;

impl Loss for ContentLoss {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        by_content("content", picture, references, |ours, theirs| mean_absolute(&ours.query, &theirs.query.f_detach()?.f_expand_as(&ours.query)?))
    }
}

/// The sum over the layers of what the picture's comes to beside the content's, which must fit it.
fn by_content(
    name: &str,
    picture: &Features,
    references: &References<Features>,
    term: impl Fn(&LayerFeatures, &LayerFeatures) -> Result<Tensor>,
) -> Result<Tensor> {
    let content = references.content.as_ref().ok_or_else(|| Error::argument("content", format!("the {name} loss needs one; none was given")))?;
    same_layers("content", picture, content)?;
    sum(picture.layers().zip(content.layers()).map(|(ours, theirs)| {
        same_grid(ours, theirs)?;
        serves("content", &theirs.query, ours.query.size4()?.0)?;
        term(ours, theirs)
    }))
}

/// A weighted sum of losses: the paper's `L_AD + beta L_content` is
/// `TotalLoss::default().plus(1.0, AdLoss::default()).plus(beta, ContentLoss)`.
#[derive(Default)]
pub struct TotalLoss {
    terms: Vec<(f64, Box<dyn Loss + Send>)>,
}

impl std::fmt::Debug for TotalLoss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TotalLoss").field("weights", &self.terms.iter().map(|(weight, _)| weight).collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

impl TotalLoss {
    /// One term more. A term of weight 0 is not evaluated; a weight that is negative, infinite or NaN is refused by
    /// [`Loss::evaluate`].
    #[must_use]
    pub fn plus(mut self, weight: f64, loss: impl Loss + Send + 'static) -> Self {
        if weight != 0.0 {
            self.terms.push((weight, Box::new(loss)));
        }
        self
    }
}

impl Loss for TotalLoss {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        sum(self.terms.iter().map(|(weight, loss)| {
            if !(weight.is_finite() && *weight >= 0.0) {
                return Err(Error::argument("loss weight", format!("{weight} is not a number of at least 0")));
            }
            loss.evaluate(picture, references)?.times(*weight)
        }))
    }

    fn uses_content(&self, references: &References) -> bool {
        self.terms.iter().any(|(_, loss)| loss.uses_content(references))
    }
}

/// `mean |a - b|`, in f32 whatever the network's kind: a mean over a million f16 differences loses too much.
fn mean_absolute(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.f_to_kind(Kind::Float)?.f_l1_loss(&b.f_to_kind(Kind::Float)?, Reduction::Mean)?)
}

fn same_layers(who: &'static str, picture: &Features, reference: &Features) -> Result<()> {
    let indices = |features: &Features| features.layers().map(|layer| layer.site.index).collect::<Vec<_>>();
    let (ours, theirs) = (indices(picture), indices(reference));
    if ours == theirs {
        Ok(())
    } else {
        Err(Error::argument(who, format!("its features are of layers {theirs:?}, the picture's of {ours:?}")))
    }
}

fn sum(mut terms: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let first = terms.next().ok_or_else(|| Error::argument("loss", "has no term: every weight is 0, or no layer was recorded"))??;
    terms.try_fold(first, |total, term| Ok(total.f_add(&term?)?))
}
