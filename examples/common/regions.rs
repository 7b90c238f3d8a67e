//! The flags that say which region of a style serves which of the result.

use attention_distillation::{fill, image, tch::Device, tch::Tensor, Error, LabelMap, References, Result};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub struct RegionFlags {
    /// A PNG whose flat colours are labels of the style's regions; once for each style, in their order
    #[arg(long, value_name = "FILE", requires = "target_mask")]
    style_mask: Vec<PathBuf>,
    /// The result's regions, in the same colours
    #[arg(long, value_name = "FILE", requires = "style_mask")]
    target_mask: Option<PathBuf>,
    /// Let regions of colours that no style mask has take from the styles as a whole
    #[arg(long, requires = "target_mask")]
    allow_missing_labels: bool,
}

/// Label maps of the styles and of the result.
pub struct Regions {
    pub styles: Vec<LabelMap>,
    pub target: LabelMap,
    /// The styles' masks as painted.
    painted: Vec<Tensor>,
    allow_missing: bool,
}

impl RegionFlags {
    /// The pictures that are read for it.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.style_mask.iter().chain(&self.target_mask)
    }

    /// The maps, for so many styles.
    pub fn load(&self, styles: usize) -> Result<Option<Regions>> {
        let Some(target) = &self.target_mask else { return Ok(None) };
        if self.style_mask.len() != styles {
            let reason = format!("{} are given for {styles} styles; give one for each, in their order", self.style_mask.len());
            return Err(Error::Argument { argument: "style masks", reason });
        }
        let map = |path: &Path, picture: &Tensor| LabelMap::from_picture(picture).map_err(|error| named(path, &error));
        let painted = self.style_mask.iter().map(image::load).collect::<Result<Vec<_>>>()?;
        let styles = self.style_mask.iter().zip(&painted).map(|(path, picture)| map(path, picture)).collect::<Result<Vec<_>>>()?;
        let map = map(target, &image::load(target)?)?;
        let served = |label: &i64| self.allow_missing_labels || styles.iter().any(|style| style.labels().contains(label));
        if let Some(&label) = map.labels().iter().find(|label| !served(label)) {
            let reason = format!("no style mask has the colour #{:06x} in it; paint one with it, or use --allow-missing-labels", rgb(label));
            return Err(Error::Image { path: target.clone(), reason });
        }
        Ok(Some(Regions { styles, target: map, painted, allow_missing: self.allow_missing_labels }))
    }
}

fn named(path: &Path, error: &Error) -> Error {
    Error::Image { path: path.to_owned(), reason: error.to_string() }
}

impl Regions {
    /// The references with these regions, which are moved to their device once.
    pub fn of(&self, mut references: References, device: Device) -> Result<References> {
        for (style, labels) in references.styles.iter_mut().zip(&self.styles) {
            style.labels = Some(labels.to_device(device)?);
        }
        references.labels = Some(self.target.to_device(device)?);
        references.allow_missing_labels = self.allow_missing;
        Ok(references)
    }

    /// The target's regions in `(height, width)` pixels, each made of pixels of the regions of its colour in all of these
    /// pictures, the styles'.
    pub fn filled(&self, styles: &[Tensor], size: (i64, i64), seed: u64) -> Result<Tensor> {
        let row = |picture: &Tensor| picture.f_flatten(2, -1)?.f_unsqueeze(2);
        let (mut pixels, mut colours) = (vec![], vec![]);
        for (style, painted) in styles.iter().zip(&self.painted) {
            let (height, width) = image::size(style)?;
            pixels.push(row(style)?);
            colours.push(row(&painted.f_upsample_nearest2d([height, width], None, None)?)?);
        }
        if self.allow_missing {
            // A colour that no style has is given to a second copy of all pixels.
            let all = Tensor::f_cat(&pixels, 3)?;
            let there = LabelMap::from_picture(&Tensor::f_cat(&colours, 3)?)?;
            for &label in self.target.labels().iter().filter(|label| !there.labels().contains(label)) {
                colours.push(pixel(label)?.f_expand_as(&all)?);
                pixels.push(all.shallow_clone());
            }
        }
        let labels = LabelMap::from_picture(&Tensor::f_cat(&colours, 3)?)?;
        fill(&Tensor::f_cat(&pixels, 3)?, &labels, &self.target.resized(size)?, seed)
    }
}

/// The colour that [`LabelMap::from_picture`] made this label of.
fn rgb(label: i64) -> i64 {
    if label < 256 {
        label * 0x0001_0101
    } else {
        label - (1 << 24)
    }
}

/// One pixel of it.
fn pixel(label: i64) -> Result<Tensor> {
    let channels = [16, 8, 0].map(|bits| (rgb(label) >> bits & 255) as f32 / 255.0);
    Ok(Tensor::f_from_slice(&channels)?.f_view([1, 3, 1, 1])?)
}
