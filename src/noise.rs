//! Standard normal noise by seed, without the process-wide generator: two runs do not disturb each other.

use crate::{Error, Result};
use tch::Tensor;

/// The numbers of `torch.manual_seed(seed); torch.randn(shape)` on the CPU in f32 (to the last digits, in which libtorch's
/// own kernels differ from CPU to CPU), whatever else the process draws. On the CPU; move it where it is needed.
///
/// # Errors
/// A shape that is empty, negative or absurd.
pub fn seeded_noise(seed: u64, shape: &[i64]) -> Result<Tensor> {
    let count =
        shape.iter().try_fold(1_usize, |count, &side| count.checked_mul(usize::try_from(side).ok()?)).filter(|count| (1..=1 << 31).contains(count));
    let count = count.ok_or_else(|| Error::shape("noise", "sides of at least 1, 2^31 numbers at most", shape.to_vec()))?;
    let mut generator = MersenneTwister::new(seed as u32);
    let values = if count < LANES { pairs(&mut generator, count) } else { blocks(&mut generator, count) };
    Ok(Tensor::f_from_slice(&values)?.f_view(shape)?)
}

/// libtorch fills blocks of so many numbers at once; fewer in all are drawn in pairs.
const LANES: usize = 16;

/// Box-Muller in f32, radii from the first half of a block and angles from the second.
fn blocks(generator: &mut MersenneTwister, count: usize) -> Vec<f32> {
    let mut values: Vec<f32> = (0..count).map(|_| generator.uniform()).collect();
    let normal = |block: &mut [f32]| {
        let (first, second) = block.split_at_mut(LANES / 2);
        for (a, b) in first.iter_mut().zip(second) {
            let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
            let angle = 2.0 * std::f32::consts::PI * *b;
            (*a, *b) = (radius * angle.cos(), radius * angle.sin());
        }
    };
    let mut whole = values.chunks_exact_mut(LANES);
    whole.by_ref().for_each(normal);
    if !whole.into_remainder().is_empty() {
        // The last block begins anew, over numbers that were done already.
        if let Some(last) = values.get_mut(count - LANES..) {
            last.iter_mut().for_each(|value| *value = generator.uniform());
            normal(last);
        }
    }
    values
}

/// Box-Muller in f64, the second number of a pair kept for the next.
fn pairs(generator: &mut MersenneTwister, count: usize) -> Vec<f32> {
    let mut values = vec![];
    while values.len() < count {
        let (a, b) = (generator.uniform_double(), generator.uniform_double());
        let radius = (-2.0 * (-b).ln_1p()).sqrt();
        let angle = 2.0 * std::f64::consts::PI * a;
        values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    values.truncate(count);
    values
}

/// MT19937 (Matsumoto and Nishimura 1998), libtorch's CPU generator.
struct MersenneTwister {
    state: Vec<u32>,
    next: usize,
}

const STATE: usize = 624;
const SHIFT: usize = 397;

impl MersenneTwister {
    fn new(seed: u32) -> Self {
        let successor = |(i, last): &(u32, u32)| Some((i + 1, 1_812_433_253_u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i + 1)));
        let state = std::iter::successors(Some((0, seed)), successor).map(|(_, value)| value).take(STATE).collect();
        Self { state, next: STATE }
    }

    fn twist(&mut self) {
        for i in 0..STATE {
            let at = |j: usize| self.state.get(j % STATE).copied().unwrap_or_default();
            let mixed = (at(i) & 0x8000_0000) | (at(i + 1) & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            let value = at(i + SHIFT) ^ (mixed >> 1) ^ odd;
            if let Some(slot) = self.state.get_mut(i) {
                *slot = value;
            }
        }
        self.next = 0;
    }

    fn bits(&mut self) -> u32 {
        if self.next == STATE {
            self.twist();
        }
        let mut y = self.state.get(self.next).copied().unwrap_or_default();
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// In 0..1, of 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.bits() & 0x00ff_ffff) as f32 / (1 << 24) as f32
    }

    /// In 0..1, of 53 bits.
    fn uniform_double(&mut self) -> f64 {
        let bits = (u64::from(self.bits()) << 32) | u64::from(self.bits());
        (bits & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// The only test of this binary that uses libtorch's own generator.
    #[test]
    fn the_numbers_of_libtorch() -> Result<()> {
        tch::set_num_threads(1);
        for seed in [0_u64, 42, 123_456_789] {
            for shape in [&[1_i64][..], &[3], &[15], &[16], &[17], &[2, 3, 5], &[1, 4, 64, 64], &[3, 37, 29]] {
                tch::manual_seed(seed as i64);
                let theirs = Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?;
                let apart = (seeded_noise(seed, shape)? - theirs).abs().max().double_value(&[]);
                assert!(apart < 1e-5, "seed {seed}, shape {shape:?}: {apart}");
            }
        }
        assert!(seeded_noise(0, &[2, -1]).is_err() && seeded_noise(0, &[0]).is_err() && seeded_noise(0, &[1 << 40, 1 << 40]).is_err());
        Ok(())
    }
}
