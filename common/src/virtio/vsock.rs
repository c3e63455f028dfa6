//! Introduced by stage 08: streams between guest and host without a network (VIRTIO 1.2, 5.10 "Socket Device").
//!
//! A guest has a number, its CID, and the host has number 2; each has ports. What a program in the guest does with an
//! `AF_VSOCK` socket becomes packets on two queues, which begin with a header. Here their other end is a Unix socket,
//! as with Firecracker, so that a program on the host needs to know nothing of virtio:
//!
//! - who connects to the Unix socket `PATH` and writes `CONNECT 1234\n` reaches what listens on port 1234 in the
//!   guest, and reads `OK` and a port of the host's before the stream;
//! - who connects from the guest to the host's port 1234 reaches what listens at the Unix socket `PATH_1234`.
//!
//! Each side tells the other in every packet how much it can hold and how much of that it has passed on (*credit*), and
//! the other sends no more than that: nobody has to keep more than it offered.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::Value;

use super::{Broken, Device, Error, Rings, Wake, copy_config};
use crate::snapshot;

/// The host's CID (VIRTIO 1.2, 5.10.4).
const HOST: u64 = 2;

/// The CIDs that a guest may have (VIRTIO 1.2, 5.10.4): others are reserved.
pub const CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

/// VIRTIO_VSOCK_TYPE_STREAM.
const STREAM: u16 = 1;

// What a packet is for (VIRTIO 1.2, 5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (VIRTIO 1.2, 5.10.6.7 "Device Events"): all connections are gone.
const TRANSPORT_RESET: u32 = 0;

// What of a connection is shut down.
const NO_MORE_RECEIVED: u32 = 1;
const NO_MORE_SENT: u32 = 2;
const BOTH: u32 = NO_MORE_RECEIVED | NO_MORE_SENT;

/// How much a connection holds of what the guest has sent and the host has not taken.
const BUFFER: u32 = 64 << 10;

/// How many connections there may be, with those that are being made or ended.
const CONNECTIONS: usize = 256;

/// How many answers may wait for buffers of the guest's: with more, its packets wait as well.
const ANSWERS: usize = 64;

/// How many packets go to the guest before others get their turn: the driver, to reset the device, and the
/// machine's end.
const AT_ONCE: usize = 256;

/// The longest line with which a program on the host begins: `CONNECT 4294967295\n`.
const LINE: usize = 19;

/// The first of the ports that the host's ends of connections get.
const FIRST_PORT: u32 = 1 << 30;

/// What begins a packet: `struct virtio_vsock_hdr` (VIRTIO 1.2, 5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Header {
    /// Its length in bytes.
    const LEN: usize = 44;

    fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let u16_at = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// A packet for the guest's port of `ports`.
    fn to_guest(cid: u32, ports: Ports, op: u16) -> Self {
        Self {
            src_cid: HOST,
            dst_cid: cid.into(),
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op,
            ..Self::default()
        }
    }
}

/// Between which ports a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ports {
    guest: u32,
    host: u32,
}

/// What a connection has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Somebody on the host wants it; the guest is still to be asked.
    Wanted,
    /// The guest has been asked.
    Asked,
    /// The guest has asked, and is still to be answered.
    Accepted,
    /// Both have agreed.
    Open,
    /// It is over, and the guest is to be told.
    Over,
}

/// A connection between the guest and a Unix socket.
struct Connection {
    stream: UnixStream,
    phase: Phase,
    /// What the guest has sent and the host has not taken: [`BUFFER`] bytes at most.
    waiting: VecDeque<u8>,
    /// How much the host has taken, in all, modulo 2^32; and what the guest knows of that.
    taken: u32,
    told: u32,
    /// The guest wants to know.
    asked: bool,
    /// How much has gone to the guest, in all, modulo 2^32.
    sent: u32,
    /// How much the guest can hold, and how much of `sent` it has passed on.
    guest_holds: u32,
    guest_took: u32,
    /// The host has sent nothing more for now.
    quiet: bool,
    /// What the guest has shut down, of [`BOTH`].
    guest_ended: u32,
    /// What the host has shut down, and the guest has been told.
    host_ended: u32,
}

impl Connection {
    fn new(stream: UnixStream, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            waiting: VecDeque::new(),
            taken: 0,
            told: 0,
            asked: false,
            sent: 0,
            guest_holds: 0,
            guest_took: 0,
            quiet: false,
            guest_ended: 0,
            host_ended: 0,
        }
    }

    /// How much the guest can take now. It may offer less than it once did.
    fn credit(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.guest_took);
        self.guest_holds.saturating_sub(on_the_way)
    }

    /// The guest's packet says what it can hold.
    fn learn(&mut self, header: &Header) {
        (self.guest_holds, self.guest_took) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Passes on to the host what waits, as far as it goes.
    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            match self.stream.write(self.waiting.as_slices().0) {
                Ok(written @ 1..) => {
                    self.waiting.drain(..written);
                    self.taken = self.taken.wrapping_add(written as u32);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Nobody is there to take the rest.
                Ok(0) | Err(_) => {
                    self.waiting.clear();
                    self.phase = Phase::Over;
                }
            }
        }
        if self.guest_ended & NO_MORE_SENT != 0 {
            // An error means that the other end is gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_ended == BOTH {
            self.phase = Phase::Over;
        }
    }

    /// What the next packet for the guest is for, if there is one, with its flags and the length of its content, which
    /// is in `room` then.
    fn next(&mut self, room: &mut [u8]) -> Option<(u16, u32, usize)> {
        match self.phase {
            Phase::Over => return Some((RST, 0, 0)),
            Phase::Wanted => {
                self.phase = Phase::Asked;
                return Some((REQUEST, 0, 0));
            }
            Phase::Asked => return None,
            Phase::Accepted => {
                self.phase = Phase::Open;
                return Some((RESPONSE, 0, 0));
            }
            Phase::Open => {}
        }
        // With the whole of a socket closed, and not only one direction, nobody reads there either.
        if self.host_ended == NO_MORE_SENT && self.is_hung_up() {
            self.host_ended = BOTH;
            return Some((SHUTDOWN, BOTH, 0));
        }
        let len = room.len().min(self.credit() as usize);
        let wanted = self.guest_ended & NO_MORE_RECEIVED == 0;
        if self.host_ended == 0 && wanted && !self.quiet && len > 0 {
            match self.stream.read(&mut room[..len]) {
                Ok(0) => {
                    self.host_ended = if self.is_hung_up() { BOTH } else { NO_MORE_SENT };
                    return Some((SHUTDOWN, self.host_ended, 0));
                }
                Ok(read) => {
                    self.sent = self.sent.wrapping_add(read as u32);
                    return Some((RW, 0, read));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.quiet = true,
                Err(_) => {
                    self.phase = Phase::Over;
                    return Some((RST, 0, 0));
                }
            }
        }
        // The guest gets to know in time that there is room again; most packets tell it by the way.
        if std::mem::take(&mut self.asked) || self.taken.wrapping_sub(self.told) >= BUFFER / 4 {
            return Some((CREDIT_UPDATE, 0, 0));
        }
        None
    }

    fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }
}

/// A socket device.
pub struct Vsock {
    cid: u32,
    path: PathBuf,
    listener: UnixListener,
    wake: Option<Wake>,
    /// Who has connected, and has not said yet to which port.
    strangers: Vec<UnixStream>,
    connections: BTreeMap<Ports, Connection>,
    /// The connection that sent to the guest last: the next one goes first then.
    last: Option<Ports>,
    /// Connections that the guest has forgotten, with what the host has still to take of them.
    leaving: Vec<Connection>,
    /// Resets for the guest, of connections that there are not.
    answers: VecDeque<Header>,
    next_port: u32,
    /// The guest is to forget its connections: it comes from a snapshot.
    forget: bool,
    /// The content of a packet to the guest.
    content: Vec<u8>,
}

impl Vsock {
    /// A device for the guest `cid`, which begins to listen at the Unix socket `path`.
    ///
    /// A socket there at which nobody listens any more is replaced. The socket is removed when the device goes.
    pub fn listen(cid: u32, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Listen { path: path.to_owned(), source };
        if is_left_over(path) {
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            cid,
            path: path.to_owned(),
            listener,
            wake: None,
            strangers: Vec::new(),
            connections: BTreeMap::new(),
            last: None,
            leaving: Vec::new(),
            answers: VecDeque::new(),
            next_port: FIRST_PORT,
            forget: false,
            content: vec![0; BUFFER as usize],
        })
    }

    /// Whether there is room for one more connection.
    fn has_room(&self) -> bool {
        self.strangers.len() + self.connections.len() + self.leaving.len() < CONNECTIONS
    }

    /// Has the device served when something comes over `stream`, which doesn't wait from here on.
    fn watch(&self, stream: &UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.wake.as_ref().map_or(Ok(()), |wake| wake.watch(stream))
    }

    /// Lets in who has connected on the host.
    fn accept(&mut self) {
        while self.has_room() {
            // It fails when nobody waits, or when there are no descriptors left; then it is tried again later.
            let Ok((stream, _)) = self.listener.accept() else { break };
            if self.watch(&stream).is_ok() {
                self.strangers.push(stream);
            }
        }
        for stream in std::mem::take(&mut self.strangers) {
            match greeting(&stream) {
                Ok(None) => self.strangers.push(stream),
                Ok(Some(guest)) => {
                    let ports = Ports { guest, host: self.free_port(guest) };
                    self.connections.insert(ports, Connection::new(stream, Phase::Wanted));
                }
                // Who says something else is left alone.
                Err(_) => {}
            }
        }
    }

    /// A port of the host's that has no connection to the guest's port `guest`.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&Ports { guest, host }) {
                return host;
            }
        }
    }

    /// Takes the guest's packets, as long as there is room for answers. Returns whether there is none left.
    fn transmit(&mut self, rings: &mut Rings<'_>) -> Result<bool, Broken> {
        while self.answers.len() < ANSWERS {
            let Some(chain) = rings.take(TRANSMIT)? else { break };
            let head = chain.head_index();
            let mut packet =
                chain.reader(rings.ram()).map_err(|_| Broken("buffers are not in its memory"))?;
            let mut header = [0; Header::LEN];
            packet.read_exact(&mut header).map_err(|_| Broken("packet has no whole header"))?;
            let header = Header::from_bytes(&header);
            if header.len as usize > packet.available_bytes() {
                return Err(Broken("packet is shorter than it says"));
            }
            self.take(&header, &mut packet)?;
            rings.give(TRANSMIT, head, 0)?;
        }
        Ok(self.answers.len() >= ANSWERS)
    }

    /// Takes one packet of the guest's, whose content comes from `content`.
    fn take(&mut self, header: &Header, content: &mut impl Read) -> Result<(), Broken> {
        // There is nobody but us, and nobody but this guest.
        if header.dst_cid != HOST || header.src_cid != u64::from(self.cid) {
            return Ok(());
        }
        let ports = Ports { guest: header.src_port, host: header.dst_port };
        let acceptable = header.kind == STREAM && self.has_room();
        let known = self.connections.get_mut(&ports).filter(|_| header.kind == STREAM);
        match (header.op, known) {
            (REQUEST, None) if acceptable => match self.connect(ports.host) {
                Ok(stream) => {
                    let mut connection = Connection::new(stream, Phase::Accepted);
                    connection.learn(header);
                    self.connections.insert(ports, connection);
                }
                Err(_) => self.refuse(ports),
            },
            (RST, None) => {}
            (_, None) => self.refuse(ports),
            (RST, Some(_)) => {
                if let Some(connection) = self.connections.remove(&ports)
                    && connection.guest_ended & NO_MORE_SENT != 0
                    && !connection.waiting.is_empty()
                {
                    // What it sent before it left still arrives.
                    self.leaving.push(connection);
                }
            }
            (_, Some(Connection { phase: Phase::Over, .. })) => {}
            (RESPONSE, Some(connection)) if connection.phase == Phase::Asked => {
                connection.learn(header);
                connection.phase = Phase::Open;
                // So few bytes go into a socket that has just been made, or its other end is gone.
                let greeted =
                    connection.stream.write_all(format!("OK {}\n", ports.host).as_bytes());
                if greeted.is_err() {
                    connection.phase = Phase::Over;
                }
            }
            (RW, Some(connection))
                if connection.phase == Phase::Open
                    && connection.guest_ended & NO_MORE_SENT == 0
                    && header.len <= BUFFER - connection.waiting.len() as u32 =>
            {
                connection.learn(header);
                let mut bytes = vec![0; header.len as usize];
                content
                    .read_exact(&mut bytes)
                    .map_err(|_| Broken("buffers are not in its memory"))?;
                connection.waiting.extend(bytes);
                connection.flush();
            }
            (SHUTDOWN, Some(connection)) if connection.phase == Phase::Open => {
                connection.learn(header);
                connection.guest_ended |= header.flags & BOTH;
                connection.flush();
            }
            (CREDIT_UPDATE | CREDIT_REQUEST, Some(connection)) => {
                connection.learn(header);
                connection.asked |= header.op == CREDIT_REQUEST;
            }
            // What makes no sense now, or is more than there was room for.
            (_, Some(connection)) => connection.phase = Phase::Over,
        }
        Ok(())
    }

    /// Tells the guest that there is no such connection.
    fn refuse(&mut self, ports: Ports) {
        self.answers.push_back(Header::to_guest(self.cid, ports, RST));
    }

    /// Connects to who listens on the host for the guest's connections to `port`.
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path.as_bytes())?;
        // Somebody who doesn't accept must not keep the guest's other connections waiting.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        let stream = UnixStream::from(socket);
        self.watch(&stream)?;
        Ok(stream)
    }

    /// Tells the guest that its connections are gone, if they are, once it has a buffer for that.
    fn tell(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        if self.forget
            && let Some(chain) = rings.take(EVENT)?
        {
            let head = chain.head_index();
            let event = TRANSPORT_RESET.to_le_bytes();
            let mut buffer =
                chain.writer(rings.ram()).map_err(|_| Broken("buffers are not in its memory"))?;
            buffer.write_all(&event).map_err(|_| Broken("buffers have no room for an event"))?;
            rings.give(EVENT, head, event.len() as u32)?;
            self.forget = false;
        }
        Ok(())
    }

    /// Fills the guest's buffers. Returns whether there may be more to send.
    fn receive(&mut self, rings: &mut Rings<'_>) -> Result<bool, Broken> {
        for _ in 0..AT_ONCE {
            let Some(chain) = rings.take(RECEIVE)? else { return Ok(false) };
            let head = chain.head_index();
            let mut packet =
                chain.writer(rings.ram()).map_err(|_| Broken("buffers are not in its memory"))?;
            let room = packet
                .available_bytes()
                .checked_sub(Header::LEN)
                .ok_or(Broken("buffers have no room for a header"))?;
            let Some(header) = self.next(room) else {
                rings.put_back(RECEIVE);
                return Ok(false);
            };
            packet
                .write_all(&header.to_bytes())
                .and_then(|()| packet.write_all(&self.content[..header.len as usize]))
                .map_err(|_| Broken("buffers are too short"))?;
            rings.give(RECEIVE, head, Header::LEN as u32 + header.len)?;
        }
        Ok(true)
    }

    /// The next packet for the guest, with up to `room` bytes of content, which are in `self.content` then.
    fn next(&mut self, room: usize) -> Option<Header> {
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        let room = room.min(self.content.len());
        // Whoever has sent last is the last to send again.
        let all = self.connections.keys().copied();
        let (before, after): (Vec<_>, Vec<_>) = all.partition(|ports| Some(*ports) <= self.last);
        for ports in after.into_iter().chain(before) {
            let connection = self.connections.get_mut(&ports)?;
            let Some((op, flags, len)) = connection.next(&mut self.content[..room]) else {
                continue;
            };
            let mut header = Header::to_guest(self.cid, ports, op);
            (header.flags, header.len) = (flags, len as u32);
            (header.buf_alloc, header.fwd_cnt) = (BUFFER, connection.taken);
            connection.told = connection.taken;
            self.last = Some(ports);
            if op == RST {
                self.connections.remove(&ports);
            }
            return Some(header);
        }
        None
    }
}

/// Whether `path` is a socket at which nobody listens.
fn is_left_over(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
        && UnixStream::connect(path)
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// The port that somebody on the host asks for by `CONNECT PORT\n`, when the line is there. What follows the line
/// stays in the socket.
fn greeting(stream: &UnixStream) -> io::Result<Option<u32>> {
    let mut line = [0; LINE];
    let len = match rustix::net::recv(stream, &mut line[..], RecvFlags::PEEK) {
        Ok((len @ 1.., _)) => len,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Ok(_) | Err(_) => return Err(ErrorKind::UnexpectedEof.into()),
    };
    let Some(end) = line[..len].iter().position(|byte| *byte == b'\n') else {
        return if len < LINE { Ok(None) } else { Err(ErrorKind::InvalidData.into()) };
    };
    let port = std::str::from_utf8(&line[..end])
        .ok()
        .and_then(|line| line.strip_prefix("CONNECT ")?.parse().ok())
        .ok_or(ErrorKind::InvalidData)?;
    let mut stream = stream;
    stream.read_exact(&mut line[..=end])?;
    Ok(Some(port))
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        19
    }

    fn name(&self) -> &'static str {
        "virtio vsock"
    }

    fn queues(&self) -> &[u16] {
        // The third is for events, of which there is one.
        &[128, 128, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn plug(&mut self, wake: Wake) -> io::Result<()> {
        wake.watch(&self.listener)?;
        self.wake = Some(wake);
        Ok(())
    }

    fn serve(&mut self, rings: &mut Rings<'_>) -> Result<(), Broken> {
        let was_full = !self.has_room();
        for connection in self.connections.values_mut().chain(&mut self.leaving) {
            connection.quiet = false;
            connection.flush();
        }
        self.leaving.retain(|connection| !connection.waiting.is_empty());
        self.accept();
        self.tell(rings)?;
        let had_to_wait = self.transmit(rings)?;
        let mut more = self.receive(rings)?;
        // What nothing else will wake us for: packets that waited for room for answers, and who waits at the door.
        more |= had_to_wait && self.answers.len() < ANSWERS;
        more |= was_full && self.has_room();
        if more && let Some(wake) = &self.wake {
            wake.now();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.connections.clear();
        self.leaving.clear();
        self.answers.clear();
        self.forget = false;
    }

    /// The streams' other ends are programs of this host, and go with the machine that is saved. A port that the guest
    /// has seen is not used again before it has heard of that.
    fn keep(&self) -> Value {
        self.next_port.into()
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        self.next_port = snapshot::read::<u32>(state)?.max(FIRST_PORT);
        self.forget = true;
        Ok(())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Somebody may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::super::tests::{Buffer, Driver, hostile_chains};
    use super::*;

    const CID: u32 = 42;
    /// What the driver in these tests can hold.
    const HOLDS: u32 = 100_000;

    /// A guest's side of the device.
    struct Guest {
        driver: Driver,
        /// A buffer of the guest's is on the ring.
        has_buffer: bool,
        dir: TempDir,
    }

    impl Guest {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let vsock = Vsock::listen(CID, &dir.path().join("vsock")).unwrap();
            Self { driver: Driver::new(vsock), has_buffer: false, dir }
        }

        fn path(&self, rest: &str) -> PathBuf {
            self.dir.path().join(format!("vsock{rest}"))
        }

        fn header(guest: u32, host: u32, op: u16) -> Header {
            Header {
                src_cid: CID.into(),
                dst_cid: HOST,
                src_port: guest,
                dst_port: host,
                kind: STREAM,
                op,
                buf_alloc: HOLDS,
                ..Header::default()
            }
        }

        /// Sends a packet; whether the device has taken it.
        fn send_as(&mut self, header: Header, content: &[u8]) -> bool {
            let header = Header { len: content.len() as u32, ..header };
            // In one buffer or in several: where the parts begin means nothing.
            let bytes = [&header.to_bytes(), content].concat();
            let (one, other) = bytes.split_at(bytes.len() / 2);
            self.driver.put(TRANSMIT, &[Buffer::In(one), Buffer::In(other)]);
            self.driver.serve();
            self.driver.used(TRANSMIT).is_some()
        }

        fn send(&mut self, ports: Ports, op: u16, content: &[u8]) {
            assert!(self.send_as(Self::header(ports.guest, ports.host, op), content));
        }

        /// The next packet, if there is one.
        fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
            if !std::mem::replace(&mut self.has_buffer, true) {
                self.driver.put(RECEIVE, &[Buffer::Out(44), Buffer::Out(4096)]);
            }
            self.driver.serve();
            let used = self.driver.used(RECEIVE)?;
            self.has_buffer = false;
            let header = Header::from_bytes(used.data[..44].try_into().unwrap());
            assert_eq!(used.len, 44 + header.len);
            assert_eq!((header.src_cid, header.dst_cid), (HOST, CID.into()));
            Some((header, used.data[44..used.len as usize].to_vec()))
        }

        /// The next packet has to be for this.
        fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
            let packet = self.receive().unwrap_or_else(|| panic!("no packet of kind {op}"));
            assert_eq!(packet.0.op, op, "{packet:?}");
            packet
        }

        /// Content until there is no more for now.
        fn receive_content(&mut self) -> Vec<u8> {
            let packets = std::iter::from_fn(|| self.receive());
            packets
                .inspect(|(header, _)| assert_eq!(header.op, RW))
                .flat_map(|packet| packet.1)
                .collect()
        }

        /// A connection of the host's to the guest's port 1234.
        fn connected_by_host(&mut self) -> (UnixStream, Ports) {
            let mut host = UnixStream::connect(self.path("")).unwrap();
            host.write_all(b"CONNECT 1234\n").unwrap();
            let (asked, _) = self.expect(REQUEST);
            assert_eq!((asked.dst_port, asked.kind, asked.buf_alloc), (1234, STREAM, BUFFER));
            let ports = Ports { guest: 1234, host: asked.src_port };
            self.send(ports, RESPONSE, b"");
            assert_eq!(line(&mut host), format!("OK {}\n", ports.host));
            (host, ports)
        }

        /// A connection of the guest's to the host's port 52.
        fn connected_by_guest(&mut self) -> (UnixStream, Ports) {
            let listener = UnixListener::bind(self.path("_52")).unwrap();
            let ports = Ports { guest: 1000, host: 52 };
            self.send(ports, REQUEST, b"");
            assert_eq!(self.expect(RESPONSE).0.dst_port, 1000);
            (listener.accept().unwrap().0, ports)
        }
    }

    fn line(stream: &mut UnixStream) -> String {
        let mut line = String::new();
        while !line.ends_with('\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            line.push(byte[0].into());
        }
        line
    }

    fn rest(mut stream: &UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_host_connects_to_the_guest() {
        let mut guest = Guest::new();
        assert_eq!(
            (guest.driver.read(8), guest.driver.config(0, 8)),
            (19, vec![42, 0, 0, 0, 0, 0, 0, 0])
        );
        let (mut host, ports) = guest.connected_by_host();
        host.write_all(b"hello").unwrap();
        assert_eq!(guest.expect(RW).1, b"hello");
        guest.send(ports, RW, b"world");
        let header = Header { flags: BOTH, ..Guest::header(ports.guest, ports.host, SHUTDOWN) };
        guest.send_as(header, b"");
        guest.expect(RST);
        assert_eq!(rest(&host), b"world");
        // Nobody listens in the guest: it says so, and the host's program reads the end.
        let mut host = UnixStream::connect(guest.path("")).unwrap();
        host.write_all(b"CONNECT 7\nignored").unwrap();
        let (asked, _) = guest.expect(REQUEST);
        guest.send(Ports { guest: 7, host: asked.src_port }, RST, b"");
        assert!(host.read(&mut [0]).is_err() || rest(&host).is_empty());
    }

    #[test]
    fn the_guest_connects_to_the_host() {
        let mut guest = Guest::new();
        let (mut host, ports) = guest.connected_by_guest();
        guest.send(ports, RW, b"hello");
        host.write_all(b"world").unwrap();
        assert_eq!(guest.expect(RW).1, b"world");
        // The host's program ends: nothing comes, and nothing is taken.
        let mut hello = [0; 5];
        host.read_exact(&mut hello).unwrap();
        drop(host);
        assert_eq!(guest.expect(SHUTDOWN).0.flags, BOTH);
        guest.send(ports, RST, b"");
        // Where nobody listens on the host.
        guest.send(Ports { guest: 1000, host: 53 }, REQUEST, b"");
        assert_eq!(guest.expect(RST).0.src_port, 53);
        assert_eq!(guest.receive(), None);
    }

    #[test]
    fn each_direction_ends_by_itself() {
        let mut guest = Guest::new();
        let (mut host, ports) = guest.connected_by_host();
        host.write_all(b"question").unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.expect(RW).1, b"question");
        assert_eq!(guest.expect(SHUTDOWN).0.flags, NO_MORE_SENT);
        assert_eq!(guest.receive(), None);
        guest.send(ports, RW, b"answer");
        let shutdown = |flags| Header { flags, ..Guest::header(ports.guest, ports.host, SHUTDOWN) };
        guest.send_as(shutdown(NO_MORE_SENT), b"");
        assert_eq!(rest(&host), b"answer");
        assert_eq!(guest.expect(SHUTDOWN).0.flags, BOTH);
        guest.send(ports, RST, b"");

        let (mut host, ports) = guest.connected_by_guest();
        let shutdown = |flags| Header { flags, ..Guest::header(ports.guest, ports.host, SHUTDOWN) };
        guest.send(ports, RW, b"question");
        guest.send_as(shutdown(NO_MORE_SENT), b"");
        assert_eq!(rest(&host), b"question");
        host.write_all(b"answer").unwrap();
        assert_eq!(guest.expect(RW).1, b"answer");
        guest.send_as(shutdown(BOTH), b"");
        guest.expect(RST);
    }

    #[test]
    fn neither_side_sends_more_than_the_other_can_hold() {
        let mut guest = Guest::new();
        let (mut host, ports) = guest.connected_by_guest();
        let text: Vec<u8> = (0..2 * HOLDS).map(|i| (i % 251) as u8).collect();
        let writer = thread::spawn({
            let (mut host, text) = (host.try_clone().unwrap(), text.clone());
            move || host.write_all(&text).unwrap()
        });
        let mut received = Vec::new();
        while received.len() < HOLDS as usize {
            received.extend(guest.receive_content());
        }
        assert_eq!(received.len(), HOLDS as usize);
        assert_eq!(guest.receive(), None);
        // When the guest has taken some, it gets as much more.
        let update =
            Header { fwd_cnt: HOLDS, ..Guest::header(ports.guest, ports.host, CREDIT_UPDATE) };
        guest.send_as(update, b"");
        while received.len() < text.len() {
            received.extend(guest.receive_content());
        }
        writer.join().unwrap();
        assert_eq!(received, text);

        // The other way: what the host does not take fills its socket, and then the device.
        let mut total = 0_u32;
        let mut told = 0;
        loop {
            let len = (BUFFER - (total - told)).min(4096);
            if len == 0 {
                match guest.receive() {
                    Some((header, _)) => told = header.fwd_cnt,
                    None => break,
                }
                continue;
            }
            guest.send(ports, RW, &vec![7; len as usize]);
            total += len;
        }
        assert!(total > BUFFER, "{total}");
        // The host takes it, and the guest learns of it.
        let mut taken = vec![0; total as usize];
        let reader = thread::spawn(move || {
            host.read_exact(&mut taken).unwrap();
            assert!(taken.iter().all(|byte| *byte == 7));
            host
        });
        while told < total {
            told = guest.receive().map_or(told, |(header, _)| {
                assert_eq!(header.op, CREDIT_UPDATE);
                header.fwd_cnt
            });
            guest.send(ports, CREDIT_REQUEST, b"");
        }
        let _host = reader.join().unwrap();
        while guest.receive().is_some() {}
        // Who sends more all the same is cut off.
        guest.send(ports, RW, &vec![0; BUFFER as usize + 1]);
        guest.expect(RST);
    }

    #[test]
    fn what_the_guest_sent_before_it_left_arrives() {
        let mut guest = Guest::new();
        let (host, ports) = guest.connected_by_guest();
        // More than a socket holds.
        let mut total = 0;
        let mut told = 0;
        while total - told < BUFFER {
            guest.send(ports, RW, &[1; 4096]);
            total += 4096;
            while let Some((header, _)) = guest.receive() {
                told = header.fwd_cnt;
            }
        }
        let header = Header { flags: BOTH, ..Guest::header(ports.guest, ports.host, SHUTDOWN) };
        guest.send_as(header, b"");
        guest.send(ports, RST, b"");
        let reader = thread::spawn(move || rest(&host).len());
        while !reader.is_finished() {
            guest.driver.serve();
        }
        assert_eq!(reader.join().unwrap(), total as usize);
    }

    #[test]
    fn packets_that_make_no_sense_are_refused_or_ignored() {
        let mut guest = Guest::new();
        let (_host, ports) = guest.connected_by_host();
        let good = Guest::header(5, 6, RW);
        for header in [
            Header { dst_cid: 1, ..good },
            Header { dst_cid: u64::MAX, ..good },
            Header { src_cid: 43, ..good },
            Header { op: RST, ..good },
        ] {
            guest.send_as(header, b"");
            assert_eq!(guest.receive(), None, "{header:?}");
        }
        for header in [
            good,
            Header { op: 0, ..good },
            Header { op: 99, ..good },
            Header { op: REQUEST, kind: 2, ..good },
            Header { op: RW, kind: 2, src_port: ports.guest, dst_port: ports.host, ..good },
        ] {
            guest.send_as(header, b"");
            assert_eq!(guest.receive().unwrap().0.op, RST, "{header:?}");
        }
        // On a connection: it is over.
        guest.send(ports, REQUEST, b"");
        guest.expect(RST);
        let (_host, ports) = guest.connected_by_host();
        guest.send(ports, 99, b"");
        guest.expect(RST);

        type Harm = fn(&mut Driver);
        let harms: [(&str, Harm); 3] = [
            ("no header", |driver| {
                driver.put(TRANSMIT, &[Buffer::In(&[0; 43])]);
            }),
            ("more content than there is", |driver| {
                let header = Header { len: 5, ..Guest::header(1, 2, RW) };
                driver.put(TRANSMIT, &[Buffer::In(&header.to_bytes()), Buffer::In(b"four")]);
            }),
            ("no room for a header", |driver| {
                driver.put(RECEIVE, &[Buffer::Out(43)]);
            }),
        ];
        for (name, harm) in harms {
            let mut guest = Guest::new();
            harm(&mut guest.driver);
            guest.driver.serve();
            assert!(guest.driver.broken(), "{name}");
        }
    }

    #[test]
    fn a_flood_of_requests_is_stopped_at_the_gate() {
        let mut guest = Guest::new();
        // The guest takes no answers: soon its packets wait.
        let request = |port| Guest::header(port, 53, REQUEST);
        let taken = (0..1000).take_while(|port| guest.send_as(request(*port), b"")).count();
        assert_eq!(taken, ANSWERS);
        // When it does, all go their way.
        let refused = std::iter::from_fn(|| guest.receive()).count();
        assert_eq!(refused, ANSWERS + 1);

        let mut guest = Guest::new();
        let listener = UnixListener::bind(guest.path("_52")).unwrap();
        let mut streams = Vec::new();
        for port in 0..CONNECTIONS as u32 {
            guest.send(Ports { guest: port, host: 52 }, REQUEST, b"");
            guest.expect(RESPONSE);
            streams.push(listener.accept().unwrap());
        }
        guest.send(Ports { guest: 9999, host: 52 }, REQUEST, b"");
        guest.expect(RST);
        // Who comes on the host has to wait until there is room.
        let mut host = UnixStream::connect(guest.path("")).unwrap();
        host.write_all(b"CONNECT 1234\n").unwrap();
        assert_eq!(guest.receive(), None);
        guest.send(Ports { guest: 7, host: 52 }, RST, b"");
        guest.expect(REQUEST);
        // All are gone when the driver begins anew.
        let features = guest.driver.offered();
        guest.driver.begin(features);
        guest.has_buffer = false;
        assert_eq!(streams[0].0.read(&mut [0]).unwrap(), 0);
        guest.connected_by_host();
    }

    #[test]
    fn only_who_names_a_port_gets_in() {
        let mut guest = Guest::new();
        for wrong in
            ["CONNECT\n", "CONNECT -1\n", "CONNECT 4294967296\n", "GET / HTTP/1.1\r\nHost: x\r\n"]
        {
            let mut host = UnixStream::connect(guest.path("")).unwrap();
            host.write_all(wrong.as_bytes()).unwrap();
            assert_eq!(guest.receive(), None, "{wrong}");
            // Data that nobody has read makes the end an error.
            assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)), "{wrong}");
        }
        // In pieces.
        let mut host = UnixStream::connect(guest.path("")).unwrap();
        for piece in ["CONN", "ECT 429496", "7295"] {
            host.write_all(piece.as_bytes()).unwrap();
            assert_eq!(guest.receive(), None);
        }
        host.write_all(b"\nmore").unwrap();
        assert_eq!(guest.expect(REQUEST).0.dst_port, u32::MAX);
    }

    #[test]
    fn a_socket_that_somebody_left_is_replaced_and_ours_is_not_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        drop(UnixListener::bind(&path).unwrap());
        let vsock = Vsock::listen(3, &path).unwrap();
        let refused = || Vsock::listen(3, &path).err().unwrap().to_string();
        assert!(refused().contains("Address already in use"), "{}", refused());
        drop(vsock);
        assert!(!path.exists());
        std::fs::write(&path, "a file").unwrap();
        assert!(refused().contains("Address already in use"), "{}", refused());
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    }

    #[test]
    fn a_guest_from_a_snapshot_forgets_its_connections() {
        let dir = tempfile::tempdir().unwrap();
        let mut vsock = Vsock::listen(CID, &dir.path().join("vsock")).unwrap();
        vsock.next_port = FIRST_PORT + 7;
        let kept = vsock.keep();
        drop(vsock);
        let mut driver = Driver::new(Vsock::listen(CID, &dir.path().join("vsock")).unwrap());
        driver.core.lock().device.restore(&kept).unwrap();
        assert_eq!(driver.core.lock().device.keep(), kept);
        driver.serve();
        // It is told when it has a buffer, and once.
        for told in [true, false] {
            driver.put(EVENT, &[Buffer::Out(8)]);
            driver.serve();
            let used = driver.used(EVENT);
            assert_eq!(used.is_some(), told);
            if let Some(used) = used {
                assert_eq!((used.len, used.data), (4, vec![0; 8]));
            }
        }
    }

    proptest! {
        #[test]
        fn a_header_comes_back_as_it_went(bytes: [u8; 32], more: [u8; 12]) {
            let bytes: [u8; 44] = [&bytes[..], &more].concat().try_into().unwrap();
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }

        /// Packets of any kind in any order, on few ports: the device stays what it is.
        #[test]
        fn hostile_packets_do_no_harm(
            packets in prop::collection::vec(
                (0..9u16, 0..3u32, 0..2u32, any::<[u32; 3]>(), prop::collection::vec(any::<u8>(), 0..50)),
                1..60,
            ),
        ) {
            let mut guest = Guest::new();
            let _listener = UnixListener::bind(guest.path("_0")).unwrap();
            let _host = UnixStream::connect(guest.path("")).unwrap().write_all(b"CONNECT 1\nhello");
            for (op, port, host, [flags, buf_alloc, fwd_cnt], content) in packets {
                // The host's own connection is the one with the first port.
                let host = if host == 0 { 0 } else { FIRST_PORT };
                let header = Header { flags, buf_alloc, fwd_cnt, ..Guest::header(port, host, op) };
                guest.send_as(header, &content);
                guest.receive();
            }
            prop_assert!(!guest.driver.broken());
        }

        #[test]
        fn hostile_chains_do_no_harm(
            chains in hostile_chains(), forget: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut vsock = Vsock::listen(CID, &dir.path().join("vsock")).unwrap();
            vsock.forget = forget;
            Driver::new(vsock).survives(chains);
        }
    }
}
