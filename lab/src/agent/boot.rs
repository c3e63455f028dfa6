//! From the kernel's first process to "ready": file systems, modules, the port.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::protocol::{Exec, Frame, VERSION};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount, mount_bind_recursive};
use rustix::net::{AddressFamily, SendFlags, SocketType, send, socket};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, Timespec, clock_settime};

/// The port's device: the first port of the first virtio-serial device, `nr=1` in QEMU's terms.
const PORT: &str = "/dev/vport0p1";

/// The shortest period, in microseconds, that KVM gives a guest's periodic timer.
const MIN_TIMER_PERIOD: &str = "/sys/module/kvm/parameters/min_timer_period_us";

/// Adds to an error the step that failed.
fn step<E: Into<io::Error>>(what: impl Display) -> impl FnOnce(E) -> io::Error {
    move |error| {
        let error = error.into();
        io::Error::new(error.kind(), format!("{what}: {error}"))
    }
}

/// Sets the lab up to the point at which it is saved, and returns the port.
pub fn boot() -> io::Result<File> {
    for (kind, target, data) in [
        ("devtmpfs", "/dev", c"mode=0755"),
        ("proc", "/proc", c""),
        ("sysfs", "/sys", c""),
        ("devpts", "/dev/pts", c"gid=5,mode=0620,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", c"mode=1777"),
    ] {
        fs::create_dir_all(target).map_err(step(target))?;
        mount(kind, target, kind, MountFlags::NOSUID, data).map_err(step(target))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, link).map_err(step(link))?;
    }
    let mut modules: Vec<_> = fs::read_dir("/modules")?.collect::<io::Result<_>>()?;
    modules.sort_by_key(fs::DirEntry::file_name);
    for module in modules {
        let path = module.path();
        rustix::system::finit_module(File::open(&path)?, c"", 0).map_err(step(path.display()))?;
    }
    // The lab has one user at a time, who may not be root: the group that may use KVM on the host
    // means nothing here.
    for device in ["/dev/kvm", "/dev/net/tun", "/dev/ptmx", "/dev/tty"] {
        fs::set_permissions(device, Permissions::from_mode(0o666)).map_err(step(device))?;
    }
    rustix::system::sethostname(b"lab")?;
    raise_loopback().map_err(step("raising lo"))?;
    let files = Rlimit { current: Some(1024), maximum: Some(1 << 19) };
    setrlimit(Resource::Nofile, files)?;
    let mut port = open_port()?;
    let mut ready = Vec::new();
    Frame::Ready(VERSION).encode(&mut ready);
    port.write_all(&ready)?;
    Ok(port)
}

/// Sets the loopback device up, for programs that talk to themselves over 127.0.0.1: one netlink
/// message, `RTM_NEWLINK` with a `struct ifinfomsg`. (rtnetlink(7).)
fn raise_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    /// The kernel makes `lo` first, in every network namespace.
    const LOOPBACK_INDEX: u32 = 1;
    let mut message = Vec::new();
    // struct nlmsghdr: length, type, flags, sequence, port.
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    // struct ifinfomsg: family and type, index, flags, which of the flags change.
    message.extend([0; 4]);
    for word in [LOOPBACK_INDEX, IFF_UP, IFF_UP] {
        message.extend(word.to_ne_bytes());
    }
    // No protocol is number 0, NETLINK_ROUTE.
    let kernel = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    send(&kernel, &message, SendFlags::empty())?;
    Ok(())
}

/// Opens the port, which its driver makes some time after its module has been loaded.
fn open_port() -> io::Result<File> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        match OpenOptions::new().read(true).write(true).custom_flags(nonblocking).open(PORT) {
            Ok(port) => return Ok(port),
            Err(error) if Instant::now() > deadline => return Err(step(PORT)(error)),
            Err(_) => sleep(Duration::from_millis(10)),
        }
    }
}

/// What can only be done after a resume: the time, KVM's parameter, and the host's files.
pub fn prepare(exec: &Exec) -> io::Result<()> {
    let time = Timespec {
        tv_sec: exec.time.as_secs().cast_signed(),
        tv_nsec: exec.time.subsec_nanos().into(),
    };
    clock_settime(ClockId::Realtime, time).map_err(step("setting the clock"))?;
    // Each resumed lab would count its processes from the same number, and programs that name
    // files after their process would meet in the host's /tmp.
    let _ = fs::write("/proc/sys/kernel/ns_last_pid", (300 + time.tv_nsec % 30_000).to_string());
    if let Some(period) = exec.min_timer_period_us {
        fs::write(MIN_TIMER_PERIOD, period.to_string()).map_err(step(MIN_TIMER_PERIOD))?;
    }
    let root = Path::new(lab::HOST_ROOT);
    fs::create_dir_all(root)?;
    // cache=mmap: `write` goes to the host at once and `read` comes from it, so that both sides see
    // one file and a lab that is killed loses nothing that was written. Only the pages of shared
    // mappings are kept here, until msync, munmap or the program's end.
    let options = c"trans=virtio,version=9p2000.L,msize=512000,cache=mmap";
    mount(lab::SHARE, root, "9p", MountFlags::empty(), options)
        .map_err(step("mounting the host's files"))?;
    for own in ["dev", "proc", "sys"] {
        mount_bind_recursive(Path::new("/").join(own), root.join(own)).map_err(step(own))?;
    }
    Ok(())
}
