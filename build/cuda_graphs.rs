//! The library that `src/cuda_graphs/shim.rs` takes in.

use crate::{cxx11_abi, torch_includes};
use std::path::{Path, PathBuf};
use std::{env, fs};

const SOURCE: &str = "src/cuda_graphs/shim.cpp";
/// Of NVIDIA's, those that libtorch's headers include.
const HEADERS: [&str; 2] = ["cuda_runtime_api.h", "crt/host_defines.h"];
const ADVICE: &str = "install a CUDA toolkit 12 or 13 and set CUDA_HOME to it, or put the headers of the Python packages \
    nvidia-cuda-runtime and nvidia-cuda-crt into nvidia/cu13/include beside libtorch; then `cargo clean -p attention_distillation` and build again";

/// Two files: the library, and why there is none. Where it cannot be made the crate is built without, and says so when it
/// is asked for graphs.
pub fn build(libtorch: Option<&str>) {
    println!("cargo:rerun-if-changed={SOURCE}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out.join("cuda_graphs.so");
    let reason = compile(libtorch, &library).err().unwrap_or_default();
    if !reason.is_empty() {
        // An older one may be there.
        fs::write(&library, []).expect("OUT_DIR can be written to");
        println!("cargo:warning=feature cuda-graphs: {reason}");
    }
    fs::write(out.join("cuda_graphs.txt"), reason).expect("OUT_DIR can be written to");
}

fn compile(libtorch: Option<&str>, library: &Path) -> Result<(), String> {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Err("it is for Linux alone".into());
    }
    let libtorch = libtorch.ok_or("libtorch was not found (feature doc-only)")?;
    let includes = torch_includes(Path::new(libtorch));
    let cuda = cuda_include(Path::new(libtorch))?;
    let abi = cxx11_abi();
    let compiler = cc::Build::new().cpp(true).pic(true).warnings(false).opt_level(2).debug(false).try_get_compiler();
    let mut command = compiler.map_err(|error| format!("no C++ compiler: {error}"))?.to_command();
    command.args(["-std=c++17", "-shared", "-fvisibility-inlines-hidden", &format!("-D_GLIBCXX_USE_CXX11_ABI={abi}"), "-DGLOG_USE_GLOG_EXPORT"]);
    // Their warnings are not ours.
    includes.iter().chain([&cuda]).for_each(|folder| {
        command.arg("-isystem").arg(folder);
    });
    command.arg(SOURCE).arg("-o").arg(library);
    let output = command.output().map_err(|error| format!("the C++ compiler could not be started: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let first = words.lines().find(|line| line.contains("error")).unwrap_or("it says nothing").to_owned();
    Err(format!("{SOURCE} does not compile with the headers of {} and {}: {first}", libtorch, cuda.display()))
}

/// Of the toolkit that the environment names, of pip's packages beside libtorch, or of the system's toolkit.
fn cuda_include(lib: &Path) -> Result<PathBuf, String> {
    let mut folders = vec![];
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
        folders.extend(env::var_os(name).filter(|value| !value.is_empty()).map(|value| PathBuf::from(value).join("include")));
    }
    if let Some(packages) = lib.parent().and_then(Path::parent) {
        folders.extend(["cu13", "cuda_runtime"].map(|name| packages.join("nvidia").join(name).join("include")));
    }
    folders.push("/usr/local/cuda/include".into());
    // One that is not there would have this script run each time.
    folders.iter().filter(|folder| folder.is_dir()).for_each(|folder| println!("cargo:rerun-if-changed={}", folder.display()));
    let found = folders.iter().find(|folder| HEADERS.iter().all(|header| folder.join(header).is_file()));
    found.cloned().ok_or_else(|| {
        let looked = folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ");
        format!("{} and {} are not both in any of {looked}; {ADVICE}", HEADERS[0], HEADERS[1])
    })
}
