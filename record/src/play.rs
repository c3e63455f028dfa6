//! Plays a script: types into a shell on a terminal, and keeps what that prints.
//!
//! The times in the recording are not the real ones: a film that is made on a slow machine shall be neither longer nor
//! livelier than one made on a quick one. Typing takes the time that a person takes, which a fixed seed varies; a line that is
//! printed takes the same as every other; and waiting takes [`ANSWER`], however long it was. What is printed is what was
//! printed, and nothing of it is left out.

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cli::cast::{Cast, Event, Header};
use testkit::Terminal;

use crate::script::{Script, Step, bytes};

/// The prompt of the shell that everything begins in.
const PROMPT: &str = "$ ";

/// From a line that was typed to the first that it prints.
const ANSWER: Duration = Duration::from_millis(320);

/// From a line that is printed to the next, while all of them together take less than [`PAGES`].
const LINE: Duration = Duration::from_millis(25);
const PAGES: Duration = Duration::from_secs(2);

/// From a key that is pressed to the next.
const KEY: Duration = Duration::from_millis(450);

/// How long a key that was typed may take to be echoed: not all are.
const ECHO: Duration = Duration::from_secs(3);

/// How often the end of the shell is looked for.
const TICK: Duration = Duration::from_millis(20);

/// What programs ask their terminal: where is the cursor (ECMA-48: DSR)? It is answered, and is not part of what the
/// recording shows: whoever plays that would have his terminal answer again.
const QUESTION: &[u8] = b"\x1b[6n";

/// Plays `script` in the empty folder `folder`, and tells `step` what is being done.
pub fn play(script: &Script, folder: &Path, mut step: impl FnMut(usize, &str)) -> Result<Cast> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    prepare(script, folder)?;

    let mut shell = shell(folder);
    shell.arg("-i").env("PS1", PROMPT);
    let mut session = Session::start(script, &mut shell)?;
    session.wait(PROMPT, ECHO)?;
    for (number, wanted) in (1..).zip(&script.steps) {
        let what = wanted.line.clone().unwrap_or_else(|| wanted.press.join(" "));
        step(number, &what);
        session.play(wanted).with_context(|| format!("step {number}"))?;
    }
    Ok(session.cast(script))
}

/// A shell in the session's folder, where every run finds the same.
fn shell(folder: &Path) -> Command {
    let mut shell = Command::new("sh");
    shell.current_dir(folder).env_remove("ENV").env("CARGO_TERM_COLOR", "always");
    // On whichever machine a film is made, it shows what the lab shows.
    if std::env::var_os("MINI_KVM").is_none() {
        shell.env("MINI_KVM", "lab");
    }
    shell
}

fn prepare(script: &Script, folder: &Path) -> Result<()> {
    let output =
        shell(folder).args(["-ec", &script.prepare]).output().context("cannot start sh")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.lines().last().unwrap_or("it gives no reason").to_owned();
    ensure!(output.status.success(), "what the script does to prepare fails: {why}");
    Ok(())
}

/// A shell on a terminal, and the recording so far.
struct Session {
    terminal: Terminal,
    window: vt100::Parser,
    /// What was printed and is not in the recording yet.
    unseen: Vec<u8>,
    /// The beginning of a [`QUESTION`], perhaps.
    begun: Vec<u8>,
    /// The film's time.
    clock: Duration,
    hands: Hands,
    events: Vec<(Duration, Event)>,
    poster: Option<Duration>,
    /// What was printed, whose characters may come in pieces.
    piece: Vec<u8>,
}

impl Session {
    fn start(script: &Script, shell: &mut Command) -> Result<Self> {
        let size = |n| NonZero::new(n).context("a window has rows and columns");
        let (rows, columns) = (size(script.rows)?, size(script.columns)?);
        let terminal =
            Terminal::start(shell, rows, columns).context("cannot start sh on a terminal")?;
        Ok(Self {
            terminal,
            window: vt100::Parser::new(rows, columns, 0),
            unseen: Vec::new(),
            begun: Vec::new(),
            clock: Duration::ZERO,
            hands: Hands(0x6D69_6E69_2D6B_766D),
            events: Vec::new(),
            poster: None,
            piece: Vec::new(),
        })
    }

    fn play(&mut self, step: &Step) -> Result<()> {
        if let Some(caption) = &step.caption {
            self.event(Event::Marker(format!("{}\n{}", caption.ko, caption.en)));
        }
        self.clock += Duration::from_secs_f64(step.before);
        if let Some(line) = &step.line {
            self.type_line(line)?;
        }
        if !step.press.is_empty() {
            self.event(Event::Input(step.press.join(" ")));
            for key in &step.press {
                self.clock += KEY;
                self.terminal.type_in(&bytes(key)?).context("cannot type")?;
            }
        }
        if let Some(text) = &step.wait {
            self.clock += ANSWER;
            self.wait(text, Duration::from_secs_f64(step.limit))?;
        }
        self.clock += Duration::from_secs_f64(step.pause);
        if step.poster {
            self.poster = Some(self.clock);
        }
        Ok(())
    }

    fn type_line(&mut self, line: &str) -> Result<()> {
        let mut utf8 = [0; 4];
        for key in line.chars() {
            self.clock += self.hands.until(key);
            let key = key.encode_utf8(&mut utf8).as_bytes();
            self.terminal.type_in(key).context("cannot type")?;
            self.echo(key);
        }
        self.clock += self.hands.until('\n');
        self.terminal.type_in(b"\r").context("cannot type")?;
        self.echo(b"\n");
        Ok(())
    }

    /// Shows what is printed up to `key`; all that is there if it does not come: not every program echoes.
    fn echo(&mut self, key: &[u8]) {
        let end = self.find(key, ECHO);
        self.show(end.unwrap_or(self.unseen.len()));
    }

    /// Shows what is printed up to `text`, line by line.
    fn wait(&mut self, text: &str, limit: Duration) -> Result<()> {
        let Some(end) = self.find(text.as_bytes(), limit) else {
            let screen = self.window.screen().contents();
            cli::eprintln!("The window:\n{}", screen.trim_end());
            let last = screen.trim_end().lines().last().unwrap_or_default();
            if self.terminal.has_ended() {
                bail!("the shell ended without having printed {text:?}; the last line: {last}");
            }
            bail!("{text:?} did not come within {limit:?}; the last line: {last}");
        };
        let lines = self.unseen[..end].iter().filter(|&&byte| byte == b'\n').count() as u32;
        let pace = LINE.min(PAGES / lines.max(1));
        let mut left = end;
        while let Some(line) = self.unseen[..left].iter().position(|&byte| byte == b'\n') {
            self.show(line + 1);
            left -= line + 1;
            self.clock += pace;
        }
        self.show(left);
        Ok(())
    }

    /// Where `text` ends in what is printed, if it comes before `limit` is over.
    fn find(&mut self, text: &[u8], limit: Duration) -> Option<usize> {
        let deadline = Instant::now() + limit;
        let mut ended = false;
        loop {
            let found = self.unseen.windows(text.len()).position(|window| window == text);
            if let Some(start) = found {
                return Some(start + text.len());
            }
            if ended || Instant::now() >= deadline {
                return None;
            }
            // What it printed last is still to be read.
            ended = self.terminal.has_ended();
            let printed = self.terminal.read(TICK);
            self.take(&printed);
        }
    }

    /// Adds what was printed, and answers the questions in it.
    fn take(&mut self, printed: &[u8]) {
        for &byte in printed {
            self.begun.push(byte);
            if self.begun == QUESTION {
                let (row, column) = self.window.screen().cursor_position();
                let answer = format!("\x1b[{};{}R", row + 1, column + 1);
                // Who asked may be gone.
                let _ = self.terminal.type_in(answer.as_bytes());
                self.begun.clear();
            } else if !QUESTION.starts_with(&self.begun) {
                self.window.process(&self.begun);
                self.unseen.append(&mut self.begun);
            }
        }
    }

    /// Records the first `len` bytes of what was printed, now.
    fn show(&mut self, len: usize) {
        self.piece.extend(self.unseen.drain(..len));
        let text = cli::cast::take_text(&mut self.piece);
        if !text.is_empty() {
            self.event(Event::Output(text));
        }
    }

    fn event(&mut self, event: Event) {
        self.events.push((self.clock, event));
    }

    fn cast(mut self, script: &Script) -> Cast {
        // The last caption is to be read, too.
        self.event(Event::Output(String::new()));
        let title = format!("{} / {}", script.title.ko, script.title.en);
        let header = Header {
            title: Some(title),
            poster: self.poster.map(|at| at.as_secs_f64()),
            script: Some(script.fingerprint()),
            ..Header::new(script.columns, script.rows)
        };
        Cast { header, events: self.events }
    }
}

/// How a person types: some keys come quicker than others, and before a new word there is a thought. The same
/// each time.
struct Hands(u64);

impl Hands {
    /// How long it takes to find `key`.
    fn until(&mut self, key: char) -> Duration {
        // splitmix64: all that is asked of it is that neighbours differ.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let varied = (mixed >> 33) % 55;
        let thought = match key {
            ' ' => 45,
            '\n' => 260,
            key if key.is_alphanumeric() => 0,
            _ => 30,
        };
        Duration::from_millis(40 + varied + thought)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn played(text: &str) -> (Result<Cast>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script.toml");
        let head = "title = { ko = \"가\", en = \"a\" }\ncolumns = 60\nrows = 12\n";
        fs::write(&path, format!("{head}{text}")).unwrap();
        let script = Script::read(&path).unwrap();
        let cast = play(&script, &dir.path().join("session"), |_, _| {});
        (cast, dir)
    }

    #[test]
    fn a_session_is_the_same_whatever_time_it_took() {
        let script = |sleep: &str| {
            let prepare = format!("prepare = \"echo kept > file; echo {sleep} > wait\"\n");
            prepare
                + "[[step]]\ncaption = { ko = \"처음\", en = \"first\" }\ntype = \"sh ./wait; cat file\"\n\
                   wait = \"kept\"\n[[step]]\nwait = \"$ \"\n[[step]]\ntype = \"cat\"\n\
                   [[step]]\npress = [\"Ctrl-D\"]\nwait = \"$ \"\nposter = true\n"
        };
        let (quick, _dir) = played(&script(":"));
        let (slow, _dir) = played(&script("sleep 0.4"));
        let (quick, slow) = (quick.unwrap(), slow.unwrap());
        assert_eq!(quick.events, slow.events);
        let printed: String = quick
            .events
            .iter()
            .filter_map(|(_, event)| match event {
                Event::Output(text) => Some(text.as_str()),
                _ => None,
            })
            .collect();
        assert!(printed.starts_with("$ sh ./wait; cat file\r\nkept\r\n$ cat\r\n"), "{printed:?}");
        let said = |wanted: Event| quick.events.iter().any(|(_, event)| *event == wanted);
        assert!(said(Event::Marker("처음\nfirst".into())) && said(Event::Input("Ctrl-D".into())));
    }

    #[test]
    fn a_program_that_asks_where_the_cursor_is_gets_an_answer() {
        let ask = r#"stty raw -echo; printf 'ab\\033[6n'; head -c 6 | tr '\\033' E; stty sane"#;
        let (cast, _dir) = played(&format!(
            "[[step]]\ntype = \"{ask}\"\nwait = \"abE[\"\n[[step]]\nwait = \"R\"\nposter = true\n"
        ));
        let text = String::from_utf8(cast.unwrap().written().unwrap()).unwrap();
        assert!(!text.contains("[6n\"]"), "{text}");
    }

    #[test]
    fn what_does_not_come_is_said_with_what_came() {
        let (cast, _dir) = played(
            "[[step]]\ntype = \"echo no''thing\"\nwait = \"xx\"\nlimit = 0.5\nposter = true\n",
        );
        let error = format!("{:#}", cast.unwrap_err());
        assert!(error.contains("step 1: \"xx\" did not come within 500ms"), "{error}");
        let (cast, _dir) = played("[[step]]\ntype = \"exit\"\nwait = \"xx\"\nposter = true\n");
        let error = format!("{:#}", cast.unwrap_err());
        assert!(error.contains("the shell ended without having printed \"xx\""), "{error}");
        let (cast, _dir) = played("prepare = \"echo why >&2; false\"\n[[step]]\nposter = true\n");
        assert!(format!("{:#}", cast.unwrap_err()).contains("to prepare fails: why"));
    }
}
