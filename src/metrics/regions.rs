//! The same distances label by label.

use super::sliced::{PatchConfig, PatchDistance, Scales};
use crate::scalar::integer;
use crate::{Error, LabelMap, Result};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// [`patch_distance`](super::patch_distance) for each label of the picture, over the patches whose centre lies in its region here and
/// in the reference. A patch near a region's rim sees some of its neighbour.
///
/// Both are a picture and its label map, of any size: it lies over the whole of the picture, and is scaled to it by nearest
/// neighbour. Equal labels meet, so paint both maps with the same colours. Regions that the reference alone has play no part. At scale `j` above 0 a pixel, the mean of `2^j x 2^j`, has the label of
/// the pixel right below its middle; a region has no more scales than both pictures have patches of it.
///
/// # Errors
/// As [`patch_distance`](super::patch_distance); [`Error::Argument`] for a soft map, or one of several pictures;
/// [`Error::Argument`], with the label, where a region of the picture has no patch here or in the reference.
pub fn patch_distance_by_region(
    (picture, labels): (&Tensor, &LabelMap),
    (reference, reference_labels): (&Tensor, &LabelMap),
    config: &PatchConfig,
) -> Result<BTreeMap<i64, PatchDistance>> {
    let scales = Scales::new(picture, reference, config)?;
    let device = picture.device();
    let (ours, theirs) = (by_pixel("labels", labels, picture, device)?, by_pixel("reference labels", reference_labels, reference, device)?);
    let (distinct, _) = ours.f_internal_unique(true, false)?;
    let mut found: Vec<(i64, Vec<f64>)> = Vec::<i64>::try_from(distinct)?.into_iter().map(|label| (label, vec![])).collect();
    for (scale, pair) in scales.pairs.iter().enumerate() {
        let (ours, theirs) = (centres(&ours, scale, config.size, &pair.0)?, centres(&theirs, scale, config.size, &pair.1)?);
        let (mut going_on, mut selections) = (vec![], vec![]);
        for (label, distances) in found.iter_mut().filter(|(_, distances)| distances.len() == scale) {
            let (here, there) = (places(&ours, *label)?, places(&theirs, *label)?);
            let lacking = [("picture", &here), ("reference", &there)].into_iter().find(|(_, places)| places.numel() == 0);
            match lacking {
                None => {
                    going_on.push(distances);
                    selections.push((Some(here), Some(there)));
                }
                Some((which, _)) if scale == 0 => {
                    let (size, label) = (config.size, labels.name(*label));
                    return Err(Error::argument(
                        "labels",
                        format!("label {label}: the {which} has no patch of {size}x{size} pixels with its centre in it"),
                    ));
                }
                Some(_) => {}
            }
        }
        for (distances, distance) in going_on.into_iter().zip(scales.compare(pair, &selections)?) {
            distances.push(distance);
        }
    }
    Ok(found.into_iter().map(|(label, distances)| (label, PatchDistance::new(distances))).collect())
}

/// [`colour_distance`](super::colour_distance) for each label of the picture, over the pixels of its region here and in the reference.
///
/// # Errors
/// As [`colour_distance`](super::colour_distance) and [`patch_distance_by_region`].
pub fn colour_distance_by_region(picture: (&Tensor, &LabelMap), reference: (&Tensor, &LabelMap), seed: u64) -> Result<BTreeMap<i64, f64>> {
    let distances = patch_distance_by_region(picture, reference, &PatchConfig::colours(seed))?;
    Ok(distances.into_iter().map(|(label, distance)| (label, distance.mean)).collect())
}

/// `(1, 1, height, width)` in i64, as large as the picture.
fn by_pixel(name: &'static str, labels: &LabelMap, picture: &Tensor, device: Device) -> Result<Tensor> {
    let (_, _, height, width) = picture.size4()?;
    if labels.batch()? != 1 {
        return Err(Error::argument(name, format!("are of {} pictures; one is possible", labels.batch()?)));
    }
    let labels = labels.by_pixel((height, width))?;
    let labels = labels.ok_or_else(|| Error::argument(name, "are soft; a pixel is to have one label (`LabelMap::new`)"))?;
    Ok(labels.f_to_device(device)?)
}

/// The labels of the patches' centres in reading order, for the picture at a scale.
fn centres(labels: &Tensor, scale: usize, size: i64, picture: &Tensor) -> Result<Tensor> {
    let (_, _, height, width) = picture.size4()?;
    let (step, rim) = (1 << scale, size / 2);
    let mut centres = labels.shallow_clone();
    for (dim, length) in [(2, height), (3, width)] {
        centres = centres.f_slice(dim, step / 2, None, step)?.f_narrow(dim, rim, length - size + 1)?;
    }
    Ok(centres.f_flatten(0, -1)?)
}

fn places(labels: &Tensor, label: i64) -> Result<Tensor> {
    Ok(labels.f_eq_tensor(&integer(label)?)?.f_nonzero()?.f_squeeze_dim(1)?)
}
