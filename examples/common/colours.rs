//! Whose colours a transfer ends in.

use attention_distillation::{image, tch::Tensor, Error, Result};
use clap::ValueEnum;

#[derive(Debug, clap::Args)]
pub struct ColourFlags {
    /// Whose colours the picture gets
    #[arg(long, value_enum, default_value_t = Colours::Style)]
    colours: Colours,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Colours {
    /// The styles'
    Style,
    /// The content's: the styles are given its mean and covariance of colours first
    Content,
    /// The content's in their very places: the result keeps its luminance alone (previews and drafts are not yet so)
    InPlace,
}

impl ColourFlags {
    /// Whether the picture that they ask for is there.
    pub fn check(&self, has_content: bool) -> Result<()> {
        if self.colours != Colours::Style && !has_content {
            return Err(Error::Argument { argument: "colours", reason: "of the content need one; give --content".into() });
        }
        Ok(())
    }

    /// The styles as the run is to see them.
    pub fn of_styles(&self, styles: Vec<Tensor>, content: Option<&Tensor>) -> Result<Vec<Tensor>> {
        match content {
            Some(content) if self.colours == Colours::Content => styles.iter().map(|style| image::match_colours(style, content)).collect(),
            _ => Ok(styles),
        }
    }

    /// The result as it is to be written.
    pub fn of_result(&self, result: Tensor, content: Option<&Tensor>) -> Result<Tensor> {
        match content {
            Some(content) if self.colours == Colours::InPlace => image::match_chroma(&result, content),
            _ => Ok(result),
        }
    }
}
