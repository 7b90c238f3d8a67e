//! The losses against plain tensor arithmetic, and their gradients.
#![allow(clippy::disallowed_methods, missing_docs)]

mod toy;

use attention_distillation::{
    AdLoss, AttentionHook, AttentionSite, ContentLoss, Denoiser, Error, FeatureExtractor, Features, LayerFeatures, Loss, Qkv, References, Result,
    Style, TotalLoss,
};
use std::sync::{
    atomic::{AtomicUsize, Ordering},
    Arc,
};
use tch::{Kind, Tensor};
use toy::{assert_same, difference, extractor, features, latents, number, relative, style, Toy};

/// f32 against the same sums in another order: some units in the last place (6e-8) of numbers near 1.
const ROUNDING: f64 = 1e-6;

fn f64_of(t: &Tensor) -> Tensor {
    t.detach().to_kind(Kind::Double)
}

/// `softmax(s Q K^T / sqrt(d)) V` in f64.
fn attention(query: &Tensor, key: &Tensor, value: &Tensor, sharpness: f64) -> Tensor {
    let dim = query.size()[3] as f64;
    let scores = f64_of(query).matmul(&f64_of(key).transpose(2, 3)) * (sharpness / dim.sqrt());
    scores.softmax(-1, None::<Kind>).matmul(&f64_of(value))
}

/// The AD loss in f64, from the words of the paper.
fn ad_by_hand(picture: &Features, styles: &[&Features], sharpness: f64) -> f64 {
    let layer_loss = |i: usize| {
        let layer = picture.layers().nth(i).unwrap();
        let batch = layer.query.size()[0];
        let join = |pick: fn(&attention_distillation::LayerFeatures) -> &Tensor| {
            let parts: Vec<_> = styles.iter().map(|s| pick(s.layers().nth(i).unwrap()).expand([batch, -1, -1, -1], false)).collect();
            Tensor::cat(&parts, 2)
        };
        let ideal = attention(&layer.query, &join(|l| &l.key), &join(|l| &l.value), sharpness);
        number(&(f64_of(layer.output().unwrap()) - ideal).abs().mean(None::<Kind>))
    };
    (0..picture.len()).map(layer_loss).sum()
}

fn content_by_hand(picture: &Features, content: &Features) -> f64 {
    picture.layers().zip(content.layers()).map(|(a, b)| number(&(f64_of(&a.query) - f64_of(&b.query)).abs().mean(None::<Kind>))).sum()
}

fn ad(picture: &Features, references: &References<Features>) -> f64 {
    number(&AdLoss::default().evaluate(picture, references).unwrap())
}

#[track_caller]
fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance * b.abs(), "{a} and {b}");
}

#[test]
fn the_ad_loss_is_the_papers_formula() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let picture = features(&toy, &latents(1, 6, 8));
    let style = features(&toy, &latents(2, 8, 4));
    let references = References::style(style.shallow_clone());
    for sharpness in [1.0, 1.5, 0.5] {
        let loss = AdLoss::default().with_sharpness(sharpness);
        let value = loss.evaluate(&picture, &references).unwrap();
        assert_eq!((value.size(), value.kind()), (vec![], Kind::Float));
        let expected = ad_by_hand(&picture, &[&style], sharpness);
        assert!(expected > 0.01, "a loss that says something");
        close(number(&value), expected, ROUNDING * 10.0);
        let layers = loss.per_layer(&picture, &references).unwrap();
        assert_eq!(layers.len(), 2);
        close(layers.iter().map(number).sum(), expected, ROUNDING * 10.0);
    }
    assert!((ad_by_hand(&picture, &[&style], 1.0) - ad_by_hand(&picture, &[&style], 1.5)).abs() > 1e-3, "sharpness does something");
}

/// `a` of smoothing: `(1 - a) Q + a Attn(3 Qc, Kc, Q)` in place of `Q`, in the ideal attention alone.
#[test]
fn smoothing_draws_queries_towards_those_of_like_places() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let (z, other, style) = (latents(1, 6, 8), latents(3, 6, 8), features(&toy, &latents(2, 8, 4)));
    let (picture, content) = (features(&toy, &z), features(&toy, &other));
    let references = |a: f64| References::style(style.shallow_clone()).with_content(content.shallow_clone()).with_smoothing(a);
    let by_hand = |a: f64, sharpness: f64| -> f64 {
        let layers = picture.layers().zip(content.layers()).zip(style.layers());
        layers
            .map(|((own, content), style)| {
                let mean = attention(&content.query, &content.key, &own.query, 3.0);
                let query = f64_of(&own.query) * (1.0 - a) + mean * a;
                number(&(f64_of(own.output().unwrap()) - attention(&query, &style.key, &style.value, sharpness)).abs().mean(None::<Kind>))
            })
            .sum()
    };
    for (a, sharpness) in [(0.5, 1.0), (1.0, 1.0), (0.3, 1.5)] {
        let value = number(&AdLoss::default().with_sharpness(sharpness).evaluate(&picture, &references(a)).unwrap());
        close(value, by_hand(a, sharpness), ROUNDING * 10.0);
        assert!((value - by_hand(0.0, sharpness)).abs() > 1e-3, "it does something");
    }
    // None is the paper's to the last bit, and so is one without a content.
    let plain = ad(&picture, &References::style(style.shallow_clone()));
    assert_eq!(ad(&picture, &references(0.0)), plain);
    assert_eq!(ad(&picture, &References::style(style.shallow_clone()).with_smoothing(0.7)), plain);
    let content_loss = |a| number(&ContentLoss.evaluate(&picture, &references(a)).unwrap());
    assert_eq!(content_loss(0.7), content_loss(0.0));
    // One content for a batch, or one each, is what each picture has alone.
    let second = latents(5, 6, 8);
    let alone = [&z, &second].map(|z| ad(&features(&toy, z), &references(0.5)));
    let pair = |a: &Tensor, b: &Tensor| features(&toy, &Tensor::cat(&[a, b], 0));
    let both = pair(&z, &second);
    close(ad(&both, &references(0.5)), (alone[0] + alone[1]) / 2.0, ROUNDING * 10.0);
    let third = latents(7, 6, 8);
    let of_third = References::style(style.shallow_clone()).with_content(features(&toy, &third)).with_smoothing(0.5);
    let second_by_third = ad(&features(&toy, &second), &of_third);
    assert!((second_by_third - alone[1]).abs() > 1e-3, "another content is another loss");
    let each = References::style(style.shallow_clone()).with_content(pair(&other, &third)).with_smoothing(0.5);
    close(ad(&both, &each), (alone[0] + second_by_third) / 2.0, ROUNDING * 10.0);
    // Smoothed queries are of the target alone: the gradient is that towards a constant.
    let leaf = z.detach().set_requires_grad(true);
    let constant = tch::no_grad(|| {
        let ideal = |((own, content), style): ((&LayerFeatures, &LayerFeatures), &LayerFeatures)| {
            let query = f64_of(&own.query) * 0.5 + attention(&content.query, &content.key, &own.query, 3.0) * 0.5;
            attention(&query, &style.key, &style.value, 1.0).to_kind(Kind::Float)
        };
        picture.layers().zip(content.layers()).zip(style.layers()).map(ideal).collect::<Vec<_>>()
    });
    let seen = extractor(&toy).extract(&leaf, 500.0).unwrap();
    let terms = seen.layers().zip(&constant).map(|(layer, ideal)| (layer.output().unwrap() - ideal).abs().mean(None::<Kind>));
    let by_constant = Tensor::run_backward(&[terms.sum::<Tensor>()], &[leaf], false, false).remove(0);
    let (_, gradient) = extractor(&toy).gradient(&z, 500.0, &references(0.5), &AdLoss::default()).unwrap();
    assert!(relative(&gradient, &by_constant) < 1e-5);
    // Half precisions round it as they round the loss without.
    for (kind, bound) in [(Kind::Half, 2e-3), (Kind::BFloat16, 2e-2)] {
        let half = Toy::new(kind);
        let references = toy::style(&half, &latents(2, 8, 4)).with_content(features(&half, &other)).with_smoothing(0.5);
        close(ad(&features(&half, &z), &references), alone[0], bound);
    }
}

/// One layer whose attention has text among it: tokens of its own before the places, or fewer keys than queries.
struct Joint {
    text: i64,
    keys: i64,
}

impl Denoiser for Joint {
    type Condition = ();

    fn forward(&self, latents: &Tensor, _: f64, (): &(), hook: &mut dyn AttentionHook) -> Result<Tensor> {
        let (batch, channels, height, width) = latents.size4()?;
        let places = latents.flatten(2, 3).transpose(1, 2).unsqueeze(1);
        let text = toy::noise(3, &[1, 1, self.text, channels]).expand([batch, -1, -1, -1], false) * 2.0;
        let tokens = Tensor::cat(&[text, places], 2);
        let keys = tokens.narrow(2, 0, self.keys.min(tokens.size()[2]));
        hook.attend(&AttentionSite::self_attention(0, (height, width)).with_prefix(self.text), Qkv::new(tokens, keys.cos(), keys))
    }
}

#[test]
fn smoothing_is_among_places() {
    tch::set_num_threads(1);
    let seen = |net: &Joint, seed: u64| FeatureExtractor::new(net, (), 0..1).extract(&latents(seed, 4, 5), 500.0).unwrap();
    let all = |text: i64| Joint { text, keys: i64::MAX };
    let net = all(3);
    let (picture, content, style) = (seen(&net, 1), seen(&net, 2), seen(&net, 3));
    let [own, like, styles] = [&picture, &content, &style].map(|features| features.layers().next().unwrap());
    let places = |t: &Tensor| t.narrow(2, 3, 20);
    let drawn = f64_of(&places(&own.query)) * 0.6 + attention(&places(&like.query), &places(&like.key), &places(&own.query), 3.0) * 0.4;
    let query = Tensor::cat(&[f64_of(&own.query.narrow(2, 0, 3)), drawn], 2);
    let ideal = attention(&query, &styles.key, &styles.value, 1.0);
    let wanted = number(&(f64_of(own.output().unwrap()) - ideal).abs().mean(None::<Kind>));
    let references = |style: Features, content: Features| References::style(style).with_content(content).with_smoothing(0.4);
    close(ad(&picture, &references(style.shallow_clone(), content)), wanted, ROUNDING * 10.0);
    // Places without keys of their own have nothing to be alike by.
    for keys in [1, 7] {
        let net = Joint { text: 0, keys };
        let error = AdLoss::default().evaluate(&seen(&net, 1), &references(seen(&net, 3), seen(&net, 2))).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "content", .. }), "{error}");
        assert!(error.to_string().contains("a key for each of its 20 queries"), "{error}");
    }
}

#[test]
fn smoothing_refuses_what_it_cannot_take() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let picture = features(&toy, &latents(1, 6, 8));
    let with = |content: Features, a: f64| style(&toy, &latents(2, 4, 4)).with_content(content).with_smoothing(a);
    for a in [f64::NAN, -0.1, 1.1, f64::INFINITY] {
        for references in [with(features(&toy, &latents(3, 6, 8)), a), style(&toy, &latents(2, 4, 4)).with_smoothing(a)] {
            let error = AdLoss::default().evaluate(&picture, &references).unwrap_err();
            assert!(matches!(error, Error::Argument { argument: "smoothing", .. }), "{error}");
            assert!(error.to_string().contains("from 0 to 1"), "{error}");
        }
    }
    // As many places in other rows, fewer places, another batch.
    for content in [latents(3, 8, 6), latents(3, 4, 4), Tensor::cat(&[latents(3, 6, 8), latents(4, 6, 8)], 0)] {
        let error = AdLoss::default().evaluate(&picture, &with(features(&toy, &content), 0.5)).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "content", .. }), "{error}");
        assert!(AdLoss::default().evaluate(&picture, &with(features(&toy, &content), 0.0)).is_ok(), "unused, unasked");
    }
    let few = FeatureExtractor::new(&toy, 1.0, 0..1).extract(&latents(3, 6, 8), 500.0).unwrap();
    let error = AdLoss::default().evaluate(&picture, &with(few, 0.5)).unwrap_err();
    assert!(matches!(error, Error::Argument { argument: "content", .. }), "{error}");
}

#[test]
fn the_content_loss_is_the_papers_formula() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let (picture, content) = (features(&toy, &latents(1, 6, 8)), features(&toy, &latents(3, 6, 8)));
    let expected = content_by_hand(&picture, &content);
    let references = style(&toy, &latents(2, 4, 4)).with_content(content);
    let value = ContentLoss.evaluate(&picture, &references).unwrap();
    assert_eq!((value.size(), value.kind()), (vec![], Kind::Float));
    close(number(&value), expected, ROUNDING * 10.0);
}

#[test]
fn a_picture_that_is_its_reference_has_no_loss() {
    tch::set_num_threads(1);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let toy = Toy::new(kind);
        let z = latents(1, 6, 8);
        let picture = features(&toy, &z);
        let references = style(&toy, &z).with_content(features(&toy, &z));
        // The same numbers through the same kernel.
        assert_eq!(ad(&picture, &references), 0.0);
        assert_eq!(number(&ContentLoss.evaluate(&picture, &references).unwrap()), 0.0);
    }
}

#[test]
fn several_styles_are_one_of_all_their_tokens() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let picture = features(&toy, &latents(1, 6, 8));
    let sizes = [(8, 8), (4, 6), (3, 9)];
    let styles: Vec<_> = sizes.iter().zip(10..).map(|(&(h, w), seed)| features(&toy, &latents(seed, h, w))).collect();
    let references = References::styles(styles.iter().map(|s| Style::new(s.shallow_clone())));
    let expected = ad_by_hand(&picture, &styles.iter().collect::<Vec<_>>(), 1.0);
    close(ad(&picture, &references), expected, ROUNDING * 10.0);
    let first_alone = ad(&picture, &References::style(styles[0].shallow_clone()));
    assert!((first_alone - expected).abs() > 1e-3, "the others count");
    // Their order does not.
    let backwards = References::styles(styles.iter().rev().map(|s| Style::new(s.shallow_clone())));
    close(ad(&picture, &backwards), expected, ROUNDING * 10.0);
}

#[test]
fn a_style_given_twice_is_the_style_given_once() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let (z, other) = (latents(1, 6, 8), latents(2, 8, 8));
    let once = style(&toy, &other);
    let twice = References::styles([0, 1].map(|_| Style::new(features(&toy, &other))));
    let picture = features(&toy, &z);
    // Twice the tokens with half the weight each: the sums have another order, no other value.
    close(ad(&picture, &twice), ad(&picture, &once), 1e-6);
    let gradient = |references| extractor(&toy).gradient(&z, 500.0, references, &AdLoss::default()).unwrap().1;
    // The L1 norm's gradient is a sign: it would jump where a difference is next to 0, but none of these is.
    assert!(relative(&gradient(&twice), &gradient(&once)) < 1e-5);
}

#[test]
fn a_batch_of_pictures_shares_one_style() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let pictures = [latents(1, 6, 8), latents(2, 6, 8), latents(3, 6, 8)];
    let (reference, content) = (latents(4, 4, 8), latents(5, 6, 8));
    let references = style(&toy, &reference).with_content(features(&toy, &content));
    let batch = Tensor::cat(&pictures, 0);
    let total = TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.25, ContentLoss);
    let (loss, gradient) = extractor(&toy).gradient(&batch, 500.0, &references, &total).unwrap();
    assert_eq!(gradient.size(), batch.size());
    // A mean over the batch: the loss is the mean of the pictures', the gradients a third of theirs.
    let alone: Vec<_> = pictures.iter().map(|z| extractor(&toy).gradient(z, 500.0, &references, &total).unwrap()).collect();
    close(number(&loss), alone.iter().map(|(loss, _)| number(loss)).sum::<f64>() / 3.0, ROUNDING * 10.0);
    for (i, (_, expected)) in alone.iter().enumerate() {
        // A batch goes through other matrix kernels; measured 7e-7.
        assert!(relative(&(gradient.narrow(0, i as i64, 1) * 3.0), expected) < 1e-5);
    }
    // One style for each picture works as well, and so does none but the matching number.
    let each = style(&toy, &Tensor::cat(&[&reference, &reference, &reference], 0));
    close(ad(&features(&toy, &batch), &each), ad(&features(&toy, &batch), &style(&toy, &reference)), ROUNDING * 10.0);
    let two = style(&toy, &Tensor::cat(&[&reference, &reference], 0)).with_content(features(&toy, &Tensor::cat(&[&content, &content], 0)));
    for (loss, name) in [(&AdLoss::default() as &dyn Loss, "style"), (&ContentLoss, "content")] {
        let error = loss.evaluate(&features(&toy, &batch), &two).unwrap_err();
        assert!(matches!(&error, Error::Shape { name: found, .. } if *found == name), "{error}");
        assert!(error.to_string().contains("a batch of 1, or of 3"), "{error}");
    }
}

#[test]
fn the_target_is_detached() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let ex = extractor(&toy);
    let losses: [&dyn Loss; 2] = [&AdLoss::default(), &ContentLoss];
    for loss in losses {
        let leaf = || latents(1, 6, 8).set_requires_grad(true);
        let gradient = |references: &References<Features>| {
            let leaf = leaf();
            let value = loss.evaluate(&ex.extract(&leaf, 500.0).unwrap(), references).unwrap();
            Tensor::run_backward(&[value], &[leaf], false, false).remove(0)
        };
        let without = style(&toy, &latents(2, 6, 8)).with_content(features(&toy, &latents(2, 6, 8)));
        // Here the reference has a graph of its own, which the loss must not follow.
        let theirs = latents(2, 6, 8).set_requires_grad(true);
        let graph = || ex.extract(&theirs, 500.0).unwrap();
        assert!(graph().layers().all(|layer| layer.key.requires_grad()));
        let with = References::style(graph()).with_content(graph());
        assert_same(&gradient(&with), &gradient(&without));
        let value = loss.evaluate(&ex.extract(&leaf(), 500.0).unwrap(), &with).unwrap();
        // libtorch gives no gradient at all for what is no part of the graph.
        assert!(!Tensor::run_backward(&[value], &[&theirs], false, false).remove(0).defined());
    }
}

#[test]
fn the_gradient_is_that_of_the_stopped_objective() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let ex = extractor(&toy);
    let z = latents(1, 3, 4).to_kind(Kind::Double);
    let references = style(&toy, &latents(2, 4, 4)).with_content(features(&toy, &latents(3, 3, 4)));
    let (styles, content) = (&references.styles[0].of, references.content.as_ref().unwrap());
    let beta = 0.25;
    let total = TotalLoss::default().plus(1.0, AdLoss::default()).plus(beta, ContentLoss);
    let (_, gradient) = ex.gradient(&z, 500.0, &references, &total).unwrap();

    let ideals = |z: &Tensor| -> Vec<Tensor> {
        let picture = features(&toy, z);
        picture.layers().zip(styles.layers()).map(|(p, s)| attention(&p.query, &s.key, &s.value, 1.0)).collect()
    };
    let objective = |z: &Tensor, ideals: &[Tensor]| -> f64 {
        let picture = features(&toy, z);
        let ad: f64 = picture.layers().zip(ideals).map(|(p, ideal)| number(&(p.output().unwrap() - ideal).abs().mean(None::<Kind>))).sum();
        ad + beta * content_by_hand(&picture, content)
    };
    let stopped = ideals(&z);
    let h = 1e-6;
    let mut followed_differs = 0.0f64;
    for i in 0..z.numel() as i64 {
        let mut basis = Tensor::zeros([z.numel() as i64], (Kind::Double, tch::Device::Cpu));
        let _ = basis.get(i).fill_(h);
        basis = basis.view_as(&z);
        let (up, down) = (&z + &basis, &z - &basis);
        let slope = (objective(&up, &stopped) - objective(&down, &stopped)) / (2.0 * h);
        let ours = gradient.flatten(0, -1).double_value(&[i]);
        // The crate takes the mean in f32 (6e-8); central differences are good to h^2 and 1e-16 / h. Gradients are near 0.1.
        assert!((slope - ours).abs() < 1e-6, "{i}: {slope} by differences, {ours}");
        let followed = (objective(&up, &ideals(&up)) - objective(&down, &ideals(&down))) / (2.0 * h);
        followed_differs = followed_differs.max((followed - ours).abs());
    }
    assert!(followed_differs > 1e-4, "a gradient through the target would be another: {followed_differs}");
}

#[test]
fn gradients_of_half_precision_do_not_vanish() {
    tch::set_num_threads(1);
    // As if the numbers in a layer were the 1.3 million of Stable Diffusion at 512 pixels, in a batch of so many pictures.
    let weighed = |numbers: f64, pictures: f64| TotalLoss::default().plus(numbers / (1.3e6 * pictures), AdLoss::default());
    let error = |ours: &Tensor, exact: &Tensor| number(&(ours - exact).norm()) / number(&exact.norm());
    let (z, other) = (latents(1, 32, 32), latents(2, 32, 32));
    let gradient = |kind: Kind| {
        let toy = Toy::new(kind);
        let (loss, gradient) = extractor(&toy).gradient(&z, 500.0, &style(&toy, &other), &weighed(16384.0, 1.0)).unwrap();
        assert_eq!((gradient.kind(), loss.kind()), (Kind::Float, Kind::Float));
        (number(&loss), gradient)
    };
    let (loss, exact) = gradient(Kind::Float);
    // Roundings of 5e-4 (f16) and 4e-3 (bf16) in each number; on top of that, the signs of the L1 norm flip where they
    // exceed the difference. Measured: 0.014 and 0.11.
    for (kind, loss_bound, bound) in [(Kind::Half, 2e-3, 0.03), (Kind::BFloat16, 2e-2, 0.2)] {
        let (value, ours) = gradient(kind);
        close(value, loss, loss_bound);
        assert!(error(&ours, &exact) < bound, "{kind:?}: {}", error(&ours, &exact));
    }
    // Without the scale they would: this is five of f16's smallest numbers, and the weights make less of it. So few tokens that attention is
    // libtorch's on every processor: by way of f32, as large ones go on some, less would vanish.
    let (z, other) = (latents(1, 10, 10), latents(2, 10, 10));
    let loss = weighed(1600.0, 2.5);
    let toy = Toy::new(Kind::Float);
    let (_, exact) = extractor(&toy).gradient(&z, 500.0, &style(&toy, &other), &loss).unwrap();
    let toy = Toy::new(Kind::Half);
    let (_, scaled) = extractor(&toy).gradient(&z, 500.0, &style(&toy, &other), &loss).unwrap();
    assert!(error(&scaled, &exact) < 0.03, "{}", error(&scaled, &exact));
    let leaf = z.detach().set_requires_grad(true);
    let value = loss.evaluate(&extractor(&toy).extract(&leaf, 500.0).unwrap(), &style(&toy, &other)).unwrap();
    let unscaled = Tensor::run_backward(&[value], &[leaf], false, false).remove(0);
    assert!(error(&unscaled, &exact) > 0.3, "{}", error(&unscaled, &exact));
}

#[test]
fn a_gradient_is_taken_inside_no_grad_too() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let (z, references) = (latents(1, 4, 6), style(&toy, &latents(2, 4, 4)));
    let take = || extractor(&toy).gradient(&z, 500.0, &references, &AdLoss::default()).unwrap();
    let ((loss, gradient), (loss_inside, inside)) = (take(), tch::no_grad(take));
    assert!(number(&gradient.abs().max()) > 1e-4);
    assert_same(&gradient, &inside);
    assert_same(&loss, &loss_inside);
    assert!(!loss.requires_grad() && !gradient.requires_grad() && !z.requires_grad(), "nobody is left with a graph");
}

#[test]
fn references_carry_no_graph() {
    tch::set_num_threads(1);
    let toy = Toy::trainable(Kind::Float);
    let z = latents(1, 4, 4).set_requires_grad(true);
    let references = extractor(&toy).references(&References::style(z.shallow_clone()).with_content(z.shallow_clone()), 500.0).unwrap();
    for features in [&references.styles[0].of, references.content.as_ref().unwrap()] {
        assert_eq!(features.len(), 2);
        for layer in features.layers() {
            for tensor in [&layer.query, &layer.key, &layer.value, layer.output().unwrap()] {
                assert!(!tensor.requires_grad());
            }
        }
    }
    assert!(extractor(&toy).extract(&z, 500.0).unwrap().layers().all(|layer| layer.output().unwrap().requires_grad()), "asked for, it is there");
}

/// Counts how often it is asked.
struct Counted(Arc<AtomicUsize>, f64);

impl Loss for Counted {
    fn evaluate(&self, picture: &Features, _: &References<Features>) -> Result<Tensor> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(picture.layers().next().unwrap().query.f_mean(Kind::Float)?.f_mul_scalar(0.0)?.f_add_scalar(self.1)?)
    }
}

#[test]
fn a_total_loss_is_the_weighted_sum() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let z = latents(1, 6, 8);
    let references = style(&toy, &latents(2, 4, 4)).with_content(features(&toy, &latents(3, 6, 8)));
    let take = |loss: &dyn Loss| extractor(&toy).gradient(&z, 500.0, &references, loss).unwrap();
    let (ad, ad_gradient) = take(&AdLoss::default());
    let (content, content_gradient) = take(&ContentLoss);
    let (total, gradient) = take(&TotalLoss::default().plus(2.0, AdLoss::default()).plus(0.25, ContentLoss));
    close(number(&total), 2.0 * number(&ad) + 0.25 * number(&content), ROUNDING);
    assert!(relative(&gradient, &(ad_gradient * 2.0 + &content_gradient * 0.25)) < 1e-5);
    assert!(difference(&gradient, &(content_gradient * 0.25)) > 1e-4, "both terms count");

    let asked = Arc::new(AtomicUsize::new(0));
    let counted = |value| Counted(asked.clone(), value);
    let picture = features(&toy, &z);
    let value = TotalLoss::default().plus(0.0, counted(1.0)).plus(3.0, counted(2.0)).plus(0.5, counted(4.0)).evaluate(&picture, &references).unwrap();
    assert_eq!((number(&value), asked.load(Ordering::Relaxed)), (8.0, 2), "a weight of 0 costs nothing");
}

#[test]
fn bad_weights_are_refused() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let (picture, references) = (features(&toy, &latents(1, 4, 4)), style(&toy, &latents(2, 4, 4)));
    for weight in [f64::NAN, -1.0, f64::INFINITY, f64::NEG_INFINITY] {
        let loss = TotalLoss::default().plus(1.0, AdLoss::default()).plus(weight, AdLoss::default());
        let error = loss.evaluate(&picture, &references).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "loss weight", .. }), "{error}");
        assert!(error.to_string().contains(&weight.to_string()), "{error}");
    }
    for nothing in [TotalLoss::default(), TotalLoss::default().plus(0.0, AdLoss::default())] {
        assert!(matches!(nothing.evaluate(&picture, &references), Err(Error::Argument { argument: "loss", .. })));
    }
    for sharpness in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
        let error = AdLoss::default().with_sharpness(sharpness).evaluate(&picture, &references).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "sharpness", .. }), "{error}");
    }
}

#[test]
fn references_that_do_not_fit_are_refused() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let picture = features(&toy, &latents(1, 4, 9));
    let references = || style(&toy, &latents(2, 4, 4));

    let missing = ContentLoss.evaluate(&picture, &references()).unwrap_err();
    assert!(matches!(missing, Error::Argument { argument: "content", .. }), "{missing}");
    let no_styles = AdLoss::default().evaluate(&picture, &References::styles([])).unwrap_err();
    assert!(matches!(no_styles, Error::Argument { argument: "styles", .. }), "{no_styles}");

    let small = references().with_content(features(&toy, &latents(3, 4, 4)));
    let error = ContentLoss.evaluate(&picture, &small).unwrap_err();
    assert!(matches!(error, Error::Shape { name: "content", .. }), "{error}");
    // As many tokens, but lying on their side: pixel i of one is not pixel i of the other.
    for (h, w) in [(9, 4), (6, 6)] {
        let turned = references().with_content(features(&toy, &latents(3, h, w)));
        assert!(ContentLoss.evaluate(&picture, &turned).is_err(), "{h}x{w} for 4x9");
    }

    for layers in [1..3, 2..3, 2..5] {
        let theirs = || Features::extract(&toy, &latents(2, 4, 9), 500.0, &1.0, layers.clone()).unwrap();
        let error = AdLoss::default().evaluate(&picture, &References::style(theirs())).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "style", .. }), "{error}");
        let error = ContentLoss.evaluate(&picture, &references().with_content(theirs())).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "content", .. }), "{error}");
        assert!(error.to_string().contains("[2, 3]"), "{error}");
    }
    // The second of two styles is looked at as well.
    let second = References::styles([features(&toy, &latents(2, 4, 4)), Features::default()].map(Style::new));
    assert!(AdLoss::default().evaluate(&picture, &second).is_err());
}

/// A network that cuts the graph, as one that was written for inference alone does.
struct Cut<'t>(&'t Toy);

impl Denoiser for Cut<'_> {
    type Condition = f64;
    fn forward(&self, latents: &Tensor, timestep: f64, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.0.forward(&latents.detach(), timestep, condition, hook)
    }
}

#[test]
fn a_loss_that_does_not_depend_on_the_latents_is_an_error() {
    tch::set_num_threads(1);
    struct Constant;
    impl Loss for Constant {
        fn evaluate(&self, _: &Features, _: &References<Features>) -> Result<Tensor> {
            Ok(Tensor::from(1.0f32))
        }
    }
    // The weights of the second one have a graph, the latents none.
    for toy in [Toy::new(Kind::Float), Toy::trainable(Kind::Float)] {
        let references = style(&toy, &latents(2, 4, 4));
        let z = latents(1, 4, 4);
        let constant = extractor(&toy).gradient(&z, 500.0, &references, &Constant);
        let cut = FeatureExtractor::new(Cut(&toy), 1.0, 2..4).gradient(&z, 500.0, &references, &AdLoss::default());
        for outcome in [constant, cut] {
            let error = outcome.unwrap_err();
            assert!(error.to_string().contains("depend"), "{error}");
        }
    }
}

#[test]
fn a_timestep_that_is_no_number_is_refused() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let references = style(&toy, &latents(2, 4, 4));
    for timestep in [f64::NAN, f64::INFINITY] {
        let error = extractor(&toy).gradient(&latents(1, 4, 4), timestep, &references, &AdLoss::default()).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "timestep", .. }), "{error}");
    }
}
