//! Introduced by stage 08: a network without privileges, by the program `passt` (passt(1)).
//!
//! passt is to the guest a whole network: it answers DHCP, is the gateway and the name server, and turns the guest's
//! TCP connections and UDP packets into sockets of its own. Frames go through a Unix stream socket, each with its
//! length in front as a big-endian 32-bit number, as QEMU's `-netdev stream` has it.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::{Command, Stdio};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::{Down, ETHERNET, Error, HEADER, Link, MOST};
use crate::virtio::Wake;

/// The length in front of a frame, in bytes.
const LENGTH: usize = 4;

/// The largest packet, as passt tells the guest by DHCP, too: for it takes none in pieces, large ones are the only
/// way to send much at once.
const MTU: u16 = 65520;

/// Frames in a stream.
pub struct Passt {
    socket: OwnedFd,
    /// What has come, of which `start..end` is still to be looked at.
    received: Box<[u8]>,
    start: usize,
    end: usize,
    /// A frame on its way, of which the first `sent` bytes are gone.
    sending: Vec<u8>,
    sent: usize,
}

impl Passt {
    /// Starts passt. It ends by itself when its end of the socket hangs up: when this is dropped, or our process
    /// ends in any way.
    ///
    /// # Errors
    /// passt is not installed, or finds no network to share.
    pub fn start() -> Result<Self, Error> {
        let start = |errno: Errno| Error::StartPasst(errno.into());
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(start)?;
        fcntl_setfd(&theirs, FdFlags::empty()).map_err(start)?;
        // It leaves a process behind and returns when that is ready.
        let started = Command::new("passt")
            .args(["--quiet", "--fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output();
        let output = started.map_err(|source| match source.kind() {
            ErrorKind::NotFound => Error::NoPasst,
            _ => Error::StartPasst(source),
        })?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            // Where there is no system log, it complains of that as well.
            let said = text
                .lines()
                .rfind(|line| !line.trim().is_empty() && !line.starts_with("Failed to send"));
            let said =
                said.map_or_else(|| output.status.to_string(), |line| line.trim().to_owned());
            return Err(Error::Passt { said });
        }
        Self::new(ours).map_err(start)
    }

    /// Frames through a connected stream socket.
    pub(super) fn new(socket: OwnedFd) -> Result<Self, Errno> {
        fcntl_setfl(&socket, fcntl_getfl(&socket)? | OFlags::NONBLOCK)?;
        Ok(Self {
            socket,
            received: vec![0; 4 * MOST].into_boxed_slice(),
            start: 0,
            end: 0,
            sending: Vec::with_capacity(MOST),
            sent: 0,
        })
    }

    /// Takes what has come, as much as there is room for. Returns whether something has.
    fn read(&mut self) -> Result<bool, Down> {
        self.received.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        loop {
            return match recv(&self.socket, &mut self.received[self.end..], RecvFlags::empty()) {
                Ok((len, _)) if len > 0 => {
                    self.end += len;
                    Ok(true)
                }
                Err(Errno::AGAIN) => Ok(false),
                Err(Errno::INTR) => continue,
                _ => Err(Down),
            };
        }
    }
}

impl Link for Passt {
    fn mtu(&self) -> u16 {
        MTU
    }

    fn watch(&self, wake: &Wake) -> io::Result<()> {
        wake.watch(&self.socket)
    }

    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, Down> {
        loop {
            let there = &self.received[self.start..self.end];
            if let Some((length, rest)) = there.split_first_chunk::<LENGTH>() {
                let len = u32::from_be_bytes(*length) as usize;
                // Where the next one begins, nobody could tell.
                if !(ETHERNET..=MOST - HEADER).contains(&len) {
                    return Err(Down);
                }
                if let Some(bytes) = rest.get(..len) {
                    // Nothing is left to do for this frame: the header is empty.
                    frame[..HEADER].fill(0);
                    frame[HEADER..HEADER + len].copy_from_slice(bytes);
                    self.start += LENGTH + len;
                    return Ok(Some(HEADER + len));
                }
            }
            if !self.read()? {
                return Ok(None);
            }
        }
    }

    fn is_ready(&mut self) -> Result<bool, Down> {
        while self.sent < self.sending.len() {
            match send(&self.socket, &self.sending[self.sent..], SendFlags::NOSIGNAL) {
                Ok(len) => self.sent += len,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Down),
            }
        }
        Ok(true)
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Down> {
        let frame = &frame[HEADER..];
        self.sending.clear();
        self.sending.extend((frame.len() as u32).to_be_bytes());
        self.sending.extend(frame);
        self.sent = 0;
        self.is_ready().map(drop)
    }
}
