//! Other ways to hold a picture to its content's layout, which the authors tried beside the content loss of the paper.

use super::{by_content, mean_absolute, Loss};
use crate::scalar::WithNumber;
use crate::{Error, Features, LayerFeatures, References, Result};
use tch::{Kind, Tensor};

/// `sum over layers of mean |softmax(Q K^T / sqrt d) - sg(softmax(Qc Kc^T / sqrt d))|`: who looks at whom stays as in the content.
///
/// The authors gave it a weight of about 200 in place of [`ContentLoss`](super::ContentLoss)'s 0.25, as its means are over all pairs of tokens. These are there as
/// numbers, with a gradient: a layer of `n` tokens takes some `20 n^2` bytes per head (4096 tokens of 8 heads: 2.7 GB).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttentionMapLoss;

impl Loss for AttentionMapLoss {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        by_content("attention map", picture, references, |ours, theirs| {
            same_tokens(ours, theirs)?;
            let wanted = tch::no_grad(|| map(theirs))?;
            let found = map(ours)?;
            mean_absolute(&found, &wanted.f_expand_as(&found)?)
        })
    }
}

/// `sum over layers of mean |Attn(Q, K, Vc) - sg(Attn(Qc, Kc, Vc))|`: attention as the picture has it would put the content together again.
///
/// The authors gave it a weight of about 1 in place of [`ContentLoss`](super::ContentLoss)'s 0.25.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContentValueLoss;

impl Loss for ContentValueLoss {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        by_content("content value", picture, references, |ours, theirs| {
            same_tokens(ours, theirs)?;
            let batch = ours.query.size4()?.0;
            let value = theirs.value.f_detach()?.f_expand([batch, -1, -1, -1], false)?;
            let found = super::scaled_dot_product(&ours.query, &ours.key, &value, None, ours.scale)?;
            mean_absolute(&found, &theirs.output()?.f_detach()?.f_expand_as(&found)?)
        })
    }
}

/// Of the content's own tokens as many as of the picture's, however a network attends.
fn same_tokens(picture: &LayerFeatures, content: &LayerFeatures) -> Result<()> {
    for (ours, theirs) in [(&picture.key, &content.key), (&picture.value, &content.value)] {
        if ours.size().get(1..) != theirs.size().get(1..) {
            return Err(Error::shape("content", format!("keys and values as the picture's, {:?}", ours.size()), theirs.size()));
        }
    }
    Ok(())
}

/// What each query attends to, in f32.
fn map(layer: &LayerFeatures) -> Result<Tensor> {
    let scale = match layer.scale {
        Some(scale) => scale,
        None => (layer.query.size4()?.3 as f64).sqrt().recip(),
    };
    // In f32 before the product: half precisions overflow in sums of scores.
    let [query, key] = [&layer.query, &layer.key].map(|x| x.f_to_kind(Kind::Float));
    Ok(query?.times(scale)?.f_matmul(&key?.f_transpose(-2, -1)?)?.f_softmax(-1, Kind::Float)?)
}
