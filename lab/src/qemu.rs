//! The emulated machine: QEMU's command line, its start, its saving and its end.
//!
//! The machine's memory is a file that QEMU maps. While the machine boots to be saved, the mapping
//! is shared, so the file is the memory. When it is resumed, the mapping is private: QEMU reads
//! only the pages that are touched, and what is written stays with this one machine. QEMU's
//! migration stream then carries the devices alone, less than a megabyte
//! (capability `x-ignore-shared`), so a resume takes no longer for a machine with more memory.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, getpid, getppid, kill_process};
use serde_json::{Value, json};

use crate::parts;

/// The lab's memory: a guest of 1 GiB fits beside its kernel. It costs what is touched, no more.
const MEMORY: &str = "3G";

/// The file with the machine's memory, in a state's folder.
pub const MEMORY_FILE: &str = "memory";

/// The file with the machine's devices.
pub const DEVICES_FILE: &str = "devices";

/// What the lab's kernel is told. A panic or an oops ends the machine instead of hanging it, and
/// what slows an emulated machine down without use is off.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 oops=panic tsc=reliable no5lvl \
                       mitigations=off nokaslr nowatchdog audit=0 random.trust_cpu=on";

/// QEMU's program on this host.
///
/// # Errors
/// It isn't installed.
pub fn find() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join("qemu-system-x86_64"))
        .find(|program| program.is_file())
        .context("QEMU (qemu-system-x86_64) is not installed")
}

/// How the machine starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// From the kernel, to be saved.
    Boot,
    /// From what was saved.
    Resume,
}

/// What both starts have in common, and therefore what a saved machine depends on.
pub fn arguments(kernel: &Path, initramfs: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        "q35,accel=tcg,memory-backend=memory,vmport=off,sata=off,smbus=off,usb=off,hpet=off",
        // Without XSAVE, whose XCR0 a guest cannot set under emulated SVM (lab/README.md, "Limits").
        "-cpu",
        "max,-xsave",
        // Emulated SVM is not sound with more than one CPU (lab/README.md, "Limits").
        "-smp",
        "1",
        "-m",
        MEMORY,
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtserialport,chardev=port,nr=1",
        // A new one each start: the kernel then seeds its random numbers anew after a resume.
        "-device",
        "vmgenid,guid=auto",
        "-serial",
        "chardev:console",
        "-virtfs",
        "local,path=/,security_model=none,multidevs=remap,mount_tag=host",
        "-append",
        CMDLINE,
        "-kernel",
    ]
    .map(OsString::from)
    .to_vec();
    arguments.extend([kernel.into(), "-initrd".into(), initramfs.into()]);
    arguments
}

/// A running QEMU. Dropping it ends it.
pub struct Machine {
    child: Child,
    /// The host's end of the virtio-serial port.
    pub port: UnixStream,
    control: Control,
    stderr: File,
    console: File,
}

impl Machine {
    /// Starts QEMU in a folder where it finds, or makes, its two files.
    ///
    /// The machine dies with the thread that calls this, whatever kills that thread.
    ///
    /// # Errors
    /// QEMU can't be started, or there is no room for the memory's file.
    pub fn start(arguments: &[OsString], folder: &Path, start: Start) -> Result<Machine> {
        let (port, their_port) = UnixStream::pair()?;
        let (control, their_control) = UnixStream::pair()?;
        let stderr = File::from(memfd_create("stderr", MemfdFlags::CLOEXEC)?);
        let console = File::from(memfd_create("console", MemfdFlags::CLOEXEC)?);
        let share = if start == Start::Boot { "on" } else { "off" };
        let mut command = Command::new(find()?);
        command
            .args(arguments)
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=memory,size={MEMORY},mem-path={MEMORY_FILE},share={share}"
            ))
            .args(["-chardev", &format!("socket,id=port,fd={}", their_port.as_raw_fd())])
            .args(["-chardev", &format!("socket,id=control,fd={}", their_control.as_raw_fd())])
            .args(["-mon", "chardev=control,mode=control"])
            .args(["-chardev", "file,id=console,path=/dev/stdout,append=on"])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(stderr.try_clone()?)
            // Ctrl-C at the terminal is for the program in the lab.
            .process_group(0);
        if start == Start::Resume {
            command.args(["-incoming", "defer"]);
        }
        die_with_parent(&mut command, [their_port.as_raw_fd(), their_control.as_raw_fd()]);
        let child = command.spawn().context("cannot start QEMU")?;
        let control = Control { reader: BufReader::new(control) };
        Ok(Machine { child, port, control, stderr, console })
    }

    /// Loads the saved devices; the machine then runs on by itself, for it ran when it was saved.
    ///
    /// # Errors
    /// QEMU refuses, or has ended.
    pub fn resume(&mut self) -> Result<()> {
        let load = json!({"uri": format!("exec:cat {DEVICES_FILE}")});
        self.control.all(&[
            ("qmp_capabilities", json!({})),
            ("migrate-set-capabilities", memory_is_a_file()),
            ("migrate-incoming", load),
        ])
    }

    /// Saves the running machine's devices and ends QEMU; its memory is in its file already.
    ///
    /// # Errors
    /// QEMU refuses, has ended, or takes more than a minute.
    pub fn save(mut self) -> Result<()> {
        let store = json!({"uri": format!("exec:cat > {DEVICES_FILE}")});
        self.control.all(&[
            ("qmp_capabilities", json!({})),
            ("migrate-set-capabilities", memory_is_a_file()),
            ("migrate", store),
        ])?;
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = self.control.ask("query-migrate", &json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => bail!("QEMU cannot save the machine: {answer}"),
                _ if Instant::now() > deadline => bail!("QEMU takes too long to save the machine"),
                _ => sleep(Duration::from_millis(10)),
            }
        }
        self.control.ask("quit", &json!({}))?;
        self.child.wait()?;
        Ok(())
    }

    /// Stops the QEMU process itself, or lets it go on.
    pub fn pause(&self, paused: bool) {
        let signal = if paused { Signal::STOP } else { Signal::CONT };
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// What QEMU and the lab's kernel have said, for an error: the telling line of each. All that
    /// they said is kept in a file, which is named.
    pub fn last_words(&mut self) -> String {
        // A QEMU that is about to end has its say first.
        let deadline = Instant::now() + Duration::from_secs(1);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            sleep(Duration::from_millis(10));
        }
        let qemu = tail(&mut self.stderr).unwrap_or_default();
        let kernel = tail(&mut self.console).unwrap_or_default();
        let log = parts::folder().join("failure.log");
        let kept = std::fs::write(&log, format!("QEMU:\n{qemu}\nThe lab's kernel:\n{kernel}\n"));
        let mut words = String::new();
        let status = self.child.try_wait().ok().flatten();
        if let Some(signal) = status.and_then(|status| status.signal()) {
            // Its memory is a file, and a page of it for which there is no room is no memory.
            let full = Signal::BUS.as_raw() == signal;
            let why = if full { ", as when the cache folder's disk is full" } else { "" };
            words += &format!("; QEMU was killed by signal {signal}{why}");
        }
        for (who, text) in [("QEMU", qemu), ("its kernel", kernel)] {
            if let Some(line) = telling_line(&text) {
                words += &format!("; {who}: {line}");
            }
        }
        if kept.is_ok() {
            words += &format!("; all of it: {}", log.display());
        }
        words
    }
}

/// The line that says why: a panic's first, else the last there is.
fn telling_line(text: &str) -> Option<&str> {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines().find(|line| line.contains("Kernel panic")).or_else(|| lines().next_back())
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last 16 KiB of a file.
fn tail(file: &mut File) -> io::Result<String> {
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(16 << 10)))?;
    let mut bytes = Vec::new();
    file.take(16 << 10).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn memory_is_a_file() -> Value {
    json!({"capabilities": [{"capability": "x-ignore-shared", "state": true}]})
}

/// Lets the command's process inherit `fds`, and die when the calling thread does.
#[expect(unsafe_code, reason = "what has to happen between fork and exec")]
fn die_with_parent(command: &mut Command, fds: [RawFd; 2]) {
    let parent = getpid();
    let between = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // A parent that had died before that line would never be noticed.
        if getppid() != Some(parent) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for fd in fds {
            // SAFETY: the caller of `spawn` keeps both sockets open until it has returned, so
            // after the fork they are open here, and nothing closes them before `exec`.
            let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe functions may run: `between` makes four
    // system calls and neither allocates nor takes a lock.
    unsafe { command.pre_exec(between) };
}

/// QEMU's control socket. (QEMU Machine Protocol: one JSON object a line.)
struct Control {
    reader: BufReader<UnixStream>,
}

impl Control {
    fn send(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.reader.get_mut().write_all(line.as_bytes()).context("QEMU has ended")
    }

    /// The next answer; greetings and events are skipped.
    fn answer(&mut self, command: &str) -> Result<Value> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).unwrap_or(0) == 0 {
                bail!("QEMU has ended");
            }
            let mut line: Value =
                serde_json::from_str(&line).context("QEMU's answer is no JSON")?;
            if let Some(error) = line.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("no reason"));
            }
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.send(command, arguments)?;
        self.answer(command)
    }

    /// Sends several commands at once; QEMU carries them out in order.
    fn all(&mut self, commands: &[(&str, Value)]) -> Result<()> {
        for (command, arguments) in commands {
            self.send(command, arguments)?;
        }
        for (command, _) in commands {
            self.answer(command)?;
        }
        Ok(())
    }
}

/// A file's identity without reading it: path, size, time of its last change.
///
/// # Errors
/// There is no such file.
pub fn identity(path: &Path) -> io::Result<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;
    let path = path.canonicalize()?;
    let meta = path.metadata()?;
    let mut identity = OsStr::as_bytes(path.as_os_str()).to_vec();
    for number in [meta.size().cast_signed(), meta.mtime(), meta.mtime_nsec()] {
        identity.extend(number.to_le_bytes());
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_telling_line_is_the_panics_or_the_last() {
        let text = "a\n[ 1.0] Kernel panic - not syncing: why\n[ 1.1] Call Trace:\n\n";
        assert_eq!(telling_line(text), Some("[ 1.0] Kernel panic - not syncing: why"));
        assert_eq!(telling_line("first\nlast\n \n"), Some("last"));
        assert_eq!(telling_line("\n"), None);
    }
}
