//! What the runner and the agent say to each other, over one virtio-serial port.
//!
//! A frame is a kind (one byte), the payload's length (four bytes, little endian) and the payload.
//! The port is a byte stream without message borders, so both sides feed a [`Decoder`].
//!
//! Data flows in four [`Stream`]s, each with *credit*: a sender may have at most [`WINDOW`] bytes
//! of a stream under way, and the receiver returns credit as it passes them on. So a program that
//! doesn't read its stdin, or a pager that doesn't read the program's stdout, never blocks the port
//! for a signal or for another stream.

use std::fmt;
use std::time::Duration;

/// Changes whenever the frames below do. A saved lab with another version is not resumed.
pub const VERSION: u32 = 2;

/// How many bytes of one stream may be under way: sent and not yet credited.
pub const WINDOW: usize = 256 << 10;

/// The largest payload of a [`Frame::Data`].
pub const MAX_DATA: usize = 32 << 10;

/// The largest payload of any frame: an environment and an argument list may have 2 MiB together
/// (`execve(2)`), and the rest of [`Frame::Exec`] is small.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// Where bytes come from or go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    /// To the program: its stdin, or what is typed at its terminal.
    Stdin = 0,
    /// From the program, if its stdout is no terminal.
    Stdout = 1,
    /// From the program, if its stderr is no terminal.
    Stderr = 2,
    /// From the program's terminal.
    Terminal = 3,
}

impl Stream {
    /// All of them; a stream's number is its place.
    pub const ALL: [Stream; 4] = [Stream::Stdin, Stream::Stdout, Stream::Stderr, Stream::Terminal];

    fn from_byte(byte: u8) -> Result<Stream, Error> {
        Self::ALL.get(usize::from(byte)).copied().ok_or(Error::Payload)
    }
}

/// The four mode words of a terminal (`termios(3)`), so that the lab's is as the host's was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Modes {
    /// `c_iflag`.
    pub input: u32,
    /// `c_oflag`.
    pub output: u32,
    /// `c_cflag`.
    pub control: u32,
    /// `c_lflag`.
    pub local: u32,
}

/// A program to run, and as whom, where and with what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// The host's time since 1970: the lab's clock stood still while it was saved.
    pub time: Duration,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// The program and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// The environment, `NAME=value` each.
    pub env: Vec<Vec<u8>>,
    /// KVM's parameter `min_timer_period_us`, if it is not to stay as it is.
    pub min_timer_period_us: Option<u32>,
    /// Which of the file descriptors 0, 1 and 2 are terminals.
    pub terminals: [bool; 3],
    /// How the host's terminal was set; without meaning if none of the three is one.
    pub modes: Modes,
    /// The host terminal's size.
    pub size: Size,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Agent: modules are loaded and I wait for a program. Carries [`VERSION`].
    Ready(u32),
    /// Runner: run this.
    Exec(Exec),
    /// Agent: it runs.
    Started,
    /// Agent: it could not be started, and why.
    Failed(String),
    /// Either: bytes of a stream, at most [`MAX_DATA`].
    Data(Stream, Vec<u8>),
    /// The sender: no more bytes will come. The receiver: no more bytes are wanted.
    Eof(Stream),
    /// The receiver: this many bytes have been passed on.
    Credit(Stream, u32),
    /// Runner: the terminal's size has changed.
    Resize(Size),
    /// Runner: send this signal to the program's process group.
    Signal(i32),
    /// Agent: the program ended with this code, and all its output has been sent.
    Exited(i32),
    /// Agent: the program died by this signal, and all its output has been sent.
    Killed(i32),
}

/// Bytes which are no frame. Both sides are ours, so this means a mix of versions or a flaw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No frame has this kind.
    Kind(u8),
    /// A payload longer than [`MAX_PAYLOAD`].
    Length(u32),
    /// A payload that isn't what its kind says.
    Payload,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Kind(kind) => write!(f, "a frame of unknown kind {kind}"),
            Error::Length(length) => write!(f, "a frame of {length} bytes, above {MAX_PAYLOAD}"),
            Error::Payload => write!(f, "a frame whose payload does not fit its kind"),
        }
    }
}

impl std::error::Error for Error {}

const HEADER: usize = 5;

impl Frame {
    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([0; HEADER]);
        let kind = match self {
            Frame::Ready(version) => {
                put_u32(out, *version);
                0
            }
            Frame::Exec(exec) => {
                exec.encode(out);
                1
            }
            Frame::Started => 2,
            Frame::Failed(why) => {
                out.extend(why.as_bytes());
                3
            }
            Frame::Data(stream, bytes) => {
                out.push(*stream as u8);
                out.extend(bytes);
                4
            }
            Frame::Eof(stream) => {
                out.push(*stream as u8);
                5
            }
            Frame::Credit(stream, bytes) => {
                out.push(*stream as u8);
                put_u32(out, *bytes);
                6
            }
            Frame::Resize(size) => {
                size.encode(out);
                7
            }
            Frame::Signal(signal) => {
                put_u32(out, signal.cast_unsigned());
                8
            }
            Frame::Exited(code) => {
                put_u32(out, code.cast_unsigned());
                9
            }
            Frame::Killed(signal) => {
                put_u32(out, signal.cast_unsigned());
                10
            }
        };
        let length = (out.len() - start - HEADER) as u32;
        out[start] = kind;
        out[start + 1..start + HEADER].copy_from_slice(&length.to_le_bytes());
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Frame, Error> {
        let mut from = Reader(payload);
        let frame = match kind {
            0 => Frame::Ready(from.u32()?),
            1 => Frame::Exec(Exec::decode(&mut from)?),
            2 => Frame::Started,
            3 => Frame::Failed(String::from_utf8_lossy(from.rest()).into_owned()),
            4 => Frame::Data(Stream::from_byte(from.u8()?)?, from.rest().to_vec()),
            5 => Frame::Eof(Stream::from_byte(from.u8()?)?),
            6 => Frame::Credit(Stream::from_byte(from.u8()?)?, from.u32()?),
            7 => Frame::Resize(Size::decode(&mut from)?),
            8 => Frame::Signal(from.i32()?),
            9 => Frame::Exited(from.i32()?),
            10 => Frame::Killed(from.i32()?),
            _ => return Err(Error::Kind(kind)),
        };
        if from.0.is_empty() { Ok(frame) } else { Err(Error::Payload) }
    }
}

impl Exec {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.time.as_secs().to_le_bytes());
        put_u32(out, self.time.subsec_nanos());
        for word in [self.uid, self.gid, self.umask] {
            put_u32(out, word);
        }
        put_u32(out, self.groups.len() as u32);
        for group in &self.groups {
            put_u32(out, *group);
        }
        put_bytes(out, &self.cwd);
        for list in [&self.argv, &self.env] {
            put_u32(out, list.len() as u32);
            for bytes in list {
                put_bytes(out, bytes);
            }
        }
        out.push(self.min_timer_period_us.is_some().into());
        put_u32(out, self.min_timer_period_us.unwrap_or_default());
        out.extend(self.terminals.map(u8::from));
        for word in [self.modes.input, self.modes.output, self.modes.control, self.modes.local] {
            put_u32(out, word);
        }
        self.size.encode(out);
    }

    fn decode(from: &mut Reader<'_>) -> Result<Exec, Error> {
        let seconds = u64::from(from.u32()?) | u64::from(from.u32()?) << 32;
        let nanos = from.u32()?;
        if nanos >= 1_000_000_000 {
            return Err(Error::Payload);
        }
        Ok(Exec {
            time: Duration::new(seconds, nanos),
            uid: from.u32()?,
            gid: from.u32()?,
            umask: from.u32()?,
            groups: from.list(Reader::u32)?,
            cwd: from.bytes()?,
            argv: from.list(Reader::bytes)?,
            env: from.list(Reader::bytes)?,
            min_timer_period_us: {
                let (given, period) = (from.bool()?, from.u32()?);
                given.then_some(period)
            },
            terminals: [from.bool()?, from.bool()?, from.bool()?],
            modes: Modes {
                input: from.u32()?,
                output: from.u32()?,
                control: from.u32()?,
                local: from.u32()?,
            },
            size: Size::decode(from)?,
        })
    }
}

impl Size {
    fn encode(self, out: &mut Vec<u8>) {
        out.extend(self.rows.to_le_bytes());
        out.extend(self.columns.to_le_bytes());
    }

    fn decode(from: &mut Reader<'_>) -> Result<Size, Error> {
        let word = from.u32()?;
        Ok(Size { rows: word as u16, columns: (word >> 16) as u16 })
    }
}

fn put_u32(out: &mut Vec<u8>, word: u32) {
    out.extend(word.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(out, bytes.len() as u32);
    out.extend(bytes);
}

/// Takes values off the front of a payload.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let (head, tail) = self.0.split_at_checked(length).ok_or(Error::Payload)?;
        self.0 = tail;
        Ok(head)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.take(1)?[0])
    }

    fn bool(&mut self) -> Result<bool, Error> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Error::Payload),
        }
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn i32(&mut self) -> Result<i32, Error> {
        Ok(self.u32()?.cast_signed())
    }

    fn bytes(&mut self) -> Result<Vec<u8>, Error> {
        let length = self.u32()? as usize;
        Ok(self.take(length)?.to_vec())
    }

    /// A counted list. It grows by what is really there, never by what the count claims.
    fn list<T>(&mut self, item: impl Fn(&mut Self) -> Result<T, Error>) -> Result<Vec<T>, Error> {
        let count = self.u32()?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(item(self)?);
        }
        Ok(list)
    }
}

/// Makes frames of a byte stream, however it is cut.
#[derive(Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// How much of `bytes` has been made into frames.
    done: usize,
}

impl Decoder {
    /// Adds bytes that were read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.done);
        self.done = 0;
        self.bytes.extend(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// Bytes that are no frame. There is no way to find the next frame's start after that.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Error> {
        let mut from = Reader(&self.bytes[self.done..]);
        let (Ok(kind), Ok(length)) = (from.u8(), from.u32()) else { return Ok(None) };
        if length as usize > MAX_PAYLOAD {
            return Err(Error::Length(length));
        }
        let Ok(payload) = from.take(length as usize) else { return Ok(None) };
        self.done += HEADER + length as usize;
        Frame::decode(kind, payload).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn stream() -> impl Strategy<Value = Stream> {
        proptest::sample::select(Stream::ALL.to_vec())
    }

    fn size() -> impl Strategy<Value = Size> {
        any::<(u16, u16)>().prop_map(|(rows, columns)| Size { rows, columns })
    }

    fn exec() -> impl Strategy<Value = Exec> {
        let who = (any::<(u64, u32, u32, u32)>(), 0..1_000_000_000u32, vec(any::<u32>(), 0..5));
        let text = || vec(any::<u8>(), 0..20);
        let what = (text(), vec(text(), 0..5), vec(text(), 0..5), any::<Option<u32>>());
        let terminal = (any::<[bool; 3]>(), any::<[u32; 4]>(), size());
        (who, what, terminal).prop_map(
            |(
                ((time, uid, gid, umask), nanos, groups),
                (cwd, argv, env, timer),
                (terminals, m, size),
            )| {
                Exec {
                    time: Duration::new(time, nanos),
                    uid,
                    gid,
                    groups,
                    umask,
                    cwd,
                    argv,
                    env,
                    min_timer_period_us: timer,
                    terminals,
                    modes: Modes { input: m[0], output: m[1], control: m[2], local: m[3] },
                    size,
                }
            },
        )
    }

    fn frame() -> impl Strategy<Value = Frame> {
        prop_oneof![
            any::<u32>().prop_map(Frame::Ready),
            exec().prop_map(Frame::Exec),
            Just(Frame::Started),
            any::<String>().prop_map(Frame::Failed),
            (stream(), vec(any::<u8>(), 0..200)).prop_map(|(s, bytes)| Frame::Data(s, bytes)),
            stream().prop_map(Frame::Eof),
            (stream(), any::<u32>()).prop_map(|(s, n)| Frame::Credit(s, n)),
            size().prop_map(Frame::Resize),
            any::<i32>().prop_map(Frame::Signal),
            any::<i32>().prop_map(Frame::Exited),
            any::<i32>().prop_map(Frame::Killed),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut(frames in vec(frame(), 0..8), cuts in vec(1..40usize, 1..20)) {
            let mut bytes = Vec::new();
            frames.iter().for_each(|frame| frame.encode(&mut bytes));
            let (mut decoder, mut found, mut rest) = (Decoder::default(), Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                decoder.push(head);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    found.push(frame);
                }
                rest = tail;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(found, frames);
        }

        #[test]
        fn any_bytes_end_in_frames_or_an_error(bytes in vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(frame)) = decoder.next_frame() {
                let mut again = Vec::new();
                frame.encode(&mut again);
                prop_assert!(again.len() >= HEADER);
            }
        }

        #[test]
        fn a_damaged_payload_never_allocates_by_its_count(count in 1000..u32::MAX) {
            let mut bytes = Vec::new();
            Frame::Exec(Exec::default()).encode(&mut bytes);
            let groups = HEADER + 12 + 12;
            bytes[groups..groups + 4].copy_from_slice(&count.to_le_bytes());
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            prop_assert_eq!(decoder.next_frame(), Err(Error::Payload));
        }
    }

    #[test]
    fn an_oversized_or_unknown_frame_is_refused_from_its_header() {
        let mut decoder = Decoder::default();
        decoder.push(&[4, 0, 0, 0, 1]);
        assert_eq!(decoder.next_frame(), Err(Error::Length(1 << 24)));
        let mut decoder = Decoder::default();
        decoder.push(&[77, 0, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Err(Error::Kind(77)));
    }
}
