//! What is added to scores: which tensors the kernels take for that.

use super::kernel;
use tch::Tensor;

/// A number for each score, the same for several as may be, where nobody comes for gradients.
pub(super) fn may_be_added(bias: &Tensor, scores: [i64; 4], qkv: &[&Tensor]) -> bool {
    let fits = |(side, (own, all)): (usize, (i64, i64))| own == all || own == 1 && side < 3;
    let alike = <[i64; 4]>::try_from(bias.size()).is_ok_and(|own| own.into_iter().zip(scores).enumerate().all(fits));
    alike && !(kernel::keeps_graphs() && [&[bias], qkv].concat().iter().any(|x| x.requires_grad()))
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::kernel::tests::{doubled, error, kernels, layer, SHAPES};
    use tch::{Device, Kind, Tensor};

    /// What forbids a key: nothing does so more, what this crate's regions have, and what networks from Python have.
    const NEVER: [f64; 3] = [f64::NEG_INFINITY, -3e4, f32::MIN as f64];

    /// Of any four numbers of pictures, heads, queries and keys, from -3 to 3 and here and there as small as can be.
    pub(in crate::attention::fused) fn bias_of(size: [i64; 4]) -> Tensor {
        let at = Tensor::arange(size.iter().product::<i64>(), (Kind::Double, Device::Cpu));
        let bias = (at.square() * 0.0113).sin() * 3.0;
        bias.masked_fill(&at.remainder(7.0).eq(3.0), f64::NEG_INFINITY).to_kind(Kind::Float).view(size)
    }

    #[test]
    fn biased_outputs_are_those_of_f64() {
        for kernel in kernels() {
            for (shape, shares) in SHAPES.into_iter().zip([1, 2, 3, 5, 7].into_iter().cycle()) {
                let (pictures, heads, queries, keys, _) = shape;
                let qkv = layer(shape, 1.0);
                let [q, k, v] = &qkv;
                let [exact_q, exact_k, exact_v] = doubled(&qkv);
                for size in [[pictures, heads, queries, keys], [1, 1, queries, keys], [pictures, 1, 1, keys], [1, heads, queries, keys]] {
                    // One query may have no key but one that is forbidden, which is a question of its own.
                    let bias = if keys == 1 { bias_of(size).clamp_min(-3.0) } else { bias_of(size) };
                    let scores = exact_q.matmul(&exact_k.transpose(-2, -1)) * 0.4 + bias.to_kind(Kind::Double);
                    let expected = scores.softmax(-1, Kind::Double).matmul(&exact_v);
                    let found = kernel.attend(q, k, v, Some(&bias), 0.4, shares).unwrap();
                    assert!(error(&found, &expected) < 2e-5, "{kernel:?} {shape:?} {size:?}: {}", error(&found, &expected));
                    // Wherever its numbers lie in memory, and however many others compute.
                    let columns = bias.transpose(2, 3).contiguous().transpose(2, 3);
                    let within = Tensor::full([size[0], size[1] + 1, size[2] + 2, keys + 5], f64::NAN, (Kind::Float, Device::Cpu));
                    let within = within.narrow(1, 1, size[1]).narrow(2, 1, size[2]).narrow(3, 3, keys);
                    within.shallow_clone().copy_(&bias);
                    let expanded = bias.expand([pictures, heads, queries, keys], false);
                    let negative = Tensor::complex(&bias.zeros_like(), &-&bias).conj().imag();
                    assert!(negative.is_neg());
                    for elsewhere in [columns, within, expanded, negative] {
                        assert!(kernel.attend(q, k, v, Some(&elsewhere), 0.4, 1).unwrap().equal(&found));
                    }
                }
                let none = Tensor::zeros([1, 1, queries, keys], (Kind::Float, Device::Cpu));
                assert!(kernel.attend(q, k, v, Some(&none), 0.4, 1).unwrap().equal(&kernel.attend(q, k, v, None, 0.4, 1).unwrap()));
            }
        }
    }

    /// As the tokens of all labels but one.
    #[test]
    fn forbidden_keys_weigh_nothing() {
        for kernel in kernels() {
            let [q, k, v] = layer((1, 2, 200, 400, 24), 1.0);
            // Whole blocks of keys, at either end.
            for ((from, keys), never) in [(0, 3), (37, 100), (256, 144), (399, 1)].into_iter().zip(NEVER.into_iter().cycle()) {
                let bias = Tensor::full([1, 1, 200, 400], never, (Kind::Float, Device::Cpu));
                let _ = bias.narrow(3, from, keys).fill_(0.5);
                let found = kernel.attend(&q, &k, &v, Some(&bias), 0.2, 1).unwrap();
                let expected = kernel.attend(&q, &k.narrow(2, from, keys), &v.narrow(2, from, keys), None, 0.2, 1).unwrap();
                assert!(error(&found, &expected.to_kind(Kind::Double)) < 1e-6, "{kernel:?} {from}");
            }
            // Where nothing is left, or what is forbidden is so to a degree, it is for libtorch to say what that means.
            for never in NEVER {
                let bias = Tensor::full([1, 1, 200, 400], never, (Kind::Float, Device::Cpu));
                let _ = bias.narrow(2, 50, 1).fill_(f64::from(f32::MAX));
                let _ = bias.narrow(2, 60, 1).narrow(3, 7, 1).fill_(0.0);
                let found = kernel.attend(&q, &k, &v, Some(&bias), 0.2, 1).unwrap();
                let expected = Tensor::scaled_dot_product_attention(&q, &k, &v, Some(&bias), 0.0, false, 0.2, false);
                assert!(found.isfinite().all().int64_value(&[]) == 1, "{kernel:?} {never}");
                // Beside -3e4 f32 has steps of 2^-9 for scores, here of 2^-8 times log(2): a few thousandths of a weight.
                assert!(error(&found, &expected.to_kind(Kind::Double)) < if never == -3e4 { 1e-2 } else { 1e-5 }, "{kernel:?} {never}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_in_a_bias_stays_in_its_row() {
        for kernel in kernels() {
            let [q, k, v] = layer((1, 1, 200, 300, 24), 1.0);
            let bias = bias_of([1, 1, 200, 300]);
            let expected = kernel.attend(&q, &k, &v, Some(&bias), 0.2, 1).unwrap();
            // In whole vectors and in what is left over of them.
            for (key, value) in [(17, f64::NAN), (299, f64::NAN), (299, f64::INFINITY)] {
                let broken = bias.copy();
                let _ = broken.narrow(2, 70, 1).narrow(3, key, 1).fill_(value);
                let found = kernel.attend(&q, &k, &v, Some(&broken), 0.2, 1).unwrap();
                assert!(found.narrow(2, 70, 1).isnan().all().int64_value(&[]) == 1, "{kernel:?} {key} {value}");
                assert!(found.narrow(2, 0, 70).equal(&expected.narrow(2, 0, 70)) && found.narrow(2, 71, 129).equal(&expected.narrow(2, 71, 129)));
            }
        }
    }
}
