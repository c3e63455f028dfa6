//! The kernel modules that the lab loads, and the order that their dependencies ask for. Stage 08's default initramfs
//! takes a guest's modules from here, too.
//!
//! A module names what it needs in its ELF section `.modinfo`, as `depends=a,b`, and what it drives, as `alias=…`. (A
//! package that was unpacked and not installed has no `modules.dep` and `modules.alias`: `depmod` writes them.)

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use elf::ElfBytes;
use elf::endian::LittleEndian;

/// What the lab needs; each brings what it depends on.
pub const WANTED: &[&str] = &[
    // What the lab is for: KVM on AMD's SVM, which QEMU emulates.
    "kvm_amd",
    // The port to the runner.
    "virtio_pci",
    "virtio_console",
    // The host's files.
    "9pnet_virtio",
    "9p",
    // Network interfaces for guests, cables between network namespaces, and NAT by nftables.
    "tun",
    "veth",
    // libcrc32c asks for it by name, which is no dependency that a module tells.
    "crc32c_generic",
    "nft_chain_nat",
    "nft_masq",
];

/// Larger than any module: a limit for what a damaged compressed file may become.
const MAX_SIZE: u64 = 64 << 20;

/// A module, ready for `finit_module(2)`.
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// The ELF file, not compressed.
    pub elf: Vec<u8>,
    /// The modules that it needs itself, by name.
    pub depends: Vec<String>,
    /// The devices that it drives: patterns for what the kernel calls them, such as `virtio:d00000002v*`.
    pub aliases: Vec<String>,
}

/// A kernel's folder `lib/modules/RELEASE`.
pub struct Folder {
    path: PathBuf,
    files: HashMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl Folder {
    /// Looks which modules there are.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn open(path: &Path) -> Result<Folder> {
        let mut files = HashMap::new();
        index(path, &mut files)?;
        let builtin = fs::read_to_string(path.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin.lines().filter_map(|line| name(Path::new(line))).collect();
        Ok(Folder { path: path.to_owned(), files, builtin })
    }

    /// Whether the kernel has a module of that name: in a file, and not built in.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// The modules that `wanted` stands for, dependencies first. A module which is built into that kernel is left out.
    ///
    /// # Errors
    /// A module that the folder hasn't, or a file in it that is no module.
    pub fn load(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut modules = HashMap::new();
        let order = order(wanted, |name| {
            if self.builtin.iter().any(|builtin| builtin == name) {
                return Ok(Vec::new());
            }
            let path = self.files.get(name).with_context(|| {
                format!("the kernel in {} has no module {name}", self.path.display())
            })?;
            let elf = read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let info = modinfo(&elf).with_context(|| format!("{}", path.display()))?;
            let depends: Vec<String> = values(&info, "depends")
                .flat_map(|depends| depends.split(','))
                .filter(|name| !name.is_empty())
                .map(|name| name.replace('-', "_"))
                .collect();
            let aliases = values(&info, "alias").map(str::to_owned).collect();
            let name = name.to_owned();
            let module = Module { name: name.clone(), depends: depends.clone(), aliases, elf };
            modules.insert(name, module);
            Ok(depends)
        })?;
        Ok(order.into_iter().filter_map(|name| modules.remove(&name)).collect())
    }
}

/// Names in an order in which each comes after all that it depends on.
///
/// # Errors
/// A circle, or what `depends` fails with.
pub fn order(
    wanted: &[&str],
    mut depends: impl FnMut(&str) -> Result<Vec<String>>,
) -> Result<Vec<String>> {
    fn visit(
        name: &str,
        above: &mut Vec<String>,
        done: &mut Vec<String>,
        depends: &mut impl FnMut(&str) -> Result<Vec<String>>,
    ) -> Result<()> {
        if done.iter().any(|other| other == name) {
            return Ok(());
        }
        if above.iter().any(|other| other == name) {
            bail!("modules depend on each other in a circle: {} {name}", above.join(" "));
        }
        above.push(name.to_owned());
        for dependency in depends(name)? {
            visit(&dependency, above, done, depends)?;
        }
        done.extend(above.pop());
        Ok(())
    }
    let mut done = Vec::new();
    for name in wanted {
        visit(name, &mut Vec::new(), &mut done, &mut depends)?;
    }
    Ok(done)
}

/// `kvm_amd` for `…/kvm-amd.ko.xz`.
fn name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn index(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            index(&entry.path(), files)?;
        } else if let Some(name) = name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// Reads a module, which distributions compress or not.
fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path)?;
    let reader: Box<dyn Read> = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => Box::new(liblzma::read::XzDecoder::new(file)),
        Some("zst") => Box::new(ruzstd::decoding::StreamingDecoder::new(file)?),
        Some("ko") => Box::new(file),
        _ => bail!("a module compressed in an unknown way"),
    };
    let mut elf = Vec::new();
    reader.take(MAX_SIZE).read_to_end(&mut elf)?;
    Ok(elf)
}

/// What a module's `.modinfo` says: `NAME=VALUE`, each ended by a zero.
fn modinfo(elf: &[u8]) -> Result<String> {
    let elf = ElfBytes::<LittleEndian>::minimal_parse(elf)?;
    let section = elf.section_header_by_name(".modinfo")?.context("has no .modinfo section")?;
    let (bytes, _) = elf.section_data(&section)?;
    // An author's name need not be UTF-8.
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// The values of `name` in a `.modinfo`: there may be several.
fn values<'a>(info: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    info.split('\0').filter_map(move |entry| entry.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Module `n` may depend on any module below `n`, so there is no circle.
        #[test]
        fn dependencies_come_first_and_once(edges in vec(vec(0..20usize, 0..4), 1..20)) {
            let names: Vec<_> = (0..edges.len()).map(|number| number.to_string()).collect();
            let wanted: Vec<_> = names.iter().map(String::as_str).collect();
            let below = |number: usize| edges[number].iter().filter(move |other| **other < number);
            let order = order(&wanted, |name| {
                Ok(below(name.parse()?).map(usize::to_string).collect())
            }).unwrap();
            prop_assert_eq!(order.len(), edges.len());
            let place = |number: usize| order.iter().position(|name| *name == number.to_string());
            for number in 0..edges.len() {
                for other in below(number) {
                    prop_assert!(place(*other).unwrap() < place(number).unwrap());
                }
            }
        }

        #[test]
        fn any_bytes_are_a_module_or_an_error(bytes in vec(any::<u8>(), 0..200)) {
            prop_assert!(modinfo(&bytes).is_err());
        }
    }

    #[test]
    fn a_circle_is_an_error() {
        let error = order(&["a"], |name| Ok(vec![if name == "a" { "b" } else { "a" }.to_owned()]));
        assert_eq!(
            error.unwrap_err().to_string(),
            "modules depend on each other in a circle: a b a"
        );
    }

    #[test]
    fn of_what_modinfo_says_each_name_is_whole() {
        let info = "license=GPL\0alias=virtio:d00000002v*\0depends=a,b\0alias=x\0aliases=y\0";
        assert_eq!(values(info, "alias").collect::<Vec<_>>(), ["virtio:d00000002v*", "x"]);
        assert_eq!(values(info, "depends").collect::<Vec<_>>(), ["a,b"]);
    }

    #[test]
    fn names_are_without_path_suffix_and_dashes() {
        assert_eq!(name(Path::new("kernel/arch/x86/kvm/kvm-amd.ko.xz")).unwrap(), "kvm_amd");
        assert_eq!(name(Path::new("9p.ko")).unwrap(), "9p");
        assert_eq!(name(Path::new("modules.order")), None);
    }
}
