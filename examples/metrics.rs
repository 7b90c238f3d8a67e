//! How near a result is to its style and to its content, in numbers.
//!
//! `cargo run --release --example metrics -- --result out.png --style painting.jpg --content photo.jpg`

use attention_distillation::metrics::{self, PatchConfig};
use attention_distillation::{device, image, tch::Tensor, Error, LabelMap, Result};
use clap::Parser;
use std::{io::Write, path::PathBuf, process::ExitCode};

/// Prints a line `name value` for each metric of a result; distances are in picture values, 0 to 1. A region's is named by its colour.
#[derive(Debug, Parser)]
struct Flags {
    /// The picture to judge
    #[arg(long, value_name = "FILE")]
    result: PathBuf,
    /// A picture whose texture and colours it should have; may be given several times, then names begin with style_0_, style_1_
    #[arg(long, value_name = "FILE", required = true)]
    style: Vec<PathBuf>,
    /// The picture whose layout it should have; scaled to the result's size
    #[arg(long, value_name = "FILE")]
    content: Option<PathBuf>,
    /// Scale each style to about the result's area, nearly as style_transfer has scaled it; without it, pixels are compared as they are
    #[arg(long)]
    fit_styles: bool,
    /// The result's regions, painted in a PNG that lies over the whole of it: each colour is a label
    #[arg(long, value_name = "FILE", alias = "result-labels", requires = "style_mask")]
    target_mask: Option<PathBuf>,
    /// The same for each style, in their order
    #[arg(long, value_name = "FILE", alias = "style-labels", requires = "target_mask")]
    style_mask: Vec<PathBuf>,
    /// The same seed gives the same numbers
    #[arg(long, value_name = "N", default_value_t = PatchConfig::default().seed)]
    seed: u64,
    /// cpu, cuda or cuda:N; default: CUDA where there is a working one, else the CPU
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

fn main() -> ExitCode {
    match run(&Flags::parse()) {
        // `println!` would panic where the reader has gone, as `head` does.
        Ok(values) => match values.iter().try_for_each(|(name, value)| writeln!(std::io::stdout(), "{name} {value}")) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            // libtorch's messages may have several lines.
            let _ = writeln!(std::io::stderr(), "error: {}", error.to_string().split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<Vec<(String, String)>> {
    let device = flags.device.as_deref().map_or_else(|| Ok(device::best()), device::parse)?;
    if flags.target_mask.is_some() && flags.style_mask.len() != flags.style.len() {
        let reason = format!("{} are given for {} styles; give one for each, in their order", flags.style_mask.len(), flags.style.len());
        return Err(Error::Argument { argument: "style masks", reason });
    }
    let result = image::load(&flags.result)?.f_to_device(device)?;
    let (height, width) = image::size(&result)?;
    let content = flags.content.as_ref().map(image::load).transpose()?;
    let style = |file| -> Result<Tensor> {
        let style = image::load(file)?;
        let size = image::size(&style)?;
        image::resize(&style, if flags.fit_styles { image::size_of_area(size, height * width, 1)? } else { size })
    };
    let styles = flags.style.iter().map(style).collect::<Result<Vec<_>>>()?;
    let target = flags.target_mask.as_ref().map(labels).transpose()?;
    let masks = flags.style_mask.iter().map(labels).collect::<Result<Vec<_>>>()?;

    let mut config = PatchConfig::default();
    config.seed = flags.seed;
    let mut values = vec![];
    for (i, style) in styles.iter().enumerate() {
        let prefix = if styles.len() > 1 { format!("style_{i}_") } else { String::new() };
        let mut show = |name: &str, value: f64| values.push((format!("{prefix}{name}"), format!("{value:.4}")));
        let distance = metrics::patch_distance(&result, style, &config)?;
        show("patch_distance", distance.mean);
        for (scale, value) in distance.scales.iter().enumerate() {
            show(&format!("patch_distance_scale_{scale}"), *value);
        }
        show("colour_distance", metrics::colour_distance(&result, style, flags.seed)?);
        if let (Some(ours), Some(theirs)) = (&target, masks.get(i)) {
            for (label, distance) in metrics::patch_distance_by_region((&result, ours), (style, theirs), &config)? {
                show(&format!("patch_distance_label_{}", ours.name(label)), distance.mean);
            }
            for (label, distance) in metrics::colour_distance_by_region((&result, ours), (style, theirs), flags.seed)? {
                show(&format!("colour_distance_label_{}", ours.name(label)), distance);
            }
        }
    }
    if let Some(content) = content {
        let content = image::resize(&content, (height, width))?;
        values.push(("ms_ssim".into(), format!("{:.4}", metrics::ms_ssim(&result, &content)?)));
        values.push(("psnr".into(), format!("{:.2}", metrics::psnr(&result, &content)?)));
    }
    let seam = metrics::seam_ratio(&result)?;
    values.extend([("seam_ratio_x", seam.x), ("seam_ratio_y", seam.y)].map(|(name, ratio)| (name.into(), format!("{ratio:.2}"))));
    Ok(values)
}

fn labels(file: &PathBuf) -> Result<LabelMap> {
    LabelMap::from_picture(&image::load(file)?).map_err(|error| Error::Image { path: file.clone(), reason: error.to_string() })
}
