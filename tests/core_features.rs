//! The hook, the recorder and what they do to a network's forward pass.
#![allow(clippy::disallowed_methods, missing_docs)]

mod toy;

use attention_distillation::{
    AdLoss, AttentionHook, AttentionKind, AttentionSite, DeferredHook, Denoiser, Error, FeatureExtractor, FeatureRecorder, Features, Guidance,
    KeyValueInjection, Loss, PlainAttention, Qkv, References, Result, Style,
};
use std::{rc::Rc, sync::Arc};
use tch::{Kind, Tensor};
use toy::{assert_same, difference, latents, relative, Toy, LAYERS};

fn extract(toy: &Toy, z: &Tensor, layers: std::ops::Range<usize>) -> Result<Features> {
    Features::extract(toy, z, 300.0, &1.0, layers)
}

#[test]
fn an_early_stop_survives_a_foreign_error_type_and_saves_the_later_layers() {
    tch::set_num_threads(1);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let toy = Toy::new(kind);
        let features = extract(&toy, &latents(1, 6, 8), 1..3).unwrap();
        let indices: Vec<_> = features.layers().map(|layer| layer.site.index).collect();
        assert_eq!(indices, [1, 2]);
        assert_eq!((toy.forwards.get(), toy.entered.get()), (1, 3), "the pass ends in layer 2, the third");
        for layer in features.layers() {
            assert_eq!((layer.site.kind, layer.site.grid), (AttentionKind::SelfAttention, (6, 8)));
            for tensor in [&layer.query, &layer.key, &layer.value, layer.output().unwrap()] {
                assert_eq!((tensor.size(), tensor.kind()), (vec![1, 2, 48, 8], kind));
            }
        }
    }
}

#[test]
fn missing_layers_say_how_many_there_are() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    for layers in [3..9, 5..6, 70..76, 0..usize::MAX, usize::MAX - 1..usize::MAX] {
        let error = extract(&toy, &latents(1, 4, 4), layers.clone()).unwrap_err();
        assert!(error.to_string().contains("only 5 self-attention layers"), "{error}");
        match error {
            Error::MissingLayers { layers: asked, network } => assert_eq!((asked, network), (layers, LAYERS)),
            other => panic!("{other}"),
        }
    }
    assert_eq!(extract(&toy, &latents(1, 4, 4), 0..LAYERS).unwrap().len(), LAYERS, "all of them are not too many");
}

#[test]
fn an_empty_range_is_refused_before_any_pass() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    #[allow(clippy::reversed_empty_ranges)]
    for layers in [0..0, 2..2, 4..1] {
        let error = extract(&toy, &latents(1, 4, 4), layers).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "layers", .. }), "{error}");
    }
    assert_eq!(toy.forwards.get(), 0);
}

#[test]
fn a_recorder_changes_no_bit_of_the_output() {
    tch::set_num_threads(1);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let toy = Toy::new(kind);
        let z = latents(2, 5, 7);
        let plain = toy.run(&z, 300.0, 1.0, &mut PlainAttention).unwrap();
        // One layer more than there are, so that the pass is not stopped.
        let mut recorder = FeatureRecorder::new(0..LAYERS + 1);
        let seen = toy.run(&z, 300.0, 1.0, &mut recorder).unwrap();
        assert!(!recorder.is_complete());
        assert_same(&plain, &seen);
        let features = recorder.into_features();
        assert_eq!(features.len(), LAYERS);
        // Those of a stopped pass are the same.
        for (whole, stopped) in features.layers().skip(1).zip(extract(&toy, &z, 1..LAYERS).unwrap().layers()) {
            assert_eq!(whole.site, stopped.site);
            assert_same(whole.output().unwrap(), stopped.output().unwrap());
            assert_same(&whole.query, &stopped.query);
        }
        // And they are the layer's attention: softmax(Q K^T / sqrt(d)) V, here in f64. The kinds' own roundings are
        // 6e-8, 5e-4 and 4e-3; an attention of 35 tokens adds up a few of them.
        let tolerance = match kind {
            Kind::Float => 1e-6,
            Kind::Half => 3e-3,
            _ => 2e-2,
        };
        for layer in features.layers() {
            let [q, k, v] = [&layer.query, &layer.key, &layer.value].map(|t| t.to_kind(Kind::Double));
            let by_hand = (q.matmul(&k.transpose(2, 3)) / 8f64.sqrt()).softmax(-1, None::<Kind>).matmul(&v);
            assert!(relative(layer.output().unwrap(), &by_hand) < tolerance);
        }
    }
}

#[test]
fn references_are_what_they_are_alone() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let extractor = FeatureExtractor::new(&toy, 1.0, 1..3);
    let sizes = [(4, 6), (6, 4), (4, 6), (4, 6), (6, 4)];
    let pictures: Vec<_> = sizes.iter().enumerate().map(|(i, &(h, w))| latents(10 + i as u64, h, w)).collect();
    let batch = Tensor::cat(&[latents(20, 4, 6), latents(21, 4, 6)], 0);
    let styles = pictures.iter().chain([&batch]).map(|z| Style::new(z.shallow_clone()));
    let references = extractor.references(&References::styles(styles).with_content(latents(30, 4, 6)), 300.0).unwrap();
    assert_eq!((toy.forwards.get(), toy.entered.get()), (7, 3), "a pass for each");
    let alone = pictures.iter().chain([&batch, &latents(30, 4, 6)]).map(|z| extract(&toy, z, 1..3).unwrap()).collect::<Vec<_>>();
    let found = references.styles.iter().map(|style| &style.of).chain(&references.content);
    for (found, alone) in found.zip(&alone) {
        assert_eq!(found.len(), alone.len());
        for (x, y) in found.layers().zip(alone.layers()) {
            assert_eq!(x.site, y.site);
            // That of the last layer is made here.
            let outputs = (x.output().unwrap(), y.output().unwrap());
            for (x, y) in [(&x.query, &y.query), (&x.key, &y.key), (&x.value, &y.value), outputs] {
                assert_same(x, y);
            }
        }
    }
    assert!(relative(&alone[0].layers().next().unwrap().query, &alone[2].layers().next().unwrap().query) > 0.1, "other pictures look otherwise");
}

/// One layer, in which each token sees those before it.
struct Causal;

impl Denoiser for Causal {
    type Condition = ();

    fn forward(&self, latents: &Tensor, _: f64, (): &(), hook: &mut dyn AttentionHook) -> Result<Tensor> {
        let (_, _, h, w) = latents.size4()?;
        let tokens = latents.flatten(2, 3).transpose(1, 2).unsqueeze(1);
        let mut qkv = Qkv::new(tokens.shallow_clone(), tokens.shallow_clone(), tokens);
        qkv.mask = Some(Tensor::ones([h * w, h * w], (Kind::Bool, latents.device())).tril(0));
        hook.attend(&AttentionSite::self_attention(0, (h, w)), qkv)
    }
}

#[test]
fn outputs_of_references_are_those_of_the_pass_also_where_it_has_a_mask() {
    tch::set_num_threads(1);
    let extractor = FeatureExtractor::new(Causal, (), 0..1);
    let z = latents(1, 4, 5);
    let whole = extractor.extract(&z, 300.0).unwrap();
    let references = extractor.references(&References::style(z.shallow_clone()), 300.0).unwrap();
    let [expected, found] = [&whole, &references.styles[0].of].map(|features| features.layers().next().unwrap());
    assert_same(expected.output().unwrap(), found.output().unwrap());
    let unmasked = Qkv::new(found.query.shallow_clone(), found.key.shallow_clone(), found.value.shallow_clone()).attend().unwrap();
    assert!(relative(found.output().unwrap(), &unmasked) > 0.1);
}

#[test]
fn a_network_that_counts_wrongly_is_refused() {
    tch::set_num_threads(1);
    let mut toy = Toy::new(Kind::Float);
    type Numbering = fn(usize) -> usize;
    let wrong: [(Numbering, std::ops::Range<usize>); 6] = [
        (|i| if i == 0 { 0 } else { i + 1 }, 0..2), // leaves one out
        (|i| if i == 0 { 0 } else { i + 1 }, 0..3), // leaves one out in the middle
        (|i| i.saturating_sub(1), 0..2),            // one twice
        (|i| i.saturating_sub(1), 2..3),            // one twice, before those that are recorded
        (|i| LAYERS - 1 - i, 1..3),                 // backwards
        (|i| i ^ 1, 0..3),                          // pairs swapped
    ];
    for (number, layers) in wrong {
        toy.number = number;
        let error = extract(&toy, &latents(1, 4, 4), layers).unwrap_err();
        assert!(error.to_string().contains("execution order"), "{error}");
    }
}

#[test]
fn a_wrong_grid_is_refused() {
    tch::set_num_threads(1);
    let mut toy = Toy::new(Kind::Float);
    toy.grid = |(h, w)| (h, w / 2);
    let error = extract(&toy, &latents(1, 4, 6), 1..3).unwrap_err();
    assert!(error.to_string().contains("24 query tokens") && error.to_string().contains("12"), "{error}");
    toy.grid = |_| (i64::MAX, i64::MAX);
    assert!(extract(&toy, &latents(1, 4, 6), 1..3).is_err());
    // Another layer's grid is nobody's business: it is not recorded.
    let recorder = &mut FeatureRecorder::new(7..8);
    assert!(toy.run(&latents(1, 4, 6), 0.0, 1.0, recorder).is_ok());
}

#[test]
fn a_prefix_of_text_tokens_counts() {
    tch::set_num_threads(1);
    let qkv = || Qkv::new(toy::noise(1, &[1, 2, 11, 8]), toy::noise(2, &[1, 2, 11, 8]), toy::noise(3, &[1, 2, 11, 8]));
    let site = AttentionSite::self_attention(0, (2, 4));
    assert_eq!(site.with_prefix(3).tokens(), 11);
    assert!(FeatureRecorder::new(0..2).attend(&site.with_prefix(3), qkv()).is_ok());
    assert!(FeatureRecorder::new(0..2).attend(&site, qkv()).is_err());
}

/// The toy, but that it scales its queries itself, and so asks for scores that are not scaled once more.
struct Scaled<'t>(&'t Toy);

impl Denoiser for Scaled<'_> {
    type Condition = f64;
    fn forward(&self, latents: &Tensor, timestep: f64, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        struct Scaling<'h>(&'h mut dyn AttentionHook);
        impl AttentionHook for Scaling<'_> {
            fn attend(&mut self, site: &AttentionSite, mut qkv: Qkv) -> Result<Tensor> {
                qkv.query /= (qkv.query.size()[3] as f64).sqrt();
                qkv.scale = Some(1.0);
                self.0.attend(site, qkv)
            }
        }
        self.0.run(latents, timestep, *condition, &mut Scaling(hook)).map_err(Error::denoiser)
    }
}

#[test]
fn a_network_that_scales_its_own_queries_is_the_same_to_all() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let (plain, scaled) = (toy::extractor(&toy), FeatureExtractor::new(Scaled(&toy), 1.0, 2..4));
    let z = Tensor::cat(&[latents(1, 4, 6), latents(2, 4, 6)], 0);
    let output = plain.denoiser.run(&z, 500.0, 1.0, &mut PlainAttention).unwrap();
    assert!(relative(&scaled.denoiser.forward(&z, 500.0, &1.0, &mut PlainAttention).unwrap(), &output) < 1e-6);

    let styles = References::styles([Style::new(latents(3, 6, 4)), Style::new(latents(4, 3, 5)).with_weight(2.0)]);
    let styles = styles.with_content(latents(5, 4, 6)).with_smoothing(0.5);
    let wanted = plain.references(&styles, 500.0).unwrap();
    let handles = |features: &Features| [features.try_map(|t| Ok(t.shallow_clone())).unwrap(), features.shallow_clone()];
    let found = scaled.references(&styles, 500.0).unwrap();
    let [mapped, cloned] = [0, 1].map(|i| found.try_map(|features| Ok(handles(features)[i].shallow_clone())).unwrap());
    let picture = tch::no_grad(|| scaled.extract(&z, 500.0)).unwrap();
    let pictures: Vec<_> = [picture.shallow_clone()].into_iter().chain(handles(&picture)).collect();
    for sharpness in [1.0, 2.0] {
        let loss = AdLoss::default().with_sharpness(sharpness);
        let (value, gradient) = plain.gradient(&z, 500.0, &wanted, &loss).unwrap();
        // The loss is taken in f32. Scores that are scaled twice move the gradient by 0.4.
        let (own, of_own) = scaled.gradient(&z, 500.0, &found, &loss).unwrap();
        assert!(relative(&own, &value) < 1e-6 && relative(&of_own, &gradient) < 1e-5, "{own} {value}, {}", relative(&of_own, &gradient));
        for picture in &pictures {
            assert!(relative(&loss.evaluate(picture, &found).unwrap(), &value) < 1e-6);
        }
    }
    // Those of references are made when they are asked for, here.
    for found in [mapped, cloned, found] {
        for (wanted, found) in wanted.styles.iter().zip(&found.styles) {
            for (wanted, found) in wanted.of.layers().zip(found.of.layers()) {
                assert_eq!((wanted.scale, found.scale), (None, Some(1.0)));
                assert!(relative(found.output().unwrap(), wanted.output().unwrap()) < 1e-12);
            }
        }
    }
}

/// A network whose layers return bare tensors.
struct Bare<'t>(&'t Toy);

impl Denoiser for Bare<'_> {
    type Condition = f64;
    fn forward(&self, latents: &Tensor, timestep: f64, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        struct Deaf<'a, 'h>(&'a mut DeferredHook<'h>);
        impl AttentionHook for Deaf<'_, '_> {
            fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
                Ok(self.0.attend(site, qkv))
            }
        }
        let mut hook = DeferredHook::new(hook);
        let output = self.0.run(latents, timestep, *condition, &mut Deaf(&mut hook)).map_err(Error::denoiser)?;
        hook.finish(output)
    }
}

#[test]
fn a_deferred_hook_serves_a_network_of_bare_tensors() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let z = latents(3, 4, 6);
    let direct = extract(&toy, &z, 1..3).unwrap();
    let deferred = Features::extract(&Bare(&toy), &z, 300.0, &1.0, 1..3).unwrap();
    assert_eq!((deferred.len(), toy.entered.get()), (2, LAYERS), "it runs to its end, and the record ends where it should");
    for (a, b) in direct.layers().zip(deferred.layers()) {
        for (x, y) in [(&a.query, &b.query), (&a.key, &b.key), (&a.value, &b.value), (a.output().unwrap(), b.output().unwrap())] {
            assert_same(x, y);
        }
    }
    let plain = toy.run(&z, 300.0, 1.0, &mut PlainAttention).unwrap();
    assert_same(&plain, &Bare(&toy).forward(&z, 300.0, &1.0, &mut PlainAttention).unwrap());
    // The recorder's stop comes out at the end.
    let stopped = Bare(&toy).forward(&z, 300.0, &1.0, &mut FeatureRecorder::new(0..1));
    assert!(matches!(stopped, Err(Error::Stopped)));
    assert!(matches!(Features::extract(&Bare(&toy), &z, 300.0, &1.0, 4..7), Err(Error::MissingLayers { network: LAYERS, .. })));
}

#[test]
fn a_deferred_hook_hands_on_mask_and_scale() {
    tch::set_num_threads(1);
    let [q, k, v] = [1, 2, 3].map(|seed| toy::noise(seed, &[1, 2, 6, 8]));
    // Each token sees those before it.
    let mask = Tensor::ones([6, 6], (Kind::Bool, tch::Device::Cpu)).tril(0);
    for scale in [None, Some(1.0)] {
        let mut qkv = Qkv::new(q.shallow_clone(), k.shallow_clone(), v.shallow_clone());
        (qkv.mask, qkv.scale) = (Some(mask.shallow_clone()), scale);
        let scores = q.matmul(&k.transpose(2, 3)) * scale.unwrap_or(1.0 / 8f64.sqrt());
        let wanted = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY).softmax(-1, None::<Kind>).matmul(&v);
        let mut plain = PlainAttention;
        let mut hook = DeferredHook::new(&mut plain);
        let found = hook.attend(&AttentionSite::self_attention(0, (2, 3)), qkv);
        assert!(relative(&found, &wanted) < 1e-6, "{scale:?}: {}", relative(&found, &wanted));
        assert!(hook.finish(found).is_ok());
    }
}

#[test]
fn a_deferred_hook_keeps_the_first_error_and_asks_no_more() {
    tch::set_num_threads(1);
    struct Failing(usize);
    impl AttentionHook for Failing {
        fn attend(&mut self, _: &AttentionSite, _: Qkv) -> Result<Tensor> {
            self.0 += 1;
            Err(Error::denoiser(format!("failure {}", self.0)))
        }
    }
    let mut failing = Failing(0);
    let mut hook = DeferredHook::new(&mut failing);
    let (site, qkv) = (AttentionSite::self_attention(0, (2, 2)), || {
        Qkv::new(toy::noise(1, &[1, 1, 4, 8]), toy::noise(2, &[1, 1, 4, 8]), toy::noise(3, &[1, 1, 4, 8]))
    });
    for _ in 0..3 {
        assert_same(&hook.attend(&site, qkv()), &qkv().attend().unwrap());
    }
    let error = hook.finish(Tensor::zeros([1], tch::kind::FLOAT_CPU)).unwrap_err();
    assert!(error.to_string().contains("failure 1"), "{error}");
    assert_eq!(failing.0, 1);

    // Where even plain attention fails the queries come back, and the error in the end.
    let mut plain = PlainAttention;
    let mut hook = DeferredHook::new(&mut plain);
    let mut odd = qkv();
    odd.key = toy::noise(2, &[1, 1, 4, 5]);
    assert_same(&hook.attend(&site, odd), &qkv().query);
    assert!(matches!(hook.finish(qkv().query), Err(Error::Shape { name: "keys", .. })));
}

#[test]
fn injecting_a_pictures_own_keys_and_values_changes_nothing() {
    tch::set_num_threads(1);
    for kind in [Kind::Float, Kind::BFloat16] {
        let toy = Toy::new(kind);
        let z = latents(4, 5, 6);
        let own = extract(&toy, &z, 1..4).unwrap();
        let injected = toy.run(&z, 300.0, 1.0, &mut KeyValueInjection { reference: &own }).unwrap();
        assert_same(&injected, &toy.run(&z, 300.0, 1.0, &mut PlainAttention).unwrap());
    }
}

#[test]
fn injecting_anothers_changes_its_layers_and_no_other() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let z = Tensor::cat(&[latents(4, 5, 6), latents(5, 5, 6)], 0);
    // Of another size, and one for a batch of two.
    let other = extract(&toy, &latents(6, 7, 3), 1..3).unwrap();
    let plain = extract(&toy, &z, 0..LAYERS).unwrap();
    let mut recorder = FeatureRecorder::new(0..LAYERS + 1).around(KeyValueInjection { reference: &other });
    let output = toy.run(&z, 300.0, 1.0, &mut recorder).unwrap();
    assert!(difference(&output, &toy.run(&z, 300.0, 1.0, &mut PlainAttention).unwrap()) > 1e-3);
    let injected = recorder.into_features();
    assert_eq!(injected.len(), LAYERS);
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor| Qkv::new(q.shallow_clone(), k.shallow_clone(), v.shallow_clone()).attend().unwrap();
    for (layer, before) in injected.layers().zip(plain.layers()) {
        let own = attend(&layer.query, &layer.key, &layer.value);
        match other.at(&layer.site) {
            // Up to layer 0 nothing happened at all; behind the injected ones the layer works on what it gets.
            None => {
                assert_same(layer.output().unwrap(), &own);
                assert_eq!(layer.site.index == 0, difference(layer.output().unwrap(), before.output().unwrap()) == 0.0);
            }
            Some(reference) => {
                let expand = |t: &Tensor| t.expand([2, -1, -1, -1], false);
                assert_same(layer.output().unwrap(), &attend(&layer.query, &expand(&reference.key), &expand(&reference.value)));
                assert!(difference(layer.output().unwrap(), &own) > 1e-2);
            }
        }
    }
    // A recorder around an injection records the picture's own K and V.
    let first = other.layers().next().unwrap().site;
    assert_same(&injected.at(&first).unwrap().key, &plain.at(&first).unwrap().key);
    assert_same(&injected.at(&first).unwrap().value, &plain.at(&first).unwrap().value);
    // The sites of cross-attention with the same index are left alone.
    assert!(other.at(&AttentionSite::cross_attention(1, (5, 6))).is_none());
}

#[test]
fn a_recorder_around_an_injection_stops_the_pass_too() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let other = extract(&toy, &latents(6, 4, 4), 0..2).unwrap();
    let mut recorder = FeatureRecorder::new(1..2).around(KeyValueInjection { reference: &other });
    assert!(toy.run(&latents(7, 4, 4), 300.0, 1.0, &mut recorder).is_err());
    assert!(recorder.is_complete());
    assert_eq!((recorder.into_features().len(), toy.entered.get()), (1, 2));
}

#[test]
fn narrow_takes_pictures_of_the_batch() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let (a, b) = (latents(8, 4, 4), latents(9, 4, 4));
    let both = toy::features(&toy, &Tensor::cat(&[&a, &b], 0));
    for (range, alone) in [(0..1, &a), (1..2, &b)] {
        // A batch of two goes through other matrix kernels than one: some units in the last place.
        for (part, alone) in both.narrow(range.clone()).unwrap().layers().zip(toy::features(&toy, alone).layers()) {
            assert_eq!(part.site, alone.site);
            for (x, y) in
                [(&part.query, &alone.query), (&part.key, &alone.key), (&part.value, &alone.value), (part.output().unwrap(), alone.output().unwrap())]
            {
                assert!(relative(x, y) < 1e-5);
            }
        }
    }
    let whole = both.narrow(0..2).unwrap();
    assert_same(&whole.layers().next().unwrap().key, &both.layers().next().unwrap().key);
    #[allow(clippy::reversed_empty_ranges)]
    for outside in [1..3, 2..3, 3..4, -1..1, -1..0, 1..0, 0..i64::MAX] {
        assert!(both.narrow(outside.clone()).is_err(), "{outside:?}");
    }
}

#[test]
fn features_map_and_clone() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let features = toy::features(&toy, &latents(8, 4, 4));
    assert!(!features.is_empty() && Features::default().is_empty());
    let doubled = features.try_map(|t| Ok(t.f_mul_scalar(2.0)?)).unwrap();
    for ((twice, once), twin) in doubled.layers().zip(features.layers()).zip(features.shallow_clone().layers()) {
        for ((x, y), z) in [&twice.query, &twice.key, &twice.value, twice.output().unwrap()]
            .into_iter()
            .zip([&once.query, &once.key, &once.value, once.output().unwrap()])
            .zip([&twin.query, &twin.key, &twin.value, twin.output().unwrap()])
        {
            assert_same(x, &(y * 2.0));
            assert_eq!(y.data_ptr(), z.data_ptr(), "a handle, not a copy");
        }
    }
    let refused = features.try_map(|_| Err(Error::denoiser("no")));
    assert!(refused.is_err_and(|error| error.to_string().contains("no")));
}

#[test]
#[allow(clippy::arc_with_non_send_sync)] // the toy counts in cells; other networks do not
fn a_pointer_to_a_network_is_a_network() {
    tch::set_num_threads(1);
    fn through<D: Denoiser<Condition = f64>>(network: D) -> Tensor {
        let features = FeatureExtractor::new(network, 1.0, 1..2).extract(&latents(1, 4, 4), 300.0).unwrap();
        let output = features.layers().next().unwrap().output().unwrap().shallow_clone();
        output
    }
    let toy = Toy::new(Kind::Float);
    let expected = through(&toy);
    let dynamic: &dyn Denoiser<Condition = f64> = &toy;
    let others = [
        through(dynamic),
        through(Box::new(Toy::new(Kind::Float))),
        through(Rc::new(Toy::new(Kind::Float))),
        through(Arc::new(Toy::new(Kind::Float))),
        through(Box::new(Toy::new(Kind::Float)) as Box<dyn Denoiser<Condition = f64> + Send>),
    ];
    for other in others {
        assert_same(&other, &expected);
    }
}

#[test]
fn guidance_moves_away_from_the_negative() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let z = latents(1, 4, 4);
    let predict = |condition: f64| toy.run(&z, 300.0, condition, &mut PlainAttention).unwrap();
    let (prompt, negative) = (predict(2.0), predict(-1.0));
    assert!(difference(&prompt, &negative) > 1e-3);
    let mut guidance = Guidance { prompt: 2.0, negative: Some(-1.0), scale: 7.5 };
    // Below 1 it is between the two, at 0 the negative itself.
    for scale in [0.0, 0.5, 7.5] {
        guidance.scale = scale;
        let guided = toy.forward_guided(&z, 300.0, &guidance).unwrap();
        assert!(relative(&guided, &(&negative + (&prompt - &negative) * scale)) < 1e-6, "{scale}");
    }
    let passes = |guidance: &Guidance<f64>| {
        let before = toy.forwards.get();
        assert_same(&toy.forward_guided(&z, 300.0, guidance).unwrap(), &prompt);
        toy.forwards.get() - before
    };
    guidance.scale = 1.0;
    assert_eq!((passes(&guidance), passes(&Guidance::none(2.0))), (1, 1), "without effect, without cost");
    assert_same(&(&toy as &dyn Denoiser<Condition = f64>).forward_guided(&z, 300.0, &guidance).unwrap(), &prompt);
}
