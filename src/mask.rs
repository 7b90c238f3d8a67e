//! Regions of a picture: which label each pixel has, or how much of it belongs to each of some areas.

mod crop;
mod painted;

use crate::{image, Error, Result};
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

/// More labels than this are a picture that was taken for a label map.
const MOST_LABELS: i64 = 4096;

/// Labels of a picture's pixels, for [`References::labels`](crate::References) and [`Style::labels`](crate::Style): like
/// attends to like.
///
/// Hard maps give each pixel one label, any whole number; soft maps say how much of each pixel belongs to each of some areas,
/// whose labels are 0, 1, 2 and so on. Both kinds go together. A map lies over the whole of its picture, whatever the sizes of
/// the two: for a layer of the network a hard map is brought to the layer's grid by nearest neighbour, as torch's
/// `interpolate(mode="nearest")` does, and a soft map by averages over areas.
#[derive(Debug)]
pub struct LabelMap {
    areas: Areas,
    /// In ascending order. A crop keeps those of the whole.
    labels: Arc<[i64]>,
    /// Areas that no pixel belonged to, in ascending order.
    left_out: Arc<[i64]>,
    /// Whether labels are colours.
    painted: bool,
    identity: Identity,
}

/// Which map it is: all handles on one share it. With it goes the map at the resolution of the canvas that it was last
/// [cropped](LabelMap::crop) on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Identity(Arc<Mutex<Option<Resized>>>);

/// `(height, width)`, and the map in it.
type Resized = ((i64, i64), Tensor);

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[derive(Debug)]
enum Areas {
    /// `(batch, 1, height, width)` in f32: places in `labels`.
    Hard(Tensor),
    /// `(batch, labels, height, width)` in f32.
    Soft(Tensor),
}

impl LabelMap {
    /// From the labels of the pixels, `(1 or batch, 1, height, width)`: whole numbers, in any kind.
    ///
    /// # Errors
    /// Another shape; numbers that are not whole, or beyond 2^53; more than 4096 labels.
    pub fn new(labels: &Tensor) -> Result<Self> {
        if !matches!(labels.size().as_slice(), &[batch, 1, height, width] if batch > 0 && height > 0 && width > 0) {
            return Err(Error::shape("labels", "(1 or batch, 1, height, width) with sides of at least 1", labels.size()));
        }
        let labels = labels.f_detach()?;
        if matches!(labels.f_kind()?, Kind::ComplexHalf | Kind::ComplexFloat | Kind::ComplexDouble) {
            return Err(Error::argument("labels", format!("{:?} are no whole numbers", labels.f_kind()?)));
        }
        if labels.f_is_floating_point()? {
            let wide = labels.f_to_kind(Kind::Double)?;
            let whole = wide.f_eq_tensor(&wide.f_round()?)?.f_all()?.f_int64_value(&[])? == 1;
            if !(whole && wide.f_abs()?.f_max()?.f_double_value(&[])? <= (1_u64 << 53) as f64) {
                let advice = "labels are whole numbers; shares of areas make a `LabelMap::soft`, a picture a `LabelMap::from_picture`";
                return Err(Error::argument("labels", format!("some are not whole, or too large; {advice}")));
            }
        }
        let (distinct, places, _) = labels.f_to_kind(Kind::Int64)?.f_internal_unique2(true, true, false)?;
        let count = distinct.size1()?;
        if count > MOST_LABELS {
            return Err(Error::argument("labels", format!("{count} labels are a picture's colours, not its regions")));
        }
        Self::hard(&distinct, &places, false)
    }

    /// From how much of each pixel belongs to each area, `(1 or batch, areas, height, width)`, 0 to 1. The areas' labels are 0,
    /// 1, 2 and so on. The shares of a pixel are to sum to 1; a style's tokens with a smaller sum are attended to less.
    ///
    /// An area whose shares are all 0 is left out: [`labels`](Self::labels) does not have it, no style needs it, and
    /// [`Style::area_weights`](crate::Style) and [`Style::matches`](crate::Style) may not name it. The numbers of the others stay.
    ///
    /// # Errors
    /// Another shape; a share outside 0 to 1, or NaN; no share above 0 at all.
    pub fn soft(shares: &Tensor) -> Result<Self> {
        let areas = match shares.size().as_slice() {
            &[batch, areas, height, width] if batch > 0 && areas > 0 && height > 0 && width > 0 => areas,
            other => return Err(Error::shape("shares", "(1 or batch, areas, height, width) with sides of at least 1", other.to_vec())),
        };
        let shares = shares.f_detach()?.f_to_kind(Kind::Float)?;
        let (least, most) = (shares.f_min()?.f_double_value(&[])?, shares.f_max()?.f_double_value(&[])?);
        if !(least >= 0.0 && most <= 1.0) {
            return Err(Error::argument("shares", format!("from {least} to {most}; 0 to 1 is possible")));
        }
        // An area without any pixel is none.
        let largest = Vec::<f32>::try_from(shares.f_amax([0_i64, 2, 3], false)?.f_to_device(Device::Cpu)?)?;
        let (labels, left_out): (Vec<_>, Vec<_>) = (0..areas).zip(largest).partition(|(_, largest)| *largest > 0.0);
        let numbers = |areas: Vec<(i64, f32)>| areas.into_iter().map(|(area, _)| area).collect::<Vec<i64>>();
        let (labels, left_out) = (numbers(labels), numbers(left_out));
        if labels.is_empty() {
            return Err(Error::argument("shares", "are all 0: no pixel belongs to any area"));
        }
        let there = Tensor::f_from_slice(&labels)?.f_to_device(shares.device())?;
        let areas = Areas::Soft(shares.f_index_select(1, &there)?);
        Ok(Self { areas, labels: labels.into(), left_out: left_out.into(), painted: false, identity: Identity::default() })
    }

    /// From the distinct labels in ascending order, and which of them each pixel has.
    fn hard(distinct: &Tensor, places: &Tensor, painted: bool) -> Result<Self> {
        let labels = Vec::<i64>::try_from(distinct.f_to_device(Device::Cpu)?)?;
        let areas = Areas::Hard(places.f_to_kind(Kind::Float)?);
        Ok(Self { areas, labels: labels.into(), left_out: Arc::new([]), painted, identity: Identity::default() })
    }

    /// The labels that occur, in ascending order. A part or a smaller copy of a map keeps those of the whole.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Whether pixels have shares of areas instead of labels.
    pub fn is_soft(&self) -> bool {
        matches!(self.areas, Areas::Soft(_))
    }

    /// `(height, width)` in pixels.
    ///
    /// # Errors
    /// libtorch's.
    pub fn size(&self) -> Result<(i64, i64)> {
        let (_, _, height, width) = self.tensor().size4()?;
        Ok((height, width))
    }

    /// How many maps: 1 serves every picture of a batch, else there is one for each.
    ///
    /// # Errors
    /// libtorch's.
    pub fn batch(&self) -> Result<i64> {
        Ok(self.tensor().size4()?.0)
    }

    /// The same regions in `(height, width)` pixels: hard maps by nearest neighbour, soft maps by averages.
    ///
    /// # Errors
    /// As [`image::check_size`].
    pub fn resized(&self, (height, width): (i64, i64)) -> Result<Self> {
        image::check_size((height, width))?;
        self.with_tensor(self.at((height, width))?)
    }

    /// A second handle on the same map.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let areas = match &self.areas {
            Areas::Hard(places) => Areas::Hard(places.shallow_clone()),
            Areas::Soft(shares) => Areas::Soft(shares.shallow_clone()),
        };
        self.with(areas, self.identity.clone())
    }

    /// On another device. Maps work on any: what the losses of a run need of them is brought to the pictures' own once, and
    /// once for each batch of views; what AdaIN needs, each time.
    ///
    /// # Errors
    /// libtorch's.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        self.with_tensor(self.tensor().f_to_device(device)?)
    }

    /// The places in [`labels`](Self::labels) over a grid, `(batch, tokens)` in i64; none of a soft map.
    pub(crate) fn places(&self, grid: (i64, i64)) -> Result<Option<Tensor>> {
        match &self.areas {
            Areas::Hard(_) => Ok(Some(self.at(grid)?.f_flatten(1, -1)?.f_to_kind(Kind::Int64)?)),
            Areas::Soft(_) => Ok(None),
        }
    }

    /// The shares of [`labels`](Self::labels) over a grid, `(batch, labels, tokens)` in f32; none of a hard map.
    pub(crate) fn shares(&self, grid: (i64, i64)) -> Result<Option<Tensor>> {
        match &self.areas {
            Areas::Hard(_) => Ok(None),
            Areas::Soft(_) => Ok(Some(self.at(grid)?.f_flatten(2, -1)?)),
        }
    }

    /// How much of each token of a grid has each of [`labels`](Self::labels), `(batch, labels, tokens)`: of a hard map 0 or 1.
    pub(crate) fn weights(&self, grid: (i64, i64), kind: Kind) -> Result<Tensor> {
        if let Some(shares) = self.shares(grid)? {
            return Ok(shares.f_to_kind(kind)?);
        }
        let places = self.at(grid)?.f_flatten(2, -1)?;
        let count = i64::try_from(self.labels.len()).unwrap_or(i64::MAX);
        let each = Tensor::f_from_slice(&(0..count).map(|place| place as f32).collect::<Vec<_>>())?;
        Ok(places.f_eq_tensor(&each.f_to_device(places.device())?.f_view([1, -1, 1])?)?.f_to_kind(kind)?)
    }

    /// The labels of a grid, `(batch, 1, height, width)` in i64; none of a soft map.
    pub(crate) fn by_pixel(&self, (height, width): (i64, i64)) -> Result<Option<Tensor>> {
        let Some(places) = self.places((height, width))? else { return Ok(None) };
        let labels = Tensor::f_from_slice(&self.labels)?.f_to_device(places.device())?;
        Ok(Some(labels.f_index_select(0, &places.f_flatten(0, 1)?)?.f_view([-1, 1, height, width])?))
    }

    /// Where a label is in [`labels`](Self::labels).
    pub(crate) fn place(&self, label: i64) -> Option<usize> {
        self.labels.binary_search(&label).ok()
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Why a label is not there, for an error: "which has 0, 1".
    pub(crate) fn lacks(&self, label: i64) -> String {
        let there = self.names(&self.labels);
        if self.left_out.contains(&label) {
            return format!("which has {there}: of that area no pixel of the soft map has a share, and so it was left out; leave it out here, too");
        }
        format!("which has {there}")
    }

    /// The first labels by name, for an error.
    pub(crate) fn names(&self, labels: &[i64]) -> String {
        let names: Vec<String> = labels.iter().take(8).map(|&label| self.name(label)).collect();
        let more = labels.len().saturating_sub(names.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        names.join(", ") + &more
    }

    fn tensor(&self) -> &Tensor {
        match &self.areas {
            Areas::Hard(tensor) | Areas::Soft(tensor) => tensor,
        }
    }

    /// Another map of the same labels.
    fn with_tensor(&self, tensor: Tensor) -> Result<Self> {
        let areas = if self.is_soft() { Areas::Soft(tensor) } else { Areas::Hard(tensor) };
        Ok(self.with(areas, Identity::default()))
    }

    fn with(&self, areas: Areas, identity: Identity) -> Self {
        Self { areas, labels: Arc::clone(&self.labels), left_out: Arc::clone(&self.left_out), painted: self.painted, identity }
    }

    fn at(&self, (height, width): (i64, i64)) -> Result<Tensor> {
        if self.size()? == (height, width) {
            return Ok(self.tensor().shallow_clone());
        }
        match &self.areas {
            Areas::Hard(places) => Ok(places.f_upsample_nearest2d([height, width], None, None)?),
            Areas::Soft(shares) => Ok(shares.f_adaptive_avg_pool2d([height, width])?),
        }
    }
}
