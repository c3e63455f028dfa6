//! Assembles every `.asm` file under the [`FOLDERS`] into a
//! flat binary and writes one constant for each: `real/hello.asm` becomes `asm::real::HELLO`.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

/// Folders of guests; each becomes a module of the crate.
const FOLDERS: &[&str] = &["real", "long", "boot", "bios", "probes", "mistakes", "criteria"];

fn main() {
    println!("cargo::rerun-if-env-changed=NASM");
    println!("cargo::rerun-if-changed=include");
    if let Err(why) = assemble() {
        println!("cargo::error={why}");
    }
}

fn assemble() -> Result<(), String> {
    let nasm = env::var_os("NASM").unwrap_or_else(|| "nasm".into());
    if std::process::Command::new(&nasm).arg("-v").output().is_err() {
        return Err("NASM is not installed: run `cargo xtask setup` first".into());
    }
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let mut index = String::new();
    for folder in FOLDERS {
        // Cargo would take a folder that is missing for one that has changed, at every build.
        let entries = fs::read_dir(folder).map_err(|error| format!("asm/{folder}: {error}"))?;
        println!("cargo::rerun-if-changed={folder}");
        let mut sources: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|ext| ext == "asm"))
            .collect();
        sources.sort();
        let dir = Path::new(&out).join(folder);
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        writeln!(index, "#[doc = \"The guests of `asm/{folder}/`.\"]\npub mod {folder} {{")
            .unwrap();
        for source in sources {
            println!("cargo::rerun-if-changed={}", source.display());
            // NASM takes the last `-f` on its command line, so this overrides the object
            // format that nasm-rs picks for the host.
            let binary = nasm_rs::Build::new()
                .debug(false)
                .include("include")
                .include(folder)
                .out_dir(&dir)
                .file(&source)
                .flag("-fbin")
                .flag("-Werror")
                .compile_objects()?
                .pop()
                .ok_or_else(|| format!("{}: NASM made no output", source.display()))?;
            let name = source.file_stem().unwrap().to_str().unwrap().to_uppercase();
            writeln!(
                index,
                "    #[doc = \"`asm/{}`, assembled.\"]\n    pub const {name}: &[u8] = include_bytes!({binary:?});",
                source.display(),
            )
            .unwrap();
        }
        writeln!(index, "}}").unwrap();
    }
    fs::write(Path::new(&out).join("guests.rs"), index).map_err(|e| e.to_string())
}
