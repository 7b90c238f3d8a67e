//! Regions and weights of styles as one bias on the attention scores.

mod columns;
mod memo;
mod table;

use crate::scalar::integer;
use crate::{Features, LayerFeatures, References, Result};
use columns::Columns;
use memo::Place;
use std::sync::Arc;
use tch::{Kind, Tensor};

pub(crate) use memo::Memo;
pub(crate) use table::{check_batch, seen, Tables};

/// Through soft maps every style token is seen by this much at least: where a picture's token has nothing else to see, it sees
/// the whole style.
const LEAK: f64 = 1e-6;

/// What is added to the scores of a picture's tokens for the joined style tokens.
///
/// Be `M(l, i)` how much of the picture's token `i` has the label `l`, `S_r(m, j)` how much of the token `j` of style `r` has
/// the label `m`, both 0 or 1 in hard maps, `w_r` the style's weight and `W_r(l, m)` how much a place with the label `l` is to
/// have of that style's label `m`. Then
/// `c_r(i, j) = sum_lm M(l, i) W_r(l, m) S_r(m, j)` and `bias_r(i, j) = ln(c_r(i, j) + eps) + ln w_r`,
/// `eps` 0 where all maps are hard, and `ideal = softmax(s Q Ks^T / sqrt d + bias) Vs`.
///
/// What is small of it, a row for each label, is [kept](Memo) with the references; what is as large as the scores is made of that
/// for each evaluation, on the features' device alone.
pub(crate) struct Bias<'a> {
    references: &'a References<Features>,
    tables: Arc<Tables>,
    /// Of the last layer: those of one grid come one after the other.
    last: Option<(Place, Tensor)>,
}

impl<'a> Bias<'a> {
    /// None where the plain attention is the same.
    ///
    /// # Errors
    /// As [`Tables::new`].
    pub(crate) fn new(references: &'a References<Features>) -> Result<Option<Self>> {
        let tables = references.memo.tables(references)?;
        Ok((!tables.plain).then_some(Self { references, tables, last: None }))
    }

    /// For the `i`th layer of a picture, `(1 or batch, 1, tokens, sum of the styles' tokens)` in the kind of its queries.
    ///
    /// # Errors
    /// Maps of another batch than the picture's; keys that are not one for each token of the grid.
    pub(crate) fn of(&mut self, i: usize, layer: &LayerFeatures) -> Result<Tensor> {
        let layers: Vec<_> = self.references.counted().filter_map(|style| style.of.layers().nth(i)).collect();
        let place = Place::of(layer, &layers)?;
        if let Some((_, bias)) = self.last.as_ref().filter(|(at, _)| *at == place) {
            return Ok(bias.shallow_clone());
        }
        let rows = match self.references.memo.rows(&self.tables, &place) {
            Some(rows) => rows,
            None => {
                let rows = self.build(layer, &layers)?;
                self.references.memo.keep(&self.tables, place.clone(), rows.shallow_clone());
                rows
            }
        };
        let bias = rows.by_token(layer.site.tokens())?.f_unsqueeze(1)?;
        self.last = Some((place, bias.shallow_clone()));
        Ok(bias)
    }

    fn build(&self, layer: &LayerFeatures, layers: &[&LayerFeatures]) -> Result<Rows> {
        tracing::debug!(layer = layer.site.index, "the bias of regions and weights is built");
        let (batch, ..) = layer.query.size4()?;
        let (device, kind) = (layer.query.device(), layer.query.f_kind()?);
        check_batch(self.references, batch)?;
        let columns = Columns::new(self.references, &self.tables, layers, device)?;
        let (grid, prefix) = (layer.site.grid, layer.site.prefix);
        let (places, shares) = match &self.references.labels {
            Some(target) => (target.places(grid)?, target.shares(grid)?),
            None => (None, None),
        };
        let eps = if self.tables.soft { LEAK } else { 0.0 };
        match (places, shares) {
            (None, None) => Ok(Rows::Same(columns.scores(false, eps)?.f_to_kind(kind)?)),
            (Some(places), _) => {
                let (maps, _) = places.size2()?;
                // The row after those of the labels.
                let before = integer(self.tables.rows)?.f_expand([maps, prefix], false)?;
                let places = Tensor::f_cat(&[before.f_to_device(device)?, places.f_to_device(device)?], 1)?;
                Ok(Rows::Labels { rows: columns.scores(prefix > 0, eps)?.f_to_kind(kind)?, places })
            }
            (None, Some(shares)) => {
                let (shares, rows) = columns.shared(&shares.f_to_device(device)?, prefix, eps)?;
                Ok(Rows::Shares { shares, rows, weights: columns.weights, kind })
            }
        }
    }
}

/// A bias without its length along the picture's tokens.
#[derive(Debug)]
enum Rows {
    /// For each token, `(1 or batch, 1, columns)`.
    Same(Tensor),
    /// `rows`, `(1 or batch, labels, columns)`, and where there are tokens before the grid one more, which is theirs; and which
    /// of them each token has, `(1 or batch, tokens)`.
    Labels { rows: Tensor, places: Tensor },
    /// `ln(shares rows) + weights`: `(1 or batch, tokens, n)`, `(1 or batch, n, columns)` and, where they are not all 1,
    /// `(1, 1, columns)`, in f32.
    Shares { shares: Tensor, rows: Tensor, weights: Option<Tensor>, kind: Kind },
}

impl Rows {
    fn shallow_clone(&self) -> Self {
        match self {
            Self::Same(row) => Self::Same(row.shallow_clone()),
            Self::Labels { rows, places } => Self::Labels { rows: rows.shallow_clone(), places: places.shallow_clone() },
            Self::Shares { shares, rows, weights, kind } => Self::Shares {
                shares: shares.shallow_clone(),
                rows: rows.shallow_clone(),
                weights: weights.as_ref().map(Tensor::shallow_clone),
                kind: *kind,
            },
        }
    }

    /// `(1 or batch, tokens, columns)`.
    fn by_token(&self, tokens: i64) -> Result<Tensor> {
        match self {
            Self::Same(row) => Ok(row.f_expand([-1, tokens, -1], false)?),
            Self::Labels { rows, places } => by_place(rows, places),
            Self::Shares { shares, rows, weights, kind } => {
                let mut scores = shares.f_matmul(rows)?.f_log_()?;
                if let Some(weights) = weights {
                    scores = scores.f_add_(weights)?;
                }
                Ok(scores.f_to_kind(*kind)?)
            }
        }
    }
}

/// From a row per label to a row per token.
fn by_place(rows: &Tensor, places: &Tensor) -> Result<Tensor> {
    let ((tables, _, columns), (maps, _)) = (rows.size3()?, places.size2()?);
    if tables == 1 {
        let picked = rows.f_squeeze_dim(0)?.f_index_select(0, &places.f_flatten(0, 1)?)?;
        return Ok(picked.f_view([maps, -1, columns])?);
    }
    let pick = |i: i64| -> Result<Tensor> {
        let places = places.f_narrow(0, if maps == 1 { 0 } else { i }, 1)?.f_squeeze_dim(0)?;
        Ok(rows.f_narrow(0, i, 1)?.f_squeeze_dim(0)?.f_index_select(0, &places)?)
    };
    Ok(Tensor::f_stack(&(0..tables).map(pick).collect::<Result<Vec<_>>>()?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionHook, AttentionSite, Denoiser, LabelMap, Qkv, Style};
    use tch::Device;

    /// One layer of attention among the pixels.
    struct Net(Kind);

    impl Denoiser for Net {
        type Condition = ();

        fn forward(&self, latents: &Tensor, _: f64, (): &(), hook: &mut dyn AttentionHook) -> Result<Tensor> {
            let (_, _, height, width) = latents.size4()?;
            let tokens = latents.f_to_kind(self.0)?.f_flatten(2, 3)?.f_transpose(1, 2)?.f_unsqueeze(1)?;
            let [query, key] = [tokens.f_sin()?, tokens.f_cos()?];
            hook.attend(&AttentionSite::self_attention(0, (height, width)), Qkv::new(query, key, tokens))
        }
    }

    /// libtorch would take one in f32, too, of twice the memory. Of hard maps, of soft ones and of a weight alone.
    #[test]
    fn a_bias_has_the_queries_kind() -> Result<()> {
        tch::set_num_threads(1);
        let halves = Tensor::f_from_slice(&[1_i64, 2])?.f_view([1, 1, 1, 2])?;
        let shares = Tensor::f_from_slice(&[0.3_f32, 0.7])?.f_view([1, 2, 1, 1])?;
        let (hard, soft) = (|| LabelMap::new(&halves), || LabelMap::soft(&shares));
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            let features = |height, width| {
                let latents = Tensor::f_linspace(-1, 1, 4 * height * width, (Kind::Float, Device::Cpu))?.f_view([1, 4, height, width])?;
                Features::extract(&Net(kind), &latents, 1.0, &(), 0..1)
            };
            let style = || Ok::<_, crate::Error>(Style::new(features(2, 3)?).with_weight(0.5));
            let picture = features(4, 5)?;
            for references in [
                References::styles([style()?.with_labels(hard()?)]).with_labels(hard()?),
                References::styles([style()?.with_labels(soft()?)]).with_labels(soft()?),
                References::styles([style()?, Style::new(features(3, 3)?)]),
            ] {
                let Some(mut bias) = Bias::new(&references)? else { panic!("regions and weights have a bias") };
                for layer in picture.layers() {
                    let tokens = references.styles.iter().map(|style| style.of.layers().map(|layer| layer.site.tokens()).sum::<i64>()).sum();
                    let first = bias.of(0, layer)?;
                    assert_eq!((first.f_kind()?, first.size()), (kind, vec![1, 1, 20, tokens]));
                    // And of what was kept.
                    let Some(mut again) = Bias::new(&references)? else { panic!("as before") };
                    assert_eq!(again.of(0, layer)?.f_kind()?, kind);
                }
            }
        }
        Ok(())
    }
}
