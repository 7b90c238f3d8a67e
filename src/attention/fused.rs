//! `softmax(Q K^T * scale + bias) V` on x86-64 CPUs by kernels of this crate, with AVX-512 or AVX2; in C++, as tch has no way to tell
//! libtorch an operator's gradients.
//!
//! libtorch's own kernel multiplies small matrices by MKL, which on AMD's processors leaves half of AVX-512 unused. Whether these are
//! faster on Intel's was not measured. Among calls of this module a row of the output is the same to the last bit however many other
//! queries, threads or graphs there are. With a bias they are calls of it only where no graph is kept; else libtorch computes them. Half precisions
//! go by f32, but not on Intel's processors.

mod bias;
mod kernel;

use crate::{processor::is_intel, Result};
use kernel::Kernel;
use tch::{Device, Kind, Tensor};

/// Fewer queries or keys than this are libtorch's, as are wider heads: there is little to gain.
const FEWEST: i64 = 128;
const WIDEST: i64 = 256;

/// `None` where the kernels do not know the case, or this processor not the kernels.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: Option<f64>) -> Option<Result<Tensor>> {
    let kernel = Kernel::best()?;
    let [of_query, of_key, of_value] = [q, k, v].map(|x| <[i64; 4]>::try_from(x.size()).ok());
    let ([pictures, heads, queries, width], [_, _, keys, _]) = (of_query?, of_key?);
    let fits = of_key == of_value && of_key == Some([pictures, heads, keys, width]) && pictures > 0 && heads > 0;
    let large = queries >= FEWEST && keys >= FEWEST && (1..=WIDEST).contains(&width);
    let scale = scale.unwrap_or_else(|| 1.0 / (width as f64).sqrt());
    // Others turn the order of scores, or make the sums of the kernels' powers of two meaningless.
    let usual = scale.is_finite() && (scale as f32).is_normal() && scale > 0.0;
    let all = |kind: Kind| [q, k, v].into_iter().all(|x| plain(x, kind));
    if !(fits && large && usual) {
        return None;
    }
    if all(Kind::Float) {
        let added = bias.is_none_or(|bias| plain(bias, Kind::Float) && bias::may_be_added(bias, [pictures, heads, queries, keys], &[q, k, v]));
        return added.then(|| kernel.attend(q, k, v, bias, scale, threads()));
    }
    let half = [Kind::BFloat16, Kind::Half].into_iter().find(|&kind| all(kind));
    half.filter(|_| bias.is_none() && !is_intel()).map(|kind| by_f32(kernel, [q, k, v], scale, kind))
}

fn plain(x: &Tensor, kind: Kind) -> bool {
    x.device() == Device::Cpu && x.f_kind().is_ok_and(|own| own == kind) && !x.is_sparse()
}

fn threads() -> i64 {
    i64::from(tch::get_num_threads())
}

/// Half precisions, for which libtorch's kernels are slower than these are in f32: in bf16 by half, in f16, backward, twenty times. The result is
/// the more accurate for it, and rounded once.
fn by_f32(kernel: Kernel, qkv: [&Tensor; 3], scale: f64, kind: Kind) -> Result<Tensor> {
    let [q, k, v] = qkv.map(|x| x.f_to_kind(Kind::Float));
    Ok(kernel.attend(&q?, &k?, &v?, None, scale, threads())?.f_to_kind(kind)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::kernel::tests::layer;
    use super::*;

    #[test]
    fn other_cases_are_left_to_libtorch() {
        if Kernel::best().is_none() {
            return;
        }
        let [q, k, v] = layer((1, 2, 128, 130, 16), 1.0);
        assert!(attend(&q, &k, &v, None, None).is_some());
        let narrow = v.narrow(3, 0, 8);
        let double = [&q, &k, &v].map(|x| x.to_kind(Kind::Double));
        assert!(attend(&q.narrow(2, 0, 127), &k, &v, None, None).is_none());
        assert!(attend(&q, &k.narrow(2, 0, 127), &v.narrow(2, 0, 127), None, None).is_none());
        assert!(attend(&q, &k, &narrow, None, None).is_none());
        assert!(attend(&q, &k, &v.narrow(2, 0, 129), None, None).is_none());
        assert!(attend(&q, &k.narrow(1, 0, 1), &v.narrow(1, 0, 1), None, None).is_none());
        assert!(attend(&double[0], &double[1], &double[2], None, None).is_none());
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40] {
            assert!(attend(&q, &k, &v, None, Some(scale)).is_none());
        }
        let bias = Tensor::zeros([1, 1, 128, 130], (Kind::Float, Device::Cpu));
        assert!(attend(&q, &k, &v, Some(&bias), None).is_some() && attend(&q, &k, &v, Some(&bias.narrow(2, 0, 1)), None).is_some());
        for bias in [bias.narrow(3, 0, 1), bias.narrow(2, 0, 64), bias.squeeze(), bias.to_kind(Kind::Double), bias.to_kind(Kind::Bool)] {
            assert!(attend(&q, &k, &v, Some(&bias), None).is_none(), "{bias:?}");
        }
        let leaf = q.detach().set_requires_grad(true);
        assert!(attend(&leaf, &k, &v, Some(&bias), None).is_none());
        // As the ideal attention of a picture that is being optimised.
        assert!(tch::no_grad(|| attend(&leaf, &k, &v, Some(&bias), None)).is_some());
        assert!(attend(&q, &k, &v, Some(&bias.set_requires_grad(true)), None).is_none());
        let wide = Tensor::zeros([1, 1, 128, 257], (Kind::Float, Device::Cpu));
        assert!(attend(&wide, &wide, &wide, None, None).is_none());
    }

    /// Nearer to f64's than libtorch's, output and gradients, and of the kind that they were asked in.
    #[test]
    fn half_precisions_are_rounded_once() {
        let Some(kernel) = Kernel::best() else { return };
        for (kind, unit) in [(Kind::BFloat16, 2f64.powi(-8)), (Kind::Half, 2f64.powi(-11))] {
            let qkv = layer((1, 2, 300, 411, 40), 2.0).map(|x| x.to_kind(kind));
            let found = |qkv: &[Tensor; 3], attend: &dyn Fn([&Tensor; 3]) -> Tensor| {
                let leaves = qkv.each_ref().map(|x| x.detach().set_requires_grad(true));
                let output = attend([&leaves[0], &leaves[1], &leaves[2]]);
                let weight = Tensor::linspace(-1, 1, output.numel() as i64, (Kind::Double, Device::Cpu)).view(output.size().as_slice());
                let mut all = Tensor::run_backward(&[(&output * weight.to_kind(output.kind())).sum(Kind::Double)], &leaves, false, false);
                all.push(output.detach());
                all
            };
            let ours = found(&qkv, &|x| by_f32(kernel, x, 0.2, kind).unwrap());
            let exact = qkv.each_ref().map(|x| x.to_kind(Kind::Double));
            let exact = found(&exact, &|[q, k, v]| (q.matmul(&k.transpose(-2, -1)) * 0.2).softmax(-1, Kind::Double).matmul(v));
            for (i, (ours, exact)) in ours.iter().zip(&exact).enumerate() {
                assert_eq!((ours.kind(), ours.size()), (kind, exact.size()));
                let off = |x: &Tensor| f64::try_from((x.to_kind(Kind::Double) - exact).norm() / exact.norm()).unwrap();
                // The weights that the output's gradient is made of are rounded, too, and so is what comes of them.
                assert!(off(ours) < unit, "{kind:?} {i}: {:e}", off(ours));
            }
        }
    }

    #[test]
    fn half_precisions_where_they_gain() {
        if Kernel::best().is_none() {
            return;
        }
        for kind in [Kind::BFloat16, Kind::Half] {
            let [q, k, v] = layer((1, 2, 128, 130, 16), 1.0).map(|x| x.to_kind(kind));
            assert_eq!(attend(&q, &k, &v, None, None).is_some(), !is_intel());
            assert!(attend(&q, &k.to_kind(Kind::Float), &v, None, None).is_none(), "of one kind, or they are refused as ever");
            let bias = Tensor::zeros([1, 1, 128, 130], (kind, Device::Cpu));
            assert!(attend(&q, &k, &v, Some(&bias), None).is_none());
        }
    }

    #[test]
    fn scale_is_one_over_the_root_of_the_width() {
        if Kernel::best().is_none() {
            return;
        }
        let [q, k, v] = layer((1, 1, 128, 130, 36), 1.0);
        let found = attend(&q, &k, &v, None, None).unwrap().unwrap();
        assert!(found.equal(&attend(&q, &k, &v, None, Some(1.0 / 6.0)).unwrap().unwrap()));
    }
}
