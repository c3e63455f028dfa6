//! Introduced by stage 01: what a host has of what KVM needs, and what can be done about the rest.
//!
//! KVM is a kernel module for the virtualization that a processor has: VT-x of Intel (`vmx`), SVM of AMD (`svm`). One
//! that runs in a virtual machine itself has it only if its own hypervisor passes it on ("nested virtualization").

use std::fmt;
use std::fs;
use std::path::Path;

use crate::checkup::Verdict;
use crate::kvm;

/// The modules that can stand behind `/dev/kvm`, with the processors' flags that they need.
const MODULES: [(&str, &str); 3] = [("kvm_intel", "vmx"), ("kvm_amd", "svm"), (PVM, "")];

/// KVM for virtual machines without nested virtualization: guests run in ring 3 of the machine that it runs in, and
/// their ring 0 is emulated.
const PVM: &str = "kvm_pvm";

/// What a host tells of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// The processor's name.
    pub processor: String,
    /// Its virtualization, as Linux calls it: `vmx` or `svm`.
    pub virtualization: Option<&'static str>,
    /// Whether this is a virtual machine itself.
    pub is_guest: bool,
    /// Whether this is a container.
    pub is_container: bool,
    /// The module behind KVM that is loaded.
    pub module: Option<&'static str>,
    /// The kernel's version.
    pub kernel: String,
}

impl Host {
    /// Looks at this host.
    pub fn look() -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Self { kernel, ..Self::look_in(Path::new("/")) }
    }

    /// Looks at the one with its files below `root`.
    fn look_in(root: &Path) -> Self {
        let cpuinfo = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        let value = |key| cpuinfo.lines().find_map(|line| line.strip_prefix(key)?.split_once(": "));
        let flags = value("flags").map_or("", |(_, flags)| flags);
        let has = |flag| flags.split_whitespace().any(|word| word == flag);
        let there = |path: &str| root.join(path).exists();
        let module = |(name, _): &&(&str, _)| there(&format!("sys/module/{name}"));
        Self {
            processor: value("model name").map_or("unknown", |(_, name)| name.trim()).to_owned(),
            virtualization: ["vmx", "svm"].into_iter().find(|flag| has(*flag)),
            is_guest: has("hypervisor"),
            is_container: there(".dockerenv") || there("run/.containerenv"),
            module: MODULES.iter().find(module).map(|(name, _)| *name),
            kernel: String::new(),
        }
    }

    /// What can be done about what is missing, one sentence each, the best first; nothing if nothing is.
    pub fn advice(&self, kvm: &Result<Vec<Verdict>, kvm::Error>) -> Vec<String> {
        let advice = match kvm {
            Ok(verdicts) => {
                let lacking = verdicts.iter().filter(|verdict| !verdict.able);
                if lacking.clone().count() == 0 {
                    return Vec::new();
                }
                let mut lacks = lacking.flat_map(|verdict| &verdict.lacks);
                match lacks.any(|lack| lack.starts_with("KVM_CAP_")) {
                    true => {
                        "Boot a newer kernel: this one's KVM has not all capabilities.".to_owned()
                    }
                    false if self.module == Some(PVM) => format!(
                        "This KVM is PVM ({PVM}), which emulates ring 0. {}",
                        self.get_virtualization()
                    ),
                    false if self.virtualization.is_none() => self.get_virtualization(),
                    false => {
                        "Update the kernel, and the hypervisor below it if there is one: its KVM \
                              takes tiny guests wrong."
                            .to_owned()
                    }
                }
            }
            Err(kvm::Error::Permission { group }) => format!(
                "Join the group of {}: sudo usermod -aG {group} \"$USER\", then log in again.",
                kvm::DEVICE
            ),
            Err(kvm::Error::OnlyRoot) => {
                format!(
                    "Open it to yourself until the next boot: sudo chown \"$USER\" {}",
                    kvm::DEVICE
                )
            }
            Err(kvm::Error::Version { .. }) => "Boot a newer kernel.".to_owned(),
            Err(_) => match (self.module, self.virtualization) {
                _ if self.is_container => {
                    format!("Start this container with --device {}.", kvm::DEVICE)
                }
                (None, Some(flag)) => {
                    let module = MODULES.iter().find(|(_, needs)| *needs == flag);
                    let module = module.map_or("kvm", |(name, _)| name).replace('_', "-");
                    format!("Load the module: sudo modprobe {module}")
                }
                (None, None) => self.get_virtualization(),
                (Some(module), _) => format!(
                    "The module {module} is loaded and gives no {}: look what `sudo dmesg | grep kvm` says.",
                    kvm::DEVICE
                ),
            },
        };
        let lab = "Or change nothing: `cargo run` takes what cannot run here to the lab, an emulated \
                   machine with a KVM that can do all stages (`cargo xtask setup` fetches it), and \
                   MINI_KVM=lab chooses it by hand.";
        vec![advice, lab.to_owned()]
    }

    /// How a host comes to virtualization that it hasn't.
    fn get_virtualization(&self) -> String {
        match self.is_guest {
            true => "Have nested virtualization switched on for this virtual machine, by whoever runs it, or take \
                     another machine."
                .to_owned(),
            false => "Switch virtualization (VT-x, AMD-V or SVM) on in the firmware's set-up.".to_owned(),
        }
    }
}

/// A line for each thing, indented by two spaces.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let virtualization = match self.virtualization {
            Some("vmx") => "VT-x (vmx)",
            Some(_) => "SVM (svm)",
            None => "none: neither vmx nor svm is among its flags",
        };
        let place = match (self.is_guest, self.is_container) {
            (false, false) => "no virtual machine, no container",
            (true, false) => "a virtual machine",
            (false, true) => "a container",
            (true, true) => "a container in a virtual machine",
        };
        writeln!(f, "  processor       {}", self.processor)?;
        writeln!(f, "  virtualization  {virtualization}")?;
        writeln!(f, "  this is         {place}")?;
        writeln!(f, "  kernel          {}", self.kernel)?;
        writeln!(f, "  module          {}", self.module.unwrap_or("none of KVM's is loaded"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(flags: &str, files: &[&str]) -> Host {
        let root = tempfile::tempdir().unwrap();
        let text = format!("processor\t: 0\nmodel name\t: A 9000\nflags\t\t: fpu {flags} sse\n\n");
        for folder in ["proc", "sys/module", "run"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        fs::write(root.path().join("proc/cpuinfo"), text).unwrap();
        files.iter().for_each(|file| fs::write(root.path().join(file), "").unwrap());
        Host::look_in(root.path())
    }

    fn verdicts(lacks: &[&'static str]) -> Result<Vec<Verdict>, kvm::Error> {
        let (able, lacks) = (lacks.is_empty(), lacks.to_vec());
        Ok(vec![Verdict { stage: 8, able, lacks, reason: String::new() }])
    }

    #[test]
    fn a_host_is_told_by_its_files() {
        let found = host("vmx", &["sys/module/kvm_intel"]);
        assert_eq!((found.virtualization, found.module), (Some("vmx"), Some("kvm_intel")));
        assert_eq!((found.is_guest, found.is_container), (false, false));
        let text = found.to_string();
        assert!(text.contains("A 9000") && text.contains("VT-x") && text.contains("kvm_intel"));
        let found = host("hypervisor svm_lock", &["sys/module/kvm_pvm", ".dockerenv"]);
        assert_eq!((found.virtualization, found.module), (None, Some(PVM)));
        assert!(found.to_string().contains("a container in a virtual machine"));
        // One that says nothing of itself.
        assert_eq!(Host::look_in(Path::new("/no/such/root")).processor, "unknown");
    }

    #[test]
    fn the_advice_fits_what_is_missing_and_ends_with_the_lab() {
        let missing = || Err(kvm::Error::Missing);
        let cases = [
            (host("vmx", &[]), missing(), "sudo modprobe kvm-intel"),
            (host("svm", &[]), missing(), "sudo modprobe kvm-amd"),
            (host("", &[]), missing(), "firmware"),
            (host("hypervisor", &[]), missing(), "nested virtualization"),
            (host("svm", &["sys/module/kvm_amd", ".dockerenv"]), missing(), "--device /dev/kvm"),
            (host("svm", &["sys/module/kvm_amd"]), missing(), "dmesg"),
            (host("svm", &[]), Err(kvm::Error::Permission { group: "kvm".into() }), "-aG kvm"),
            (host("svm", &[]), Err(kvm::Error::OnlyRoot), "chown"),
            (host("svm", &[]), verdicts(&["KVM_CAP_IRQFD"]), "newer kernel"),
            (host("hypervisor", &["sys/module/kvm_pvm"]), verdicts(&["ring 3 and back"]), "PVM"),
            (host("vmx", &["sys/module/kvm_intel"]), verdicts(&["dirty log"]), "Update the kernel"),
        ];
        for (host, kvm, text) in cases {
            let advice = host.advice(&kvm);
            assert!(advice.len() == 2 && advice[0].contains(text), "{text}: {advice:?}");
            assert!(advice[1].contains("MINI_KVM=lab"), "{advice:?}");
        }
        assert!(host("svm", &[]).advice(&verdicts(&[])).is_empty());
    }
}
