//! The flags that say which region of a style serves which of the result.

use attention_distillation::{image, Error, LabelMap, References, Result};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub struct RegionFlags {
    /// A picture whose colours are labels of the style's regions; once for each style, in their order
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
    allow_missing: bool,
}

impl RegionFlags {
    /// The maps, for so many styles.
    pub fn load(&self, styles: usize) -> Result<Option<Regions>> {
        let Some(target) = &self.target_mask else { return Ok(None) };
        if self.style_mask.len() != styles {
            let reason = format!("{} are given for {styles} styles; give one for each, in their order", self.style_mask.len());
            return Err(Error::Argument { argument: "style masks", reason });
        }
        let map = |path: &Path| LabelMap::from_picture(&image::load(path)?).map_err(|error| named(path, &error));
        let styles = self.style_mask.iter().map(|path| map(path)).collect::<Result<_>>()?;
        Ok(Some(Regions { styles, target: map(target)?, allow_missing: self.allow_missing_labels }))
    }
}

fn named(path: &Path, error: &Error) -> Error {
    Error::Image { path: path.to_owned(), reason: error.to_string() }
}

impl Regions {
    /// The references with these regions.
    pub fn of(&self, mut references: References) -> Result<References> {
        for (style, labels) in references.styles.iter_mut().zip(&self.styles) {
            style.labels = Some(labels.shallow_clone());
        }
        references.labels = Some(self.target.shallow_clone());
        references.allow_missing_labels = self.allow_missing;
        Ok(references)
    }
}
