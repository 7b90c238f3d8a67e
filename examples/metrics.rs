//! How near a result is to its style and to its content, in numbers.
//!
//! `cargo run --release --example metrics -- --result out.png --style painting.jpg --content photo.jpg`

use attention_distillation::metrics::{self, PatchConfig};
use attention_distillation::{device, image, tch, Error, Result};
use clap::Parser;
use std::{io::Write, path::PathBuf, process::ExitCode};
use tch::{Kind, Tensor};

/// Prints a line `name value` for each metric of a result; distances are in picture values, 0 to 1.
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
    /// Scale each style to about the result's area, as style_transfer has done; without it, pixels are compared as they are
    #[arg(long)]
    fit_styles: bool,
    /// Its regions, painted in a PNG that lies over the whole of it: a grey value or a colour is a label
    #[arg(long, value_name = "FILE", requires = "style_labels")]
    result_labels: Option<PathBuf>,
    /// The same for each style, in their order
    #[arg(long, value_name = "FILE", requires = "result_labels")]
    style_labels: Vec<PathBuf>,
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
        Ok(values) => match values.iter().try_for_each(|(name, value)| writeln!(std::io::stdout(), "{name} {value:.6}")) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            // libtorch's messages may have several lines.
            eprintln!("error: {}", error.to_string().split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<Vec<(String, f64)>> {
    let device = flags.device.as_deref().map_or_else(|| Ok(device::best()), device::parse)?;
    if flags.result_labels.is_some() && flags.style_labels.len() != flags.style.len() {
        let reason = format!("{} for {} styles; give one for each", flags.style_labels.len(), flags.style.len());
        return Err(Error::Argument { argument: "--style-labels", reason });
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
    let result_labels = flags.result_labels.as_ref().map(|file| labels(file, &result)).transpose()?;
    let style_labels = flags.style_labels.iter().zip(&styles).map(|(file, style)| labels(file, style)).collect::<Result<Vec<_>>>()?;

    let mut config = PatchConfig::default();
    config.seed = flags.seed;
    let mut values = vec![];
    for (i, style) in styles.iter().enumerate() {
        let prefix = if styles.len() > 1 { format!("style_{i}_") } else { String::new() };
        let mut show = |name: &str, value: f64| values.push((format!("{prefix}{name}"), value));
        let distance = metrics::patch_distance(&result, style, &config)?;
        show("patch_distance", distance.mean);
        for (scale, value) in distance.scales.iter().enumerate() {
            show(&format!("patch_distance_scale_{scale}"), *value);
        }
        show("colour_distance", metrics::colour_distance(&result, style, flags.seed)?);
        if let (Some(ours), Some(theirs)) = (&result_labels, style_labels.get(i)) {
            for (label, distance) in metrics::patch_distance_by_region((&result, ours), (style, theirs), &config)? {
                show(&format!("patch_distance_label_{label}"), distance.mean);
            }
            for (label, distance) in metrics::colour_distance_by_region((&result, ours), (style, theirs), flags.seed)? {
                show(&format!("colour_distance_label_{label}"), distance);
            }
        }
    }
    if let Some(content) = content {
        let content = image::resize(&content, (height, width))?;
        values.push(("ms_ssim".into(), metrics::ms_ssim(&result, &content)?));
        values.push(("psnr".into(), metrics::psnr(&result, &content)?));
    }
    let seam = metrics::seam_ratio(&result)?;
    values.extend([("seam_ratio_x".into(), seam.x), ("seam_ratio_y".into(), seam.y)]);
    Ok(values)
}

/// The label of a grey pixel is its value, 0 to 255, that of another is `0x1RRGGBB`, which no grey has. A map of another size
/// than its picture is scaled by nearest neighbour.
fn labels(file: &PathBuf, of: &Tensor) -> Result<Tensor> {
    let picture = image::load(file)?;
    let (height, width) = image::size(&picture)?;
    let label = |pixel: &[u8]| match *pixel {
        [r, g, b] if r != g || g != b => f64::from(u32::from_be_bytes([1, r, g, b])),
        [grey, ..] => f64::from(grey),
        [] => 0.0,
    };
    let pixels = image::to_rgb8(&picture)?.into_raw_vec_and_offset().0;
    let labels: Vec<f64> = pixels.chunks_exact(3).map(label).collect();
    let (to_height, to_width) = image::size(of)?;
    let labels = Tensor::f_from_slice(&labels)?.f_view([1, 1, height, width])?.f_upsample_nearest2d([to_height, to_width], None, None)?;
    Ok(labels.f_to_kind(Kind::Int64)?)
}
