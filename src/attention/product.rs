//! `softmax(Q K^T * scale + mask) V` by libtorch's kernels, or by ours where these gain something.

use crate::{Error, Result};
use tch::Tensor;

/// Where libtorch 2.11's kernel for masks on a GPU looks for a row of the mask, it counts modulo 2^32 numbers, so that rows behind the first so
/// many are silently those at the top again. Half of that leaves room for the rows' alignment.
const MOST_SCORES: i64 = 1 << 31;

/// Shorter parts than this do not pay for themselves.
const SHORTEST_PART: i64 = 128;

pub(crate) fn scaled_dot_product(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: Option<f64>) -> Result<Tensor> {
    let ((batch, heads, queries, width), (_, _, keys, values)) = (q.size4()?, v.size4()?);
    fits((heads, width, keys), k)?;
    if keys == 1 && mask.is_none() && !(q.requires_grad() && k.requires_grad()) {
        // The softmax of one score is 1, whatever the query. Cross-attention to one token of a fixed text: nothing to compute, and
        // gradients of 0. Who asks for the gradients of both may want to see these, as of weights that are trained.
        return Ok(v.f_expand([batch, heads, queries, values], false)?);
    }
    #[cfg(fused_attention)]
    if let Some(output) = super::fused::attend(q, k, v, mask, scale) {
        return output;
    }
    if let Some(mask) = mask.filter(|_| q.device().is_cuda()) {
        return in_rows(q, k, v, mask, scale, rows_at_once(mask, keys));
    }
    let followed = [q, k, v].iter().any(|x| x.requires_grad());
    let alike = [k, v].iter().all(|x| x.size().get(..2) == Some([batch, heads].as_slice()));
    if mask.is_none() && followed && alike && q.device() == tch::Device::Cpu {
        let parts = parts(batch * heads, queries, i64::from(tch::get_num_threads()));
        if parts > 1 {
            return in_parts(q, k, v, scale, parts);
        }
    }
    plain(q, k, v, mask, scale)
}

/// libtorch's kernels for CPUs take the number of keys from the values and go through the keys' memory that far, and beyond it; where there
/// are no heads they divide by 0. All else that does not fit they refuse themselves.
fn fits((heads, width, values): (i64, i64, i64), k: &Tensor) -> Result<()> {
    let (_, _, keys, of_key) = k.size4()?;
    if heads == 0 {
        return Err(Error::shape("keys", "at least one head", k.size()));
    }
    if (keys, of_key) != (values, width) {
        let wanted = format!("(.., {values}, {width}): a key for each value, as wide as the queries");
        return Err(Error::shape("keys", wanted, k.size()));
    }
    Ok(())
}

fn plain(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: Option<f64>) -> Result<Tensor> {
    super::without_cudnn_on(q.device());
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, false, scale, false)?)
}

/// Of a mask on a GPU: its rows are as far apart as they lie in it, or as libtorch lays them anew.
fn rows_at_once(mask: &Tensor, keys: i64) -> i64 {
    let apart = mask.stride().iter().rev().nth(1).copied().unwrap_or(0).max(keys.saturating_add(16));
    (MOST_SCORES / apart).max(1)
}

/// So many queries at a time, with the rows of the mask that are theirs: queries do not see one another.
fn in_rows(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, scale: Option<f64>, most: i64) -> Result<Tensor> {
    let queries = q.size4()?.2;
    let rows = mask.size().iter().rev().nth(1).copied();
    // One row is every query's; what has neither so few nor so many is for libtorch to refuse.
    let (one, fits) = (rows == Some(1), rows == Some(1) || rows == Some(queries));
    if queries <= most || !fits {
        return plain(q, k, v, Some(mask), scale);
    }
    let mut outputs = vec![];
    let mut start = 0;
    while start < queries {
        let count = most.min(queries - start);
        let own = if one { mask.shallow_clone() } else { mask.f_narrow(-2, start, count)? };
        outputs.push(plain(&q.f_narrow(2, start, count)?, k, v, Some(&own), scale)?);
        start += count;
    }
    Ok(Tensor::f_cat(&outputs, 2)?)
}

/// libtorch's backward pass on the CPU has a thread for each head of each picture and no more, so that one picture and one head keep one
/// core busy. Queries do not see one another: cut into parts that pass for pictures, they give all cores the same amount of work.
/// So many parts, the fewest with which no core has more than a tenth more to do than on average.
fn parts(heads: i64, queries: i64, threads: i64) -> i64 {
    let busy = |parts: i64| {
        let tasks = heads.saturating_mul(parts);
        let rounds = tasks.saturating_add(threads - 1) / threads.max(1);
        // Tasks in the time of one task and one core, at best as many as there are cores.
        10 * tasks >= 9 * rounds.saturating_mul(threads)
    };
    let possible = |parts: &i64| queries % parts == 0 && queries / parts >= SHORTEST_PART;
    if threads <= 1 || heads < 1 || busy(1) {
        return 1;
    }
    let even = (2..=threads).filter(possible).find(|&parts| busy(parts));
    // Where none is, the most there is, as long as cores would be idle.
    even.or_else(|| (2..=threads / heads).rev().find(possible)).unwrap_or(1)
}

fn in_parts(q: &Tensor, k: &Tensor, v: &Tensor, scale: Option<f64>, parts: i64) -> Result<Tensor> {
    let (batch, heads, queries, width) = q.size4()?;
    let values = v.size4()?.3;
    // (batch, heads, queries, width) to (batch * parts, heads, queries / parts, width); a view, as a network's layout is
    // (batch, queries, heads, width).
    let split = q.f_transpose(1, 2)?.f_reshape([batch * parts, queries / parts, heads, width])?.f_transpose(1, 2)?;
    let shared = |x: &Tensor| -> Result<Tensor> { Ok(x.f_unsqueeze(1)?.f_expand([-1, parts, -1, -1, -1], false)?.f_flatten(0, 1)?) };
    let output = plain(&split, &shared(k)?, &shared(v)?, None, scale)?;
    Ok(output.f_transpose(1, 2)?.f_reshape([batch, queries, heads, values])?.f_transpose(1, 2)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::*;
    use tch::{Device, Kind};

    fn layer(batch: i64, heads: i64, queries: i64, keys: i64) -> [Tensor; 3] {
        tch::set_num_threads(1);
        // No random numbers: libtorch's generator is everybody's.
        let tensor = |tokens, width, pitch: f64| {
            let values = (Tensor::arange(batch * tokens * heads * width, (Kind::Double, Device::Cpu)).square() * pitch).sin() * 2.0;
            values.to_kind(Kind::Float).view([batch, tokens, heads, width]).transpose(1, 2).set_requires_grad(true)
        };
        [tensor(queries, 40, 0.013), tensor(keys, 40, 0.017), tensor(keys, 24, 0.019)]
    }

    fn gradients(qkv: &[Tensor; 3], output: &Tensor) -> Vec<Tensor> {
        let weight = Tensor::linspace(-1, 1, output.numel() as i64, (Kind::Float, Device::Cpu)).view(output.size().as_slice());
        Tensor::run_backward(&[(output * weight).sum(Kind::Float)], qkv, false, false)
    }

    #[test]
    fn parts_give_what_the_whole_gives() {
        for (batch, heads, queries, keys, parts) in [(1, 1, 512, 512, 2), (1, 3, 384, 100, 3), (2, 2, 256, 256, 4)] {
            let qkv = layer(batch, heads, queries, keys);
            let [q, k, v] = &qkv;
            let (whole, cut) = (plain(q, k, v, None, Some(0.3)).unwrap(), in_parts(q, k, v, Some(0.3), parts).unwrap());
            assert_eq!(whole.size(), cut.size());
            // Sums over the parts round otherwise.
            assert!(whole.allclose(&cut, 1e-5, 1e-6, false));
            for (a, b) in gradients(&qkv, &whole).iter().zip(gradients(&qkv, &cut)) {
                assert!(a.allclose(&b, 1e-4, 1e-6, false), "{}", (a - &b).abs().max());
            }
        }
    }

    #[test]
    fn rows_give_what_the_whole_gives() {
        let qkv = layer(2, 3, 50, 21);
        let [q, k, v] = &qkv;
        let scores = (Tensor::arange(2 * 3 * 50 * 21, (Kind::Float, Device::Cpu)) * 0.7).sin().view([2, 3, 50, 21]) * 3.0;
        let of_pictures = scores.narrow(1, 0, 1);
        // Also one row for all queries, rows for all pictures and heads, and what is to be kept.
        let masks = [&scores, &of_pictures, &scores.narrow(2, 7, 1), &scores.get(1).get(2), &of_pictures.gt(-1.0)];
        for mask in masks {
            let whole = plain(q, k, v, Some(mask), Some(0.3)).unwrap();
            let wanted = gradients(&qkv, &whole);
            for most in [1, 7, 49, 50, 1000] {
                let cut = in_rows(q, k, v, mask, Some(0.3), most).unwrap();
                assert_eq!(whole.size(), cut.size());
                // By another kernel for few queries; rows mixed up differ by tenths.
                assert!(whole.allclose(&cut, 1e-5, 1e-5, false), "{:?} by {most}: {}", mask.size(), (&whole - &cut).abs().max());
                for (a, b) in wanted.iter().zip(gradients(&qkv, &cut)) {
                    assert!(a.allclose(&b, 1e-4, 1e-5, false), "{:?} by {most}: {}", mask.size(), (a - &b).abs().max());
                }
            }
        }
    }

    #[test]
    fn rows_of_masks_on_a_gpu() {
        let mask = Tensor::empty([1], (Kind::Half, Device::Cpu)).expand([1, 1, 70_000, 65_600], false);
        assert_eq!(rows_at_once(&mask, 65_600), 32_728);
        // A part of a wider mask keeps the distance of its rows.
        let wide = Tensor::empty([3, 640], (Kind::Half, Device::Cpu)).narrow(1, 0, 16);
        assert_eq!(rows_at_once(&wide, 16), (1 << 31) / 640);
        assert_eq!(rows_at_once(&mask, i64::MAX), 1);
    }

    #[test]
    fn parts_of_queries_are_views() {
        let [q, k, v] = layer(1, 1, 512, 64).map(|x| x.detach());
        let split = q.transpose(1, 2).reshape([2, 256, 1, 40]);
        assert_eq!(split.data_ptr(), q.data_ptr());
        assert_eq!(in_parts(&q, &k, &v, None, 2).unwrap().size(), [1, 1, 512, 24]);
    }

    #[test]
    fn one_key_is_its_value() {
        let qkv = layer(2, 3, 16, 1);
        let [q, k, v] = &qkv;
        // Of a text, which nobody trains.
        let output = scaled_dot_product(q, &k.detach(), v, None, None).unwrap();
        let expected = plain(q, k, v, None, None).unwrap();
        assert!(output.allclose(&expected, 0.0, 1e-6, false));
        let [ours, theirs] = [&output, &expected].map(|x| Tensor::run_backward(&[x.square().sum(Kind::Float)], &[v], false, false).remove(0));
        assert!(ours.allclose(&theirs, 1e-5, 1e-5, false));
        // Zeros and not nothing for who trains queries and keys.
        let output = scaled_dot_product(q, k, v, None, None).unwrap();
        let gradients = Tensor::run_backward(&[output.sum(Kind::Float)], &[q, k], false, false);
        assert!(gradients.iter().all(|gradient| gradient.defined() && gradient.abs().max().double_value(&[]) < 1e-6));
        // A mask may forbid even the only key, which is for libtorch to answer.
        let mask = Tensor::zeros([16, 1], (Kind::Float, Device::Cpu));
        assert!(scaled_dot_product(q, k, v, Some(&mask), None).unwrap().allclose(&expected, 0.0, 1e-6, false));
    }

    /// libtorch would read, and in the backward pass write, where nothing is.
    #[test]
    fn keys_without_values_are_refused() {
        for (keys, values) in [(5, 9), (9, 5), (5, 1), (1, 5), (5, 0), (200, 201), (201, 200)] {
            for queries in [5, 200] {
                let ([q, k, _], [_, _, v]) = (layer(1, 1, queries, keys), layer(1, 1, queries, values));
                for (q, k, v) in [(q.detach(), k.detach(), v.detach()), (q, k, v)] {
                    let error = scaled_dot_product(&q, &k, &v, None, None).unwrap_err();
                    assert!(matches!(&error, Error::Shape { name: "keys", found, .. } if found[2] == keys), "{error}");
                }
            }
        }
        let [q, k, v] = layer(1, 2, 5, 1);
        assert!(matches!(scaled_dot_product(&q, &k.narrow(3, 0, 39), &v, None, None), Err(Error::Shape { .. })), "of another width");
        let [q, k, v] = layer(2, 0, 5, 7);
        assert!(matches!(scaled_dot_product(&q, &k, &v, None, None), Err(Error::Shape { .. })), "no heads");
        // Nothing to see, and nobody to see it, are libtorch's zeros and its empty answer.
        let [q, k, v] = layer(2, 3, 5, 0);
        assert_eq!(scaled_dot_product(&q, &k, &v, None, None).unwrap().abs().sum(Kind::Float).double_value(&[]), 0.0);
        let [q, k, v] = layer(0, 3, 5, 7);
        assert_eq!(scaled_dot_product(&q, &k, &v, None, None).unwrap().size(), [0, 3, 5, 24]);
    }

    /// Or all that is tested of the kernels is not there to be tested.
    #[test]
    #[cfg(all(feature = "fused-attention", target_arch = "x86_64", target_os = "linux"))]
    fn fused_kernels_are_built() {
        let built = cfg!(fused_attention);
        assert!(built, "the build's warning says why not");
    }

    #[test]
    fn cores_are_kept_busy() {
        // (heads of all pictures, queries, threads)
        assert_eq!(parts(1, 4096, 1), 1);
        assert_eq!(parts(1, 4096, 2), 2);
        assert_eq!(parts(2, 1024, 2), 1);
        assert_eq!(parts(8, 4096, 16), 2);
        assert_eq!(parts(3, 4096, 2), 2);
        assert_eq!(parts(20, 4096, 16), 4);
        assert_eq!(parts(64, 4096, 16), 1);
        // Too short to be cut, and what divides by nothing.
        assert_eq!(parts(1, 200, 2), 1);
        assert_eq!(parts(1, 4099, 2), 1);
        // 3 does not divide; 2 of 3 cores are better than 1.
        assert_eq!(parts(1, 1024, 3), 2);
    }
}
