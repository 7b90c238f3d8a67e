//! Attention as this crate computes it beside libtorch's own, forward and with all gradients, at the shapes that the method meets. An
//! element is a score. With the feature `fused-attention` on a CPU the two are different kernels (in bf16 not on Intel's), else nearly the same call.
#![allow(clippy::disallowed_methods, missing_docs)]

mod common;

use attention_distillation::tch::{self, Kind, Tensor};
use attention_distillation::Qkv;
use common::{device_and_kind, finished, memory};
use criterion::{criterion_group, criterion_main, Criterion, Throughput};

/// Tokens, heads, width of a head; the kind, if it is not the device's own.
const LAYERS: [(&str, [i64; 3], Option<Kind>); 4] = [
    ("bundled model, 256 px, full resolution", [4096, 1, 48], None),
    ("bundled model, 256 px, half resolution", [1024, 2, 40], None),
    ("SD 1.5, 512 px, last layers", [4096, 8, 40], None),
    ("SD 1.5, 512 px, last layers, bf16", [4096, 8, 40], Some(Kind::BFloat16)),
];

fn attention(c: &mut Criterion) {
    let (device, own) = device_and_kind();
    tch::manual_seed(0);
    for (name, [tokens, heads, width], kind) in LAYERS {
        // On a GPU the device's own is a half precision already.
        if kind.is_some() && device.is_cuda() {
            continue;
        }
        let kind = kind.unwrap_or(own);
        // As networks have them: the heads of a token side by side.
        let tensor = || Tensor::randn([1, tokens, heads, width], (kind, device)).transpose(1, 2);
        let [q, k, v] = [tensor(), tensor(), tensor()].map(|x| x.set_requires_grad(true));
        let weight = tensor();
        let ours = || Qkv::new(q.shallow_clone(), k.shallow_clone(), v.shallow_clone()).attend().unwrap();
        let libtorchs = || Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false);
        let kernels: [(&str, &dyn Fn() -> Tensor); 2] = [("this crate", &ours), ("libtorch", &libtorchs)];

        let mut group = c.benchmark_group(format!("attention, {name}"));
        group.throughput(Throughput::Elements((tokens * tokens * heads) as u64));
        for (whose, attend) in kernels {
            memory::bench(&mut group, device, &format!("{whose}, forward"), |b| b.iter(|| finished(device, || tch::no_grad(attend))));
            memory::bench(&mut group, device, &format!("{whose}, forward and backward"), |b| {
                b.iter(|| finished(device, || Tensor::run_backward(&[(attend() * &weight).sum(kind)], &[&q, &k, &v], false, false)));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = common::criterion();
    targets = attention, memory::peak
}
criterion_main!(benches);
