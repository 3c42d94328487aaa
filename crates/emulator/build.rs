//! Compiles the kernels with the emulator's names in place of a GPU's instructions: for a GPU with much shared memory and for
//! one with little, which cut their work into pieces of different sizes.

const SUITES: [(&str, u32); 2] = [("large", 227 << 10), ("small", 99 << 10)];

fn main() {
    let kernels = "../kernels/cuda";
    println!("cargo:rerun-if-changed={kernels}");
    println!("cargo:rerun-if-changed=cpp");
    let compiler = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).include("cpp").include(kernels).define("MOESAIC_EMULATOR", None);
        // Threads leave their stacks by longjmp.
        build.flag("-U_FORTIFY_SOURCE").flag("-Wno-unknown-pragmas").flag("-xc++").link_lib_modifier("+whole-archive");
        build
    };
    for (suite, shared_bytes) in SUITES {
        let mut build = compiler();
        build.define("SHARED_BYTES", &*shared_bytes.to_string()).define("SUITE", &*format!("\"{suite} \""));
        for source in ["experts", "linear", "attention", "rows", "draw"] {
            build.file(format!("{kernels}/{source}.cu"));
        }
        build.compile(&format!("moesaic_kernels_{suite}"));
    }
    compiler().file("cpp/emulator.cpp").compile("moesaic_emulator");
}
