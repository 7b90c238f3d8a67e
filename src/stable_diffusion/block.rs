//! A U-Net's blocks: down, mid, up.

use super::resnet::{Downsample, Resnet, ResnetStyle, Upsample};
use super::transformer::{Pass, Transformer, TransformerShape};
use super::weights::Scope;
use crate::{Error, Result};
use tch::Tensor;

/// What a block is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockShape {
    pub(crate) inputs: i64,
    pub(crate) outputs: i64,
    /// Residual blocks.
    pub(crate) layers: i64,
    pub(crate) resnet: ResnetStyle,
    /// After each residual block, where the block has attention.
    pub(crate) transformer: Option<TransformerShape>,
}

/// One step of the way through the network, between two states of the picture's features and the skips.
#[derive(Debug)]
pub(crate) enum Layer {
    /// A residual block, and a transformer where there is one.
    Block { resnet: Box<Resnet>, transformer: Option<Transformer>, skip: Skip },
    /// Halves the sides; its output is a skip, too.
    Downsample(Downsample),
    /// Doubles them.
    Upsample(Upsample),
}

/// What a block has to do with the skips from the way down to the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Skip {
    /// Its output becomes one.
    Push,
    /// The last one is joined to its input.
    Pop,
    /// Nothing, in the middle.
    None,
}

impl Layer {
    pub(crate) fn self_attentions(&self) -> usize {
        match self {
            Self::Block { transformer: Some(transformer), .. } => transformer.len(),
            _ => 0,
        }
    }

    pub(crate) fn pushes(&self) -> bool {
        matches!(self, Self::Block { skip: Skip::Push, .. } | Self::Downsample(_))
    }

    pub(crate) fn pops(&self) -> bool {
        matches!(self, Self::Block { skip: Skip::Pop, .. })
    }

    pub(crate) fn forward(&self, x: Tensor, time: &Tensor, pass: &mut Pass<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        match self {
            Self::Block { resnet, transformer, .. } => {
                if self.pops() {
                    let skip = skips.pop().ok_or_else(|| Error::argument("layers_per_block", "the way up has more layers than the way down"))?;
                    x = Tensor::f_cat(&[x, skip], 1)?;
                }
                x = resnet.forward(&x, Some(time))?;
                if let Some(transformer) = transformer {
                    x = transformer.forward(&x, pass)?;
                }
            }
            Self::Downsample(downsample) => x = downsample.forward(&x)?,
            Self::Upsample(upsample) => {
                // The sides of the next skip: on the way down an odd side was rounded up.
                let (_, _, height, width) = x.size4()?;
                let sides = match skips.last() {
                    Some(skip) => {
                        let (_, _, height, width) = skip.size4()?;
                        (height, width)
                    }
                    None => (2 * height, 2 * width),
                };
                x = upsample.forward(&x, sides)?;
            }
        }
        if self.pushes() {
            skips.push(x.shallow_clone());
        }
        Ok(x)
    }
}

fn blocks(at: &Scope<'_>, shape: BlockShape, skip: Skip, inputs: impl Fn(i64) -> i64) -> Result<Vec<Layer>> {
    let block = |i: i64| {
        let resnet = Box::new(Resnet::new(&at.at("resnets").at(i), inputs(i), shape.outputs, shape.resnet)?);
        let transformer = shape.transformer.map(|shape| Transformer::new(&at.at("attentions").at(i), shape)).transpose()?;
        Ok(Layer::Block { resnet, transformer, skip })
    };
    (0..shape.layers).map(block).collect()
}

/// `DownBlock2D` and `CrossAttnDownBlock2D`. `downsample` is the padding of the halving convolution, where there is one.
pub(crate) fn down(at: &Scope<'_>, shape: BlockShape, downsample: Option<i64>) -> Result<Vec<Layer>> {
    let mut layers = blocks(at, shape, Skip::Push, |i| if i == 0 { shape.inputs } else { shape.outputs })?;
    if let Some(padding) = downsample {
        layers.push(Layer::Downsample(Downsample::new(&at.at("downsamplers.0"), shape.outputs, padding)?));
    }
    Ok(layers)
}

/// `UNetMidBlock2DCrossAttn`: residual, transformer, residual; in `UNetMidBlock2D` the first residual is all.
pub(crate) fn mid(at: &Scope<'_>, channels: i64, style: ResnetStyle, transformer: Option<TransformerShape>) -> Result<Vec<Layer>> {
    let resnet = |i: i64| Resnet::new(&at.at("resnets").at(i), channels, channels, style).map(Box::new);
    let attends = transformer.is_some();
    let transformer = transformer.map(|shape| Transformer::new(&at.at("attentions.0"), shape)).transpose()?;
    let mut layers = vec![Layer::Block { resnet: resnet(0)?, transformer, skip: Skip::None }];
    if attends {
        layers.push(Layer::Block { resnet: resnet(1)?, transformer: None, skip: Skip::None });
    }
    Ok(layers)
}

/// `UpBlock2D` and `CrossAttnUpBlock2D`. `shape.inputs` come from the block below, and with each layer the channels of a
/// skip: `shape.outputs`, with the last layer `last_skip`.
pub(crate) fn up(at: &Scope<'_>, shape: BlockShape, last_skip: i64, upsample: bool) -> Result<Vec<Layer>> {
    let mut layers = blocks(at, shape, Skip::Pop, |i| {
        let below = if i == 0 { shape.inputs } else { shape.outputs };
        below + if i == shape.layers - 1 { last_skip } else { shape.outputs }
    })?;
    if upsample {
        layers.push(Layer::Upsample(Upsample::new(&at.at("upsamplers.0"), shape.outputs)?));
    }
    Ok(layers)
}
