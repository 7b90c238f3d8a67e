//! Gradient checkpointing (Chen et al. 2016): the backward pass computes activations anew, layer by layer, instead of keeping
//! those of the whole network.

use super::block::Layer;
use super::encoder::Start;
use super::transformer::{Pass, Place};
use super::{Condition, UNet};
use crate::denoiser::independent;
use crate::features::check_layers;
use crate::{AttentionHook, AttentionKind, AttentionSite, Error, FeatureRecorder, Features, Qkv, Result};
use std::ops::Range;
use tch::{Kind, Tensor};

/// What the forward pass leaves behind for one layer.
struct Visit<'n> {
    layer: &'n Layer,
    place: Place,
    input: Tensor,
    /// The last skip when the layer began: what it pops, or what gives it its size.
    top: Option<Tensor>,
    /// How many skips there were.
    skips: usize,
}

/// As [`Denoiser::gradient`](crate::Denoiser::gradient), for one forward pass more.
///
/// A pass without a graph keeps each layer's input, and the features. The value's gradient by the features is then carried
/// back: each layer, last first, runs once more with a graph of its own.
pub(crate) fn gradient(
    unet: &UNet,
    latents: &Tensor,
    timestep: &Tensor,
    condition: &Condition,
    layers: Range<usize>,
    value: &mut dyn FnMut(&Features) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    check_layers(&layers)?;
    let mut recorder = FeatureRecorder::new(layers.clone());
    let (Start { time, text, .. }, visits, outcome) = tch::no_grad(|| visit(unet, latents, timestep, condition, &mut recorder))?;
    let features = recorder.after(outcome)?;
    tch::with_grad(|| {
        let (value, of_features) = by_features(&features, value)?;
        drop(features);
        let mut of_skips: Vec<Option<Tensor>> = vec![];
        let mut of_output: Option<Tensor> = None;
        for visit in visits.into_iter().rev() {
            if visit.layer.pushes() {
                of_output = sum(of_output, of_skips.get_mut(visit.skips).and_then(Option::take))?;
            }
            let input = visit.input.f_detach()?.f_set_requires_grad(true)?;
            let top = visit.top.as_ref().map(|top| top.f_detach()?.f_set_requires_grad(visit.layer.pops())).transpose()?;
            let mut collector = Collector { layers: layers.clone(), found: vec![] };
            let mut skips: Vec<Tensor> = top.iter().map(Tensor::shallow_clone).collect();
            let mut pass = Pass::new(&text, &mut collector).starting_at(visit.place);
            let output = match visit.layer.forward(input.shallow_clone(), &time, &mut pass, &mut skips) {
                Ok(output) => Some(output),
                Err(Error::Stopped) => None,
                Err(error) => return Err(error),
            };
            let mut terms = vec![];
            for (index, tensors) in &collector.found {
                let gradients = of_features.get(index.saturating_sub(layers.start));
                let pairs = tensors.iter().zip(gradients.into_iter().flatten());
                terms.extend(pairs.filter_map(|(tensor, gradient)| Some((tensor.shallow_clone(), gradient.as_ref()?.shallow_clone()))));
            }
            terms.extend(output.zip(of_output.take()));
            let inputs: Vec<&Tensor> = std::iter::once(&input).chain(top.iter().filter(|_| visit.layer.pops())).collect();
            let mut gradients = carried_back(terms, &inputs)?.into_iter();
            of_output = gradients.next().flatten();
            if visit.layer.pops() {
                let place = visit.skips.saturating_sub(1);
                of_skips.resize_with(of_skips.len().max(place + 1), || None);
                if let Some(slot) = of_skips.get_mut(place) {
                    *slot = gradients.next().flatten();
                }
            }
        }
        // The first convolution's output is the first skip, too.
        let of_first = sum(of_output, of_skips.first_mut().and_then(Option::take))?;
        let leaf = latents.f_detach()?.f_set_requires_grad(true)?;
        let first = unet.encoder().start(&leaf, timestep, condition)?.x;
        let gradient = carried_back(of_first.map(|gradient| (first, gradient)).into_iter().collect(), &[&leaf])?.pop().flatten();
        Ok((value, gradient.ok_or_else(independent)?))
    })
}

/// The forward pass as far as the hook lets it go, and how it ended.
fn visit<'n>(
    unet: &'n UNet,
    latents: &Tensor,
    timestep: &Tensor,
    condition: &Condition,
    hook: &mut dyn AttentionHook,
) -> Result<(Start, Vec<Visit<'n>>, Result<()>)> {
    let start = unet.encoder().start(latents, timestep, condition)?;
    let mut pass = Pass::new(&start.text, hook);
    let mut x = start.x.shallow_clone();
    let mut skips = vec![x.shallow_clone()];
    let mut visits = vec![];
    for layer in unet.layers() {
        let top = skips.last().filter(|_| !layer.pushes()).map(Tensor::shallow_clone);
        visits.push(Visit { layer, place: pass.place(), input: x.shallow_clone(), top, skips: skips.len() });
        match layer.forward(x, &start.time, &mut pass, &mut skips) {
            Ok(output) => x = output,
            Err(error) => return Ok((start, visits, Err(error))),
        }
    }
    Ok((start, visits, Ok(())))
}

/// Gradients by one layer's queries, keys, values and output, where there are any.
type LayerGradients = Vec<Option<Tensor>>;

/// The value, and its gradient by the features of each recorded layer.
fn by_features(features: &Features, value: &mut dyn FnMut(&Features) -> Result<Tensor>) -> Result<(Tensor, Vec<LayerGradients>)> {
    let leaves = features.try_map(|feature| Ok(feature.f_detach()?.f_set_requires_grad(true)?))?;
    let value = value(&leaves)?;
    if !value.requires_grad() {
        return Err(independent());
    }
    let mut all: Vec<&Tensor> = vec![];
    for layer in leaves.layers() {
        all.extend([&layer.query, &layer.key, &layer.value, layer.output()?]);
    }
    let gradients = Tensor::f_run_backward(&[&value], &all, false, false)?;
    let mut gradients = gradients.into_iter().map(|gradient| Some(gradient).filter(Tensor::defined));
    let by_layer = (0..leaves.len()).map(|_| gradients.by_ref().take(4).collect()).collect();
    Ok((value.f_detach()?, by_layer))
}

/// Gradients by the inputs, from those by the outputs that belong to them.
fn carried_back(outputs: Vec<(Tensor, Tensor)>, inputs: &[&Tensor]) -> Result<Vec<Option<Tensor>>> {
    // The gradient of `sum(output * gradient)` by the output is that gradient, whatever the sum's own value.
    let products = outputs.iter().filter(|(output, _)| output.requires_grad()).map(|(output, gradient)| {
        let product = output.f_to_kind(Kind::Float)?.f_mul(&gradient.f_to_kind(Kind::Float)?)?;
        Ok(product.f_sum(Kind::Float)?)
    });
    let products = products.collect::<Result<Vec<_>>>()?;
    if products.is_empty() {
        return Ok(vec![]);
    }
    let total = Tensor::f_stack(&products, 0)?.f_sum(Kind::Float)?;
    let gradients = Tensor::f_run_backward(&[&total], inputs, false, false)?;
    Ok(gradients.into_iter().map(|gradient| Some(gradient).filter(Tensor::defined)).collect())
}

fn sum(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some(a.f_add(&b)?)),
        (a, b) => Ok(a.or(b)),
    }
}

/// Keeps queries, keys, values and outputs of the layers in a range, and stops after the last.
struct Collector {
    layers: Range<usize>,
    found: Vec<(usize, [Tensor; 4])>,
}

impl AttentionHook for Collector {
    fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
        let output = qkv.attend()?;
        if site.kind == AttentionKind::SelfAttention && self.layers.contains(&site.index) {
            self.found.push((site.index, [qkv.query, qkv.key, qkv.value, output.shallow_clone()]));
            if site.index + 1 == self.layers.end {
                return Err(Error::Stopped);
            }
        }
        Ok(output)
    }
}
