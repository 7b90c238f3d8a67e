//! The kernels and the operator that `src/attention/fused.rs` calls: two kernels from one source, and what libtorch knows them by.

use crate::{cxx11_abi, torch_includes};
use std::path::{Path, PathBuf};

const FOLDER: &str = "src/attention/fused";
/// By their names in the sources: flags of processors, for which a program chooses as it runs.
const KERNELS: [&[&str]; 2] = [&["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"], &["-mavx2", "-mfma"]];

/// Where they cannot be made (another processor or compiler) the crate is built without, and attention is libtorch's.
pub fn build(libtorch: &Path) {
    println!("cargo:rerun-if-changed={FOLDER}");
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return;
    }
    match compile(libtorch) {
        Ok(()) => println!("cargo:rustc-cfg=fused_attention"),
        Err(error) => println!("cargo:warning=feature fused-attention: built without, attention on the CPU will be slower: {error}"),
    }
}

fn compile(libtorch: &Path) -> Result<(), cc::Error> {
    let source = |name: &str| Path::new(FOLDER).join(name);
    let mut objects: Vec<PathBuf> = vec![];
    for (index, flags) in KERNELS.iter().enumerate() {
        let mut kernel = common();
        // No function of the standard library that one of them might hand the other.
        kernel.opt_level(3).flags(*flags).flags(["-ffp-contract=fast", "-fno-math-errno"]);
        objects.extend(kernel.out_dir(out_dir(&index.to_string())).file(source("kernel.cpp")).try_compile_intermediates()?);
    }
    let mut operator = common();
    operator.opt_level(2).define("_GLIBCXX_USE_CXX11_ABI", cxx11_abi().as_str());
    for folder in torch_includes(libtorch) {
        // Their warnings are not ours.
        operator.flag("-isystem").flag(folder);
    }
    operator.file(source("operator.cpp")).objects(objects).try_compile("attention_distillation_fused")
}

fn common() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").pic(true).debug(false).warnings(false).flag("-fvisibility=hidden").flag("-fvisibility-inlines-hidden");
    build
}

/// A folder for each kernel, as objects are named by their sources.
fn out_dir(name: &str) -> PathBuf {
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels").join(name);
    std::fs::create_dir_all(&folder).expect("OUT_DIR can be written to");
    folder
}
