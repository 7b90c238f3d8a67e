//! How much of which label of a style the labels of a picture see.

use crate::mask::Identity;
use crate::{AttentionSite, Error, LabelMap, References, Result, Style};
use std::collections::{BTreeMap, BTreeSet};
use tch::{Device, Kind, Tensor};

/// `W_r(l, m)` of all styles that count; and what they were made of.
#[derive(Debug)]
pub(crate) struct Tables {
    key: Key,
    /// In the styles' order.
    pub(crate) styles: Vec<Table>,
    /// Labels of the picture.
    pub(crate) rows: i64,
    /// Whether one of the maps is.
    pub(crate) soft: bool,
    /// Whether each row of the bias is a constant, which a softmax does not see.
    pub(crate) plain: bool,
}

/// Of one style. What is not listed is 0.
#[derive(Debug)]
pub(crate) struct Table {
    /// `w`.
    pub(crate) weight: f64,
    rows: usize,
    /// Labels of the style; 1 where it has no map.
    columns: usize,
    /// Place of the picture's label, place of the style's, `W` with the weights of areas.
    pub(crate) entries: Vec<(usize, usize, f64)>,
}

/// All that tables depend on.
#[derive(Debug)]
struct Key {
    target: Option<Identity>,
    allow_missing_labels: bool,
    styles: Vec<StyleKey>,
}

#[derive(Debug)]
struct StyleKey {
    weight: f64,
    labels: Option<Identity>,
    area_weights: Vec<(i64, f64)>,
    matches: Option<Vec<(i64, i64, f64)>>,
}

impl Key {
    fn of<T>(references: &References<T>) -> Self {
        let identity = |map: &Option<LabelMap>| map.as_ref().map(LabelMap::identity).cloned();
        let style = |style: &Style<T>| StyleKey {
            weight: style.weight,
            labels: identity(&style.labels),
            area_weights: style.area_weights.clone(),
            matches: style.matches.clone(),
        };
        Self {
            target: identity(&references.labels),
            allow_missing_labels: references.allow_missing_labels,
            styles: references.styles.iter().map(style).collect(),
        }
    }

    fn is_of<T>(&self, references: &References<T>) -> bool {
        let same = |key: &Option<Identity>, map: &Option<LabelMap>| key.as_ref() == map.as_ref().map(LabelMap::identity);
        let same_style = |(key, style): (&StyleKey, &Style<T>)| {
            key.weight == style.weight && same(&key.labels, &style.labels) && key.area_weights == style.area_weights && key.matches == style.matches
        };
        same(&self.target, &references.labels)
            && self.allow_missing_labels == references.allow_missing_labels
            && self.styles.len() == references.styles.len()
            && self.styles.iter().zip(&references.styles).all(same_style)
    }
}

impl Tables {
    /// # Errors
    /// Weights out of range; labels, matches or weights of areas that do not go together; a label of the picture that no style
    /// has, unless the references allow it.
    pub(crate) fn new<T>(references: &References<T>) -> Result<Self> {
        let target = references.labels.as_ref();
        for style in &references.styles {
            check(style, target)?;
        }
        let counted: Vec<_> = references.counted().collect();
        let informed = |style: &&Style<T>| style.labels.is_some() || !style.area_weights.is_empty();
        if target.is_some() && !counted.iter().any(informed) {
            let advice = "give the styles labels of theirs, or weights for the picture's labels";
            return Err(Error::argument("labels", format!("are the picture's alone: {advice}")));
        }
        let styles = counted.iter().map(|style| Table::new(style, target)).collect::<Result<Vec<_>>>()?;
        if let Some(target) = target.filter(|_| !references.allow_missing_labels) {
            missing(target, &counted, &styles)?;
        }
        let maps: Vec<_> = counted.iter().filter_map(|style| style.labels.as_ref()).collect();
        let uniform = maps.iter().all(|map| !map.is_soft() && map.labels().len() == 1);
        let rows = target.map_or(1, |map| map.labels().len());
        Ok(Self {
            key: Key::of(references),
            plain: uniform && constant(&styles, rows),
            styles,
            rows: i64::try_from(rows).unwrap_or(i64::MAX),
            soft: target.into_iter().chain(maps).any(LabelMap::is_soft),
        })
    }

    /// Whether they would be made again just as they are. The features of a timestep play no part.
    pub(crate) fn are_of<T>(&self, references: &References<T>) -> bool {
        self.key.is_of(references)
    }
}

impl Table {
    fn new<T>(style: &Style<T>, target: Option<&LabelMap>) -> Result<Self> {
        let Some(target) = target else { return Ok(Self { weight: style.weight, rows: 1, columns: 1, entries: vec![(0, 0, 1.0)] }) };
        // Of several for one label the last stays.
        let areas: BTreeMap<i64, f64> = style.area_weights.iter().copied().collect();
        let area = |label: i64| areas.get(&label).copied().unwrap_or(1.0);
        let ours = || target.labels().iter().copied().enumerate();
        let mut entries: Vec<(usize, usize, f64)> = match (&style.labels, &style.matches) {
            (None, _) => ours().map(|(row, label)| (row, 0, area(label))).collect(),
            (Some(map), None) => ours().filter_map(|(row, label)| Some((row, map.place(label)?, area(label)))).collect(),
            (Some(map), Some(matches)) => {
                let matches: BTreeMap<(i64, i64), f64> = matches.iter().map(|&(ours, theirs, weight)| ((ours, theirs), weight)).collect();
                let entry = |((ours, theirs), weight)| Some((target.place(ours)?, map.place(theirs)?, area(ours) * weight));
                matches.into_iter().filter_map(entry).collect()
            }
        };
        for (_, _, weight) in &entries {
            check_weight(*weight, ", of an area times that of a match,")?;
        }
        entries.retain(|(_, _, weight)| *weight > 0.0);
        let columns = style.labels.as_ref().map_or(1, |map| map.labels().len());
        Ok(Self { weight: style.weight, rows: target.labels().len(), columns, entries })
    }

    /// `(labels of the picture, labels of the style)`.
    pub(crate) fn dense(&self, kind: Kind, device: Device) -> Result<Tensor> {
        let (mut places, mut weights) = (vec![], vec![]);
        for &(row, column, weight) in &self.entries {
            places.push(i64::try_from(row * self.columns + column).unwrap_or(0));
            weights.push(weight);
        }
        let shape = [self.rows, self.columns].map(|side| i64::try_from(side).unwrap_or(0));
        let table = Tensor::f_zeros(shape, (kind, device))?.f_view([-1])?;
        if places.is_empty() {
            return Ok(table.f_view(shape)?);
        }
        let weights = Tensor::f_from_slice(&weights)?.f_to_kind(kind)?.f_to_device(device)?;
        Ok(table.f_scatter(0, &Tensor::f_from_slice(&places)?.f_to_device(device)?, &weights)?.f_view(shape)?)
    }
}

/// `sum_m W(l, m) S(m, j)` of one style over the grid of a layer with so many keys: `(1 or batch, labels of the picture, tokens)` in
/// the kind of its table.
///
/// # Errors
/// Where the style has labels: keys that are not one for each token of the grid.
pub(crate) fn seen(map: Option<&LabelMap>, table: &Tensor, site: &AttentionSite, keys: i64) -> Result<Tensor> {
    let Some(map) = map else { return Ok(table.f_unsqueeze(0)?.f_expand([-1, -1, keys], false)?) };
    if keys != site.tokens() {
        let reason = format!("layer {} has {keys} keys for {} tokens: there is no telling what lies where", site.index, site.tokens());
        return Err(Error::argument("labels", reason));
    }
    if let Some(shares) = map.shares(site.grid)? {
        return Ok(table.f_matmul(&shares.f_to_device(table.device())?.f_to_kind(table.f_kind()?)?)?);
    }
    let Some(places) = map.places(site.grid)? else { return Ok(table.f_unsqueeze(0)?) };
    let (batch, tokens) = places.size2()?;
    let picked = table.f_index_select(1, &places.f_flatten(0, 1)?.f_to_device(table.device())?)?;
    Ok(picked.f_view([-1, batch, tokens])?.f_transpose(0, 1)?)
}

/// # Errors
/// Maps that are neither one for all of the batch nor one for each.
pub(crate) fn check_batch<T>(references: &References<T>, batch: i64) -> Result<()> {
    for map in references.labels.iter().chain(references.counted().filter_map(|style| style.labels.as_ref())) {
        if !matches!(map.batch()?, found if found == 1 || found == batch) {
            return Err(Error::argument("labels", format!("are of {} pictures; 1 or {batch} are possible", map.batch()?)));
        }
    }
    Ok(())
}

/// Weights are logarithms of f32 in the end.
fn check_weight(weight: f64, which: &str) -> Result<()> {
    if weight == 0.0 || (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&weight) {
        return Ok(());
    }
    let reason = if weight.is_finite() && weight > 0.0 {
        format!("{weight:e}{which} is beyond what f32 holds (1.2e-38 to 3.4e38); only ratios matter, so bring them nearer to 1")
    } else {
        format!("{weight}{which} is not a number of at least 0")
    };
    Err(Error::argument("style weight", reason))
}

fn check<T>(style: &Style<T>, target: Option<&LabelMap>) -> Result<()> {
    let weights = style.area_weights.iter().map(|(_, weight)| weight).chain(style.matches.iter().flatten().map(|(_, _, weight)| weight));
    for weight in std::iter::once(&style.weight).chain(weights) {
        check_weight(*weight, "")?;
    }
    let Some(target) = target else {
        if style.labels.is_some() || style.matches.is_some() || !style.area_weights.is_empty() {
            let reason = "are the style's alone: the picture needs labels, too (`References::with_labels`)";
            return Err(Error::argument("labels", reason));
        }
        return Ok(());
    };
    let ours = style.area_weights.iter().map(|(label, _)| label).chain(style.matches.iter().flatten().map(|(label, _, _)| label));
    for &label in ours {
        if target.place(label).is_none() {
            return Err(Error::argument("style weight", format!("is for label {} of the picture, {}", target.name(label), target.lacks(label))));
        }
    }
    let Some(matches) = &style.matches else { return Ok(()) };
    let map = style.labels.as_ref().ok_or_else(|| Error::argument("matches", "the style has no labels to match"))?;
    for &(_, label, _) in matches {
        if map.place(label).is_none() {
            return Err(Error::argument("matches", format!("name label {} of the style, {}", map.name(label), map.lacks(label))));
        }
    }
    Ok(())
}

fn missing<T>(target: &LabelMap, styles: &[&Style<T>], tables: &[Table]) -> Result<()> {
    let served: BTreeSet<usize> = tables.iter().flat_map(|table| &table.entries).map(|(row, _, _)| *row).collect();
    let missing: Vec<i64> = target.labels().iter().enumerate().filter(|(row, _)| !served.contains(row)).map(|(_, &label)| label).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let maps = styles.iter().filter_map(|style| style.labels.as_ref()).map(|map| map.names(map.labels()));
    let theirs = maps.collect::<Vec<_>>().join("; ");
    let theirs = if theirs.is_empty() { String::new() } else { format!(" (styles have {theirs})") };
    let advice = "add it to a style's labels, or give it a weight above 0 where one is 0, or let such places see every style by `References::allow_missing_labels`";
    Err(Error::argument("labels", format!("no style has label {} of the picture{theirs}; {advice}", target.names(&missing))))
}

/// Whether each label of the picture sees all styles alike, where each of them has one label at most.
fn constant(tables: &[Table], rows: usize) -> bool {
    // Tokens before a style's grid have the style's weight alone.
    if tables.iter().flat_map(|table| &table.entries).any(|(_, _, weight)| *weight != 1.0) {
        return false;
    }
    let sums = tables.iter().map(|table| {
        let mut sums = vec![0.0; rows];
        for &(row, _, weight) in &table.entries {
            if let Some(sum) = sums.get_mut(row) {
                *sum += weight;
            }
        }
        sums
    });
    let sums: Vec<Vec<f64>> = sums.collect();
    (0..rows).all(|row| {
        let shares: Vec<f64> = sums.iter().map(|sums| sums.get(row).copied().unwrap_or(0.0)).collect();
        let nothing = shares.iter().all(|share| *share == 0.0);
        let weights: Vec<f64> = tables.iter().zip(shares).map(|(table, share)| table.weight * if nothing { 1.0 } else { share }).collect();
        weights.windows(2).all(|pair| matches!(pair, [a, b] if a == b))
    })
}
