//! Attention by several threads. One test, as the number of threads is the whole program's.
#![allow(clippy::disallowed_methods, missing_docs)]

use attention_distillation::tch::{self, Device, Kind, Tensor};
use attention_distillation::Qkv;

/// As a network has them, (pictures, tokens, heads, width) transposed, of waves.
fn tensor(pictures: i64, heads: i64, tokens: i64, width: i64, pitch: f64) -> Tensor {
    let values: Tensor = Tensor::arange(pictures * heads * tokens * width, (Kind::Double, Device::Cpu)).square() * pitch;
    values.sin().view([pictures, tokens, heads, width]).transpose(1, 2).to_kind(Kind::Float)
}

/// Output, and the gradients by queries, keys and values of a sum that weighs its elements.
fn all(inputs: &[Tensor; 3], attend: impl Fn(&[Tensor; 3]) -> Tensor) -> Vec<Tensor> {
    let leaves = [0, 1, 2].map(|i: usize| inputs[i].detach().set_requires_grad(true));
    let output = attend(&leaves);
    let weight = (Tensor::arange(output.numel() as i64, (Kind::Double, Device::Cpu)) * 0.37).sin().view(output.size().as_slice());
    let sum = (&output * weight.to_kind(output.kind())).sum(output.kind());
    std::iter::once(output.detach()).chain(Tensor::run_backward(&[sum], &leaves, false, false)).collect()
}

/// Whether this crate's kernels were built, and serve here.
fn ours() -> bool {
    #[cfg(fused_attention)]
    let ours = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(fused_attention))]
    let ours = false;
    ours
}

#[test]
fn threads_share_out_heads_and_queries() {
    // More heads than threads and fewer, queries that no number of threads divides, keys of none.
    for (pictures, heads, queries, keys, width) in [(1, 1, 4096, 1024, 48), (1, 1, 1000, 1001, 40), (2, 3, 333, 257, 64), (1, 8, 150, 200, 20)] {
        let qkv = [
            tensor(pictures, heads, queries, width, 0.0131),
            tensor(pictures, heads, keys, width, 0.0173),
            tensor(pictures, heads, keys, width, 0.0197),
        ];
        let double = [0, 1, 2].map(|i: usize| qkv[i].to_kind(Kind::Double));
        let expected = all(&double, |[q, k, v]| (q.matmul(&k.transpose(-2, -1)) / (width as f64).sqrt()).softmax(-1, Kind::Double).matmul(v));
        let by = |threads| {
            tch::set_num_threads(threads);
            all(&qkv, |[q, k, v]| Qkv::new(q.shallow_clone(), k.shallow_clone(), v.shallow_clone()).attend().unwrap())
        };
        let one = by(1);
        for threads in [1, 2, 3, 5, 7] {
            let found = by(threads);
            // To the last bit by this crate's kernels; libtorch, where it attends, promises less.
            let same = if ours() { found[0].equal(&one[0]) } else { found[0].allclose(&one[0], 1e-5, 1e-6, false) };
            assert!(same, "the output depends on who computes it");
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let error = (found.to_kind(Kind::Double) - expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
                // f32, whose sums over keys and queries are each some 1e-6 off.
                assert!(error < 5e-6, "{heads} heads, {queries} queries, {threads} threads, {i}: {error}");
            }
            // The same threads, the same sums.
            for (found, again) in found.iter().zip(by(threads)) {
                assert!(found.equal(&again));
            }
        }
    }
    tch::set_num_threads(1);
}
