//! New textures like a given one; with masks, in a layout of one's own.
//!
//! `cargo run --release --example texture_synthesis -- --style texture.jpg --method sample`

mod common;

use attention_distillation::{image, tch::Tensor, Distiller, GuidedSampler, Noise, Result, Task};
use clap::{Parser, ValueEnum};
use std::{path::PathBuf, process::ExitCode};

/// Makes textures like one or several others, from noise; with masks, from a layout filled with their pixels.
#[derive(Debug, Parser)]
struct Flags {
    /// A texture to be like; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    style: Vec<PathBuf>,
    /// Optimise latents, or sample
    #[arg(long, value_enum, default_value_t = Method::Optimise)]
    method: Method,
    /// Pictures to make at once
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    count: u16,
    /// Which borders of the result meet without a seam, best where a side is a multiple of what the network's deepest layer sees as
    /// one place, 64 pixels in Stable Diffusion 1.5; the sheet then shows it laid 2x2
    #[arg(long, value_enum, default_value_t = common::Tile::None)]
    tile: common::Tile,
    /// With masks: start from noise and hold no content, instead of filling the target from the styles' regions
    #[arg(long, requires = "target_mask")]
    no_fill: bool,
    #[command(flatten)]
    regions: common::RegionFlags,
    #[command(flatten)]
    graphs: common::GraphFlags,
    #[command(flatten)]
    shared: common::Shared,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Method {
    Optimise,
    Sample,
}

fn main() -> ExitCode {
    common::begin();
    common::report(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let shared = &flags.shared;
    shared.over(flags.task().settings())?;
    let files = common::files(shared, flags.count.into());
    common::check_outputs(shared, &files, flags.style.iter().chain(flags.regions.files()))?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;
    let regions = flags.regions.load(styles.len())?;
    let filled = regions.is_some() && !flags.no_fill;
    shared.warn_without_content(filled, "give masks, without --no-fill: what they are filled to is the content");

    let mut model = common::open_without_text(shared)?;
    model.set_seamless(flags.tile.seamless());
    let mut settings = model.settings(flags.task());
    if filled && settings.content_weight == 0.0 {
        // What a texture from noise has no use for, a layout needs.
        settings.content_weight = model.settings(flags.transfer()).content_weight;
    }
    let settings = shared.over(settings)?;
    // The layout's own size, unless a flag says otherwise.
    let size = match (&regions, shared.size) {
        (Some(regions), None) => model.fit(regions.target.size()?)?,
        _ => common::output_size(&model, shared, &settings, None)?,
    };
    flags.tile.warn(size, model.vae().factor() * model.unet().factor());
    let styles = common::scaled_to_area(&model, &styles, size)?;
    let mut references = common::references(&model, &styles, None)?;
    // Also says whether so many pictures can be made at once, before any is filled.
    let mut noise = Noise::seeded(shared.seed);
    let start = model.noise(flags.count.into(), size, &mut noise)?;
    let mut layout = None;
    if let Some(regions) = &regions {
        if filled {
            // Each picture's layout has pixels of its own.
            let seeds = (0..flags.count).map(|i| shared.seed.wrapping_add(i.into()));
            let pictures = seeds.map(|seed| regions.filled(&styles, size, seed)).collect::<Result<Vec<_>>>()?;
            let pictures = Tensor::f_cat(&pictures, 0)?;
            references.content = Some(model.encode(&pictures)?);
            layout = Some(pictures);
        }
        references = regions.of(references, model.device())?;
    }

    let extractor = common::extractor(&model, &settings, size)?;
    let (pictures, _) = if flags.method == Method::Sample {
        let guidance = model.guidance(&[""], None, settings.guidance, size)?;
        let filled = references.content.as_ref().map(Tensor::shallow_clone);
        let run = GuidedSampler::new(extractor, model.ddim(settings.steps)?, guidance, references, start, noise);
        let mut run = run.with_settings(&settings)?;
        if let Some(filled) = filled {
            // The layout under as much noise as sampling begins with.
            run = run.edited(&filled, 1.0)?;
        }
        flags.graphs.follow(run, &model, shared, &files)?
    } else {
        let timesteps = model.timesteps(settings.steps)?;
        let run = match &references.content {
            Some(_) => Distiller::style_transfer(extractor, timesteps, references, settings.content_weight)?,
            None => Distiller::new(extractor, timesteps, references, start),
        };
        flags.graphs.follow(run.with_settings(&settings)?, &model, shared, &files)?
    };
    common::save(&pictures, &files)?;
    let inputs = styles.iter().chain(&layout).map(|input| flags.tile.beside(input)).collect::<Result<Vec<_>>>()?;
    common::sheet(shared, &inputs.iter().collect::<Vec<_>>(), &[flags.tile.shown(pictures)?])?;
    Ok(files)
}

impl Flags {
    /// Whose content weight a filled layout has.
    fn transfer(&self) -> Task {
        match self.method {
            Method::Optimise => Task::StyleTransfer,
            Method::Sample => Task::StyleTransferBySampling,
        }
    }

    fn task(&self) -> Task {
        match self.method {
            Method::Optimise => Task::TextureSynthesis,
            Method::Sample => Task::TextureBySampling,
        }
    }
}
