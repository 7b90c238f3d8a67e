//! The two other ways to hold a picture to its content, against their formulas written out in f64.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)] // A test may panic.

mod toy;

use attention_distillation::{
    AdLoss, AttentionMapLoss, ContentLoss, ContentValueLoss, Error, Features, LayerFeatures, Loss, References, Result, TotalLoss,
};
use tch::{Kind, Tensor};
use toy::{extractor, features, latents, number, relative, style, Toy};

/// The formulas, with a graph.
enum ByHand {
    Maps,
    Values,
}

fn f64_of(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double)
}

fn map(layer: &LayerFeatures) -> Tensor {
    let width = layer.query.size()[3] as f64;
    (f64_of(&layer.query).matmul(&f64_of(&layer.key).transpose(2, 3)) / width.sqrt()).softmax(-1, None::<Kind>)
}

impl Loss for ByHand {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        let content = references.content.as_ref().unwrap();
        let layer = |(ours, theirs): (&LayerFeatures, &LayerFeatures)| {
            let (ours, wanted) = (map(ours), map(theirs));
            let value = f64_of(&theirs.value);
            match self {
                Self::Maps => (ours - wanted.detach()).abs().mean(None::<Kind>),
                Self::Values => (ours.matmul(&value) - wanted.matmul(&value).detach()).abs().mean(None::<Kind>),
            }
        };
        Ok(picture.layers().zip(content.layers()).map(layer).sum::<Tensor>().to_kind(Kind::Float))
    }
}

fn both() -> [(Box<dyn Loss + Send>, ByHand); 2] {
    [(Box::new(AttentionMapLoss), ByHand::Maps), (Box::new(ContentValueLoss), ByHand::Values)]
}

/// Loss and gradient, of one picture and of two that share a content or have one each.
#[test]
fn the_formulas() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let (first, second, content) = (latents(1, 6, 8), latents(4, 6, 8), latents(3, 6, 8));
    let two = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 0);
    for (picture, content) in [
        (first.shallow_clone(), content.shallow_clone()),
        (two(&first, &second), content.shallow_clone()),
        (two(&first, &second), two(&content, &first)),
    ] {
        let references = style(&toy, &latents(2, 4, 4)).with_content(features(&toy, &content));
        for (loss, by_hand) in both() {
            let (found, gradient) = extractor(&toy).gradient(&picture, 500.0, &references, &loss).unwrap();
            let (wanted, wanted_gradient) = extractor(&toy).gradient(&picture, 500.0, &references, &by_hand).unwrap();
            assert_eq!((found.size(), found.kind()), (vec![], Kind::Float));
            assert!(number(&wanted) > 1e-4 && (number(&found) / number(&wanted) - 1.0).abs() < 1e-5, "{found} {wanted}");
            // Their differences are taken in f32, in which a sign or two may turn; another formula is off by tenths.
            let off = relative(&gradient, &wanted_gradient);
            assert!(off < 1e-2, "{off}");
        }
    }
}

/// Both fall to nothing at the content, and a descent by either comes nearer to it by the loss of the paper as well.
#[test]
fn they_lead_to_the_content() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let content = latents(3, 6, 8);
    let references = References::default().with_content(features(&toy, &content));
    let start = &content + latents(1, 6, 8) * 0.3;
    let of = |loss: &dyn Loss, z: &Tensor| number(&loss.evaluate(&features(&toy, z), &references).unwrap());
    for (loss, _) in both() {
        assert!(of(&loss, &content) < 1e-7, "{}", of(&loss, &content));
        let mut z = start.shallow_clone();
        let mut step = 0.03;
        for _ in 0..60 {
            let (_, gradient) = extractor(&toy).gradient(&z, 500.0, &references, &loss).unwrap();
            z = &z - gradient.sign() * step;
            step *= 0.95;
        }
        assert!(of(&loss, &z) < 0.6 * of(&loss, &start), "{} {}", of(&loss, &z), of(&loss, &start));
        assert!(of(&ContentLoss, &z) < of(&ContentLoss, &start), "{} {}", of(&ContentLoss, &z), of(&ContentLoss, &start));
    }
}

/// In half precisions as in f32, up to these; and beside the other losses.
#[test]
fn half_precisions_and_sums() {
    tch::set_num_threads(1);
    let value = |kind: Kind, loss: &dyn Loss| {
        let toy = Toy::new(kind);
        let references = style(&toy, &latents(2, 4, 4)).with_content(features(&toy, &latents(3, 6, 8)));
        number(&loss.evaluate(&features(&toy, &latents(1, 6, 8)), &references).unwrap())
    };
    for (loss, _) in both() {
        let wanted = value(Kind::Float, &loss);
        for kind in [Kind::Half, Kind::BFloat16] {
            assert!((value(kind, &loss) / wanted - 1.0).abs() < 0.03, "{kind:?}: {} {wanted}", value(kind, &loss));
        }
    }
    let total = TotalLoss::default().plus(1.0, AdLoss::default()).plus(200.0, AttentionMapLoss).plus(1.0, ContentValueLoss);
    let [ad, maps, values] = [&AdLoss::default() as &dyn Loss, &AttentionMapLoss, &ContentValueLoss].map(|loss| value(Kind::Float, loss));
    assert!((value(Kind::Float, &total) / (ad + 200.0 * maps + values) - 1.0).abs() < 1e-5);
    assert!(total.uses_content(&References::default()));
}

#[test]
fn contents_that_do_not_fit() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let picture = features(&toy, &latents(1, 4, 9));
    let with = |content: Features| style(&toy, &latents(2, 4, 4)).with_content(content);
    for (loss, _) in both() {
        let refused = |references: &References<Features>| loss.evaluate(&picture, references).unwrap_err();
        assert!(matches!(refused(&style(&toy, &latents(2, 4, 4))), Error::Argument { argument: "content", .. }));
        // Smaller, as large but lying on its side, another number of pictures.
        for content in [latents(3, 4, 4), latents(3, 9, 4), Tensor::cat(&[latents(3, 4, 9), latents(5, 4, 9)], 0)] {
            let error = refused(&with(features(&toy, &content)));
            assert!(matches!(error, Error::Shape { name: "content", .. }), "{error}");
        }
        let others = Features::extract(&toy, &latents(3, 4, 9), 500.0, &1.0, 1..3).unwrap();
        assert!(matches!(refused(&with(others)), Error::Argument { argument: "content", .. }));
        assert!(loss.evaluate(&picture, &with(features(&toy, &latents(3, 4, 9)))).is_ok());
    }
}
