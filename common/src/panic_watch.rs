//! Introduced by stage 08: noticing that the guest's kernel has panicked, by its last words on the console.
//!
//! A kernel has no other way to tell: after a panic it restarts the machine, as after `reboot`, or waits for
//! ever, as when idle.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::run::{Ending, Stop};

/// How a kernel's last message begins, and how the very last one does, if nothing follows.
const PANIC: &[u8] = b"Kernel panic - not syncing: ";
const PANIC_END: &[u8] = b"---[ end Kernel panic - not syncing: ";

/// The longest line that is looked at, in bytes.
const LINE: usize = 1024;

/// Passes on what the guest prints, and notices when its kernel panics.
pub struct PanicWatch<W> {
    out: W,
    /// The current line, cut off at [`LINE`] bytes.
    line: Vec<u8>,
    panicked: Panicked,
    stop: Stop,
}

/// Whether the kernel has panicked, and why.
#[derive(Clone, Debug, Default)]
pub struct Panicked(Arc<Mutex<Option<String>>>);

impl Panicked {
    /// A restart after a panic is a panic.
    pub fn judge(&self, ending: Ending) -> Ending {
        let reason = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (ending, reason) {
            (Ending::Reset, Some(reason)) => Ending::Panicked(reason),
            (ending, _) => ending,
        }
    }
}

impl<W: Write> PanicWatch<W> {
    /// A writer to `out` that remembers a panic, and ends the machine when it sees a kernel say that
    /// nothing will follow (`panic=0` on its command line).
    pub fn new(out: W, stop: Stop) -> (Self, Panicked) {
        let panicked = Panicked::default();
        (Self { out, line: Vec::new(), panicked: panicked.clone(), stop }, panicked)
    }

    /// The same watch over what another console of the same machine prints to `out`.
    pub fn also<V: Write>(&self, out: V) -> PanicWatch<V> {
        let (panicked, stop) = (self.panicked.clone(), self.stop.clone());
        PanicWatch { out, line: Vec::new(), panicked, stop }
    }

    /// Looks at a complete line.
    fn look(&mut self) {
        let line = without_timestamp(&self.line);
        // It ends up in a message of ours, where a guest has no terminal to control.
        let reason = |text: &[u8]| {
            let text = String::from_utf8_lossy(text);
            text.trim_end().replace(char::is_control, "\u{fffd}")
        };
        if let Some(text) = line.strip_prefix(PANIC) {
            let mut panicked = self.panicked.0.lock().unwrap_or_else(PoisonError::into_inner);
            panicked.get_or_insert_with(|| reason(text));
        } else if let Some(text) = line.strip_prefix(PANIC_END) {
            let text = reason(text);
            let text = text.strip_suffix(" ]---").unwrap_or(&text);
            self.stop.now(Ending::Panicked(text.to_owned()));
        }
    }
}

/// A line of the kernel's without the `[    1.234567] ` before it.
fn without_timestamp(line: &[u8]) -> &[u8] {
    let rest = line.strip_prefix(b"[").and_then(|line| {
        let end = line.iter().position(|&byte| byte == b']')?;
        let time = line[..end].iter().all(|byte| byte.is_ascii_digit() || b" .".contains(byte));
        line[end + 1..].strip_prefix(b" ").filter(|_| time)
    });
    rest.unwrap_or(line)
}

impl<W: Write> Write for PanicWatch<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        for &byte in &bytes[..written] {
            match byte {
                b'\n' => {
                    self.look();
                    self.line.clear();
                }
                _ if self.line.len() < LINE => self.line.push(byte),
                _ => {}
            }
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run;

    fn watch(text: &str) -> (Option<Ending>, Ending) {
        let (stop, stopped) = run::stop();
        let (mut watch, panicked) = PanicWatch::new(io::sink(), stop);
        for piece in text.as_bytes().chunks(3) {
            watch.write_all(piece).unwrap();
        }
        (stopped.ending(), panicked.judge(Ending::Reset))
    }

    #[test]
    fn a_restart_after_a_panic_is_no_restart() {
        let panic = || Ending::Panicked("VFS: no root".into());
        let text =
            "ok\r\n[    1.500000] Kernel panic - not syncing: VFS: no root\r\n[    1.6] CPU: 0\r\n";
        assert_eq!(watch(text), (None, panic()));
        assert_eq!(watch("Kernel panic - not syncing: VFS: no root\n"), (None, panic()));
        // With panic=0 the kernel says that nothing follows, and waits for ever.
        let end = "[    2.0] ---[ end Kernel panic - not syncing: VFS: no root ]---\r\n";
        assert_eq!(watch(end).0, Some(panic()));
    }

    #[test]
    fn two_consoles_of_a_machine_are_watched() {
        let (stop, _stopped) = run::stop();
        let (mut serial, panicked) = PanicWatch::new(io::sink(), stop);
        let mut other = serial.also(io::sink());
        // What one of them prints is no part of the other's line.
        serial.write_all(b"early").unwrap();
        other.write_all(b"Kernel panic - not syncing: x\r\n").unwrap();
        assert_eq!(panicked.judge(Ending::Reset), Ending::Panicked("x".into()));
    }

    #[test]
    fn a_reason_cannot_control_the_terminal_that_it_is_told_on() {
        let (_, ending) = watch("Kernel panic - not syncing: \x1b]0;title\x07\u{9b}2J\r\n");
        let told = "\u{fffd}]0;title\u{fffd}\u{fffd}2J";
        assert_eq!(ending, Ending::Panicked(told.into()));
    }

    #[test]
    fn other_text_is_no_panic() {
        for text in [
            "a restart\r\n",
            "# echo Kernel panic - not syncing: x\r\n",
            "[a] Kernel panic - not syncing: x\r\n",
            "Kernel panic - not syncing: in a line without an end",
        ] {
            assert_eq!(watch(text), (None, Ending::Reset), "{text}");
        }
        let long = "x".repeat(5000) + "\n";
        assert_eq!(watch(&long), (None, Ending::Reset));
    }
}
