//! Tells this crate's own examples, tests and benches where libtorch lies, so that they start without LD_LIBRARY_PATH, and
//! makes the parts in C++ of the features `fused-attention` and `cuda-graphs`.

#[cfg(feature = "cuda-graphs")]
mod cuda_graphs;
#[cfg(feature = "fused-attention")]
mod fused_attention;

#[cfg(any(feature = "cuda-graphs", feature = "fused-attention"))]
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rustc-check-cfg=cfg(fused_attention)");
    // Set by torch-sys, which found (or fetched) libtorch.
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let unix = std::env::var("CARGO_CFG_TARGET_FAMILY").is_ok_and(|family| family == "unix");
    let libtorch = std::env::var("DEP_TCH_LIBTORCH_LIB").ok();
    if let (true, Some(folder)) = (unix, &libtorch) {
        // Not by `-Wl`, which would cut a path at its commas.
        for argument in ["-Xlinker", "-rpath", "-Xlinker", folder] {
            println!("cargo:rustc-link-arg={argument}");
        }
        #[cfg(feature = "fused-attention")]
        fused_attention::build(Path::new(folder));
    }
    #[cfg(feature = "cuda-graphs")]
    cuda_graphs::build(libtorch.as_deref());
}

/// Folders of libtorch's headers, where torch-sys finds them.
#[cfg(any(feature = "cuda-graphs", feature = "fused-attention"))]
fn torch_includes(lib: &Path) -> Vec<PathBuf> {
    let named = ["LIBTORCH_INCLUDE", "LIBTORCH"].into_iter().filter(|_| !of_python()).find_map(|name| {
        println!("cargo:rerun-if-env-changed={name}");
        std::env::var_os(name).map(PathBuf::from)
    });
    let root = named.or_else(|| lib.parent().map(Path::to_owned)).unwrap_or_default();
    let folders = ["include", "include/torch/csrc/api/include"].map(|folder| root.join(folder));
    // The compiler looks there by itself, and must do so after its own.
    folders.into_iter().filter(|folder| folder != Path::new("/usr/include")).collect()
}

/// For which of C++'s two ABIs libtorch was built, as torch-sys has it.
#[cfg(any(feature = "cuda-graphs", feature = "fused-attention"))]
fn cxx11_abi() -> String {
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    std::env::var("LIBTORCH_CXX11_ABI").ok().filter(|_| !of_python()).unwrap_or_else(|| "1".into())
}

/// Whether libtorch is that of a Python, whose folders and ABI no variable names.
#[cfg(any(feature = "cuda-graphs", feature = "fused-attention"))]
fn of_python() -> bool {
    println!("cargo:rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    std::env::var_os("LIBTORCH_USE_PYTORCH").is_some()
}
