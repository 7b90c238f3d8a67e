//! How much memory a benchmark takes, where the system tells.

use attention_distillation::tch::Device;
use criterion::{measurement::WallTime, Bencher, BenchmarkGroup, Criterion};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::{env, fs};

/// Of the benchmarks so far, in KiB: each begins to count anew.
static PEAK: AtomicU64 = AtomicU64::new(0);

/// Whether there was any: a list of them is not to have other lines.
static RAN: AtomicBool = AtomicBool::new(false);

/// A benchmark of the group, after which the peak of the process's memory in it is printed, and where memory stood before: with
/// models and pictures, so that the difference is what the procedure takes.
///
/// On a GPU that is followed by what its driver says is in use, by all programs. libtorch gives nothing back to the driver, so that
/// is the peak since this program began: to learn a benchmark's own, run it alone (`cargo bench -- NAME`).
pub fn bench(group: &mut BenchmarkGroup<'_, WallTime>, device: Device, name: &str, mut f: impl FnMut(&mut Bencher<'_>)) {
    release();
    let before = (begin_anew(), resident("VmRSS:"), on_gpu(device));
    let mut ran = false;
    group.bench_function(name, |b| {
        ran = true;
        f(b);
    });
    // A filter may have left it out.
    if !ran {
        return;
    }
    RAN.store(true, Relaxed);
    if let (true, Some(before), Some(peak)) = (before.0, before.1, resident("VmHWM:")) {
        PEAK.fetch_max(peak, Relaxed);
        println!("peak memory of \"{name}\": {} MiB ({} MiB before)", peak >> 10, before >> 10);
    }
    if let (Some(before), Some(after)) = (before.2, on_gpu(device)) {
        println!("GPU memory in use after \"{name}\": {after} MiB ({before} MiB before)");
    }
}

/// Last of a program's targets: the peak of the whole process.
pub fn peak(_: &mut Criterion) {
    if let (true, Some(now)) = (RAN.load(Relaxed), resident("VmHWM:")) {
        println!("peak memory of the process: {} MiB", PEAK.load(Relaxed).max(now) >> 10);
    }
}

/// Has the allocator give back to the system what is free, or a benchmark would inherit the peak of those before it. glibc's alone
/// needs to be told and can be.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn release() {
    use libloading::os::unix::{Library, Symbol};
    type Trim = unsafe extern "C" fn(usize) -> i32;
    // SAFETY: the type is that of glibc's function, which may be called at any time; other C libraries have none of that name.
    unsafe {
        let trim: Result<Symbol<Trim>, _> = Library::this().get(b"malloc_trim\0");
        trim.map(|trim| trim(0)).ok();
    }
}

#[cfg(not(target_os = "linux"))]
fn release() {}

/// Sets the process's peak back to what it holds now; whether that worked. Linux has a file for it.
fn begin_anew() -> bool {
    if let Some(peak) = resident("VmHWM:") {
        PEAK.fetch_max(peak, Relaxed);
    }
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// A line of Linux's account of this process, in KiB.
fn resident(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// In MiB.
fn on_gpu(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return None };
    // Where some GPUs are hidden, CUDA counts the others from 0.
    let visible = env::var("CUDA_VISIBLE_DEVICES").ok().and_then(|list| list.split(',').nth(index).map(|id| id.trim().to_owned()));
    let id = visible.filter(|id| !id.is_empty()).unwrap_or_else(|| index.to_string());
    let output = Command::new("nvidia-smi").args(["--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id", &id]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}
