//! Regions of a picture: which label each pixel has, or how much of it belongs to each of some areas.

use crate::scalar::WithNumber;
use crate::{image, Error, Result};
use tch::{Device, Kind, Tensor};

/// More labels than this are a picture that was taken for a label map.
const MOST_LABELS: usize = 4096;

/// More colours than this are a painted label map that was stored or scaled with loss.
const MOST_COLOURS: usize = 256;

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
    labels: Vec<i64>,
    /// Whether they are colours.
    painted: bool,
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
        Self::hard(&labels.f_to_kind(Kind::Int64)?, MOST_LABELS, false)
    }

    /// From how much of each pixel belongs to each area, `(1 or batch, areas, height, width)`, 0 to 1. The areas' labels are 0,
    /// 1, 2 and so on. The shares of a pixel are to sum to 1; a style's tokens with a smaller sum are attended to less.
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
        let labels: Vec<i64> = (0..areas).zip(largest).filter(|(_, largest)| *largest > 0.0).map(|(area, _)| area).collect();
        if labels.is_empty() {
            return Err(Error::argument("shares", "are all 0: no pixel belongs to any area"));
        }
        let there = Tensor::f_from_slice(&labels)?.f_to_device(shares.device())?;
        Ok(Self { areas: Areas::Soft(shares.f_index_select(1, &there)?), labels, painted: false })
    }

    /// From a painted picture, `(1 or batch, 3, height, width)`, 0 to 1: each colour is a label, so that pictures painted with
    /// the same colours have the same labels. A grey is the label 0 (black) to 255 (white), as in [`new`](Self::new) of
    /// a grey picture's bytes; other colours are `2^24 + 0xrrggbb`.
    ///
    /// # Errors
    /// Not a picture, or NaN in it; more than 256 colours, as they come from a JPEG or from soft edges.
    pub fn from_picture(picture: &Tensor) -> Result<Self> {
        image::size(picture)?;
        let picture = picture.f_detach()?.f_to_kind(Kind::Float)?;
        if picture.f_isnan()?.f_any()?.f_int64_value(&[])? != 0 {
            return Err(Error::argument("label picture", "holds NaN"));
        }
        let bytes = picture.within(0.0, 1.0)?.times(255.0)?.f_round()?;
        let channel = |i: i64| bytes.f_narrow(1, i, 1);
        let (red, green, blue) = (channel(0)?, channel(1)?, channel(2)?);
        // Exact in f32: below 2^24.
        let colour = red.times(65536.0)?.f_add(&green.times(256.0)?)?.f_add(&blue)?.f_to_kind(Kind::Int64)?;
        let colour = colour.f_add(&crate::scalar::integer(COLOURED)?)?;
        let grey = red.f_eq_tensor(&green)?.f_logical_and(&green.f_eq_tensor(&blue)?)?;
        Self::hard(&red.f_to_kind(Kind::Int64)?.f_where_self(&grey, &colour)?, MOST_COLOURS, true)
    }

    fn hard(labels: &Tensor, most: usize, painted: bool) -> Result<Self> {
        let (distinct, places, _) = labels.f_internal_unique2(true, true, false)?;
        let count = usize::try_from(distinct.size1()?).unwrap_or(usize::MAX);
        if count > most {
            let reason = if painted {
                "of them; labels are painted in a few flat colours. Store the picture as PNG, not as JPEG, and without soft edges"
            } else {
                "labels are a picture's colours, not its regions"
            };
            let name = if painted { "label picture" } else { "labels" };
            return Err(Error::argument(name, format!("{count} {}{reason}", if painted { "colours are too many " } else { "" })));
        }
        let labels = Vec::<i64>::try_from(distinct.f_to_device(Device::Cpu)?)?;
        Ok(Self { areas: Areas::Hard(places.f_to_kind(Kind::Float)?), labels, painted })
    }

    /// The labels that occur, in ascending order. A part of a map has those of the whole.
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
        Self { areas, labels: self.labels.clone(), painted: self.painted }
    }

    /// On another device. Maps work on any; on the pictures' own they are not copied there for every loss.
    ///
    /// # Errors
    /// libtorch's.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        self.with_tensor(self.tensor().f_to_device(device)?)
    }

    /// The parts of one map under views of its picture, one map of the batch for each view. `canvas` is the picture's size in
    /// latents, `(height, width)`; so are the views, `[top, left, height, width]`, all of one size.
    ///
    /// # Errors
    /// A batch of maps; no view; a view that is empty or beyond the canvas, or of another size than the first.
    pub fn crop(&self, canvas: (i64, i64), views: impl IntoIterator<Item = [i64; 4]>) -> Result<Self> {
        image::check_size(canvas)?;
        if self.batch()? != 1 {
            return Err(Error::shape("labels", "(1, ..): views are of one picture", self.tensor().size()));
        }
        // Whole pixels for each latent, or the views' parts would have different sizes.
        let (height, width) = self.size()?;
        let scale = ((height + canvas.0 - 1) / canvas.0, (width + canvas.1 - 1) / canvas.1);
        let whole = self.at((scale.0 * canvas.0, scale.1 * canvas.1))?;
        let mut parts: Vec<Tensor> = vec![];
        for [top, left, height, width] in views {
            let inside = |start: i64, length: i64, side: i64| start >= 0 && length > 0 && start <= side - length;
            if !(inside(top, height, canvas.0) && inside(left, width, canvas.1)) {
                let view = format!("{height}x{width} at {top}, {left}");
                return Err(Error::argument("view", format!("{view} is not within {}x{} latents", canvas.0, canvas.1)));
            }
            let part = whole.f_narrow(2, top * scale.0, height * scale.0)?.f_narrow(3, left * scale.1, width * scale.1)?;
            if let Some(first) = parts.first().filter(|first| first.size() != part.size()) {
                return Err(Error::shape("view", format!("that of the first, {:?} in pixels of the map", first.size()), part.size()));
            }
            parts.push(part);
        }
        if parts.is_empty() {
            return Err(Error::argument("views", "there are none"));
        }
        self.with_tensor(Tensor::f_cat(&parts, 0)?)
    }

    /// A canvas that goes on at its other border, by so many rows and columns: its map, as [`crop`](Self::crop) scales that.
    pub(crate) fn gone_on(&self, canvas: (i64, i64), (rows, columns): (i64, i64)) -> Result<Self> {
        let (height, width) = self.size()?;
        let scale = ((height + canvas.0 - 1) / canvas.0, (width + canvas.1 - 1) / canvas.1);
        let whole = self.at((scale.0 * canvas.0, scale.1 * canvas.1))?;
        let taller = Tensor::f_cat(&[&whole, &whole.f_narrow(2, 0, rows * scale.0)?], 2)?;
        self.with_tensor(Tensor::f_cat(&[&taller, &taller.f_narrow(3, 0, columns * scale.1)?], 3)?)
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

    /// What an error calls a label.
    pub(crate) fn name(&self, label: i64) -> String {
        match label {
            grey @ 0..=255 if self.painted => format!("#{grey:02x}{grey:02x}{grey:02x}"),
            colour if self.painted => format!("#{:06x}", colour - COLOURED),
            other => other.to_string(),
        }
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

    fn with_tensor(&self, tensor: Tensor) -> Result<Self> {
        let areas = if self.is_soft() { Areas::Soft(tensor) } else { Areas::Hard(tensor) };
        Ok(Self { areas, labels: self.labels.clone(), painted: self.painted })
    }

    fn at(&self, (height, width): (i64, i64)) -> Result<Tensor> {
        match &self.areas {
            Areas::Hard(places) => Ok(places.f_upsample_nearest2d([height, width], None, None)?),
            Areas::Soft(shares) => Ok(shares.f_adaptive_avg_pool2d([height, width])?),
        }
    }
}

/// What keeps a dark blue apart from a grey.
const COLOURED: i64 = 1 << 24;
