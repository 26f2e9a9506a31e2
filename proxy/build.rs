//! Links the unwinder of GCC into both programs where that can be had: no hook has to load and prepare a library for it.

use std::{path::Path, process::Command};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    const UNWINDER: &str = "libgcc_eh.a";
    // A compiler that has none of that name says the name again.
    let found = Command::new("cc").arg(format!("-print-file-name={UNWINDER}")).output();
    if found.is_ok_and(|found| Path::new(String::from_utf8_lossy(&found.stdout).trim()).is_absolute()) {
        println!("cargo:rustc-link-lib=static:-bundle,+verbatim={UNWINDER}");
    }
}
