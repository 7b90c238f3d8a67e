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

    /// What a sheet shows: a tile laid 2x2.
    pub fn shown(self, pictures: Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(pictures),
            _ => Ok(pictures.f_repeat([1, 1, 2, 2])?),
        }
    }
}
