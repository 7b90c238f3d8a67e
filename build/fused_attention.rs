//! The kernels and the operator that `src/attention/fused.rs` calls: two kernels from one source, and what libtorch knows them by.

use crate::{cxx11_abi, torch_includes};
use std::path::{Path, PathBuf};

const FOLDER: &str = "src/attention/fused";

/// By its name in the sources: floats of a vector, flags. A program chooses as it runs, so what is asked of the processor there is
/// what stands here.
const KERNELS: [(&str, &str, &[&str]); 2] = [
    ("avx512", "16", &["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]),
    ("avx2", "8", &["-mavx2", "-mfma"]),
];

/// Where they cannot be made (another processor or compiler) the crate is built without, and attention is libtorch's.
pub fn build(libtorch: &Path) {
    for source in ["kernel.h", "kernel.cpp", "operator.cpp"] {
        println!("cargo:rerun-if-changed={FOLDER}/{source}");
    }
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return;
    }
    match compile(libtorch) {
        Ok(()) => println!("cargo:rustc-cfg=fused_attention"),
        Err(error) => println!(
            "cargo:warning=feature fused-attention: built without, attention on the CPU will be slower; once that is mended, \
             `cargo clean -p attention_distillation` and build again: {error}"
        ),
    }
}

fn compile(libtorch: &Path) -> Result<(), String> {
    let source = |name: &str| Path::new(FOLDER).join(name);
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut objects: Vec<PathBuf> = vec![];
    for (name, lanes, flags) in KERNELS {
        // A folder for each, as objects are named by their sources.
        let folder = out.join(name);
        std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut kernel = common();
        kernel.out_dir(folder).opt_level(3).define("FUSED_KERNEL", name).define("FUSED_LANES", lanes).flags(flags);
        // Sums of products in one instruction; roots and logarithms that do not have to set errno.
        kernel.flags(["-ffp-contract=fast", "-fno-math-errno"]).file(source("kernel.cpp"));
        objects.extend(kernel.try_compile_intermediates().map_err(|error| error.to_string())?);
    }
    let mut operator = common();
    operator.opt_level(2).define("_GLIBCXX_USE_CXX11_ABI", cxx11_abi().as_str());
    // As torch-sys does: a libtorch with glog wants it.
    operator.define("GLOG_USE_GLOG_EXPORT", None);
    for folder in torch_includes(libtorch) {
        // Their warnings are not ours.
        operator.flag("-isystem").flag(folder);
    }
    operator.file(source("operator.cpp")).objects(objects);
    operator.try_compile("attention_distillation_fused").map_err(|error| error.to_string())
}

fn common() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").pic(true).debug(false).warnings(false).flag("-fvisibility=hidden").flag("-fvisibility-inlines-hidden");
    build
}
