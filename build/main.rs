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
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
        #[cfg(feature = "fused-attention")]
        fused_attention::build(Path::new(folder));
    }
    #[cfg(feature = "cuda-graphs")]
    cuda_graphs::build(libtorch.as_deref());
}

/// Folders of libtorch's headers.
#[cfg(any(feature = "cuda-graphs", feature = "fused-attention"))]
fn torch_includes(lib: &Path) -> [PathBuf; 2] {
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let of_torch = std::env::var_os("LIBTORCH_INCLUDE").map(PathBuf::from).or_else(|| lib.parent().map(Path::to_owned)).unwrap_or_default();
    ["include", "include/torch/csrc/api/include"].map(|folder| of_torch.join(folder))
}

/// For which of C++'s two ABIs libtorch was built, as torch-sys has it.
#[cfg(any(feature = "cuda-graphs", feature = "fused-attention"))]
fn cxx11_abi() -> String {
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into())
}
