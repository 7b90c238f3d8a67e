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

fn transformers(at: &Scope<'_>, count: i64, shape: Option<TransformerShape>) -> Result<Vec<Transformer>> {
    let count = if shape.is_some() { count } else { 0 };
    let shapes = (0..count).filter_map(|i| shape.map(|shape| (i, shape)));
    shapes.map(|(i, shape)| Transformer::new(&at.at("attentions").at(i), shape)).collect()
}

fn self_attentions(transformers: &[Transformer]) -> usize {
    transformers.iter().map(Transformer::len).sum()
}

/// `DownBlock2D` and `CrossAttnDownBlock2D`.
#[derive(Debug)]
pub(crate) struct DownBlock {
    resnets: Vec<Resnet>,
    transformers: Vec<Transformer>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    /// `downsample` is the padding of the halving convolution, where there is one.
    pub(crate) fn new(at: &Scope<'_>, shape: BlockShape, downsample: Option<i64>) -> Result<Self> {
        let resnet = |i: i64| Resnet::new(&at.at("resnets").at(i), if i == 0 { shape.inputs } else { shape.outputs }, shape.outputs, shape.resnet);
        Ok(Self {
            resnets: (0..shape.layers).map(resnet).collect::<Result<_>>()?,
            transformers: transformers(at, shape.layers, shape.transformer)?,
            downsample: downsample.map(|padding| Downsample::new(&at.at("downsamplers.0"), shape.outputs, padding)).transpose()?,
        })
    }

    pub(crate) fn self_attentions(&self) -> usize {
        self_attentions(&self.transformers)
    }

    /// Each layer's output goes to `skips`, too.
    pub(crate) fn forward(&self, x: Tensor, time: &Tensor, pass: &mut Pass<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, Some(time))?;
            if let Some(transformer) = self.transformers.get(i) {
                x = transformer.forward(&x, pass)?;
            }
            skips.push(x.shallow_clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x)?;
            skips.push(x.shallow_clone());
        }
        Ok(x)
    }
}

/// `UNetMidBlock2DCrossAttn`: residual, transformer, residual; in `UNetMidBlock2D` the first residual is all.
#[derive(Debug)]
pub(crate) struct MidBlock {
    first: Resnet,
    rest: Option<(Transformer, Resnet)>,
}

impl MidBlock {
    pub(crate) fn new(at: &Scope<'_>, channels: i64, resnet: ResnetStyle, transformer: Option<TransformerShape>) -> Result<Self> {
        let first = Resnet::new(&at.at("resnets.0"), channels, channels, resnet)?;
        let rest = |shape| -> Result<_> {
            Ok((Transformer::new(&at.at("attentions.0"), shape)?, Resnet::new(&at.at("resnets.1"), channels, channels, resnet)?))
        };
        Ok(Self { first, rest: transformer.map(rest).transpose()? })
    }

    pub(crate) fn self_attentions(&self) -> usize {
        self.rest.as_ref().map_or(0, |(transformer, _)| transformer.len())
    }

    pub(crate) fn forward(&self, x: &Tensor, time: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let x = self.first.forward(x, Some(time))?;
        match &self.rest {
            Some((transformer, second)) => second.forward(&transformer.forward(&x, pass)?, Some(time)),
            None => Ok(x),
        }
    }
}

/// `UpBlock2D` and `CrossAttnUpBlock2D`.
#[derive(Debug)]
pub(crate) struct UpBlock {
    resnets: Vec<Resnet>,
    transformers: Vec<Transformer>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    /// `shape.inputs` come from the block below, and with each layer the channels of a skip: `shape.outputs`, with the
    /// last layer `last_skip`.
    pub(crate) fn new(at: &Scope<'_>, shape: BlockShape, last_skip: i64, upsample: bool) -> Result<Self> {
        let resnet = |i: i64| {
            let below = if i == 0 { shape.inputs } else { shape.outputs };
            let skip = if i == shape.layers - 1 { last_skip } else { shape.outputs };
            Resnet::new(&at.at("resnets").at(i), below + skip, shape.outputs, shape.resnet)
        };
        Ok(Self {
            resnets: (0..shape.layers).map(resnet).collect::<Result<_>>()?,
            transformers: transformers(at, shape.layers, shape.transformer)?,
            upsample: upsample.then(|| Upsample::new(&at.at("upsamplers.0"), shape.outputs)).transpose()?,
        })
    }

    pub(crate) fn self_attentions(&self) -> usize {
        self_attentions(&self.transformers)
    }

    pub(crate) fn forward(&self, x: Tensor, time: &Tensor, pass: &mut Pass<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().ok_or_else(|| Error::argument("layers_per_block", "the way up has more layers than the way down"))?;
            x = resnet.forward(&Tensor::f_cat(&[x, skip], 1)?, Some(time))?;
            if let Some(transformer) = self.transformers.get(i) {
                x = transformer.forward(&x, pass)?;
            }
        }
        if let Some(upsample) = &self.upsample {
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
        Ok(x)
    }
}
