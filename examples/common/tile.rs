//! Which borders of the result meet.

use attention_distillation::{tch::Tensor, Result, Seamless};
use clap::ValueEnum;

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum Tile {
    None,
    X,
    Y,
    Both,
}

impl Tile {
    pub fn seamless(self) -> Seamless {
        match self {
            Self::None => Seamless::None,
            Self::X => Seamless::X,
            Self::Y => Seamless::Y,
            Self::Both => Seamless::Both,
        }
    }

    /// Where a side does not end with a whole place of the network's deepest layer, its borders meet there within one.
    pub fn warn(self, (height, width): (i64, i64), multiple: i64) {
        let (x, y) = (self.seamless().x(), self.seamless().y());
        if (x && width % multiple != 0) || (y && height % multiple != 0) {
            tracing::warn!("{width}x{height} may show a slight seam: borders meet best where sides are multiples of {multiple} pixels");
        }
    }

    /// An input beside it on the sheet, at the scale of one tile: with as much white below.
    pub fn beside(self, input: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(input.shallow_clone()),
            _ => Ok(Tensor::f_cat(&[input, &input.f_ones_like()?], 2)?),
        }
    }

    /// What a sheet shows: a tile laid 2x2.
    pub fn shown(self, pictures: Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(pictures),
            _ => Ok(pictures.f_repeat([1, 1, 2, 2])?),
        }
    }
}
