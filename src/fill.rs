//! A layout filled with the pixels of a texture, where controlled texture synthesis starts.

use crate::noise::MersenneTwister;
use crate::{image, Error, LabelMap, Result};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// The target's regions, each made of pixels drawn at random from the source's region of the same label.
///
/// `source` is a picture `(1, 3, height, width)`; its labels are scaled to it by nearest neighbour where they have another size.
/// The result is `(1, 3, height, width)` in f32, in the size of the target's labels ([`LabelMap::resized`] changes it), and on
/// the source's device. It is start and content of a controlled synthesis:
/// `Distiller::style_transfer(.., References::styles([Style::new(source).with_labels(..)]).with_labels(..).with_content(filled), weight)`,
/// both encoded.
///
/// The labels take their turn in ascending order, pixels row by row, and numbers are those of `torch.randint` with a generator
/// of this seed (of which the lower 32 bits count), so a seed fills the picture as it does in Python.
///
/// # Errors
/// Not one picture; a batch of labels, or soft ones; a label of the target that the source does not have, by name.
pub fn fill(source: &Tensor, source_labels: &LabelMap, target_labels: &LabelMap, seed: u64) -> Result<Tensor> {
    let size = image::size(source)?;
    if source.size4()?.0 != 1 {
        return Err(Error::shape("source", "(1, 3, height, width)", source.size()));
    }
    let colours = source.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1])?;
    let colours = Vec::<f32>::try_from(colours)?;
    let theirs = pixels("source labels", source_labels, size)?;
    let (height, width) = target_labels.size()?;
    let ours = pixels("target labels", target_labels, (height, width))?;

    let mut twister = MersenneTwister::new(seed as u32);
    let channels: Vec<&[f32]> = colours.chunks_exact(theirs.count).collect();
    let mut filled = vec![0.0_f32; channels.len() * ours.count];
    for (label, places) in &ours.by_label {
        let region = theirs.by_label.get(label).ok_or_else(|| {
            let there = source_labels.names(&theirs.by_label.keys().copied().collect::<Vec<_>>());
            Error::argument("source labels", format!("the source has no pixel of label {} to fill with; it has {there}", target_labels.name(*label)))
        })?;
        for place in places {
            let drawn = usize::try_from(twister.below(region.len() as u64)).unwrap_or(0);
            let Some(&from) = region.get(drawn) else { continue };
            for (channel, row) in channels.iter().zip(filled.chunks_exact_mut(ours.count)) {
                if let (Some(to), Some(colour)) = (row.get_mut(*place), channel.get(from)) {
                    *to = *colour;
                }
            }
        }
    }
    Ok(Tensor::f_from_slice(&filled)?.f_view([1, -1, height, width])?.f_to_device(source.device())?)
}

struct Pixels {
    count: usize,
    /// Row by row.
    by_label: BTreeMap<i64, Vec<usize>>,
}

fn pixels(name: &'static str, map: &LabelMap, size: (i64, i64)) -> Result<Pixels> {
    let places = map.places(size)?.ok_or_else(|| Error::argument(name, "are soft; a pixel is to have one label (`LabelMap::new`)"))?;
    if map.batch()? != 1 {
        return Err(Error::argument(name, format!("are of {} pictures; one is possible", map.batch()?)));
    }
    let places = Vec::<i64>::try_from(places.f_to_device(Device::Cpu)?.f_view([-1])?)?;
    let mut by_label: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
    for (pixel, &place) in places.iter().enumerate() {
        let label = usize::try_from(place).ok().and_then(|place| map.labels().get(place));
        by_label.entry(label.copied().unwrap_or_default()).or_default().push(pixel);
    }
    Ok(Pixels { count: places.len(), by_label })
}
