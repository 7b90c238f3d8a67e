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

/// Computed in f32. On a Zen 5 libtorch's kernels take twice as long as that in bf16, and backward in f16 more than ten times as long.
const HALVES: [Kind; 2] = [Kind::BFloat16, Kind::Half];

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
    let known = match bias {
        Some(bias) => all(Kind::Float) && plain(bias, Kind::Float) && bias::may_be_added(bias, [pictures, heads, queries, keys], &[q, k, v]),
        None => all(Kind::Float) || HALVES.into_iter().any(all) && !is_intel(),
    };
    known.then(|| kernel.attend(q, k, v, bias, scale, i64::from(tch::get_num_threads())))
}

fn plain(x: &Tensor, kind: Kind) -> bool {
    x.device() == Device::Cpu && x.f_kind().is_ok_and(|own| own == kind) && !x.is_sparse()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::kernel::tests::{kernels, layer};
    use super::*;

    #[test]
    fn other_cases_are_left_to_libtorch() {
        if kernels().next().is_none() {
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

    /// Output and gradients by queries, keys and values, each weighed alike.
    fn found(qkv: &[Tensor; 3], wanted: &[usize], attend: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> Vec<Tensor> {
        let leaves = [0, 1, 2].map(|i| qkv[i].detach().set_requires_grad(wanted.contains(&i)));
        let output = attend(&leaves[0], &leaves[1], &leaves[2]);
        let weight = Tensor::linspace(-1, 1, output.numel() as i64, (Kind::Double, Device::Cpu)).view(output.size().as_slice());
        // Rounded as the coarsest of what is compared.
        let sum = (&output * weight.to_kind(Kind::BFloat16).to_kind(output.kind())).sum(Kind::Double);
        let by: Vec<_> = wanted.iter().map(|&i| &leaves[i]).collect();
        std::iter::once(output.detach()).chain(Tensor::run_backward(&[sum], &by, false, false)).collect()
    }

    /// As near to f64's as libtorch's are, output and gradients, and of the kind that they were asked in.
    #[test]
    fn half_precisions_are_computed_in_f32() {
        for (kernel, kind) in kernels().flat_map(|kernel| HALVES.map(|kind| (kernel, kind))) {
            let qkv = layer((1, 2, 300, 411, 40), 2.0).map(|x| x.to_kind(kind));
            let attend = |q: &Tensor, k: &Tensor, v: &Tensor| kernel.attend(q, k, v, None, 0.2, 3).unwrap();
            let ours = found(&qkv, &[0, 1, 2], &attend);
            let libtorchs =
                found(&qkv, &[0, 1, 2], &|q, k, v| Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, false, Some(0.2), false));
            let doubled = qkv.each_ref().map(|x| x.to_kind(Kind::Double));
            let exact = found(&doubled, &[0, 1, 2], &|q, k, v| (q.matmul(&k.transpose(-2, -1)) * 0.2).softmax(-1, Kind::Double).matmul(v));
            // The output is rounded as it leaves, and the gradients are made of it as it was rounded.
            let unit = if kind == Kind::Half { 2f64.powi(-11) } else { 2f64.powi(-8) };
            for (i, exact) in exact.iter().enumerate() {
                assert_eq!((ours[i].kind(), ours[i].size()), (kind, exact.size()));
                let off = |x: &Tensor| f64::try_from((x.to_kind(Kind::Double) - exact).norm() / exact.norm()).unwrap();
                let (ours, libtorchs) = (off(&ours[i]), off(&libtorchs[i]));
                let roundings = if i == 0 { 0.6 } else { 2.0 };
                assert!(ours < roundings * unit && ours < 1.05 * libtorchs, "{kernel:?} {kind:?} {i}: {ours:e}, libtorch {libtorchs:e}");
            }
            // Of another layout, and of one gradient alone; the output is the same whatever shares there are.
            let apart = qkv.each_ref().map(Tensor::contiguous);
            assert!(found(&apart, &[0, 1, 2], &attend).iter().zip(&ours).all(|(x, y)| x.equal(y)));
            for i in 0..3 {
                assert!(found(&qkv, &[i], &attend)[1].equal(&ours[i + 1]), "{kernel:?} {kind:?} {i}");
            }
            assert!(kernel.attend(&qkv[0], &qkv[1], &qkv[2], None, 0.2, 1).unwrap().equal(&ours[0]));
            // What is kept is the output that was handed out: it may not be written to.
            let leaf = qkv[0].detach().set_requires_grad(true);
            let mut output = attend(&leaf, &qkv[1], &qkv[2]);
            let sum = output.f_mul_(&Tensor::from(2.0_f32).set_requires_grad(true)).unwrap().sum(Kind::Float);
            assert!(Tensor::f_run_backward(&[sum], &[&leaf], false, false).unwrap_err().to_string().contains("inplace"));
        }
    }

    #[test]
    fn half_precisions_where_they_gain() {
        let Some(kernel) = kernels().next() else { return };
        for kind in HALVES {
            let [q, k, v] = layer((1, 2, 128, 130, 16), 1.0).map(|x| x.to_kind(kind));
            let found = attend(&q, &k, &v, None, None).map(Result::unwrap);
            assert_eq!(found.is_some(), !is_intel());
            if let Some(found) = found {
                assert!(found.kind() == kind && found.equal(&kernel.attend(&q, &k, &v, None, 0.25, 1).unwrap()));
            }
            // Of one kind, or they are refused as ever.
            assert!(attend(&q, &k.to_kind(Kind::Float), &v, None, None).is_none());
            assert!(attend(&q.to_kind(Kind::Float), &k, &v, None, None).is_none());
            assert!(kernel.attend(&q, &k.to_kind(Kind::Float), &v, None, 0.25, 1).is_err());
            let bias = Tensor::zeros([1, 1, 128, 130], (kind, Device::Cpu));
            assert!(attend(&q, &k, &v, Some(&bias), None).is_none());
            assert!(tch::no_grad(|| kernel.attend(&q, &k, &v, Some(&bias.to_kind(Kind::Float)), 0.25, 1)).is_err());
        }
    }

    #[test]
    fn scale_is_one_over_the_root_of_the_width() {
        if kernels().next().is_none() {
            return;
        }
        let [q, k, v] = layer((1, 1, 128, 130, 36), 1.0);
        let found = attend(&q, &k, &v, None, None).unwrap().unwrap();
        assert!(found.equal(&attend(&q, &k, &v, None, Some(1.0 / 6.0)).unwrap().unwrap()));
    }
}
