//! The program's process before it becomes the program: session, terminal, root, user, folder.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use lab::protocol::Exec;
use rustix::fs::Mode;
use rustix::mount::mount_move;
use rustix::process::{Gid, Uid, chroot, ioctl_tiocsctty, setsid, umask};
use rustix::termios::isatty;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// What tells `/init` to be this.
pub const ARGUMENT: &str = "child";

/// The command that starts this with everything but the three standard streams.
pub fn command(exec: &Exec) -> Command {
    let groups: Vec<_> = exec.groups.iter().map(u32::to_string).collect();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(ARGUMENT)
        .args([exec.uid, exec.gid, exec.umask].map(|number| number.to_string()))
        .arg(groups.join(","))
        .arg(OsStr::from_bytes(&exec.cwd))
        .args(exec.argv.iter().map(|argument| OsStr::from_bytes(argument)))
        .env_clear();
    for variable in &exec.env {
        if let Some(equals) = variable.iter().position(|byte| *byte == b'=') {
            let (name, value) = (&variable[..equals], &variable[equals + 1..]);
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
    command.env(lab::INSIDE, "1");
    command
}

/// Becomes the program, or says on stderr why not: 127 if there is no such program and 126 if it
/// can't be run, as a shell would.
pub fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let cwd_and_user = become_user(&mut arguments);
    let program = arguments.next().unwrap_or_default();
    let error = match cwd_and_user {
        Ok(()) => Command::new(&program).args(arguments).exec(),
        Err(error) => error,
    };
    eprintln!("error: cannot run {} in the lab: {error}", program.display());
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
}

fn become_user(arguments: &mut impl Iterator<Item = OsString>) -> io::Result<()> {
    let mut word = || arguments.next().unwrap_or_default();
    let number = |word: OsString| {
        let number = word.to_str().and_then(|word| word.parse::<u32>().ok());
        number.ok_or(io::Error::from(io::ErrorKind::InvalidInput))
    };
    let (uid, gid, mask) = (number(word())?, number(word())?, number(word())?);
    let groups: Vec<Gid> = word()
        .to_string_lossy()
        .split(',')
        .filter_map(|group| group.parse().ok().map(Gid::from_raw))
        .collect();
    let cwd = word();

    setsid()?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    if isatty(&stdin) {
        ioctl_tiocsctty(&stdin)?;
    } else if isatty(&stdout) {
        ioctl_tiocsctty(&stdout)?;
    } else if isatty(&stderr) {
        ioctl_tiocsctty(&stderr)?;
    }
    // Not only this process's root, but the machine's, or else the program could make no user namespaces
    // (clone(2), EPERM). That goes as in switch_root(8).
    std::env::set_current_dir(lab::HOST_ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    // These act on one thread, and there is only one.
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&groups)?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    umask(Mode::from_raw_mode(mask));
    std::env::set_current_dir(&cwd).map_err(|error| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {error}", cwd.display()))
    })
}
