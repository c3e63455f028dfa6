//! Whether this host's KVM can do a stage's job: stage 01's check-up, asked once a boot.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use common::{checkup, kvm};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

/// What the check-up said, and for which host.
#[derive(Default, Serialize, Deserialize)]
struct Cache {
    /// See [`host`].
    host: String,
    /// By stage: nothing if the host can do it, else why not.
    reasons: BTreeMap<u8, Option<String>>,
}

/// Why `stage` can't run on this host; `None` if it can.
pub fn reason_against(stage: u8) -> Option<String> {
    let host = host();
    let path = cli::cache::dir().join("check-up.json");
    let mut cache = read(&path).filter(|cache| cache.host == host).unwrap_or_default();
    if let Some(reason) = cache.reasons.get(&stage) {
        return reason.clone();
    }
    // Not remembered: whoever is told to load a module or to join a group does so, and tries again.
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return Some(in_short(&error)),
    };
    let verdict = checkup::run_for(&kvm, &asm::checkup(), stage);
    // The line that the runner prints has room for one reason; 01_create_vm tells them all.
    let first = verdict.reason.split("; ").next().unwrap_or_default();
    let reason =
        (!verdict.able).then(|| format!("this host's KVM cannot run stage {stage:02} ({first})"));
    cache.host = host;
    cache.reasons.insert(stage, reason.clone());
    // Without a cache the next run checks again; that is no reason to fail.
    let _ = write(&path, &cache);
    reason
}

/// An error of opening KVM without the advice that it gives a person who has no lab.
fn in_short(error: &kvm::Error) -> String {
    let device = kvm::DEVICE;
    match error {
        kvm::Error::Missing => format!("there is no {device}"),
        kvm::Error::Permission { group } => {
            format!("you may not open {device} (group {group} may)")
        }
        kvm::Error::OnlyRoot => format!("you may not open {device} (only root may)"),
        kvm::Error::Open(why) => format!("cannot open {device} ({why})"),
        kvm::Error::NotKvm => format!("{device} is not KVM"),
        kvm::Error::Version { found } => {
            format!("{device} speaks API version {found}, expected {}", kvm::API_VERSION)
        }
        kvm::Error::Ioctl { .. } => error.to_string(),
    }
}

/// What a verdict holds for: this boot of this kernel, with a device that this user may open, as
/// judged by this very program.
fn host() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let kernel = rustix::system::uname();
    let program = std::env::current_exe().and_then(|path| lab::qemu::identity(&path));
    let device = lab::qemu::identity(Path::new(kvm::DEVICE));
    let may_open = fs::File::options().read(true).write(true).open(kvm::DEVICE).is_ok();
    lab::parts::hash([
        boot.into_bytes(),
        kernel.release().to_bytes().to_vec(),
        program.unwrap_or_default(),
        device.unwrap_or_default(),
        vec![may_open.into()],
    ])
}

fn read(path: &Path) -> Option<Cache> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn write(path: &Path, cache: &Cache) -> anyhow::Result<()> {
    fs::create_dir_all(cli::cache::dir())?;
    let mut file = NamedTempFile::new_in(cli::cache::dir())?;
    file.write_all(&serde_json::to_vec(cache)?)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_reason_advises_to_choose_the_lab_that_is_being_taken() {
        let group = "kvm".to_owned();
        for error in [
            kvm::Error::Missing,
            kvm::Error::Permission { group },
            kvm::Error::OnlyRoot,
            kvm::Error::NotKvm,
            kvm::Error::Version { found: 11 },
        ] {
            let reason = in_short(&error);
            assert!(reason.contains(kvm::DEVICE) && !reason.contains("MINI_KVM"), "{reason}");
        }
    }
}
