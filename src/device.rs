//! Finding CUDA at run time.
//!
//! Programs that link libtorch_cuda cannot start where there is only a CPU libtorch, and those that do not link it
//! never see a GPU: `tch::Device::cuda_if_available()` then says CPU. Here the library is opened when it is asked
//! for, which registers CUDA with libtorch; no linker flag is needed, in programs that depend on this crate neither.
//!
//! Ask before all else that is done with tch, by one call of [`best`], or of [`parse`] with the name of a GPU: libtorch looks for CUDA
//! only once, where a seed is set, where GPUs are counted, and at the first backward pass.
//!
//! # cuDNN's attention
//! With CUDA found, and at the latest before attention on a GPU, libtorch is told for the whole process to leave cuDNN's kernels of attention alone: in
//! libtorch 2.11, which prefers them on H100 and H200, their gradients in bf16 and f16 are wrong wherever the gradient of an output has another layout than the
//! output. Attention then is libtorch's own (flash attention), in networks of your own as well.

use crate::{Error, Result};
use std::{path::PathBuf, sync::OnceLock};
use tch::{Device, Kind};

/// The first GPU where there is a working one, else the CPU.
pub fn best() -> Device {
    match cuda() {
        Ok(count) if count > 0 => Device::Cuda(0),
        Ok(_) => Device::Cpu,
        Err(reason) => {
            tracing::debug!(reason, "no CUDA");
            Device::Cpu
        }
    }
}

/// `cpu`, `cuda` (the first GPU) or `cuda:N`.
///
/// # Errors
/// [`Error::Device`] for another word, or where there is no such GPU: it says what is missing.
pub fn parse(name: &str) -> Result<Device> {
    let refuse = |reason: String| Error::Device { device: name.to_owned(), reason };
    let index = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => 0,
        Some(("cuda", digits)) => digits.parse::<usize>().map_err(|_| refuse("the part after `cuda:` is not a number".into()))?,
        _ => return Err(refuse("is unknown; use cpu, cuda or cuda:N".into())),
    };
    match cuda() {
        Ok(0) => Err(refuse("libtorch sees no GPU; is the NVIDIA driver installed?".into())),
        Ok(count) if index >= count => Err(refuse(format!("there are {count} GPUs, counted from 0"))),
        Ok(_) => Ok(Device::Cuda(index)),
        Err(reason) => Err(refuse(format!(
            "CUDA cannot be used: {reason}; use the CPU (in the examples --device cpu), or a libtorch built for CUDA (see the README)"
        ))),
    }
}

/// Whether a network can be opened there and in that precision.
#[cfg(feature = "stable-diffusion")]
pub(crate) fn check(device: Device, kind: Kind) -> Result<()> {
    if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
        return Err(Error::argument("kind", format!("{kind:?} is not what networks compute in; use Float, BFloat16 or Half (or Double)")));
    }
    match device {
        Device::Cuda(index) => parse(&format!("cuda:{index}")).map(drop),
        _ => Ok(()),
    }
}

/// `f32`, `bf16` or `f16`.
///
/// # Errors
/// [`Error::Argument`] for another word.
pub fn parse_kind(name: &str) -> Result<Kind> {
    match name {
        "f32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        "f16" => Ok(Kind::Half),
        other => Err(Error::argument("dtype", format!("`{other}` is unknown; use f32, bf16 or f16"))),
    }
}

/// What networks run in there: bf16 on a GPU, f32 on the CPU.
pub fn kind(device: Device) -> Kind {
    if device.is_cuda() {
        Kind::BFloat16
    } else {
        Kind::Float
    }
}

/// How many GPUs libtorch sees, or why it cannot use CUDA. The library is opened once per process.
fn cuda() -> std::result::Result<usize, &'static str> {
    static COUNT: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    COUNT.get_or_init(open_cuda).as_ref().copied().map_err(String::as_str)
}

fn open_cuda() -> std::result::Result<usize, String> {
    // Before libtorch is asked for CUDA at all: it looks for it once, and what it then does not find is never there. Where the library is
    // open already, this only makes its symbols visible to all: the C++ part of CUDA graphs needs them so also where a host such as
    // Python opened it for itself alone.
    let opened = open_library();
    // Counting devices throws where CUDA is not registered.
    if !tch::utils::has_cudart() {
        opened?;
        tracing::warn!("CUDA is there, but libtorch was asked for it before it was opened, and does not see it");
        return Err("libtorch_cuda was opened too late: something asked libtorch for CUDA before, which it looks for once; call `device::best` or \
            `device::parse` before anything of tch that asks for GPUs, such as `tch::Cuda` or `tch::manual_seed`"
            .into());
    }
    crate::attention::without_cudnn();
    Ok(usize::try_from(tch::Cuda::device_count()).unwrap_or(0))
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn open_library() -> std::result::Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let mut reasons = vec![];
    for path in candidates() {
        // SAFETY: opening runs the library's initialisers; libtorch's register its operators, which is what is wanted.
        match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                // Its operators stay registered for good, so it must never be closed.
                std::mem::forget(library);
                return Ok(());
            }
            Err(error) => reasons.push(with_causes(&error)),
        }
    }
    // The last attempt names the very file beside libtorch_cpu, so its reason says most.
    Err(reasons.pop().unwrap_or_else(|| "no libtorch_cuda.so".into()))
}

/// The loader's own words, which name what is missing, are the cause of libloading's.
#[cfg(unix)]
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(not(unix))]
fn open_library() -> std::result::Result<(), String> {
    Err("opening CUDA at run time works on Unix only; link libtorch_cuda".into())
}

/// By its name, as the loader searches; then beside the libtorch_cpu that this process runs on.
#[cfg(unix)]
fn candidates() -> Vec<PathBuf> {
    [PathBuf::from("libtorch_cuda.so")].into_iter().chain(beside_libtorch_cpu("libtorch_cuda.so")).collect()
}

/// The file of this name in the folder of the libtorch_cpu that this process runs on.
#[cfg(unix)]
pub(crate) fn beside_libtorch_cpu(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| line.find('/').and_then(|start| line.get(start..)));
    let cpu = paths.find(|path| path.ends_with("/libtorch_cpu.so"))?;
    Some(std::path::Path::new(cpu).with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_refused() {
        assert_eq!(parse("cpu").ok(), Some(Device::Cpu));
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA"] {
            assert!(matches!(parse(bad), Err(Error::Device { .. })), "{bad}");
        }
        assert!(matches!(parse("cuda:4095"), Err(Error::Device { .. })));
        assert_eq!(parse_kind("bf16").ok(), Some(Kind::BFloat16));
        assert!(parse_kind("float").is_err());
    }

    #[test]
    fn the_best_device_works() {
        let device = best();
        assert!(tch::Tensor::f_zeros([2], (kind(device), device)).is_ok());
        if device == Device::Cpu {
            let reason = parse("cuda").err().map(|error| error.to_string());
            assert!(reason.is_some_and(|r| r.contains("libtorch") || r.contains("CUDA")), "an absent GPU is explained");
        }
    }
}
