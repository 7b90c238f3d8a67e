//! Regions and weights of styles as one bias on the attention scores.

use crate::scalar::WithNumber;
use crate::{Error, Features, LabelMap, LayerFeatures, References, Result, Style};
use tch::{Device, Kind, Tensor};

/// Through soft maps every style token is seen by this much at least: where a picture's token has nothing else to see, it sees
/// the whole style.
const LEAK: f64 = 1e-6;

/// Stands for `ln 0`: its exponential is exactly 0. Kernels that go through the keys in blocks may meet a block of nothing but
/// `ln 0`, and would subtract infinity from infinity.
const NEVER: f64 = -3e4;

/// What is added to the scores of a picture's tokens for the joined style tokens.
///
/// Be `M(l, i)` how much of the picture's token `i` has the label `l`, `S_r(m, j)` how much of the token `j` of style `r` has
/// the label `m`, both 0 or 1 in hard maps, `w_r` the style's weight and `W_r(l, m)` how much a place with the label `l` is to
/// have of that style's label `m`. Then
/// `c_r(i, j) = sum_lm M(l, i) W_r(l, m) S_r(m, j)` and `bias_r(i, j) = ln(c_r(i, j) + eps) + ln w_r`,
/// `eps` 0 where all maps are hard, and `ideal = softmax(s Q Ks^T / sqrt d + bias) Vs`.
pub(crate) struct Bias<'a> {
    target: Option<&'a LabelMap>,
    styles: Vec<(&'a Style<Features>, Tensor)>,
    eps: f64,
    /// Of the last layer: those of one grid come one after the other.
    last: Option<(Vec<i64>, Tensor)>,
}

impl<'a> Bias<'a> {
    /// None where the plain attention is the same.
    ///
    /// # Errors
    /// Weights out of range; labels, matches or weights of areas that do not go together; a label of the picture that no style
    /// has, unless the references allow it.
    pub(crate) fn new(references: &'a References<Features>) -> Result<Option<Self>> {
        let target = references.labels.as_ref();
        for style in &references.styles {
            check(style, target)?;
        }
        let counted: Vec<_> = references.styles.iter().filter(|style| style.weight > 0.0).collect();
        let informed = |style: &&Style<Features>| style.labels.is_some() || !style.area_weights.is_empty();
        if target.is_some() && !counted.iter().any(informed) {
            let advice = "give the styles labels of theirs, or weights for the picture's labels";
            return Err(Error::argument("labels", format!("are the picture's alone: {advice}")));
        }
        let tables: Vec<_> = counted.iter().map(|style| table(style, target)).collect();
        if let Some(target) = target.filter(|_| !references.allow_missing_labels) {
            missing(target, &counted, &tables)?;
        }
        if is_plain(&counted, &tables) {
            return Ok(None);
        }
        let soft = target.is_some_and(LabelMap::is_soft) || counted.iter().any(|style| style.labels.as_ref().is_some_and(LabelMap::is_soft));
        let rows = target.map_or(1, |map| map.labels().len());
        let styles = counted.into_iter().zip(tables).map(|(style, table)| {
            let flat: Vec<f32> = table.iter().flatten().map(|&weight| weight as f32).collect();
            Ok((style, Tensor::f_from_slice(&flat)?.f_view([i64::try_from(rows).unwrap_or(0), -1])?))
        });
        Ok(Some(Self { target, styles: styles.collect::<Result<_>>()?, eps: if soft { LEAK } else { 0.0 }, last: None }))
    }

    /// For the `i`th layer of a picture, `(1 or batch, 1, tokens, sum of the styles' tokens)` in the kind of its queries.
    ///
    /// # Errors
    /// Maps of another batch than the picture's; keys that are not one for each token of the grid.
    pub(crate) fn of(&mut self, i: usize, layer: &LayerFeatures) -> Result<Tensor> {
        let layers: Vec<_> = self.styles.iter().filter_map(|(style, _)| style.of.layers().nth(i)).collect();
        let mut grids = vec![layer.site.grid.0, layer.site.grid.1, layer.site.prefix];
        for there in &layers {
            grids.extend([there.site.grid.0, there.site.grid.1, there.site.prefix, there.key.size4()?.2]);
        }
        if let Some((_, bias)) = self.last.as_ref().filter(|(at, _)| *at == grids) {
            return Ok(bias.shallow_clone());
        }
        let bias = self.build(layer, &layers)?;
        self.last = Some((grids, bias.shallow_clone()));
        Ok(bias)
    }

    fn build(&self, layer: &LayerFeatures, layers: &[&LayerFeatures]) -> Result<Tensor> {
        let (batch, ..) = layer.query.size4()?;
        let (device, kind) = (layer.query.device(), layer.query.f_kind()?);
        let maps = self.target.into_iter().chain(self.styles.iter().filter_map(|(style, _)| style.labels.as_ref()));
        for map in maps {
            if !matches!(map.batch()?, found if found == 1 || found == batch) {
                return Err(Error::argument("labels", format!("are of {} pictures; 1 or {batch} are possible", map.batch()?)));
            }
        }
        let shares = match self.target {
            Some(target) => target.shares(layer.site.grid)?.map(|shares| shares.f_to_device(device)).transpose()?,
            None => None,
        };
        // Rows are labels of the picture, or where these are soft, its tokens.
        let mut parts = vec![];
        for ((style, table), there) in self.styles.iter().zip(layers) {
            let seen = seen(style, &table.f_to_device(device)?, there)?;
            parts.push(match &shares {
                Some(shares) => shares.f_transpose(1, 2)?.f_matmul(&seen)?,
                None => seen,
            });
        }
        let rows = self.scores(parts, layers, layer.site.prefix > 0, device)?;
        let rows = match (&shares, self.target.map(|target| target.places(layer.site.grid)).transpose()?.flatten()) {
            (None, Some(places)) => by_place(&rows.f_to_kind(kind)?, &places.f_to_device(device)?, layer.site.prefix)?,
            (None, None) => {
                let one = rows.f_narrow(1, 0, 1)?.f_to_kind(kind)?;
                one.f_expand([-1, layer.site.tokens(), -1], false)?
            }
            (Some(_), _) => with_prefix(&rows, layer.site.prefix)?.f_to_kind(kind)?,
        };
        Ok(rows.f_unsqueeze(1)?)
    }

    /// `ln(c + eps) + ln w`, `(1 or batch, rows, sum of the styles' tokens)` in f32; with a `prefix` one row more, of `ln w` alone,
    /// for tokens that are no part of the grid.
    fn scores(&self, parts: Vec<Tensor>, layers: &[&LayerFeatures], prefix: bool, device: Device) -> Result<Tensor> {
        let batch = parts.iter().map(|part| part.size3().map(|(batch, ..)| batch)).try_fold(1, |most, batch| batch.map(|batch| batch.max(most)))?;
        // Through a leak a row that sees nothing sees everything as it is, unless there are tokens that all rows see.
        let text = layers.iter().zip(&parts).any(|(there, part)| matches!((there.key.size4(), part.size3()), (Ok(key), Ok(part)) if key.2 > part.2));
        let nothing = if self.eps == 0.0 || text { empty_rows(&parts)? } else { None };
        let ones = |rows, columns| Tensor::f_ones([1, rows, columns], (Kind::Float, device));
        let mut columns = vec![];
        for ((part, there), (style, _)) in parts.into_iter().zip(layers).zip(&self.styles) {
            let (_, rows, tokens) = part.size3()?;
            let part = match &nothing {
                Some(nothing) => ones(1, 1)?.f_where_self(nothing, &part)?,
                None => part,
            };
            let mut part = part.f_expand([batch, rows, -1], false)?;
            let text = there.key.size4()?.2 - tokens;
            if text > 0 {
                part = Tensor::f_cat(&[ones(rows, text)?.f_expand([batch, -1, -1], false)?, part], 2)?;
            }
            if prefix {
                part = Tensor::f_cat(&[part, ones(1, text + tokens)?.f_expand([batch, -1, -1], false)?], 1)?;
            }
            let mut scores = part.plus(self.eps)?.f_log_()?;
            if style.weight != 1.0 {
                scores = scores.plus(style.weight.ln())?;
            }
            // With a leak there is no `ln 0`.
            columns.push(if self.eps > 0.0 { scores } else { scores.within(NEVER, -NEVER)? });
        }
        match columns.as_slice() {
            [one] => Ok(one.shallow_clone()),
            several => Ok(Tensor::f_cat(several, 2)?),
        }
    }
}

/// Whether a row is 0 in all of the parts, `(1 or batch, rows, 1)`.
fn empty_rows(parts: &[Tensor]) -> Result<Option<Tensor>> {
    let mut largest: Option<Tensor> = None;
    for part in parts {
        let here = part.f_amax([-1_i64], true)?;
        largest = Some(match largest {
            Some(largest) => largest.f_maximum(&here)?,
            None => here,
        });
    }
    largest.map(|largest| Ok(largest.f_eq_tensor(&crate::scalar::integer(0)?)?)).transpose()
}

/// `sum_m W(l, m) S(m, j)` of one style: `(1 or batch, labels of the picture, tokens)` in f32.
fn seen(style: &Style<Features>, table: &Tensor, there: &LayerFeatures) -> Result<Tensor> {
    let (_, _, keys, _) = there.key.size4()?;
    let Some(map) = &style.labels else { return Ok(table.f_unsqueeze(0)?.f_expand([-1, -1, keys], false)?) };
    if keys != there.site.tokens() {
        let reason = format!("layer {} has {keys} keys for {} tokens: there is no telling what lies where", there.site.index, there.site.tokens());
        return Err(Error::argument("labels", reason));
    }
    if let Some(shares) = map.shares(there.site.grid)? {
        return Ok(table.f_matmul(&shares.f_to_device(table.device())?)?);
    }
    let Some(places) = map.places(there.site.grid)? else { return Ok(table.f_unsqueeze(0)?) };
    let (batch, tokens) = places.size2()?;
    let picked = table.f_index_select(1, &places.f_flatten(0, 1)?.f_to_device(table.device())?)?;
    Ok(picked.f_view([-1, batch, tokens])?.f_transpose(0, 1)?)
}

/// From a row per label (and one of the tokens before the grid, where there are any) to a row per token.
fn by_place(rows: &Tensor, places: &Tensor, prefix: i64) -> Result<Tensor> {
    let (tables, labels, columns) = rows.size3()?;
    let (maps, _) = places.size2()?;
    let before = Tensor::f_from_slice(&[labels - 1])?.f_to_device(places.device())?.f_expand([maps, prefix], false)?;
    let places = Tensor::f_cat(&[before, places.shallow_clone()], 1)?;
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

/// Where there are tokens before the grid, the last row is theirs.
fn with_prefix(rows: &Tensor, prefix: i64) -> Result<Tensor> {
    if prefix == 0 {
        return Ok(rows.shallow_clone());
    }
    let (_, count, _) = rows.size3()?;
    let before = rows.f_narrow(1, count - 1, 1)?.f_expand([-1, prefix, -1], false)?;
    Ok(Tensor::f_cat(&[before, rows.f_narrow(1, 0, count - 1)?], 1)?)
}

fn check(style: &Style<Features>, target: Option<&LabelMap>) -> Result<()> {
    let weights = style.area_weights.iter().map(|(_, weight)| weight).chain(style.matches.iter().flatten().map(|(_, _, weight)| weight));
    for weight in std::iter::once(&style.weight).chain(weights) {
        if !(weight.is_finite() && *weight >= 0.0) {
            return Err(Error::argument("style weight", format!("{weight} is not a number of at least 0")));
        }
    }
    let Some(target) = target else {
        if style.labels.is_some() || style.matches.is_some() || !style.area_weights.is_empty() {
            let reason = "are the style's alone: the picture needs labels, too (`References::with_labels`)";
            return Err(Error::argument("labels", reason));
        }
        return Ok(());
    };
    let ours = style.area_weights.iter().map(|(label, _)| label).chain(style.matches.iter().flatten().map(|(label, _, _)| label));
    for label in ours {
        if !target.labels().contains(label) {
            let there = target.names(target.labels());
            return Err(Error::argument("style weight", format!("is for label {} of the picture, which has {there}", target.name(*label))));
        }
    }
    let Some(matches) = &style.matches else { return Ok(()) };
    let map = style.labels.as_ref().ok_or_else(|| Error::argument("matches", "the style has no labels to match"))?;
    for (_, label, _) in matches {
        if !map.labels().contains(label) {
            return Err(Error::argument("matches", format!("name label {} of the style, which has {}", map.name(*label), map.names(map.labels()))));
        }
    }
    Ok(())
}

/// `W(l, m)` with the weights of areas, a row for each label of the picture.
fn table(style: &Style<Features>, target: Option<&LabelMap>) -> Vec<Vec<f64>> {
    let Some(target) = target else { return vec![vec![1.0]] };
    let row = |ours: i64| {
        let area = style.area_weights.iter().rev().find(|(label, _)| *label == ours).map_or(1.0, |(_, weight)| *weight);
        let entry = |theirs: i64| match &style.matches {
            Some(matches) => matches.iter().rev().find(|(l, m, _)| (*l, *m) == (ours, theirs)).map_or(0.0, |(_, _, weight)| *weight),
            None => f64::from(u8::from(ours == theirs)),
        };
        match &style.labels {
            Some(map) => map.labels().iter().map(|&theirs| area * entry(theirs)).collect(),
            None => vec![area],
        }
    };
    target.labels().iter().map(|&label| row(label)).collect()
}

fn missing(target: &LabelMap, styles: &[&Style<Features>], tables: &[Vec<Vec<f64>>]) -> Result<()> {
    let served = |row: usize| tables.iter().filter_map(|table| table.get(row)).flatten().any(|weight| *weight > 0.0);
    let missing: Vec<i64> = (0..).zip(target.labels()).filter(|(row, _)| !served(*row)).map(|(_, &label)| label).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let maps = styles.iter().filter_map(|style| style.labels.as_ref()).map(|map| map.names(map.labels()));
    let theirs = maps.collect::<Vec<_>>().join("; ");
    let theirs = if theirs.is_empty() { String::new() } else { format!(" (styles have {theirs})") };
    let advice = "add it to a style's labels, or let such places see every style by `References::allow_missing_labels`";
    Err(Error::argument("labels", format!("no style has label {} of the picture{theirs}; {advice}", target.names(&missing))))
}

/// Whether each row of the bias is a constant, which a softmax does not see.
fn is_plain(styles: &[&Style<Features>], tables: &[Vec<Vec<f64>>]) -> bool {
    let uniform = |style: &&Style<Features>| style.labels.as_ref().is_none_or(|map| !map.is_soft() && map.labels().len() == 1);
    if !styles.iter().all(uniform) {
        return false;
    }
    let rows = tables.first().map_or(0, Vec::len);
    (0..rows).all(|row| {
        let shares: Vec<f64> = tables.iter().map(|table| table.get(row).into_iter().flatten().sum()).collect();
        let nothing = shares.iter().all(|share| *share == 0.0);
        let weights: Vec<f64> = styles.iter().zip(shares).map(|(style, share)| style.weight * if nothing { 1.0 } else { share }).collect();
        weights.windows(2).all(|pair| matches!(pair, [a, b] if a == b))
    })
}
