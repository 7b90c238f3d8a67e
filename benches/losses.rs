//! The losses alone, on random features of the shapes that the method meets; what the backward pass goes on to cost in
//! the network is in `step.rs`. An element is a query token: all tokens of the six layers count, whatever their
//! heads and widths.
#![allow(clippy::disallowed_methods, missing_docs)]

mod common;

use attention_distillation::tch::{self, Device, Kind, Tensor};
use attention_distillation::{
    AdLoss, AttentionHook, AttentionSite, ContentLoss, Denoiser, Features, LabelMap, LayerFeatures, Loss, Qkv, References, Result, Style,
};
use common::{device_and_kind, finished, memory};
use criterion::{criterion_group, criterion_main, Criterion, Throughput};

/// Side of the token grid, heads, width of a head; each shape stands for three layers.
type Shape = (i64, i64, i64);

/// The last six self-attention layers.
const MODELS: [(&str, [Shape; 2]); 2] = [("bundled model, 256 px", [(32, 2, 40), (64, 1, 48)]), ("SD 1.5, 512 px", [(32, 8, 80), (64, 8, 40)])];

/// Stands for a network: its attention layers have the shapes of a true one's, and nothing lies between them.
struct Layers {
    shapes: [Shape; 2],
    options: (Kind, Device),
}

impl Denoiser for Layers {
    type Condition = ();

    fn forward(&self, latents: &Tensor, _: f64, (): &(), hook: &mut dyn AttentionHook) -> Result<Tensor> {
        let layers = self.shapes.iter().flat_map(|shape| [shape; 3]);
        for (index, &(side, heads, width)) in layers.enumerate() {
            let random = || Tensor::randn([1, heads, side * side, width], self.options);
            let _ = hook.attend(&AttentionSite::self_attention(index, (side, side)), Qkv::new(random(), random(), random()))?;
        }
        Ok(latents.shallow_clone())
    }
}

impl Layers {
    fn features(&self) -> Features {
        tch::no_grad(|| Features::extract(self, &Tensor::zeros([1], self.options), 0.0, &(), 0..6)).unwrap()
    }
}

/// Forward without a graph, as a progress display would ask; then with the gradient by the features that the loss looks at.
fn bench(
    c: &mut Criterion,
    name: &str,
    layers: &Layers,
    more: impl Fn(&mut References<Features>),
    loss: &dyn Loss,
    of: fn(&LayerFeatures) -> &Tensor,
) {
    let (_, device) = layers.options;
    let mut references = References::styles([Style::new(layers.features())]).with_content(layers.features());
    more(&mut references);
    let picture = layers.features();
    // Leaves, so that the backward pass ends where the network's would begin.
    let leaves = picture.try_map(|feature| Ok(feature.detach().set_requires_grad(true))).unwrap();
    let inputs: Vec<&Tensor> = leaves.layers().map(of).collect();
    let tokens: i64 = picture.layers().map(|layer| layer.site.tokens()).sum();

    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(tokens as u64));
    memory::bench(&mut group, device, "forward", |b| {
        b.iter(|| finished(device, || tch::no_grad(|| loss.evaluate(&picture, &references).unwrap())));
    });
    memory::bench(&mut group, device, "forward and backward", |b| {
        b.iter(|| finished(device, || Tensor::run_backward(&[loss.evaluate(&leaves, &references).unwrap()], &inputs, false, false)));
    });
    group.finish();
}

/// The same labels for the picture and its style.
fn labelled(labels: &LabelMap) -> impl Fn(&mut References<Features>) + '_ {
    |references| {
        for style in &mut references.styles {
            style.labels = Some(labels.shallow_clone());
        }
        references.labels = Some(labels.shallow_clone());
    }
}

fn losses(c: &mut Criterion) {
    let (device, kind) = device_and_kind();
    tch::manual_seed(0);
    for (model, shapes) in MODELS {
        let layers = Layers { shapes, options: (kind, device) };
        bench(c, &format!("AD loss, {model}"), &layers, |_| (), &AdLoss::default(), |layer| layer.output().unwrap());
        let smoothed = |references: &mut References<Features>| references.smoothing = 0.5;
        bench(c, &format!("AD loss with smoothing, {model}"), &layers, smoothed, &AdLoss::default(), |layer| layer.output().unwrap());
        // Four areas, one above the other.
        let rows = Tensor::from_slice(&[0_i64, 1, 2, 3]).view([1, 1, 4, 1]);
        let hard = LabelMap::new(&rows).unwrap().resized((512, 512)).unwrap().to_device(device).unwrap();
        bench(c, &format!("AD loss with labels, {model}"), &layers, labelled(&hard), &AdLoss::default(), |layer| layer.output().unwrap());
        let shares = rows.eq_tensor(&rows.view([1, 4, 1, 1])).to_kind(Kind::Float).expand([1, 4, 4, 512], false);
        let soft = LabelMap::soft(&shares).unwrap().resized((512, 512)).unwrap().to_device(device).unwrap();
        bench(c, &format!("AD loss with soft labels, {model}"), &layers, labelled(&soft), &AdLoss::default(), |layer| layer.output().unwrap());
        bench(c, &format!("content loss, {model}"), &layers, |_| (), &ContentLoss, |layer| &layer.query);
    }
}

criterion_group! {
    name = benches;
    config = common::criterion();
    targets = losses, memory::peak
}
criterion_main!(benches);
