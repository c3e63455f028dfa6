//! One program, and everything that goes in and out of it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use lab::protocol::{Decoder, Exec, Frame, MAX_DATA, Size, Stream, WINDOW};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, fchown, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, Uid, WaitOptions, WaitStatus, kill_process_group, pidfd_open, wait,
};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, Winsize, tcgetattr,
    tcgetpgrp, tcsetattr, tcsetwinsize,
};

use crate::{boot, child};

/// Waits for the one program, runs it, tells its end, and waits to be switched off.
pub fn serve(port: File) -> io::Result<()> {
    let mut port = Port { file: port, decoder: Decoder::default(), out: Vec::new() };
    let exec = loop {
        port.wait()?;
        port.fill()?;
        match port.next()? {
            Some(Frame::Exec(exec)) => break exec,
            Some(_) => return Err(io::Error::other("the first frame starts no program")),
            None => {}
        }
    };
    match Program::start(&exec) {
        Ok(program) => {
            port.send(&Frame::Started);
            let end = program.relay(&mut port)?;
            // What shared mappings have changed must be in the host's files before the host
            // hears of the end.
            rustix::fs::sync();
            port.send(&end);
        }
        Err(error) => port.send(&Frame::Failed(error.to_string())),
    }
    // The runner ends the machine; powering off here would race with its reading the last frame.
    loop {
        port.drain()?;
        port.wait()?;
        port.fill()?;
        while port.next()?.is_some() {}
    }
}

/// The virtio-serial port, not blocking.
struct Port {
    file: File,
    decoder: Decoder,
    out: Vec<u8>,
}

impl Port {
    fn send(&mut self, frame: &Frame) {
        frame.encode(&mut self.out);
    }

    fn next(&mut self) -> io::Result<Option<Frame>> {
        self.decoder.next_frame().map_err(io::Error::other)
    }

    /// Whether what waits to be sent is so much that outputs should wait, too.
    fn is_full(&self) -> bool {
        self.out.len() >= WINDOW
    }

    /// What to wait for: always input, and room if there is something to send.
    fn interest(&self) -> PollFlags {
        if self.out.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
    }

    fn wait(&self) -> io::Result<()> {
        sleep(&mut [PollFd::new(&self.file, self.interest())])
    }

    /// Reads what is there. The host's end never closes while the machine runs.
    fn fill(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        while let Some(bytes @ 1..) = now(self.file.read(&mut buffer))? {
            self.decoder.push(&buffer[..bytes]);
        }
        Ok(())
    }

    /// Writes what the port takes.
    fn drain(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match now(self.file.write(&self.out))? {
                None | Some(0) => break,
                Some(bytes) => drop(self.out.drain(..bytes)),
            }
        }
        Ok(())
    }
}

/// Waits until one of `fds` is ready.
fn sleep(fds: &mut [PollFd<'_>]) -> io::Result<()> {
    match poll(fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes "not now" of the errors that mean it.
fn now(result: io::Result<usize>) -> io::Result<Option<usize>> {
    use io::ErrorKind::{Interrupted, WouldBlock};
    match result {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One of the program's outputs.
struct Output {
    stream: Stream,
    /// Gone once it has ended, or once nobody reads it any more.
    file: Option<File>,
    credit: usize,
}

impl Output {
    fn new(stream: Stream, file: Option<File>) -> io::Result<Output> {
        if let Some(file) = &file {
            nonblocking(file)?;
        }
        Ok(Output { stream, file, credit: WINDOW })
    }

    /// The file, if there is one and its bytes may be sent.
    fn may_send(&self, port: &Port) -> Option<&File> {
        self.file.as_ref().filter(|_| self.credit > 0 && !port.is_full())
    }

    /// Moves up to one frame's bytes to the port; `false` if there are none at present.
    fn pump(&mut self, port: &mut Port) -> bool {
        let room = self.credit.min(MAX_DATA);
        let mut buffer = [0; MAX_DATA];
        let Some(mut file) = self.may_send(port) else { return false };
        match now(file.read(&mut buffer[..room])) {
            Ok(None) => false,
            Ok(Some(bytes @ 1..)) => {
                self.credit -= bytes;
                port.send(&Frame::Data(self.stream, buffer[..bytes].to_vec()));
                true
            }
            // A terminal says EIO once the last program has closed its side.
            Ok(Some(0)) | Err(_) => {
                self.file = None;
                port.send(&Frame::Eof(self.stream));
                false
            }
        }
    }
}

/// The program, running.
struct Program {
    pid: Pid,
    pidfd: OwnedFd,
    /// Our side of its terminal, if it has one.
    terminal: Option<File>,
    /// Where its input goes, the terminal or a pipe, and what waits to go there.
    stdin: Option<File>,
    typed: Vec<u8>,
    /// The runner has sent the last of it.
    typed_all: bool,
    outputs: [Output; 3],
}

impl Program {
    fn start(exec: &Exec) -> io::Result<Program> {
        boot::prepare(exec)?;
        let (terminal, slave) = match exec.terminals.contains(&true) {
            true => terminal(exec).map(|(master, slave)| (Some(master), Some(slave)))?,
            false => (None, None),
        };
        let again = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        // The program's side and ours of each of its three streams.
        let side = |number: usize| -> io::Result<(Stdio, Option<File>)> {
            if exec.terminals[number] {
                let slave = again(&slave)?.map_or_else(Stdio::null, Stdio::from);
                let keyboard = if number == 0 { again(&terminal)? } else { None };
                return Ok((slave, keyboard));
            }
            let (reader, writer) = io::pipe()?;
            let (theirs, ours) = match number {
                0 => (Stdio::from(reader), OwnedFd::from(writer)),
                _ => (Stdio::from(writer), OwnedFd::from(reader)),
            };
            Ok((theirs, Some(ours.into())))
        };
        let (their_stdin, stdin) = side(0)?;
        let (their_stdout, stdout) = side(1)?;
        let (their_stderr, stderr) = side(2)?;
        if let Some(stdin) = &stdin {
            nonblocking(stdin)?;
        }
        let child = child::command(exec)
            .stdin(their_stdin)
            .stdout(their_stdout)
            .stderr(their_stderr)
            .spawn()?;
        let pid = Pid::from_child(&child);
        Ok(Program {
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty())?,
            stdin,
            typed: Vec::new(),
            typed_all: false,
            outputs: [
                Output::new(Stream::Stdout, stdout)?,
                Output::new(Stream::Stderr, stderr)?,
                Output::new(Stream::Terminal, again(&terminal)?)?,
            ],
            terminal,
        })
    }

    /// Carries everything until the program has ended; returns the frame that tells its end.
    fn relay(mut self, port: &mut Port) -> io::Result<Frame> {
        let end = loop {
            self.step(port)?;
            if let Some(end) = self.reap()? {
                break end;
            }
            self.wait(port)?;
        };
        // What it has left in its pipes. This doesn't wait for their end, which a process left in
        // the background may put off for ever.
        while self.step(port)? || self.is_held_up(port) {
            if self.is_held_up(port) {
                port.wait()?;
            }
        }
        Ok(end)
    }

    /// Moves what can be moved without waiting; `true` if some of it was output.
    fn step(&mut self, port: &mut Port) -> io::Result<bool> {
        port.fill()?;
        while let Some(frame) = port.next()? {
            self.obey(frame, port);
        }
        self.feed(port);
        let mut moved = false;
        for output in &mut self.outputs {
            moved |= output.pump(port);
        }
        port.drain()?;
        Ok(moved)
    }

    /// Whether an output has to wait for the runner.
    fn is_held_up(&self, port: &Port) -> bool {
        self.outputs.iter().any(|output| output.file.is_some() && output.may_send(port).is_none())
    }

    /// Sleeps until there is something to do.
    fn wait(&self, port: &Port) -> io::Result<()> {
        let mut fds =
            vec![PollFd::new(&port.file, port.interest()), PollFd::new(&self.pidfd, PollFlags::IN)];
        if let (Some(stdin), false) = (&self.stdin, self.typed.is_empty()) {
            fds.push(PollFd::new(stdin, PollFlags::OUT));
        }
        let outputs = self.outputs.iter().filter_map(|output| output.may_send(port));
        fds.extend(outputs.map(|file| PollFd::new(file, PollFlags::IN)));
        sleep(&mut fds)
    }

    fn obey(&mut self, frame: Frame, port: &mut Port) {
        match frame {
            Frame::Data(Stream::Stdin, bytes) if self.stdin.is_some() => self.typed.extend(bytes),
            // Nobody reads any more: take it and forget it.
            Frame::Data(Stream::Stdin, bytes) => {
                port.send(&Frame::Credit(Stream::Stdin, bytes.len() as u32));
            }
            Frame::Eof(Stream::Stdin) => self.typed_all = true,
            // The runner's own output is closed: the program shall get its SIGPIPE.
            Frame::Eof(stream) => {
                if let Some(output) = self.output(stream) {
                    output.file = None;
                }
            }
            Frame::Credit(stream, bytes) => {
                if let Some(output) = self.output(stream) {
                    output.credit = (output.credit + bytes as usize).min(WINDOW);
                }
            }
            Frame::Resize(size) => {
                if let Some(terminal) = &self.terminal {
                    let _ = tcsetwinsize(terminal, winsize(size));
                }
            }
            Frame::Signal(number) => self.signal(number),
            // A second program, or what only the agent says.
            Frame::Exec(_)
            | Frame::Ready(_)
            | Frame::Started
            | Frame::Failed(_)
            | Frame::Data(..)
            | Frame::Exited(_)
            | Frame::Killed(_) => {}
        }
    }

    fn output(&mut self, stream: Stream) -> Option<&mut Output> {
        self.outputs.iter_mut().find(|output| output.stream == stream)
    }

    /// Sends a signal to the terminal's foreground group, or to the program's own.
    fn signal(&self, number: i32) {
        let Some(signal) = Signal::from_named_raw(number) else { return };
        let foreground = self.terminal.as_ref().and_then(|terminal| tcgetpgrp(terminal).ok());
        let _ = kill_process_group(foreground.unwrap_or(self.pid), signal);
    }

    /// Hands the program what was typed, as much as it takes.
    fn feed(&mut self, port: &mut Port) {
        while let (Some(stdin), false) = (&mut self.stdin, self.typed.is_empty()) {
            match now(stdin.write(&self.typed)) {
                Ok(None | Some(0)) => break,
                Ok(Some(bytes)) => {
                    self.typed.drain(..bytes);
                    port.send(&Frame::Credit(Stream::Stdin, bytes as u32));
                }
                Err(_) => {
                    self.stdin = None;
                    port.send(&Frame::Credit(Stream::Stdin, self.typed.len() as u32));
                    port.send(&Frame::Eof(Stream::Stdin));
                    self.typed.clear();
                }
            }
        }
        if self.typed_all && self.typed.is_empty() {
            self.stdin = None;
        }
    }

    /// Collects every process that has ended: as process 1 the agent inherits the orphans.
    fn reap(&mut self) -> io::Result<Option<Frame>> {
        let mut end = None;
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.pid => end = frame_of(status).or(end),
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) | Err(Errno::CHILD) => return Ok(end),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn frame_of(status: WaitStatus) -> Option<Frame> {
    let exited = status.exit_status().map(Frame::Exited);
    exited.or_else(|| status.terminating_signal().map(Frame::Killed))
}

fn nonblocking(file: &File) -> io::Result<()> {
    Ok(fcntl_setfl(file, fcntl_getfl(file)? | OFlags::NONBLOCK)?)
}

/// Makes a terminal that is as the host's was: our side and the program's.
fn terminal(exec: &Exec) -> io::Result<(File, File)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let slave =
        rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    tcsetwinsize(&master, winsize(exec.size))?;
    let mut termios = tcgetattr(&slave)?;
    termios.input_modes = InputModes::from_bits_retain(exec.modes.input);
    termios.output_modes = OutputModes::from_bits_retain(exec.modes.output);
    termios.control_modes = ControlModes::from_bits_retain(exec.modes.control);
    termios.local_modes = LocalModes::from_bits_retain(exec.modes.local);
    tcsetattr(&slave, OptionalActions::Now, &termios)?;
    fchown(&slave, Some(Uid::from_raw(exec.uid)), None)?;
    Ok((master.into(), slave.into()))
}

fn winsize(size: Size) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}
