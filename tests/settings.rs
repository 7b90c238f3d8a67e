//! Settings and sizes outside of their range are refused before a run begins.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

use attention_distillation::{Error, Procedure, Settings};

fn by_optimisation() -> [Settings; 4] {
    [Settings::style_transfer(), Settings::style_transfer_few_timesteps(), Settings::style_transfer_fast(), Settings::texture_synthesis()]
}

fn by_sampling() -> [Settings; 5] {
    [
        Settings::style_transfer_by_sampling(),
        Settings::text_to_image(),
        Settings::text_to_image_xl(),
        Settings::texture_by_sampling(),
        Settings::texture_expansion(),
    ]
}

/// `change` spoils sound settings: the error names the setting and its value.
#[track_caller]
fn refused(name: &str, value: &str, change: impl Fn(&mut Settings)) {
    refused_of(by_optimisation().into_iter().chain(by_sampling()), name, value, change);
}

#[track_caller]
fn refused_of(tasks: impl IntoIterator<Item = Settings>, name: &str, value: &str, change: impl Fn(&mut Settings)) {
    for mut settings in tasks {
        change(&mut settings);
        match settings.check() {
            Err(Error::Argument { argument, reason }) => {
                assert_eq!(argument, name);
                assert!(reason.contains(value), "{name}: {reason}");
                let message = Error::Argument { argument, reason }.to_string();
                assert!(message.contains(name) && message.contains(value), "{message}");
            }
            other => panic!("{name} {value}: {other:?}"),
        }
    }
}

#[track_caller]
fn accepted(change: impl Fn(&mut Settings)) {
    for mut settings in by_optimisation().into_iter().chain(by_sampling()) {
        change(&mut settings);
        settings.check().unwrap();
    }
}

#[test]
fn the_authors_settings_are_sound() {
    accepted(|_| {});
    let (transfer, texture) = (Settings::style_transfer(), Settings::texture_synthesis());
    assert_eq!((transfer.steps, transfer.iterations, transfer.learning_rate, transfer.content_weight), (200, 1, 0.05, 0.25));
    assert_eq!((transfer.layers, transfer.size), (None, None));
    assert_eq!((texture.steps, texture.iterations, texture.learning_rate, texture.content_weight), (300, 1, 0.05, 0.0));
    for settings in by_optimisation() {
        assert_eq!((settings.task.procedure(), settings.guidance, settings.adain), (Procedure::Optimisation, 1.0, false));
        assert_eq!(settings.smoothing, 0.0);
    }

    let [transfer, image, xl, texture, expansion] = by_sampling();
    assert_eq!((transfer.steps, transfer.iterations, transfer.learning_rate, transfer.content_weight), (50, 3, 0.05, 0.25));
    assert_eq!((image.steps, image.iterations, image.learning_rate, image.content_weight), (50, 3, 0.015, 0.25));
    assert_eq!((xl.steps, xl.iterations, xl.learning_rate, xl.content_weight), (50, 2, 0.015, 0.25));
    assert_eq!((texture.steps, texture.iterations, texture.learning_rate, texture.content_weight), (50, 3, 0.05, 0.0));
    assert_eq!((expansion.steps, expansion.iterations, expansion.learning_rate, expansion.content_weight), (50, 2, 0.05, 0.0));
    let plain = [transfer, texture, expansion].map(|settings| (settings, 1.0, false));
    for (settings, guidance, adain) in plain.into_iter().chain([(image, 7.5, true), (xl, 7.0, true)]) {
        assert_eq!((settings.task.procedure(), settings.guidance, settings.adain), (Procedure::Sampling, guidance, adain));
        assert_eq!(settings.smoothing, 0.0);
    }
}

#[test]
fn counts_of_zero() {
    refused("steps", "0", |s| s.steps = 0);
    refused_of(by_optimisation(), "iterations", "0", |s| s.iterations = 0);
    // Sampling without descents is plain sampling.
    for mut settings in by_sampling() {
        settings.iterations = 0;
        settings.check().unwrap();
    }
    accepted(|s| (s.steps, s.iterations) = (1, 1));
}

#[test]
fn numbers_that_are_none_or_negative() {
    for (number, shown) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf"), (-0.5, "-0.5"), (-1e-9, "-0.000000001")] {
        refused("learning rate", shown, |s| s.learning_rate = number);
        refused("content weight", shown, |s| s.content_weight = number);
        refused("guidance", shown, |s| s.guidance = number);
        refused("smoothing", shown, |s| s.smoothing = number);
    }
    refused("smoothing", "1.5", |s| s.smoothing = 1.5);
    accepted(|s| s.smoothing = 1.0);
    accepted(|s| (s.learning_rate, s.content_weight) = (0.0, 0.0));
    accepted(|s| (s.learning_rate, s.content_weight) = (10.0, 1.0));
    accepted(|s| (s.guidance, s.adain) = (0.0, !s.adain));
}

#[test]
#[allow(clippy::reversed_empty_ranges)]
fn empty_layers() {
    refused("layers", "3..3", |s| s.layers = Some(3..3));
    refused("layers", "5..3", |s| s.layers = Some(5..3));
    refused("layers", "0..0", |s| s.layers = Some(0..0));
    accepted(|s| s.layers = Some(0..1));
}

#[test]
fn empty_and_absurd_sizes() {
    // Shown as width x height, the way flags are written.
    refused("size", "64x0", |s| s.size = Some((0, 64)));
    refused("size", "0x64", |s| s.size = Some((64, 0)));
    refused("size", "64x-8", |s| s.size = Some((-8, 64)));
    refused("size", "64x99999", |s| s.size = Some((99_999, 64)));
    refused("size", "32768x32768", |s| s.size = Some((32_768, 32_768)));
    refused("size", &format!("{}x{}", i64::MAX, i64::MAX), |s| s.size = Some((i64::MAX, i64::MAX)));
    refused("size", &format!("{}x1", i64::MIN), |s| s.size = Some((1, i64::MIN)));
    accepted(|s| s.size = Some((1, 1)));
    accepted(|s| s.size = Some((16_384, 16_384)));
}

#[cfg(feature = "stable-diffusion")]
mod fit {
    use attention_distillation::{Error, LabelMap, Noise, References, StableDiffusion, Windows};
    use std::io::Write;
    use std::path::PathBuf;
    use std::time::{Duration, Instant};
    use tch::{Device, Kind, Tensor};

    fn open(folder: &str) -> StableDiffusion {
        tch::set_num_threads(1);
        StableDiffusion::open(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder), Device::Cpu, Kind::Float).unwrap()
    }

    fn tiny() -> StableDiffusion {
        open("tests/fixtures/sd15")
    }

    /// The error of a size `(height, width)`, which both `fit` and `noise` give.
    #[track_caller]
    fn refused(model: &StableDiffusion, (height, width): (i64, i64)) -> String {
        let started = Instant::now();
        let error = model.fit((height, width)).unwrap_err();
        let memory = error.is_out_of_memory();
        assert!(if memory { matches!(error, Error::Memory { .. }) } else { matches!(error, Error::Argument { argument: "size", .. }) }, "{error:?}");
        let message = error.to_string();
        assert!(message.contains("size") && message.contains(&format!("{width}x{height}")), "{message}");
        let other = model.noise(1, (height, width), &mut Noise::seeded(0)).unwrap_err();
        assert_eq!(format!("{:?}", but_for_free(other)), format!("{:?}", but_for_free(error)));
        // Refused, and not tried: what fills a machine's memory takes minutes.
        assert!(started.elapsed() < Duration::from_secs(30), "{message}");
        message
    }

    /// What is free is read anew for each error, and other programs take and give meanwhile.
    fn but_for_free(mut error: Error) -> Error {
        if let Error::Memory { free, .. } = &mut error {
            *free = 0;
        }
        error
    }

    #[test]
    fn rounds_down_to_what_the_network_takes() {
        let model = tiny();
        for ((height, width), fit) in [((64, 64), (64, 64)), ((71, 65), (64, 64)), ((8, 8), (8, 8)), ((15, 1000), (8, 1000)), ((33, 47), (32, 40))] {
            assert_eq!(model.fit((height, width)).unwrap(), fit, "{height}, {width}");
            assert_eq!(model.noise(2, (height, width), &mut Noise::seeded(1)).unwrap().size(), [2, 4, fit.0 / 8, fit.1 / 8]);
        }
        // Its autoencoder has a factor of 4.
        assert_eq!(open("assets/mini").fit((30, 31)).unwrap(), (28, 28));
    }

    #[test]
    fn empty() {
        let model = tiny();
        for size in [(0, 64), (64, 0), (0, 0), (-8, 64), (64, i64::MIN)] {
            assert!(refused(&model, size).contains("at least 1 pixel"));
        }
    }

    #[test]
    fn smaller_than_one_latent() {
        let model = tiny();
        for size in [(7, 64), (64, 7), (1, 1)] {
            assert!(refused(&model, size).contains("8x8"));
        }
    }

    #[test]
    fn absurd() {
        let model = tiny();
        for size in [(99_999, 99_999), (8, 40_000), (i64::MAX, i64::MAX), (i64::MAX, 8), (32_768, 32_768)] {
            assert!(refused(&model, size).contains("too large"));
        }
    }

    /// What the machine has in all, rounded up: no less than is free, whatever other programs do meanwhile.
    fn memory_gib() -> Option<i64> {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let all = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let gib = all.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()).map(|kib| (kib >> 20) + 1);
        if gib.is_none() {
            skipped("the system does not tell how much memory it has");
        }
        gib
    }

    /// Not by `eprintln!`, which is shown for failed tests only.
    fn skipped(reason: &str) {
        std::io::stderr().write_all(format!("partly skipped: {reason}\n").as_bytes()).unwrap();
    }

    /// What an expansion needs is a batch of views, with what regions add to them: each refused size is one that fits but for
    /// one thing.
    #[test]
    fn batches_of_windows_beyond_memory() {
        let (model, size) = (tiny(), (2048, 2048));
        let style = |side: i64| References::style(Tensor::zeros([1, 4, side, side], (Kind::Float, Device::Cpu)));
        let labels = || LabelMap::new(&Tensor::zeros([1, 1, 4, 4], (Kind::Int64, Device::Cpu))).unwrap();
        // Of these there are 37 249, of 75 MiB of activations each, so that a batch can be too large for nearly any machine. One with the
        // picture takes .3 GiB, and .4 with the bias of 64x64 tokens for as many of a style: that has to be free.
        let windows = Windows::new(64, 1);
        model.check_windows(&windows.with_batch(1), size, &style(512)).unwrap();
        model.check_windows(&windows.with_batch(usize::MAX), (512, 512), &style(64)).unwrap();
        model.check_windows(&windows.with_batch(1), size, &style(64).with_labels(labels())).unwrap();
        match memory_gib() {
            // The bias for 512x512 tokens of a style is 8 GiB.
            Some(gib) if gib < 2000 => {
                for (batch, references) in [(gib * 1024 / 75 + 1, style(64)), (gib / 8 + 1, style(512).with_labels(labels()))] {
                    let batch = usize::try_from(batch).unwrap();
                    let error = model.check_windows(&windows.with_batch(batch), size, &references).unwrap_err();
                    assert!(matches!(error, Error::Memory { .. }), "{error:?}");
                    let error = error.to_string();
                    for words in ["2048x2048", &format!("batches of {batch} windows"), "GiB", "smaller batches"] {
                        assert!(error.contains(words), "{error}");
                    }
                }
            }
            Some(gib) => skipped(&format!("{gib} GiB hold all the windows at once")),
            None => {}
        }
        assert!(model.check_windows(&Windows::new(0, 1), size, &style(64)).is_err());
        assert!(model.check_windows(&windows, (7, 64), &style(64)).is_err());
    }

    /// Sizes that a little more memory than the machine has would hold: to the bundled model's network a pixel is 3600 bytes.
    #[test]
    fn beyond_memory() {
        let mut model = open("assets/mini");
        if let Some(gib) = memory_gib() {
            // 37 rows of 8192 pixels are more than 1 GiB, and five pictures of 512x512 more than 4.
            let rows = (gib * 37 + 3) / 4 * 4;
            if rows <= 32_768 {
                let message = refused(&model, (8192, rows));
                assert!(matches!(model.fit((8192, rows)), Err(Error::Memory { .. })), "{message}");
                assert!(message.contains("memory") && message.contains("GiB"), "{message}");
                assert!(message.contains("smaller"), "what to do: {message}");
                assert!(refused(&model, (rows, 8192)).contains("memory"));
            } else {
                skipped(&format!("{gib} GiB hold any picture that is not absurd"));
            }
            let pictures = gib * 5 / 4 + 1;
            let many = model.noise(pictures, (512, 512), &mut Noise::seeded(0)).unwrap_err().to_string();
            assert!(many.contains(&format!("{pictures} pictures of 512x512 at once")) && many.contains("fewer"), "{many}");
            // A third of it with checkpointing, which is what the message advises unless it is on.
            assert!(many.contains("--low-memory"), "{many}");
            let needed = |model: &StableDiffusion| match model.noise(1 << 30, (512, 512), &mut Noise::seeded(0)) {
                Err(Error::Memory { needed, free, advice, .. }) => (needed, free, advice),
                other => panic!("{other:?}"),
            };
            let (all, free, _) = needed(&model);
            model.set_gradient_checkpointing(true);
            let (fewer, _, advice) = needed(&model);
            assert!(free < all && all == 3 * fewer && !advice.contains("--low-memory"), "{all} {fewer} {advice}");
        }
        // Small ones go through in any case.
        assert_eq!(model.fit((256, 256)).unwrap(), (256, 256));
    }

    #[test]
    fn noise_of_no_pictures() {
        for batch in [0, -1, i64::MIN] {
            let error = tiny().noise(batch, (64, 64), &mut Noise::seeded(0)).unwrap_err();
            assert!(matches!(error, Error::Argument { argument: "batch", .. }), "{error:?}");
            assert!(error.to_string().contains(&batch.to_string()), "{error}");
        }
    }
}
