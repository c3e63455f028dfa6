//! The first moments of a watched program: this very binary once more, which asks to be traced, lays a filter over its
//! own system calls and becomes the program.
//!
//! Without the filter every system call would stop the program twice. With it (`SECCOMP_RET_TRACE`, seccomp(2)) only
//! those do that have to do with KVM: ioctls whose type is KVM's, and the `mmap` of a file, by which a vCPU's
//! `struct kvm_run` comes into the process.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::ioctl;

/// The word after this binary's name by which it knows that it is to do this.
pub const WORD: &str = "--launch";

/// The same, where `KVM_RUN` is not to stop the program.
pub const WITHOUT_EXITS: &str = "--launch-without-exits";

/// Becomes the program in `words`, under the eyes of the thread that started this process. Returns only if that fails.
pub fn launch(words: &[OsString], exits: bool) -> Result<()> {
    let [program, args @ ..] = words else { bail!("no program to launch") };
    let filter = filter(exits).context("cannot make a filter for system calls")?;
    ptrace::traceme().context("cannot be traced (PTRACE_TRACEME)")?;
    // Here the witness sets its options.
    raise(Signal::SIGSTOP).context("cannot stop")?;
    seccompiler::apply_filter(&filter).context("cannot filter system calls")?;
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}

/// What stops the program: see the module.
fn filter(exits: bool) -> Result<BpfProgram> {
    let condition = |argument, length, operation, value| {
        SeccompCondition::new(argument, length, operation, value)
    };
    use SeccompCmpArgLen::{Dword, Qword};
    let mut of_kvm =
        vec![condition(1, Qword, SeccompCmpOp::MaskedEq(0xFF00), u64::from(ioctl::KVM) << 8)?];
    if !exits {
        of_kvm.push(condition(1, Dword, SeccompCmpOp::Ne, ioctl::RUN)?);
    }
    // No file: the descriptor is -1.
    let of_a_file = condition(4, Dword, SeccompCmpOp::Ne, u64::from(u32::MAX))?;
    let rules = BTreeMap::from([
        (libc::SYS_ioctl, vec![SeccompRule::new(of_kvm)?]),
        (libc::SYS_mmap, vec![SeccompRule::new(vec![of_a_file])?]),
    ]);
    let (otherwise, matched) = (SeccompAction::Allow, SeccompAction::Trace(0));
    Ok(SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)?.try_into()?)
}
