//! Introduced by stage 08: a network interface (VIRTIO 1.2, 5.1 "Network Device").
//!
//! Two rings, one for each direction. Buffers carry Ethernet frames, each with a header of 12 bytes in front
//! (`struct virtio_net_hdr_v1`) that says what is still to be done with it. *Offloads* are such work: a driver that may
//! leave the checksum to the other side, and hand over 64 KiB of TCP in one piece (TSO), is woken a tenth as often. If
//! the frame never leaves this machine, nobody does it at all.
//!
//! What carries frames to the rest of the world is a [`Link`]: a [`tap`] interface of the host, which knows the same
//! header and to which the host's kernel is the other side, or [`passt`], a program that needs no privileges.
//!
//! ```text
//!   guest -- transmit ring --> Net::transmit --> Link::send ----> tap or passt
//!   guest <-- receive ring --- Net::receive <--- Link::receive <--'
//! ```
//!
//! A frame is copied once on its way, into a buffer of ours: the guest may write to its own while we read them, and
//! what has been looked at has to stay what it was.

use std::fmt;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::{Broken, Device, Rings, Wake, copy_config};
use crate::error::{Blame, Blamed};

pub mod passt;
pub mod tap;
#[cfg(test)]
mod tests;

/// The header's bytes.
pub const HEADER: usize = 12;
/// Where in it stands how many buffers a frame fills.
const NUM_BUFFERS: usize = 10;
/// Two addresses and a type: nothing shorter is a frame.
const ETHERNET: usize = 14;
/// A packet of IP, the largest that an offload makes, in its frame, with the header.
pub const MOST: usize = HEADER + ETHERNET + (64 << 10);

/// The rings.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Their size.
const SIZE: u16 = 256;

/// So many frames go in each direction before the other one's turn, and before a driver that waits to reset the
/// device.
const TURN: usize = 64;

/// Why a machine cannot have its network interface.
#[derive(Debug, Error)]
pub enum Error {
    /// No name that Linux gives to an interface.
    #[error("{name:?} is no name of an interface: 1 to 15 characters without /, : and spaces")]
    Name {
        /// What was given.
        name: String,
    },
    /// There is none of that name.
    #[error(
        "there is no interface {name}; make it: `sudo ip tuntap add {name} mode tap user $USER`, \
         `sudo ip address add 10.0.0.1/24 dev {name}`, `sudo ip link set {name} up`"
    )]
    NoTap {
        /// Its name.
        name: String,
    },
    /// It is one of another kind.
    #[error("{name} is not a tap interface for one program: `ip -details link show {name}`")]
    OtherKind {
        /// Its name.
        name: String,
    },
    /// Another program has it.
    #[error("the tap interface {name} is in use by another program, perhaps another machine")]
    Busy {
        /// Its name.
        name: String,
    },
    /// It belongs to somebody else.
    #[error(
        "the tap interface {name} belongs to another user: make yours with \
         `sudo ip tuntap add NAME mode tap user $USER`"
    )]
    NotYours {
        /// Its name.
        name: String,
    },
    /// The driver for taps isn't there, or out of reach.
    #[error(
        "cannot open /dev/net/tun: {source}; load its driver (`sudo modprobe tun`), and let all users \
         write to it, as most systems do: connecting to an interface is checked apart from that"
    )]
    NoDriver {
        /// What the system said.
        source: io::Error,
    },
    /// Something else failed.
    #[error("{what} failed for the tap interface {name}: {source}")]
    Tap {
        /// Its name.
        name: String,
        /// The call.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// There is no `passt`.
    #[error("passt is not installed: `apt install passt`, or give a tap interface")]
    NoPasst,
    /// It could not be started.
    #[error("cannot start passt: {0}")]
    StartPasst(io::Error),
    /// It gave up.
    #[error("passt gives no network: {said}")]
    Passt {
        /// The last line that it printed.
        said: String,
    },
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Name { .. }
            | Self::NoTap { .. }
            | Self::OtherKind { .. }
            | Self::Busy { .. }
            | Self::NotYours { .. } => Blame::Input,
            Self::NoDriver { .. }
            | Self::Tap { .. }
            | Self::NoPasst
            | Self::StartPasst(_)
            | Self::Passt { .. } => Blame::Host,
        }
    }
}

/// The other end is gone, and with it the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Down;

/// What carries a guest's frames. None of its methods waits.
pub trait Link: Send {
    /// The feature bits of VIRTIO 1.2, 5.1.3 for offloads that it knows.
    fn offloads(&self) -> u64 {
        0
    }

    /// The driver has chosen `features`: what it hasn't chosen, it must not receive.
    fn activate(&mut self, features: u64) {
        let _ = features;
    }

    /// The largest packet in a frame, in bytes.
    fn mtu(&self) -> u16;

    /// Has the device served when something changes.
    fn watch(&self, wake: &Wake) -> io::Result<()>;

    /// Takes the next frame, if one waits, into `frame`, which holds [`MOST`] bytes: first the header, then the
    /// frame. Returns the length of both.
    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, Down>;

    /// Whether it takes another frame now. If not, the device is served when it does.
    fn is_ready(&mut self) -> Result<bool, Down> {
        Ok(true)
    }

    /// Sends `frame`, header and all, once [`is_ready`](Self::is_ready). What makes no sense is dropped, as everything
    /// may be on a network.
    fn send(&mut self, frame: &[u8]) -> Result<(), Down>;
}

/// An interface's address (IEEE 802).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address for the machine's network interface `number`, on the link `name`: at random, but the same each
    /// time on this host, so that a guest knows its interface again and a DHCP server the guest.
    pub fn for_link(name: &str, number: usize) -> Self {
        // systemd's identity of an installation, else the kernel's of what has run since it booted.
        let host = ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"]
            .iter()
            .find_map(|file| fs::read_to_string(file).ok().filter(|id| !id.trim().is_empty()));
        let text = format!("{} {number} {name}", host.unwrap_or_default().trim());
        let hash =
            blake3::derive_key("mini-kvm 2026 MAC address of a network interface", text.as_bytes());
        let mut mac = [0; 6];
        mac.copy_from_slice(&hash[..6]);
        // Locally administered, and of one interface, not of a group.
        mac[0] = mac[0] & !1 | 2;
        Self(mac)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let what =
            || format!("{text:?} is no MAC address, expected six bytes as 02:00:00:12:34:56");
        let mut mac = [0; 6];
        let mut bytes = text.split(':');
        for byte in &mut mac {
            let digits = bytes.next().ok_or_else(what)?;
            let is_byte =
                digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(digits, 16).ok().filter(|_| is_byte).ok_or_else(what)?;
        }
        if bytes.next().is_some() {
            return Err(what());
        }
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(format!(
                "{text} is not one interface's address: the first byte is even, such as 02"
            ));
        }
        Ok(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A network interface.
pub struct Net {
    link: Box<dyn Link>,
    mac: Mac,
    wake: Option<Wake>,
    is_up: bool,
    /// What the driver has chosen.
    features: u64,
    received: Box<[u8]>,
    /// The length of the frame in `received` for which the guest has given no buffers yet.
    waiting: Option<usize>,
    sending: Box<[u8]>,
}

impl Net {
    /// An interface with the address `mac` on `link`.
    pub fn new(link: impl Link + 'static, mac: Mac) -> Self {
        let buffer = || vec![0; MOST].into_boxed_slice();
        Self {
            link: Box::new(link),
            mac,
            wake: None,
            is_up: true,
            features: 0,
            received: buffer(),
            waiting: None,
            sending: buffer(),
        }
    }

    /// From the link to the guest. Returns whether there may be more for now.
    fn receive(&mut self, rings: &mut Rings<'_>) -> Result<bool, Broken> {
        for _ in 0..TURN {
            let Some(len) = self.waiting.take().or_else(|| self.next_frame()) else {
                return Ok(false);
            };
            if !self.fill(rings, len)? {
                self.waiting = Some(len);
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn next_frame(&mut self) -> Option<usize> {
        if !self.is_up {
            return None;
        }
        self.link.receive(&mut self.received).unwrap_or_else(|Down| {
            self.go_down();
            None
        })
    }

    /// Copies the frame in `received` into the guest's buffers, if it has given enough. A frame that is too large for
    /// what it can give is dropped.
    fn fill(&mut self, rings: &mut Rings<'_>, len: usize) -> Result<bool, Broken> {
        // A frame may take several (VIRTIO 1.2, 5.1.6.4 "Processing of Incoming Packets").
        let most = if self.has(VIRTIO_NET_F_MRG_RXBUF) { usize::from(SIZE) } else { 1 };
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < len {
            let chain = if chains.len() < most { rings.take(RECEIVE)? } else { None };
            let Some(chain) = chain else {
                chains.iter().for_each(|_| rings.put_back(RECEIVE));
                return Ok(chains.len() == most);
            };
            let head = chain.head_index();
            let buffers = chain.writer(rings.ram()).map_err(|_| OUTSIDE)?;
            room += buffers.available_bytes();
            chains.push((head, buffers));
        }
        let frame = &mut self.received[..len];
        frame[NUM_BUFFERS..HEADER].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mut rest = &*frame;
        let mut used = Vec::with_capacity(chains.len());
        for (head, mut buffers) in chains {
            let written = buffers.write(rest).map_err(|_| OUTSIDE)?;
            rest = &rest[written..];
            used.push((head, written as u32));
        }
        rings.give_all(RECEIVE, &used)?;
        Ok(true)
    }

    /// From the guest to the link. Returns whether there may be more for now.
    fn transmit(&mut self, rings: &mut Rings<'_>) -> Result<bool, Broken> {
        for _ in 0..TURN {
            // Without a link frames go nowhere, but the guest gets its buffers back.
            let is_ready = if self.is_up { self.link.is_ready() } else { Ok(true) };
            if !is_ready.unwrap_or_else(|Down| self.go_down()) {
                return Ok(false);
            }
            let Some(chain) = rings.take(TRANSMIT)? else { return Ok(false) };
            let head = chain.head_index();
            let mut buffers = chain.reader(rings.ram()).map_err(|_| OUTSIDE)?;
            let len = buffers.available_bytes();
            if self.is_up && (HEADER + ETHERNET..=MOST).contains(&len) {
                let frame = &mut self.sending[..len];
                buffers.read_exact(frame).map_err(|_| OUTSIDE)?;
                self.link.send(frame).unwrap_or_else(|Down| {
                    self.go_down();
                });
            }
            rings.give(TRANSMIT, head, 0)?;
        }
        Ok(true)
    }

    /// The guest learns that its cable is out. Returns that frames are taken, to be dropped.
    fn go_down(&mut self) -> bool {
        self.is_up = false;
        if let Some(wake) = &self.wake {
            wake.config_changed();
        }
        true
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

const OUTSIDE: Broken = Broken("buffers are not in its memory");

impl Device for Net {
    fn kind(&self) -> u32 {
        1
    }

    fn name(&self) -> &'static str {
        "virtio net"
    }

    fn queues(&self) -> &[u16] {
        &[SIZE, SIZE]
    }

    fn features(&self) -> u64 {
        let own = [VIRTIO_NET_F_MTU, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS];
        own.iter().fold(self.link.offloads(), |bits, feature| bits | 1 << feature)
    }

    /// `struct virtio_net_config` (VIRTIO 1.2, 5.1.4): address, status, number of queue pairs, MTU.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.0);
        let status = if self.is_up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.link.mtu().to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn plug(&mut self, wake: Wake) -> io::Result<()> {
        self.link.watch(&wake)?;
        self.wake = Some(wake);
        Ok(())
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.link.activate(features);
    }

    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        let more = [self.receive(rings)?, self.transmit(rings)?];
        if more.contains(&true)
            && let Some(wake) = &self.wake
        {
            wake.now();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.waiting = None;
        self.features = 0;
        self.link.activate(0);
    }

    /// Nothing is kept: what was on its way is lost, as frames may be. But the cable may be in again, or out, so the driver
    /// is to look.
    fn restore(&mut self, _: &Value) -> Result<(), serde_json::Error> {
        if let Some(wake) = &self.wake {
            wake.config_changed();
        }
        Ok(())
    }
}
