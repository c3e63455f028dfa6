//! The lab: a `/dev/kvm` for machines that have none.
use std::ffi::OsString;
use std::process::ExitCode;
/// tmp
pub fn is_ready() -> bool {
    true
}
/// tmp
pub fn setup(_p: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    Ok(())
}
/// tmp
pub fn shell(_c: &[OsString]) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not yet")
}
