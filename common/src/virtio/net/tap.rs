//! Introduced by stage 08: a tap, a network interface of the host whose cable ends in this program (Linux,
//! Documentation/networking/tuntap.rst). What the host sends to it, `read` returns; what is written, the host receives.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::{Down, Error, HEADER, Link};
use crate::virtio::Wake;

const TUNSETIFF: Opcode = libc::TUNSETIFF as Opcode;
const TUNSETOFFLOAD: Opcode = libc::TUNSETOFFLOAD as Opcode;
const TUNSETVNETHDRSZ: Opcode = libc::TUNSETVNETHDRSZ as Opcode;
const SIOCGIFMTU: Opcode = libc::SIOCGIFMTU as Opcode;

/// What the host has to be told that the guest takes, and the bit of VIRTIO's that the guest says it with.
const TO_GUEST: [(u32, libc::c_uint); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// What the host does for any frame that asks for it.
const TO_HOST: [u32; 4] =
    [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN];

/// `struct ifreq` (Linux, if.h): an interface's name, and something about it.
#[repr(C)]
struct Ifreq {
    name: [u8; libc::IFNAMSIZ],
    value: i32,
    rest: [u8; 20],
}

const _: () = assert!(size_of::<Ifreq>() == size_of::<libc::ifreq>());

/// A tap interface.
pub struct Tap {
    file: File,
    mtu: u16,
}

impl Tap {
    /// The tap interface `name`, which has to be there: one that this made would have no address and be switched off.
    /// It stays when the machine ends.
    ///
    /// # Errors
    /// It isn't there, or not for us.
    pub fn open(name: &str) -> Result<Self, Error> {
        let refused = || Error::Name { name: name.to_owned() };
        // Linux would take % for a pattern, after which to number a new one.
        let odd = |c: char| c.is_whitespace() || c.is_control() || ['/', ':', '%'].contains(&c);
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(odd) {
            return Err(refused());
        }
        let failed = |what| {
            let name = name.to_owned();
            move |errno: Errno| Error::Tap { name, what, source: errno.into() }
        };
        // Any socket will do to ask for an interface.
        let any = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(failed("socket"))?;
        name_to_index(&any, name).map_err(|errno| match errno {
            Errno::NODEV => Error::NoTap { name: name.to_owned() },
            errno => failed("SIOCGIFINDEX")(errno),
        })?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|source| Error::NoDriver { source })?;
        let mut bytes = [0; libc::IFNAMSIZ];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        let ifreq = |value| Ifreq { name: bytes, value, rest: [0; 20] };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        set_iff(&file, ifreq(flags)).map_err(|errno| match errno {
            Errno::BUSY => Error::Busy { name: name.to_owned() },
            Errno::PERM => Error::NotYours { name: name.to_owned() },
            Errno::INVAL => Error::OtherKind { name: name.to_owned() },
            errno => failed("TUNSETIFF")(errno),
        })?;
        set_vnet_hdr_size(&file, HEADER as libc::c_int).map_err(failed("TUNSETVNETHDRSZ"))?;
        let mut about = ifreq(0);
        get_mtu(&any, &mut about).map_err(failed("SIOCGIFMTU"))?;
        let mut tap = Self { file, mtu: about.value.clamp(68, 65535) as u16 };
        tap.activate(0);
        Ok(tap)
    }
}

impl Link for Tap {
    fn offloads(&self) -> u64 {
        let bits = TO_GUEST.iter().map(|(bit, _)| bit).chain(&TO_HOST);
        bits.fold(0, |bits, bit| bits | 1 << bit)
    }

    fn activate(&mut self, features: u64) {
        let flags = TO_GUEST
            .iter()
            .filter(|(bit, _)| features & 1 << bit != 0)
            .fold(0, |flags, (_, flag)| flags | flag);
        // A host that refuses sends frames that are done, which every guest takes.
        let _ = set_offload(&self.file, flags);
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn watch(&self, wake: &Wake) -> io::Result<()> {
        wake.watch(&self.file)
    }

    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, Down> {
        loop {
            let error = match self.file.read(frame) {
                Ok(len) => return Ok((len >= HEADER).then_some(len)),
                Err(error) => error,
            };
            match Errno::from_io_error(&error) {
                // A signal; or a frame that is longer than the buffer, which is gone.
                Some(Errno::INTR | Errno::FAULT) => {}
                // The interface was removed.
                Some(Errno::BADFD) => return Err(Down),
                // Nothing waits.
                _ => return Ok(None),
            }
        }
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Down> {
        loop {
            let Err(error) = self.file.write(frame) else { return Ok(()) };
            match Errno::from_io_error(&error) {
                Some(Errno::INTR) => {}
                Some(Errno::BADFD) => return Err(Down),
                // A header that makes no sense (EINVAL), an interface that is switched off (EIO), no memory: the frame
                // is lost.
                _ => return Ok(()),
            }
        }
    }
}

/// `TUNSETIFF` (tuntap.rst, 3.2): connects the file to the interface that `ifreq` names.
fn set_iff(tap: impl AsFd, ifreq: Ifreq) -> Result<(), Errno> {
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: the kernel reads a struct ifreq, whose size and fields Ifreq has.
    unsafe {
        ioctl(tap, Setter::<TUNSETIFF, Ifreq>::new(ifreq))
    }
}

/// `TUNSETVNETHDRSZ`: how long the header in front of each frame is, in bytes.
fn set_vnet_hdr_size(tap: impl AsFd, size: libc::c_int) -> Result<(), Errno> {
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: the kernel reads an int.
    unsafe {
        ioctl(tap, Setter::<TUNSETVNETHDRSZ, libc::c_int>::new(size))
    }
}

/// `TUNSETOFFLOAD`: what the reader of the frames takes upon itself.
fn set_offload(tap: impl AsFd, flags: libc::c_uint) -> Result<(), Errno> {
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: the argument is the flags themselves, no address.
    unsafe {
        ioctl(tap, rustix::ioctl::IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags as usize))
    }
}

/// `SIOCGIFMTU` (netdevice(7)): the largest packet of the interface that `ifreq` names.
fn get_mtu(socket: impl AsFd, ifreq: &mut Ifreq) -> Result<(), Errno> {
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: the kernel reads and writes a struct ifreq, whose size and fields Ifreq has; any bytes are one.
    unsafe {
        ioctl(socket, Updater::<SIOCGIFMTU, Ifreq>::new(ifreq))
    }
}
