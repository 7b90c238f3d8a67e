//! `softmax(Q K^T * scale) V` on x86-64 CPUs by kernels of this crate, with AVX-512 or AVX2; in C++, as tch has no way to tell
//! libtorch an operator's gradients.
//!
//! For whom it is slow: libtorch's own kernel multiplies small matrices by MKL, which on other processors than Intel's leaves half of
//! AVX-512 unused. Rows of the output are the same to the last bit however many queries, threads or graphs there are.

use crate::{Error, Result};
use std::ffi::{c_char, c_void, CStr};
use tch::{Device, Kind, TchError, Tensor};

/// Fewer queries or keys than this are libtorch's, as are wider heads: neither gains.
const FEWEST: i64 = 128;
const WIDEST: i64 = 256;

/// Floats of a vector, the best first.
const LANES: [i64; 2] = [16, 8];

#[allow(unsafe_code)] // Declared here, see operator.cpp.
extern "C" {
    fn fused_attention_can(lanes: i64) -> bool;
    fn fused_attention(
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        scale: f64,
        lanes: i64,
        output: *mut *mut c_void,
    ) -> *mut c_char;
    fn fused_attention_free_error(error: *mut c_char);
}

/// `None` where the kernels do not know the case, or this processor not the kernels. Without a mask.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: Option<f64>) -> Option<Result<Tensor>> {
    let lanes = lanes()?;
    let [of_query, of_key, of_value] = [q, k, v].map(|x| <[i64; 4]>::try_from(x.size()).ok());
    let ([pictures, heads, queries, width], [_, _, keys, _]) = (of_query?, of_key?);
    let fits = of_key == of_value && of_key == Some([pictures, heads, keys, width]) && pictures > 0 && heads > 0;
    let large = queries >= FEWEST && keys >= FEWEST && (1..=WIDEST).contains(&width);
    let plain = [q, k, v].iter().all(|x| x.device() == Device::Cpu && x.f_kind().is_ok_and(|kind| kind == Kind::Float) && !x.is_sparse());
    let scale = scale.unwrap_or_else(|| 1.0 / (width as f64).sqrt());
    // Others turn the order of scores, or make the sums of the kernels' powers of two meaningless.
    let usual = scale.is_finite() && (scale as f32).is_normal() && scale > 0.0;
    (fits && large && plain && usual).then(|| by_vectors_of(lanes, q, k, v, scale))
}

/// The widest vectors that this processor has kernels for.
fn lanes() -> Option<i64> {
    static BEST: std::sync::OnceLock<Option<i64>> = std::sync::OnceLock::new();
    *BEST.get_or_init(|| LANES.into_iter().find(|&lanes| can(lanes)))
}

#[allow(unsafe_code)]
fn can(lanes: i64) -> bool {
    // SAFETY: it takes a number, and asks the processor.
    unsafe { fused_attention_can(lanes) }
}

/// # Errors
/// [`Error::Torch`], as where there is no memory.
#[allow(unsafe_code)]
fn by_vectors_of(lanes: i64, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    let mut output: *mut c_void = std::ptr::null_mut();
    // SAFETY: three tensors that live as long as this call, of the kind and shapes that it asks for, which its one caller has seen to;
    // what it keeps for the gradients is counted as libtorch counts. It throws nothing.
    let error = unsafe { fused_attention(q.as_ptr().cast(), k.as_ptr().cast(), v.as_ptr().cast(), scale, lanes, &mut output) };
    if error.is_null() {
        // SAFETY: without an error it is a tensor on the heap, which is handed over.
        return Ok(unsafe { Tensor::from_ptr(output.cast()) });
    }
    // SAFETY: an error is a text that ends with a 0 and is ours to free.
    let text = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
    // SAFETY: as above, and it is not looked at again.
    unsafe { fused_attention_free_error(error) };
    Err(Error::Torch(TchError::Torch(text)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::*;

    /// Pictures, heads, queries, keys, width.
    type Shape = (i64, i64, i64, i64, i64);

    /// Of whole tiles, blocks and vectors, and of what is left over of each; more keys than queries, fewer, one query.
    const SHAPES: [Shape; 7] = [
        (1, 1, 512, 512, 48),
        (1, 2, 300, 411, 40),
        (2, 3, 129, 257, 7),
        (1, 1, 1, 300, 16),
        (1, 4, 200, 1, 64),
        (2, 1, 131, 640, 160),
        (1, 2, 256, 130, 80),
    ];

    /// As a network has them, (pictures, tokens, heads, width) transposed. No random numbers: libtorch's generator is everybody's.
    fn layer((pictures, heads, queries, keys, width): Shape, spread: f64) -> [Tensor; 3] {
        tch::set_num_threads(1);
        let tensor = |tokens: i64, pitch: f64, spread: f64| {
            let values = (Tensor::arange(pictures * tokens * heads * width, (Kind::Double, Device::Cpu)).square() * pitch).sin() * spread;
            values.to_kind(Kind::Float).view([pictures, tokens, heads, width]).transpose(1, 2)
        };
        [tensor(queries, 0.0131, spread), tensor(keys, 0.0173, spread), tensor(keys, 0.0197, 1.0)]
    }

    fn kernels() -> impl Iterator<Item = i64> {
        LANES.into_iter().filter(|&lanes| can(lanes))
    }

    fn exact(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Tensor {
        (q.matmul(&k.transpose(-2, -1)) * scale).softmax(-1, Kind::Double).matmul(v)
    }

    /// Output, and gradients by queries, keys and values of a sum that weighs each of its elements.
    fn all(qkv: &[Tensor; 3], attend: impl Fn(&[Tensor; 3]) -> Tensor) -> Vec<Tensor> {
        let leaves = [0, 1, 2].map(|i: usize| qkv[i].detach().set_requires_grad(true));
        let output = attend(&leaves);
        let weight = (Tensor::arange(output.numel() as i64, (Kind::Double, Device::Cpu)) * 0.37).sin().view(output.size().as_slice());
        let sum = (&output * weight.to_kind(output.kind())).sum(output.kind());
        std::iter::once(output.detach()).chain(Tensor::run_backward(&[sum], &leaves, false, false)).collect()
    }

    /// Of a whole, the root of the mean square of the difference.
    fn error(found: &Tensor, expected: &Tensor) -> f64 {
        let difference = (found.to_kind(Kind::Double) - expected).norm().double_value(&[]);
        difference / expected.norm().double_value(&[]).max(1e-30)
    }

    #[test]
    fn outputs_and_gradients_are_those_of_f64() {
        for lanes in kernels() {
            // From attention to all keys alike to attention to one of them.
            for (shape, spread) in SHAPES.into_iter().flat_map(|shape| [0.1, 1.0, 4.0].map(|spread| (shape, spread))) {
                let qkv = layer(shape, spread);
                let double = [0, 1, 2].map(|i: usize| qkv[i].to_kind(Kind::Double));
                let scale = 0.4;
                let expected = all(&double, |[q, k, v]| exact(q, k, v, scale));
                let found = all(&qkv, |[q, k, v]| by_vectors_of(lanes, q, k, v, scale).unwrap());
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_eq!(found.size(), expected.size());
                    // Scores of 100 in f32 are 1e-5 off, and so are the weights. Gradients by scores are differences, which vanish
                    // where there is one key.
                    let least = if shape.3 == 1 { 1e-3 } else { 0.0 };
                    if expected.norm().double_value(&[]) > least {
                        assert!(error(found, expected) < 2e-5, "{lanes} {shape:?} {spread} {i}: {}", error(found, expected));
                    } else {
                        assert!(found.abs().max().double_value(&[]) < 1e-3, "{lanes} {shape:?} {spread} {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_do_not_depend_on_others() {
        for lanes in kernels() {
            let [q, k, v] = layer((1, 1, 512, 300, 48), 1.0);
            let whole = by_vectors_of(lanes, &q, &k, &v, 0.2).unwrap();
            let part = by_vectors_of(lanes, &q.narrow(2, 37, 200), &k, &v, 0.2).unwrap();
            assert!(whole.narrow(2, 37, 200).equal(&part));
            let followed = by_vectors_of(lanes, &q.set_requires_grad(true), &k, &v, 0.2).unwrap();
            assert!(followed.requires_grad() && followed.equal(&whole));
            // The last two are the first two of another picture.
            let twice = Tensor::cat(&[&q.detach(), &q.detach()], 0);
            let both = by_vectors_of(lanes, &twice, &k.expand([2, -1, -1, -1], false), &v.expand([2, -1, -1, -1], false), 0.2).unwrap();
            assert!(both.narrow(0, 1, 1).equal(&whole));
        }
    }

    #[test]
    fn only_what_is_wanted_gets_a_gradient() {
        for lanes in kernels() {
            let qkv = layer((1, 2, 140, 150, 40), 1.0);
            let every = all(&qkv, |[q, k, v]| by_vectors_of(lanes, q, k, v, 0.2).unwrap());
            for wanted in 0..3 {
                let one = [0, 1, 2].map(|i: usize| qkv[i].detach().set_requires_grad(i == wanted));
                let output = by_vectors_of(lanes, &one[0], &one[1], &one[2], 0.2).unwrap();
                let weight = (Tensor::arange(output.numel() as i64, (Kind::Double, Device::Cpu)) * 0.37).sin().view(output.size().as_slice());
                let sum = (&output * weight.to_kind(Kind::Float)).sum(Kind::Float);
                let gradient = Tensor::run_backward(&[sum], &[&one[wanted]], false, false).remove(0);
                assert!(gradient.equal(&every[wanted + 1]), "{lanes} {wanted}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so_in_its_row() {
        for lanes in kernels() {
            let [q, k, v] = layer((1, 1, 200, 300, 24), 1.0);
            let expected = by_vectors_of(lanes, &q, &k, &v, 0.2).unwrap();
            let _ = q.narrow(2, 70, 1).fill_(f64::NAN);
            let output = by_vectors_of(lanes, &q, &k, &v, 0.2).unwrap();
            assert!(output.narrow(2, 70, 1).isnan().all().int64_value(&[]) == 1);
            assert!(output.narrow(2, 0, 70).equal(&expected.narrow(2, 0, 70)));
            assert!(output.narrow(2, 71, 129).equal(&expected.narrow(2, 71, 129)));
            let _ = v.narrow(2, 299, 1).fill_(f64::INFINITY);
            assert!(by_vectors_of(lanes, &q, &k, &v, 0.2).unwrap().isfinite().any().int64_value(&[]) == 0);
        }
    }

    #[test]
    fn gradients_of_gradients_are_refused() {
        for lanes in kernels() {
            let [q, k, v] = layer((1, 1, 128, 128, 16), 1.0);
            let q = q.set_requires_grad(true);
            let output = by_vectors_of(lanes, &q, &k, &v, 0.2).unwrap();
            let error = Tensor::f_run_backward(&[output.square().sum(Kind::Float)], &[&q], true, true).unwrap_err();
            assert!(error.to_string().contains("fused-attention"), "{error}");
        }
    }

    #[test]
    fn other_cases_are_left_to_libtorch() {
        if lanes().is_none() {
            return;
        }
        let [q, k, v] = layer((1, 2, 128, 130, 16), 1.0);
        assert!(attend(&q, &k, &v, None).is_some());
        let narrow = v.narrow(3, 0, 8);
        let double = [&q, &k, &v].map(|x| x.to_kind(Kind::Double));
        assert!(attend(&q.narrow(2, 0, 127), &k, &v, None).is_none());
        assert!(attend(&q, &k.narrow(2, 0, 127), &v.narrow(2, 0, 127), None).is_none());
        assert!(attend(&q, &k, &narrow, None).is_none());
        assert!(attend(&q, &k, &v.narrow(2, 0, 129), None).is_none());
        assert!(attend(&q, &k.narrow(1, 0, 1), &v.narrow(1, 0, 1), None).is_none());
        assert!(attend(&double[0], &double[1], &double[2], None).is_none());
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40] {
            assert!(attend(&q, &k, &v, Some(scale)).is_none());
        }
        let wide = Tensor::zeros([1, 1, 128, 257], (Kind::Float, Device::Cpu));
        assert!(attend(&wide, &wide, &wide, None).is_none());
    }

    #[test]
    fn scale_is_one_over_the_root_of_the_width() {
        if lanes().is_none() {
            return;
        }
        let [q, k, v] = layer((1, 1, 128, 130, 36), 1.0);
        let found = attend(&q, &k, &v, None).unwrap().unwrap();
        assert!(found.equal(&attend(&q, &k, &v, Some(1.0 / 6.0)).unwrap().unwrap()));
    }
}
