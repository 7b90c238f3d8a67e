//! The kernels of kernel.cpp as operator.cpp hands them to libtorch.

use crate::{Error, Result};
use std::ffi::{c_char, c_void, CStr};
use std::sync::OnceLock;
use tch::{TchError, Tensor};

#[allow(unsafe_code)] // Declared here, see operator.cpp.
extern "C" {
    fn attention_distillation_attend(
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        bias: *const c_void,
        scale: f64,
        lanes: i64,
        threads: i64,
        output: *mut *mut c_void,
    ) -> *mut c_char;
    fn attention_distillation_keeps_graphs() -> bool;
    fn attention_distillation_free_error(error: *mut c_char);
}

/// Whether a graph is kept of what is computed now, as it is but under `tch::no_grad`.
#[allow(unsafe_code)]
pub(super) fn keeps_graphs() -> bool {
    // SAFETY: it reads a flag of this thread.
    unsafe { attention_distillation_keeps_graphs() }
}

/// For one instruction set. There is none that this processor, or its system, lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel {
    /// Floats of a vector.
    lanes: i64,
}

impl Kernel {
    /// All there are here, the best first. What is asked for is what build/fused_attention.rs compiles them for.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        [(16, avx512 && avx2), (8, avx2)].into_iter().filter_map(|(lanes, there)| there.then_some(Self { lanes }))
    }

    pub(super) fn best() -> Option<Self> {
        static BEST: OnceLock<Option<Kernel>> = OnceLock::new();
        *BEST.get_or_init(|| {
            let best = Self::all().next();
            tracing::debug!(kernel = ?best, "attention on this CPU, none: by libtorch");
            best
        })
    }

    /// By as many shares of the work as there are threads. With a bias on the scores there are no gradients.
    ///
    /// # Errors
    /// [`Error::Torch`]: shapes or kinds that it does not know, gradients with a bias, no memory.
    #[allow(unsafe_code)]
    pub(super) fn attend(self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64, threads: i64) -> Result<Tensor> {
        let mut output: *mut c_void = std::ptr::null_mut();
        let [query, key, value] = [q, k, v].map(|x| x.as_ptr().cast::<c_void>());
        let bias = bias.map_or(std::ptr::null(), |x| x.as_ptr().cast::<c_void>());
        // SAFETY: tensors that live as long as this call, whose kinds and shapes it checks, or for the bias null; what it keeps of them for
        // the gradients it counts as libtorch does. The processor has the instructions, or there would be no `self`. It throws nothing.
        let error = unsafe { attention_distillation_attend(query, key, value, bias, scale, self.lanes, threads, &mut output) };
        if error.is_null() {
            // SAFETY: without an error it is a tensor on the heap, which is handed over.
            return Ok(unsafe { Tensor::from_ptr(output.cast()) });
        }
        // SAFETY: an error is a text that ends with a 0 and is ours to free.
        let text = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
        // SAFETY: as above, and it is not looked at again.
        unsafe { attention_distillation_free_error(error) };
        Err(Error::Torch(TchError::Torch(text)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    //! The kernels against f64, and what they have in common with libtorch's attention.
    #![allow(clippy::disallowed_methods)]
    use super::super::bias::tests::bias_of;
    use super::*;
    use std::io::Write;
    use std::sync::Once;
    use tch::{Device, Kind};

    /// All there are here. Without any a test looks at nothing and passes, so which there are is told.
    pub(in crate::attention::fused) fn kernels() -> impl Iterator<Item = Kernel> {
        static TOLD: Once = Once::new();
        let there: Vec<_> = Kernel::all().collect();
        let known = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        assert_eq!((there.contains(&Kernel { lanes: 8 }), Kernel::best()), (known, there.first().copied()));
        TOLD.call_once(|| {
            let [wide, narrow] =
                [16, 8].map(|lanes| if there.contains(&Kernel { lanes }) { "tested" } else { "skipped, as this processor lacks it" });
            // Not by `eprintln!`, which is shown for failed tests only.
            std::io::stderr().write_all(format!("attention by AVX-512: {wide}; by AVX2: {narrow}\n").as_bytes()).unwrap();
        });
        there.into_iter()
    }

    /// Pictures, heads, queries, keys, width.
    pub(in crate::attention::fused) type Shape = (i64, i64, i64, i64, i64);

    /// Of whole tiles, blocks and vectors, and of what is left over of each; more keys than queries, fewer, one of either, one column.
    pub(in crate::attention::fused) const SHAPES: [Shape; 8] = [
        (1, 1, 512, 512, 48),
        (1, 2, 300, 411, 40),
        (2, 3, 129, 257, 7),
        (1, 1, 1, 300, 16),
        (1, 4, 200, 1, 64),
        (2, 1, 131, 640, 160),
        (1, 2, 256, 130, 80),
        (2, 2, 133, 140, 1),
    ];

    /// As a network has them, (pictures, tokens, heads, width) transposed. No random numbers: libtorch's generator is everybody's.
    pub(in crate::attention::fused) fn layer((pictures, heads, queries, keys, width): Shape, spread: f64) -> [Tensor; 3] {
        tch::set_num_threads(1);
        let tensor = |tokens: i64, pitch: f64, spread: f64| {
            let values = (Tensor::arange(pictures * tokens * heads * width, (Kind::Double, Device::Cpu)).square() * pitch).sin() * spread;
            values.to_kind(Kind::Float).view([pictures, tokens, heads, width]).transpose(1, 2)
        };
        [tensor(queries, 0.0131, spread), tensor(keys, 0.0173, spread), tensor(keys, 0.0197, 1.0)]
    }

    fn exact(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Tensor {
        (q.matmul(&k.transpose(-2, -1)) * scale).softmax(-1, Kind::Double).matmul(v)
    }

    /// Weighs each element of an output.
    fn weight(output: &Tensor) -> Tensor {
        let weight: Tensor = Tensor::arange(output.numel() as i64, (Kind::Double, Device::Cpu)) * 0.37;
        weight.sin().view(output.size().as_slice()).to_kind(output.kind())
    }

    /// Output, and gradients by queries, keys and values of a sum that weighs each of its elements.
    fn all(qkv: &[Tensor; 3], attend: impl Fn(&[Tensor; 3]) -> Tensor) -> Vec<Tensor> {
        let leaves = [0, 1, 2].map(|i: usize| qkv[i].detach().set_requires_grad(true));
        let output = attend(&leaves);
        let sum = (&output * weight(&output)).sum(output.kind());
        std::iter::once(output.detach()).chain(Tensor::run_backward(&[sum], &leaves, false, false)).collect()
    }

    /// Of a whole, the root of the mean square of the difference.
    pub(in crate::attention::fused) fn error(found: &Tensor, expected: &Tensor) -> f64 {
        let difference = (found.to_kind(Kind::Double) - expected).norm().double_value(&[]);
        difference / expected.norm().double_value(&[]).max(1e-30)
    }

    pub(in crate::attention::fused) fn doubled(qkv: &[Tensor; 3]) -> [Tensor; 3] {
        [0, 1, 2].map(|i: usize| qkv[i].to_kind(Kind::Double))
    }

    #[test]
    fn outputs_and_gradients_are_those_of_f64() {
        for kernel in kernels() {
            // From attention to all keys alike to attention to one of them; by shares that end within heads and without.
            for ((shape, spread), shares) in
                SHAPES.into_iter().flat_map(|shape| [0.1, 1.0, 4.0].map(|spread| (shape, spread))).zip([1, 2, 3, 5, 7].into_iter().cycle())
            {
                let qkv = layer(shape, spread);
                let scale = 0.4;
                let expected = all(&doubled(&qkv), |[q, k, v]| exact(q, k, v, scale));
                let found = all(&qkv, |[q, k, v]| kernel.attend(q, k, v, None, scale, shares).unwrap());
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_eq!(found.size(), expected.size());
                    // Gradients by scores are differences, which vanish where there is one key.
                    if shape.3 == 1 && (i == 1 || i == 2) {
                        assert!(found.abs().max().double_value(&[]) < 1e-3, "{kernel:?} {shape:?} {spread} {i}");
                    } else {
                        // Scores of 100 in f32 are 1e-5 off, and so are the weights.
                        assert!(error(found, expected) < 2e-5, "{kernel:?} {shape:?} {spread} {i}: {}", error(found, expected));
                    }
                }
            }
        }
    }

    #[test]
    fn rows_do_not_depend_on_others() {
        for kernel in kernels() {
            let [q, k, v] = layer((1, 1, 512, 300, 48), 1.0);
            let attend = |q: &Tensor, k: &Tensor, v: &Tensor, shares| kernel.attend(q, k, v, None, 0.2, shares).unwrap();
            let whole = attend(&q, &k, &v, 1);
            assert!((2..9).all(|shares| attend(&q, &k, &v, shares).equal(&whole)));
            assert!(whole.narrow(2, 37, 200).equal(&attend(&q.narrow(2, 37, 200), &k, &v, 1)));
            // A second picture, whose keys and values are the first's in memory, too.
            let twice = Tensor::cat(&[&q, &q], 0);
            let both = attend(&twice, &k.expand([2, -1, -1, -1], false), &v.expand([2, -1, -1, -1], false), 3);
            assert!((0..2).all(|picture| both.narrow(0, picture, 1).equal(&whole)));
            let followed = attend(&q.set_requires_grad(true), &k, &v, 1);
            assert!(followed.requires_grad() && followed.equal(&whole));
        }
    }

    #[test]
    fn only_what_is_wanted_gets_a_gradient() {
        for kernel in kernels() {
            let qkv = layer((1, 2, 140, 150, 40), 1.0);
            let every = all(&qkv, |[q, k, v]| kernel.attend(q, k, v, None, 0.2, 3).unwrap());
            for wanted in 0..3 {
                let one = [0, 1, 2].map(|i: usize| qkv[i].detach().set_requires_grad(i == wanted));
                let output = kernel.attend(&one[0], &one[1], &one[2], None, 0.2, 3).unwrap();
                let gradient = Tensor::run_backward(&[(&output * weight(&output)).sum(Kind::Float)], &[&one[wanted]], false, false).remove(0);
                assert!(gradient.equal(&every[wanted + 1]), "{kernel:?} {wanted}");
                // Of three that could have one, one that is asked for.
                let leaves = [0, 1, 2].map(|i: usize| qkv[i].detach().set_requires_grad(true));
                let output = kernel.attend(&leaves[0], &leaves[1], &leaves[2], None, 0.2, 3).unwrap();
                let gradient = Tensor::run_backward(&[(&output * weight(&output)).sum(Kind::Float)], &[&leaves[wanted]], false, false).remove(0);
                assert!(gradient.equal(&every[wanted + 1]), "{kernel:?} {wanted}");
            }
        }
    }

    #[test]
    fn any_layout_will_do() {
        for kernel in kernels() {
            let attend = |[q, k, v]: &[Tensor; 3]| kernel.attend(q, k, v, None, 0.2, 2).unwrap();
            let qkv = layer((2, 3, 150, 140, 24), 1.0);
            let expected = all(&qkv, attend);
            let close = |found: &[Tensor]| found.iter().zip(&expected).all(|(found, expected)| error(found, &expected.to_kind(Kind::Double)) < 1e-6);
            // Heads apart, tokens side by side, every second number of a wider tensor, and a sign that is still to be changed.
            let columns = |x: &Tensor| x.transpose(2, 3).contiguous().transpose(2, 3);
            let seconds = |x: &Tensor| Tensor::stack(&[x, x], -1).flatten(3, 4).slice(3, 0, None, 2);
            let negative = |x: &Tensor| Tensor::complex(&x.zeros_like(), &-x).conj().imag();
            assert!(negative(&qkv[0]).is_neg());
            for layout in [&|x: &Tensor| x.contiguous() as Tensor, &columns, &seconds, &negative] as [&dyn Fn(&Tensor) -> Tensor; 4] {
                assert!(close(&all(&qkv, |[q, k, v]| attend(&[layout(q), layout(k), layout(v)]))));
                // The gradient by the output in that layout.
                assert!(close(&all(&qkv, |qkv| layout(&attend(qkv)))));
            }
            // One head's keys and values for all, and a gradient that is one number for all.
            let shared = [0, 1, 2].map(|i: usize| qkv[i].narrow(1, 0, 1).detach());
            let sums = |qkv: &[Tensor; 3], attend: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor| {
                let leaves = [0, 1, 2].map(|i: usize| qkv[i].detach().set_requires_grad(true));
                let [q, k, v] = [0, 1, 2].map(|i: usize| leaves[i].expand([-1, 3, -1, -1], false));
                let output = attend(&q, &k, &v).cumsum(2, q.kind());
                Tensor::run_backward(&[output.sum(q.kind())], &leaves, false, false)
            };
            let expected = sums(&doubled(&shared), &|q, k, v| exact(q, k, v, 0.2));
            let found = sums(&shared, &|q, k, v| kernel.attend(q, k, v, None, 0.2, 2).unwrap());
            assert!(found.iter().zip(&expected).all(|(found, expected)| error(found, expected) < 2e-5));
            let leaf = qkv[2].detach().set_requires_grad(true);
            let gradient =
                Tensor::run_backward(&[kernel.attend(&qkv[0], &qkv[1], &leaf, None, 0.2, 2).unwrap().sum(Kind::Float)], &[&leaf], false, false)
                    .remove(0);
            // Weights of a query add up to 1.
            assert!((gradient.sum(Kind::Double).double_value(&[]) / (2.0 * 3.0 * 150.0 * 24.0) - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so_in_its_row() {
        // As arithmetic makes them, as GPUs do, and as nobody does.
        for bits in [0x7fc0_0000_u32, 0xffc0_0000, 0x7fff_ffff, 0xffff_ffff, 0x7fc0_0001, 0x7f80_0001] {
            let nan = Tensor::from_slice(&[f32::from_bits(bits)]);
            for kernel in kernels() {
                let attend = |q: &Tensor, k: &Tensor, v: &Tensor| kernel.attend(q, k, v, None, 0.2, 1).unwrap();
                let [q, k, v] = layer((1, 1, 200, 300, 24), 1.0);
                let (expected, followed) = (attend(&q, &k, &v), q.detach().set_requires_grad(true));
                let broken = |x: &Tensor, token: i64| {
                    let x = x.copy();
                    x.narrow(2, token, 1).copy_(&nan.expand([1, 1, 1, 24], false));
                    x
                };
                let output = attend(&broken(&q, 70), &k, &v);
                assert!(output.narrow(2, 70, 1).isnan().all().int64_value(&[]) == 1, "{bits:x} {kernel:?}");
                assert!(output.narrow(2, 0, 70).equal(&expected.narrow(2, 0, 70)) && output.narrow(2, 71, 129).equal(&expected.narrow(2, 71, 129)));
                for output in [attend(&q, &broken(&k, 130), &v), attend(&q, &k, &broken(&v, 299))] {
                    assert!(output.isnan().all().int64_value(&[]) == 1, "{bits:x} {kernel:?}");
                }
                let output = attend(&followed, &k, &v);
                let gradient = Tensor::run_backward(&[(output * broken(&expected, 5)).sum(Kind::Float)], &[&followed], false, false).remove(0);
                assert!(gradient.narrow(2, 5, 1).isnan().all().int64_value(&[]) == 1, "{bits:x} {kernel:?}");
                assert!(gradient.narrow(2, 6, 194).isfinite().all().int64_value(&[]) == 1);
            }
        }
    }

    #[test]
    fn scores_as_small_as_can_be_weigh_nothing() {
        for kernel in kernels() {
            let [_, _, v] = layer((1, 1, 130, 300, 16), 1.0);
            let q = Tensor::ones([1, 1, 130, 16], (Kind::Float, Device::Cpu));
            // The first block of keys and a part of the next.
            let k = Tensor::zeros([1, 1, 300, 16], (Kind::Float, Device::Cpu));
            let _ = k.narrow(2, 0, 140).narrow(3, 0, 1).fill_(f64::NEG_INFINITY);
            let output = kernel.attend(&q, &k, &v, None, 0.25, 1).unwrap();
            let expected = v.narrow(2, 140, 160).mean_dim(2, true, Kind::Double).expand([1, 1, 130, 16], false);
            assert!(error(&output, &expected) < 1e-5, "{kernel:?}");
            // Where all are, as libtorch.
            let _ = k.narrow(3, 0, 1).fill_(f64::NEG_INFINITY);
            let expected = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, 0.25, false);
            assert!(kernel.attend(&q, &k, &v, None, 0.25, 1).unwrap().equal(&expected), "{expected:?}");
        }
    }

    #[test]
    fn graphs_are_as_of_libtorchs_attention() {
        for kernel in kernels() {
            let [q, k, v] = layer((1, 1, 128, 128, 16), 1.0);
            let attend = |q: &Tensor| kernel.attend(q, &k, &v, None, 0.2, 1).unwrap();
            // The output may be written to; with a graph behind it not without the backward pass being refused.
            let factor = Tensor::from(2.0_f32).set_requires_grad(true);
            let _ = attend(&q).f_mul_(&factor).unwrap();
            let leaf = q.detach().set_requires_grad(true);
            let _ = tch::no_grad(|| attend(&leaf)).f_mul_(&factor).unwrap();
            let mut output = attend(&leaf);
            let sum = output.f_mul_(&factor).unwrap().sum(Kind::Float);
            assert!(Tensor::f_run_backward(&[sum], &[&leaf], false, false).unwrap_err().to_string().contains("inplace"));
            // So are queries that were written to since.
            let changed = leaf.shallow_clone() * 1.0;
            let output = attend(&changed);
            let _ = changed.detach().fill_(0.0);
            assert!(Tensor::f_run_backward(&[output.sum(Kind::Float)], &[&leaf], false, false).unwrap_err().to_string().contains("inplace"));
            // A graph of the gradients holds what lies beside the attention.
            let gradient =
                Tensor::run_backward(&[attend(&leaf).square().sum(Kind::Float) + leaf.pow_tensor_scalar(3).sum(Kind::Float)], &[&leaf], true, true)
                    .remove(0);
            assert!(gradient.requires_grad());
            let refused = Tensor::f_run_backward(&[gradient.sum(Kind::Float)], &[&leaf], false, false).unwrap_err();
            assert!(refused.to_string().contains("have no gradients"), "{refused}");
            let beside =
                Tensor::run_backward(&[attend(&leaf).sum(Kind::Float) * 0.0 + leaf.pow_tensor_scalar(3).sum(Kind::Float)], &[&leaf], true, true)
                    .remove(0);
            assert!(beside.allclose(&(leaf.square() * 3.0), 1e-5, 1e-6, false));
        }
    }

    #[test]
    fn a_traced_module_attends_to_what_it_is_given() {
        let Some(kernel) = kernels().next() else { return };
        let [q, k, v] = layer((1, 1, 130, 140, 16), 1.0);
        let inputs = [&q, &k, &v].map(Tensor::shallow_clone);
        let mut attend = |inputs: &[Tensor]| vec![kernel.attend(&inputs[0], &inputs[1], &inputs[2], None, 0.2, 1).unwrap()];
        let module = tch::CModule::create_by_tracing("attention", "forward", &inputs, &mut attend).unwrap();
        let others = [q.flip([2]), k * 0.5, v * 2.0];
        let found = module.method_ts("forward", &others).unwrap();
        assert!(found.allclose(&kernel.attend(&others[0], &others[1], &others[2], None, 0.2, 1).unwrap(), 1e-5, 1e-6, false));
        // And with a bias, which is one more of these.
        let bias = bias_of([1, 1, 130, 140]);
        let inputs = [&inputs[0], &inputs[1], &inputs[2], &bias].map(Tensor::shallow_clone);
        let mut attend = |inputs: &[Tensor]| vec![kernel.attend(&inputs[0], &inputs[1], &inputs[2], Some(&inputs[3]), 0.2, 1).unwrap()];
        let module = tch::CModule::create_by_tracing("attention", "forward", &inputs, &mut attend).unwrap();
        let [q, k, v] = others;
        let bias = bias.flip([3]);
        let expected = kernel.attend(&q, &k, &v, Some(&bias), 0.2, 1).unwrap();
        assert!(module.method_ts("forward", &[q, k, v, bias]).unwrap().allclose(&expected, 1e-5, 1e-6, false));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for kernel in kernels() {
            let [q, k, v] = layer((1, 2, 128, 130, 16), 1.0);
            for (q, k, v) in [
                (&q, &k, &v.narrow(2, 0, 129)),
                (&q.narrow(3, 0, 8), &k, &v),
                (&q, &k.narrow(1, 0, 1), &v),
                (&q.squeeze(), &k, &v),
                (&q.to_kind(Kind::Double), &k, &v),
            ] {
                assert!(matches!(kernel.attend(q, k, v, None, 0.2, 1), Err(Error::Torch(_))));
            }
            assert!(Kernel { lanes: 3 }.attend(&q, &k, &v, None, 0.2, 1).is_err());
            let bias = Tensor::zeros([1, 1, 128, 130], (Kind::Float, Device::Cpu));
            let refused = |q: &Tensor, bias: &Tensor| matches!(kernel.attend(q, &k, &v, Some(bias), 0.2, 1), Err(Error::Torch(_)));
            assert!(!refused(&q, &bias));
            for bias in [bias.narrow(3, 0, 1), bias.narrow(2, 0, 5), bias.squeeze(), bias.to_kind(Kind::Double)] {
                assert!(refused(&q, &bias), "{:?}", bias.size());
            }
            // Gradients that nobody would get.
            let leaf = q.detach().set_requires_grad(true);
            assert!(refused(&leaf, &bias) && !tch::no_grad(|| refused(&leaf, &bias)));
            assert!(refused(&q, &bias.set_requires_grad(true)));
        }
    }
}
