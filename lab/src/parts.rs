//! What the saved lab is made of: the kernel that set-up fetched, the agent, the initramfs.
//!
//! A part's name carries a hash of what it was made from, so a part that is there is the right
//! one, and another version of this project doesn't disturb it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempDir};

use crate::initramfs::Archive;
use crate::modules;

/// The sources that the agent is built from: when they change, it is built anew.
const AGENT_SOURCES: &[&str] = &[
    include_str!("agent/main.rs"),
    include_str!("agent/boot.rs"),
    include_str!("agent/child.rs"),
    include_str!("agent/relay.rs"),
    include_str!("protocol.rs"),
    include_str!("lib.rs"),
    include_str!("../Cargo.toml"),
];

/// What is told to the person while something takes its time.
pub type Progress<'a> = &'a mut dyn FnMut(&str);

/// The lab's folder in the cache.
pub fn folder() -> PathBuf {
    cli::cache::dir().join("lab")
}

/// The first 16 hexadecimal digits of a SHA-256 over the parts, with borders between them.
pub fn hash<Part: AsRef<[u8]>>(parts: impl IntoIterator<Item = Part>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The lab's kernel.
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The folder with its modules.
    modules: PathBuf,
    release: String,
}

impl Kernel {
    /// The kernel that set-up has fetched.
    ///
    /// # Errors
    /// It hasn't.
    pub fn find() -> Result<Kernel> {
        let root = cli::cache::lab_kernel();
        let entries =
            fs::read_dir(root.join("boot")).ok().context("the lab's kernel is missing")?;
        for entry in entries {
            let entry = entry?;
            if let Some(release) = entry.file_name().to_string_lossy().strip_prefix("vmlinuz-") {
                return Ok(Kernel {
                    image: entry.path(),
                    modules: root.join("lib/modules").join(release),
                    release: release.to_owned(),
                });
            }
        }
        bail!("there is no kernel in {}", root.display())
    }
}

/// Where the initramfs for this kernel is, or would be.
pub fn initramfs_path(kernel: &Kernel) -> PathBuf {
    let parts = [hash(AGENT_SOURCES), hash(modules::WANTED), kernel.release.clone()];
    folder().join(format!("initramfs-{}.cpio", hash(parts)))
}

/// Makes the lab's initramfs, the agent as `/init` and the modules, unless it is there.
///
/// # Errors
/// What building the agent, reading the modules or writing the file fails with.
pub fn initramfs(kernel: &Kernel, progress: Progress<'_>) -> Result<PathBuf> {
    let path = initramfs_path(kernel);
    if path.is_file() {
        return Ok(path);
    }
    progress("building the lab's agent");
    let agent = fs::read(build_agent()?)?;
    let mut archive = Archive::new();
    archive.folder("dev")?;
    // Where the kernel opens the first process's standard streams.
    archive.device("dev/console", 5, 1)?;
    archive.file("init", 0o755, &agent)?;
    archive.folder("modules")?;
    let wanted = modules::Folder::open(&kernel.modules)?.load(modules::WANTED)?;
    for (number, module) in wanted.iter().enumerate() {
        archive.file(&format!("modules/{number:02}-{}.ko", module.name), 0o644, &module.elf)?;
    }
    let new = NamedTempFile::new_in(folder())?;
    fs::write(&new, archive.finish()?)?;
    new.persist(&path)?;
    Ok(path)
}

/// Builds the agent and returns its file, in a target folder of its own.
fn build_agent() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let target = workspace.join(target).join("lab-agent");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["rustc", "--quiet", "--package", "lab", "--bin", "agent"])
        .args(["--no-default-features", "--target-dir"])
        .arg(&target)
        // In the lab there is no dynamic linker before the host's files are mounted.
        .args(["--", "-C", "target-feature=+crt-static", "-C", "strip=symbols"])
        .current_dir(&workspace)
        .stdin(Stdio::null())
        .output()
        .context("cannot run cargo to build the lab's agent")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.lines().find(|line| line.starts_with("error")).unwrap_or("no reason given");
        bail!("the lab's agent cannot be built (it needs a static C library): {why}");
    }
    Ok(target.join("debug/agent"))
}

/// Moves a finished folder to its name. If another process was faster, its folder is as good.
pub(crate) fn publish(new: TempDir, name: &Path) -> Result<()> {
    let new = new.keep();
    if let Err(error) = fs::rename(&new, name) {
        let _ = fs::remove_dir_all(&new);
        if !name.is_dir() {
            return Err(error).with_context(|| format!("cannot write {}", name.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_knows_where_its_parts_end() {
        assert_ne!(hash(["ab", "c"]), hash(["a", "bc"]));
        assert_ne!(hash(["ab"]), hash(["ab", ""]));
        assert_eq!(hash(["ab", "c"]), hash(["ab", "c"]));
        assert_eq!(hash(["ab"]).len(), 16);
    }
}
