//! A texture expanded to any size: MultiDiffusion, each window held to the texture.
//!
//! `cargo run --release --example texture_expansion -- --style texture.jpg --size 1536x512`

mod common;

use attention_distillation::stable_diffusion::{Tiles, Tiling};
use attention_distillation::{image, tch::Kind, tch::Tensor, GuidedSampler, Noise, Result, Settings, Task, Windows};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};

/// Makes a texture of any size, in overlapping windows; memory is that of a few windows, however large it gets.
#[derive(Debug, Parser)]
struct Flags {
    /// The texture to expand; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    style: Vec<PathBuf>,
    /// Side of the windows, in latents (of 8 pixels each, of the bundled model 4); default: the size that the network was trained for
    #[arg(long, value_name = "N")]
    window: Option<i64>,
    /// From one window to the next, in latents: the smaller, the smoother and slower
    #[arg(long, value_name = "N", default_value_t = Windows::default().stride)]
    stride: i64,
    /// Windows in one pass of the network
    #[arg(long, value_name = "N", default_value_t = Windows::default().batch)]
    view_batch: usize,
    /// Draw fresh noise for the style in each batch of windows, the authors' way, and not once in each step
    #[arg(long)]
    reference_per_batch: bool,
    /// Which borders of the result meet without a seam; the sheet then shows it laid 2x2
    #[arg(long, alias = "seamless", value_enum, default_value_t = common::Tile::None)]
    tile: common::Tile,
    #[command(flatten)]
    regions: common::RegionFlags,
    #[command(flatten)]
    graphs: common::GraphFlags,
    #[command(flatten)]
    shared: common::Shared,
}

fn main() -> ExitCode {
    common::begin();
    common::report(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let shared = &flags.shared;
    shared.over(Settings::texture_expansion())?;
    let windows = |size| Windows::new(size, flags.stride).with_batch(flags.view_batch).with_reference_per_batch(flags.reference_per_batch);
    // A window that only the model knows is looked at below; here at what no window would do for.
    windows(flags.window.unwrap_or(flags.stride.max(Windows::default().size))).check()?;
    let files = common::files(shared, 1);
    common::check_outputs(shared, &files, flags.style.iter().chain(flags.regions.files()))?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;
    let regions = flags.regions.load(styles.len())?;
    shared.warn_without_content(false, "an expansion has no content, only regions");

    let mut model = common::open_without_text(shared)?;
    model.set_seamless(flags.tile.seamless());
    let trained = model.unet().sample_size().map_or(Windows::default().size, |(height, width)| height.min(width));
    let windows = windows(flags.window.unwrap_or(trained));
    windows.check()?;
    // Decoding, too, is to need the memory of a window, not of the canvas.
    let tile = windows.size.max(64);
    model.set_tiling(Tiling::Always(Tiles { size: tile, overlap: tile / 2 }))?;
    let settings = shared.over(model.settings(Task::TextureExpansion))?;
    // The canvas may be larger than what the network could take at once; a window may not.
    let size = model.vae().fit(match (&regions, shared.size) {
        (Some(regions), None) => regions.target.size()?,
        _ => settings.size.unwrap_or((512, 512)),
    })?;
    let factor = model.vae().factor();
    let side = windows.size.saturating_mul(factor);
    let window = model.fit((side.min(size.0), side.min(size.1)))?;
    let styles = common::scaled_to_area(&model, &styles, window)?;
    let mut references = common::references(&model, &styles, None)?;
    if let Some(regions) = &regions {
        references = regions.of(references, model.device())?;
    }
    model.check_windows(&windows, size, &references)?;

    let extractor = common::extractor(&model, &settings, size)?;
    let mut noise = Noise::seeded(shared.seed);
    let canvas = [1, model.unet().in_channels(), size.0 / factor, size.1 / factor];
    let start = noise.draw(&Tensor::f_zeros(canvas, (Kind::Float, model.device()))?)?;
    let guidance = model.guidance(&[""], None, settings.guidance, size)?;
    let run = GuidedSampler::new(extractor, model.ddim(settings.steps)?, guidance, references, start, noise);
    let run = run.with_settings(&settings)?.with_windows(windows);
    let (picture, _) = flags.graphs.follow(run, &model, shared, &files)?;
    common::save(&picture, &files)?;
    let inputs = styles.iter().map(|input| flags.tile.beside(input)).collect::<Result<Vec<_>>>()?;
    common::sheet(shared, &inputs.iter().collect::<Vec<_>>(), &[flags.tile.shown(picture)?])?;
    Ok(files)
}
