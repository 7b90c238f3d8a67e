//! Standard normal noise by seed, without the process-wide generator: two runs do not disturb each other.

use crate::{Error, Result};
use std::collections::VecDeque;
use tch::{Kind, Tensor};

/// Where a run takes its standard normal noise from, draw after draw.
///
/// [`Noise::seeded`] gives the numbers of `torch.manual_seed(seed)` and one `torch.randn` after the other on the CPU in f32 (to
/// the last digits, in which libtorch's own kernels differ from CPU to CPU), on every device and whatever else the process
/// draws. Hand the generator that drew a run's first latents on to the run, and a seed gives the picture that it gives in
/// Python.
pub struct Noise(Source);

enum Source {
    Seeded {
        generator: Box<Generator>,
        mark: Box<Generator>,
    },
    /// With the draws since a mark, where there is one, and those that are to be given once more.
    Custom {
        draw: Draw,
        given: Option<VecDeque<Tensor>>,
        again: VecDeque<Tensor>,
    },
}

type Draw = Box<dyn FnMut(&Tensor) -> Result<Tensor> + Send>;

impl std::fmt::Debug for Noise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Source::Seeded { .. } => "Noise::seeded",
            Source::Custom { .. } => "Noise::from_fn",
        })
    }
}

impl Noise {
    /// From its beginning. As in torch, only the lower 32 bits of a seed count.
    pub fn seeded(seed: u64) -> Self {
        let generator = Box::new(Generator::new(seed as u32));
        Self(Source::Seeded { mark: generator.clone(), generator })
    }

    /// From a source of one's own, which is given a tensor of the wanted shape and device. A checkpoint cannot keep its
    /// state.
    pub fn from_fn(draw: impl FnMut(&Tensor) -> Result<Tensor> + Send + 'static) -> Self {
        Self(Source::Custom { draw: Box::new(draw), given: None, again: VecDeque::new() })
    }

    /// The next draw, in f32, in the shape and on the device of `like`.
    ///
    /// # Errors
    /// A shape that is empty or absurd; a source of one's own that fails, or gives another shape.
    pub fn draw(&mut self, like: &Tensor) -> Result<Tensor> {
        let shape = like.size();
        let drawn = match &mut self.0 {
            Source::Seeded { generator, .. } => Tensor::f_from_slice(&generator.normal(count(&shape)?))?.f_view(shape.as_slice())?,
            Source::Custom { draw, given, again } => {
                let drawn = match again.pop_front().filter(|drawn| drawn.size() == shape) {
                    Some(drawn) => drawn,
                    None => draw(like)?,
                };
                given.iter_mut().for_each(|given| given.push_back(drawn.shallow_clone()));
                drawn
            }
        };
        if drawn.size() != shape {
            return Err(Error::shape("noise", format!("{shape:?}, as it was asked for"), drawn.size()));
        }
        Ok(drawn.f_to_device(like.device())?.f_to_kind(Kind::Float)?)
    }

    /// The state, for a checkpoint, `(627)` whole numbers; none of a source of one's own.
    ///
    /// # Errors
    /// libtorch's.
    pub fn state(&self) -> Result<Option<Tensor>> {
        match &self.0 {
            Source::Seeded { generator, .. } => Ok(Some(Tensor::f_from_slice(&generator.save())?)),
            Source::Custom { .. } => Ok(None),
        }
    }

    /// Goes on from what [`state`](Self::state) gave, for a source of the same kind: one of one's own has none to go on from.
    ///
    /// # Errors
    /// A state of the other kind, or a tensor that is none; the source is then as it was.
    pub fn load_state(&mut self, state: Option<&Tensor>) -> Result<()> {
        let bad = || Error::argument("noise state", "is none of a seeded generator");
        if let (Source::Custom { given, again, .. }, None) = (&mut self.0, state) {
            // What a step that failed had drawn is of the past that the state is not of.
            *given = None;
            again.clear();
            return Ok(());
        }
        let state = match (&self.0, state) {
            (Source::Seeded { .. }, Some(state)) => state,
            (_, None) => return Err(Error::argument("noise state", "is missing: it was saved with a source of one's own; bring that")),
            (Source::Custom { .. }, Some(_)) => return Err(Error::argument("noise state", "is a seeded generator's, and this source is another")),
        };
        if state.f_kind()? != Kind::Int64 || state.dim() != 1 {
            return Err(bad());
        }
        let generator = Box::new(Generator::load(&Vec::<i64>::try_from(state)?).ok_or_else(bad)?);
        self.0 = Source::Seeded { mark: generator.clone(), generator };
        Ok(())
    }

    /// The place that [`rewind`](Self::rewind) goes back to.
    pub(crate) fn mark(&mut self) {
        match &mut self.0 {
            Source::Seeded { generator, mark } => mark.clone_from(generator),
            Source::Custom { given, .. } => *given = Some(VecDeque::new()),
        }
    }

    /// What was drawn since the mark need not be given again.
    pub(crate) fn unmark(&mut self) {
        if let Source::Custom { given, .. } = &mut self.0 {
            *given = None;
        }
    }

    /// The draws since the mark are given once more.
    pub(crate) fn rewind(&mut self) {
        match &mut self.0 {
            Source::Seeded { generator, mark } => generator.clone_from(mark),
            Source::Custom { given, again, .. } => {
                let mut first = given.take().unwrap_or_default();
                first.append(again);
                *again = first;
            }
        }
    }
}

/// How many numbers a shape holds.
fn count(shape: &[i64]) -> Result<usize> {
    let count = shape.iter().try_fold(1_usize, |count, &side| count.checked_mul(usize::try_from(side).ok()?));
    let count = count.filter(|count| (1..=1 << 31).contains(count));
    count.ok_or_else(|| Error::shape("noise", "sides of at least 1, 2^31 numbers at most", shape.to_vec()))
}

/// torch's CPU generator: uniform bits, and the second number of a pair that nobody has taken yet.
#[derive(Debug, Clone)]
struct Generator {
    bits: MersenneTwister,
    kept: Option<f64>,
}

impl Generator {
    fn new(seed: u32) -> Self {
        Self { bits: MersenneTwister::new(seed), kept: None }
    }

    fn normal(&mut self, count: usize) -> Vec<f32> {
        if count < LANES {
            (0..count).map(|_| self.single() as f32).collect()
        } else {
            blocks(&mut self.bits, count)
        }
    }

    /// Box-Muller in f64, the second number of a pair kept for the next.
    fn single(&mut self) -> f64 {
        if let Some(kept) = self.kept.take() {
            return kept;
        }
        let (a, b) = (self.bits.uniform_double(), self.bits.uniform_double());
        let radius = (-2.0 * (-b).ln_1p()).sqrt();
        let angle = 2.0 * std::f64::consts::PI * a;
        self.kept = Some(radius * angle.sin());
        radius * angle.cos()
    }

    /// The twister's words, its place among them, whether a number is kept, and its bits.
    fn save(&self) -> Vec<i64> {
        let words = self.bits.state.iter().map(|&word| i64::from(word));
        let rest = [self.bits.next as i64, i64::from(self.kept.is_some()), self.kept.unwrap_or(0.0).to_bits() as i64];
        words.chain(rest).collect()
    }

    fn load(saved: &[i64]) -> Option<Self> {
        let (words, rest) = saved.split_at_checked(STATE)?;
        let state = words.iter().map(|&word| u32::try_from(word).ok()).collect::<Option<Vec<_>>>()?;
        let &[next, has_kept, kept] = rest else { return None };
        let next = usize::try_from(next).ok().filter(|next| *next <= STATE)?;
        let kept = (has_kept == 1).then(|| f64::from_bits(kept as u64));
        (kept.is_none_or(f64::is_finite) && matches!(has_kept, 0 | 1)).then_some(Self { bits: MersenneTwister { state, next }, kept })
    }
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

/// MT19937 (Matsumoto and Nishimura 1998), libtorch's CPU generator.
#[derive(Debug, Clone)]
pub(crate) struct MersenneTwister {
    state: Vec<u32>,
    next: usize,
}

const STATE: usize = 624;
const SHIFT: usize = 397;

impl MersenneTwister {
    pub(crate) fn new(seed: u32) -> Self {
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

    fn wide_bits(&mut self) -> u64 {
        (u64::from(self.bits()) << 32) | u64::from(self.bits())
    }

    /// A whole number below `end` (0 for 0), as `torch.randint` draws it.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        let drawn = if end < 1 << 28 { u64::from(self.bits()) } else { self.wide_bits() };
        drawn.checked_rem(end).unwrap_or(0)
    }

    /// In 0..1, of 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.bits() & 0x00ff_ffff) as f32 / (1 << 24) as f32
    }

    /// In 0..1, of 53 bits.
    fn uniform_double(&mut self) -> f64 {
        (self.wide_bits() & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn blank(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::Float, Device::Cpu))
    }

    /// The only test of this binary that uses libtorch's own generator.
    #[test]
    fn the_numbers_of_libtorch_draw_after_draw() -> Result<()> {
        tch::set_num_threads(1);
        let shapes = [&[1_i64][..], &[3], &[15], &[16], &[17], &[5], &[2, 3, 5], &[1, 4, 64, 64], &[2], &[3, 37, 29], &[7]];
        for seed in [0_u64, 42, 123_456_789] {
            tch::manual_seed(seed as i64);
            let mut noise = Noise::seeded(seed);
            for shape in shapes {
                let theirs = Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?;
                let apart = (noise.draw(&blank(shape))? - theirs).abs().max().double_value(&[]);
                assert!(apart < 1e-5, "seed {seed}, shape {shape:?}: {apart}");
            }
        }
        let mut noise = Noise::seeded(0);
        assert!(noise.draw(&blank(&[0])).is_err() && noise.draw(&blank(&[1]).expand([1 << 40], false)).is_err());
        Ok(())
    }

    /// Numbers of `torch.randint(0, n, (4,), generator=torch.Generator().manual_seed(seed))`, torch 2.11.0.
    #[test]
    fn whole_numbers_of_torch() {
        let drawn = |seed: u64, end: u64| {
            let mut twister = MersenneTwister::new(seed as u32);
            [(); 4].map(|()| twister.below(end))
        };
        assert_eq!(drawn(0, 7), [4, 3, 0, 2]);
        assert_eq!(drawn(4100, 1000), [456, 743, 151, 761]);
        assert_eq!(drawn(4294971396, 1000), [456, 743, 151, 761]);
        assert_eq!(drawn(5, 268435455), [148147046, 236996814, 250105852, 80864970]);
        assert_eq!(drawn(5, 268435456), [236996814, 80864957, 220060790, 180152393]);
        assert_eq!(drawn(5, 1099511627776), [425438759118, 1030067709629, 989404716150, 622681974857]);
    }

    #[test]
    fn a_state_goes_on_where_it_was_taken() -> Result<()> {
        tch::set_num_threads(1);
        let mut noise = Noise::seeded(7);
        let _ = noise.draw(&blank(&[3]))?;
        let state = noise.state()?.unwrap();
        assert_eq!(state.size(), [627]);
        let ahead = [noise.draw(&blank(&[1]))?, noise.draw(&blank(&[20]))?];
        let mut other = Noise::seeded(0);
        other.load_state(Some(&state))?;
        for expected in ahead {
            assert!(other.draw(&expected)?.equal(&expected));
        }
        for bad in [blank(&[627]), state.narrow(0, 0, 626), -state.shallow_clone() - 1, state.view([3, 209])] {
            assert!(matches!(other.load_state(Some(&bad)), Err(Error::Argument { .. })), "{bad:?}");
        }
        Ok(())
    }

    #[test]
    fn what_was_drawn_since_the_mark_is_drawn_again() -> Result<()> {
        tch::set_num_threads(1);
        let mut count = 0.0;
        let counting = move |like: &Tensor| {
            count += 1.0;
            Ok(like.zeros_like() + count)
        };
        for mut noise in [Noise::seeded(1), Noise::from_fn(counting)] {
            let draw = |noise: &mut Noise| noise.draw(&blank(&[2])).map(|drawn| drawn.double_value(&[0]));
            draw(&mut noise)?;
            noise.mark();
            let first = [draw(&mut noise)?, draw(&mut noise)?];
            noise.rewind();
            noise.mark();
            assert_eq!(draw(&mut noise)?, first[0]);
            // Failed again, half way.
            noise.rewind();
            noise.mark();
            assert_eq!([draw(&mut noise)?, draw(&mut noise)?], first);
            noise.mark();
            let third = draw(&mut noise)?;
            assert!(!first.contains(&third), "{noise:?}");
        }
        Ok(())
    }

    #[test]
    fn a_source_of_ones_own_is_held_to_its_word() {
        tch::set_num_threads(1);
        let mut count = 0.0;
        let mut counting = Noise::from_fn(move |like| {
            count += 1.0;
            Ok(like.zeros_like() + count)
        });
        let draw = |noise: &mut Noise| noise.draw(&blank(&[1])).unwrap().double_value(&[0]);
        counting.mark();
        assert_eq!(draw(&mut counting), 1.0);
        counting.rewind();
        // Another run's past: what was to be given again is not, and what is drawn is not kept.
        counting.load_state(None).unwrap();
        assert_eq!(draw(&mut counting), 2.0);
        let mut noise = Noise::from_fn(|_| Ok(blank(&[3])));
        assert!(matches!(noise.draw(&blank(&[2])), Err(Error::Shape { .. })));
        assert!(noise.state().unwrap().is_none() && noise.load_state(None).is_ok());
        assert!(noise.load_state(Noise::seeded(0).state().unwrap().as_ref()).is_err());
        assert!(Noise::seeded(0).load_state(None).is_err());
    }
}
