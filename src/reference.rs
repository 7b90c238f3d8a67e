//! What a picture is compared with: latents before a run, features at one timestep of it.

use crate::bias::Memo;
use crate::{FeatureCache, Features, LabelMap, Result};
use tch::Tensor;

/// One style picture, how much it counts, and which of its regions serve which of the picture's.
#[derive(Debug)]
#[non_exhaustive]
pub struct Style<T = Tensor> {
    /// The picture's latents (or features). A batch of 1 serves every picture of the batch; else one for each.
    pub of: T,
    /// `w`, at least 0: its tokens count as if each were there so many times. Only ratios matter: 2 and 1 are the same as the
    /// first style listed twice, and a single style's weight is without effect. A style of weight 0 counts for nothing: a run draws no
    /// noise and makes no pass for it. Weights that are not 0, here and below, must lie between 1.2e-38 and 3.4e38, the range of f32.
    pub weight: f64,
    /// Of the style's pixels. A style without labels serves every region of the picture.
    pub labels: Option<LabelMap>,
    /// What the weight is multiplied with where the picture has a label, `(the picture's label, at least 0)`; 1 for labels not
    /// listed, and the last of several for one label. A label that the picture does not have is an error.
    pub area_weights: Vec<(i64, f64)>,
    /// `W(l, m)`: how much of the style's label `m` a place of the picture with the label `l` is to have, `(l, m, at least 0)`;
    /// 0 for pairs not listed, the last of several for one pair. None: 1 where the two are equal, else 0.
    pub matches: Option<Vec<(i64, i64, f64)>>,
    /// Features of these very latents.
    pub(crate) cache: Option<FeatureCache>,
}

impl<T> Style<T> {
    /// From latents `(1 or batch, channels, height, width)`, or from their features: of weight 1, without labels.
    pub fn new(of: T) -> Self {
        Self { of, weight: 1.0, labels: None, area_weights: vec![], matches: None, cache: None }
    }

    /// The same with another [`weight`](Self::weight).
    #[must_use]
    pub fn with_weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// The same with labels of its pixels: its regions serve the picture's of the same labels. The map may be of any size;
    /// it lies over the whole of the style.
    #[must_use]
    pub fn with_labels(mut self, labels: LabelMap) -> Self {
        self.labels = Some(labels);
        self
    }

    /// The same with [weights for areas](Self::area_weights) of the picture, in place of those before: a style for the sky and
    /// another for the ground, without labels of the styles.
    #[must_use]
    pub fn with_area_weights(mut self, weights: impl IntoIterator<Item = (i64, f64)>) -> Self {
        self.area_weights = weights.into_iter().collect();
        self
    }

    /// The same with [pairs of labels](Self::matches), in place of equal ones: `(the picture's, the style's, weight)`.
    #[must_use]
    pub fn with_matches(mut self, matches: impl IntoIterator<Item = (i64, i64, f64)>) -> Self {
        self.matches = Some(matches.into_iter().collect());
        self
    }

    fn with<U>(&self, of: U) -> Style<U> {
        Style {
            of,
            weight: self.weight,
            labels: self.labels.as_ref().map(LabelMap::shallow_clone),
            area_weights: self.area_weights.clone(),
            matches: self.matches.clone(),
            cache: None,
        }
    }
}

impl Style {
    /// The same with features that runs with this style share. What is [mapped](References::try_map) from it has none: a cache is of
    /// these very latents.
    #[must_use]
    pub fn with_cache(mut self, cache: FeatureCache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// A second handle on the same latents and features.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self { cache: self.cache.clone(), ..self.with(self.of.shallow_clone()) }
    }
}

/// The styles and the content that a picture is compared with. Batch means pictures being made; several references
/// are several entries of `styles`, each of its own size. Empty by default.
///
/// # Regions and weights
/// Each token `i` of the picture attends to the styles' tokens `j` with a bias on the scores,
/// `softmax(s Q Ks^T / sqrt d + bias) Vs`, where for the style `r`
/// `bias_r(i, j) = ln(sum over l, m of M(l, i) W_r(l, m) S_r(m, j)) + ln w_r`:
/// `M(l, i)` is 1 where the picture's token has the label `l` ([`labels`](Self::labels)), `S_r(m, j)` where the style's has the
/// label `m` ([`Style::labels`]), or how much of it has, in soft maps; `W_r` is 1 for equal labels, 0 for others, or what
/// [`Style::matches`] says, times [`Style::area_weights`]; and `w_r` is [`Style::weight`]. So by default like attends to like.
/// Soft maps let 1e-6 of everything through.
///
/// A token that may attend to no style's token attends to all of every style: that happens where a region is too small for the coarse grid of
/// a layer, and for labels that no style has, if that is [allowed](Self::allow_missing_labels).
///
/// Labels of the picture need a style that has some, or area weights; labels of a style need labels of the picture.
///
/// [AdaIN](References::adain), where a run has it on, goes by the same weights: each region of the picture, and in an optimisation of the
/// content, gets mean and deviation of what it sees of the styles.
///
/// # Smoothing
/// A picture's queries follow the colours that it takes on, so in one ground of the content two places nearly alike may settle on two parts of a
/// style, as patches of a second colour. With a [`smoothing`](Self::smoothing) of `a` and a content, [`AdLoss`](crate::AdLoss) has each place ask
/// the styles with `(1 - a) Q + a Attn(3 Qc, Kc, Q)` in place of `Q`: drawn towards the mean of the queries of those places that are alike in
/// the content, by its own attention in that layer. The content must then have the picture's size, and a batch of 1 or as many pictures, also
/// where no content loss looks at it. It costs one attention more per layer and iteration, without gradients. The authors have no such thing.
#[derive(Debug)]
#[non_exhaustive]
pub struct References<T = Tensor> {
    /// Every token of the picture attends to the tokens of all of these; sizes may differ.
    pub styles: Vec<Style<T>>,
    /// Whose layout to keep; of the picture's own size.
    pub content: Option<T>,
    /// Of the picture being made, whatever its size: one map for all of the batch, or one for each.
    pub labels: Option<LabelMap>,
    /// Allows the picture to have labels that no style has: such places see every style as a whole. A style that has maps of
    /// its own for each picture of a batch has what any of them has; a picture whose map lacks it sees every style there.
    pub allow_missing_labels: bool,
    /// `a` above, from 0, which leaves the queries as they are, to 1; what is out of range is refused by [`AdLoss`](crate::AdLoss). Without a
    /// content of no effect. A run's `with_settings` sets it to [`Settings::smoothing`](crate::Settings::smoothing).
    pub smoothing: f64,
    /// What labels and weights come to, for these references and all that are made from them.
    pub(crate) memo: Memo,
}

impl<T> Default for References<T> {
    fn default() -> Self {
        Self::styles([])
    }
}

impl<T> References<T> {
    /// One style.
    pub fn style(of: T) -> Self {
        Self::styles([Style::new(of)])
    }

    /// Several styles.
    pub fn styles(styles: impl IntoIterator<Item = Style<T>>) -> Self {
        Self { styles: styles.into_iter().collect(), content: None, labels: None, allow_missing_labels: false, smoothing: 0.0, memo: Memo::default() }
    }

    /// The same with a content.
    #[must_use]
    pub fn with_content(mut self, content: T) -> Self {
        self.content = Some(content);
        self
    }

    /// The same with labels of the picture being made.
    #[must_use]
    pub fn with_labels(mut self, labels: LabelMap) -> Self {
        self.labels = Some(labels);
        self
    }

    /// The same, and a label that no style has is [no error](Self::allow_missing_labels).
    #[must_use]
    pub fn allow_missing_labels(mut self) -> Self {
        self.allow_missing_labels = true;
        self
    }

    /// The same with another [`smoothing`](Self::smoothing), from 0 to 1. For runs that are given no settings: `with_settings` puts the settings'
    /// in its place.
    #[must_use]
    pub fn with_smoothing(mut self, smoothing: f64) -> Self {
        self.smoothing = smoothing;
        self
    }

    /// Each style in order, then the content, through `f`: the order of the authors' random draws. All styles, those of weight 0
    /// as well; labels and weights stay.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn try_map<U>(&self, mut f: impl FnMut(&T) -> Result<U>) -> Result<References<U>> {
        let styles = self.styles.iter().map(|style| Ok(style.with(f(&style.of)?))).collect::<Result<_>>()?;
        let content = self.content.as_ref().map(f).transpose()?;
        Ok(self.with(styles, content))
    }

    /// The same without styles of weight 0: no noise is drawn for these, and no pass made.
    pub(crate) fn try_map_counted<U>(&self, mut f: impl FnMut(&T) -> Result<U>) -> Result<References<U>> {
        let mut mapped = self.try_map_styles(|style| f(&style.of))?;
        mapped.content = self.content.as_ref().map(f).transpose()?;
        Ok(mapped)
    }

    /// The same without the content as well.
    pub(crate) fn try_map_styles<U>(&self, mut f: impl FnMut(&Style<T>) -> Result<U>) -> Result<References<U>> {
        let styles = self.counted().map(|style| Ok(style.with(f(style)?))).collect::<Result<_>>()?;
        Ok(self.with(styles, None))
    }

    /// The styles of a weight above 0.
    pub(crate) fn counted(&self) -> impl Iterator<Item = &Style<T>> {
        self.styles.iter().filter(|style| style.weight != 0.0)
    }

    fn with<U>(&self, styles: Vec<Style<U>>, content: Option<U>) -> References<U> {
        let labels = self.labels.as_ref().map(LabelMap::shallow_clone);
        References { styles, content, labels, allow_missing_labels: self.allow_missing_labels, smoothing: self.smoothing, memo: self.memo.clone() }
    }
}

impl References<Tensor> {
    /// A second handle on the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let styles = self.styles.iter().map(Style::shallow_clone).collect();
        self.with(styles, self.content.as_ref().map(Tensor::shallow_clone))
    }
}

impl References<Features> {
    /// A second handle on the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let styles = self.styles.iter().map(|style| style.with(style.of.shallow_clone())).collect();
        self.with(styles, self.content.as_ref().map(Features::shallow_clone))
    }
}
