//! Label maps that are painted: colours as labels.

use super::LabelMap;
use crate::scalar::WithNumber;
use crate::{image, Error, Result};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

/// More colours than this are a painted label map that was stored or scaled with loss.
const MOST_COLOURS: i64 = 256;

/// So many stray colours are no accident.
const STRAY_COLOURS: usize = 8;

/// A stray colour has at most one pixel of so many.
const STRAY_AREA: i64 = 200;

/// What keeps a dark blue apart from a grey.
const COLOURED: i64 = 1 << 24;

const ADVICE: &str = "save it as PNG, not as JPEG, painted without smooth edges (antialiasing) and scaled by nearest neighbour; \
                      where areas are to blend, make a `LabelMap::soft` of how much of each pixel belongs to each";

impl LabelMap {
    /// From a painted picture, `(1 or batch, 3, height, width)`, 0 to 1: each colour is a label, so that pictures painted with
    /// the same colours have the same labels. A grey is the label 0 (black) to 255 (white), as in [`new`](Self::new) of
    /// a grey picture's bytes; other colours are `2^24 + 0xrrggbb`.
    ///
    /// Paint in flat colours, and save as PNG: a JPEG, a brush with smooth edges or a map that was scaled smoothly adds colours
    /// between the painted ones, each of them a label of its own. Many that are nowhere 3 pixels wide and have less than 1/200 of the
    /// pixels are taken for these and refused; of a few, `tracing` warns. Regions that are meant to be so fine make a map by
    /// [`new`](Self::new), and areas that are meant to blend one by [`soft`](Self::soft).
    ///
    /// # Errors
    /// Not a picture, or NaN in it; more than 256 colours, or signs of a JPEG or of smooth edges.
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
        let labels = red.f_to_kind(Kind::Int64)?.f_where_self(&grey, &colour)?;
        let (distinct, places, counts) = labels.f_internal_unique2(true, true, true)?;
        let count = distinct.size1()?;
        if count > MOST_COLOURS {
            let reason = format!("{count} colours are too many of them: labels are a few flat colours; {ADVICE}");
            return Err(Error::argument("label picture", reason));
        }
        let map = Self::hard(&distinct, &places, true)?;
        map.refuse_stray(&counts)?;
        Ok(map)
    }

    fn refuse_stray(&self, counts: &Tensor) -> Result<()> {
        let stray = self.stray(counts)?;
        if stray.is_empty() {
            return Ok(());
        }
        let (count, all, names) = (stray.len(), self.labels().len(), self.names(&stray));
        if count >= STRAY_COLOURS && 2 * count >= all {
            let reason = format!(
                "{count} of its {all} colours have hardly a pixel ({names}), as they come from a JPEG or from smooth edges: {ADVICE}; if they \
                 are regions, give them numbers and make a `LabelMap::new`"
            );
            return Err(Error::argument("label picture", reason));
        }
        tracing::warn!(labels = all, stray = count, names, "labels of hardly a pixel; if they were not painted, {ADVICE}");
        Ok(())
    }

    /// Labels that are nowhere 3 pixels wide, and rare. Of a map that is itself so small, none.
    fn stray(&self, counts: &Tensor) -> Result<Vec<i64>> {
        let places = self.tensor();
        let (_, _, height, width) = places.size4()?;
        if height < 3 || width < 3 {
            return Ok(vec![]);
        }
        let largest = |of: &Tensor| of.f_max_pool2d([3, 3], [1, 1], [0, 0], [1, 1], false);
        let (most, least) = (largest(places)?, largest(&places.f_neg()?)?.f_neg()?);
        let within = most.f_masked_select(&most.f_eq_tensor(&least)?)?;
        let (wide, _) = within.f_internal_unique(true, false)?;
        let wide: BTreeSet<i64> = Vec::<i64>::try_from(wide.f_to_kind(Kind::Int64)?.f_to_device(Device::Cpu)?)?.into_iter().collect();
        let counts = Vec::<i64>::try_from(counts.f_to_device(Device::Cpu)?)?;
        let pixels: i64 = counts.iter().sum();
        let stray = (0..).zip(self.labels()).zip(counts).filter(|((place, _), count)| count * STRAY_AREA <= pixels && !wide.contains(place));
        Ok(stray.map(|((_, &label), _)| label).collect())
    }

    /// How messages write a label: `#rrggbb` where it was painted, else the number.
    pub fn name(&self, label: i64) -> String {
        match label {
            grey @ 0..=255 if self.painted => format!("#{grey:02x}{grey:02x}{grey:02x}"),
            colour if self.painted => format!("#{:06x}", colour.wrapping_sub(COLOURED)),
            other => other.to_string(),
        }
    }
}
