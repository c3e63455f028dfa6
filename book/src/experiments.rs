//! The experiments: blocks of a note that begin with a command and go on with what it printed.
//!
//! All commands are run in one session of the lab, one after the other, each in a shell at the repository's root:
//! there they print the same on every host, and the lab is resumed only once. `cargo run --bin NAME` is the program
//! itself there.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use regex::Regex;

use crate::links;

/// How a block begins, and how its end.
const FENCE: &str = "```console\n$ ";
const END: &str = "```";

/// What differs from run to run in every output: times, and addresses in a process.
const VARIES: &str = r"\b\d+(\.\d+)? ?(ns|us|µs|ms|s)\b|0x[57][0-9a-f]{11}\b";

/// What stands for it in comparisons.
const VARIED: &str = "…";

/// A command of a note and what the note says that it prints.
#[derive(Debug, PartialEq)]
struct Experiment<'a> {
    command: &'a str,
    printed: &'a str,
    /// What else differs from run to run, by a regular expression.
    varies: Option<&'a str>,
}

/// The experiments of a note, in their order.
fn experiments(note: &str) -> Vec<Experiment<'_>> {
    let mut found = Vec::new();
    for (at, _) in note.match_indices(FENCE) {
        let rest = &note[at + FENCE.len()..];
        let Some((command, rest)) = rest.split_once('\n') else { continue };
        let Some(end) = rest.find(END) else { continue };
        let above = note[..at].trim_end_matches('\n').lines().last();
        let varies = above.and_then(|line| line.strip_prefix("<!-- varies: "));
        let varies = varies.and_then(|line| line.strip_suffix(" -->"));
        found.push(Experiment { command, printed: &rest[..end], varies });
    }
    found
}

// ANCHOR: steady
impl Experiment<'_> {
    /// An output with what differs from run to run left out, and no matter how wide that was.
    fn steady(&self, output: &str) -> Result<Vec<String>> {
        let varies = match self.varies {
            Some(more) => format!("{more}|{VARIES}"),
            None => VARIES.to_owned(),
        };
        let varies = Regex::new(&varies)
            .with_context(|| format!("what `varies` in `{}` is no pattern", self.command))?;
        let steady = |line: &str| {
            let line = varies.replace_all(line, VARIED);
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        Ok(output.trim_end().lines().map(steady).collect())
    }
}
// ANCHOR_END: steady

/// Runs the experiments of all notes. Where a note shows something else, this is a fault, or, to `refresh` it, it is
/// replaced.
pub fn run(root: &Path, target: &Path, refresh: bool) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for path in links::markdown(&root.join("notes"))? {
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        notes.push((path, text));
    }
    let all: Vec<_> = notes.iter().map(|(_, text)| experiments(text)).collect();
    let commands: Vec<_> = all.iter().flatten().map(|experiment| experiment.command).collect();
    let mut outputs = outputs(root, target, &commands)?.into_iter();
    let mut faults = Vec::new();
    for ((path, text), experiments) in notes.iter().zip(&all) {
        let name = links::relative(root, path);
        let mut new = text.clone();
        for experiment in experiments {
            let output = outputs.next().context("an experiment has no output")?;
            let (shown, printed) =
                (experiment.steady(experiment.printed)?, experiment.steady(&output)?);
            if shown == printed {
                continue;
            }
            if refresh {
                let block =
                    |printed: &str| format!("{FENCE}{}\n{printed}{END}", experiment.command);
                new = new.replacen(&block(experiment.printed), &block(&output), 1);
                println!("{name}: `{}` prints something else now", experiment.command);
            } else {
                faults.push(format!(
                    "{name}: `{}` prints something else:{}\n  `cargo xtask book --refresh` pastes it",
                    experiment.command,
                    difference(&shown, &printed)
                ));
            }
        }
        if new != *text {
            fs::write(path, new).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(faults)
}

/// The first line in which two outputs differ.
fn difference(shown: &[String], printed: &[String]) -> String {
    let lines = shown.len().max(printed.len());
    let at = (0..lines).find(|&at| shown.get(at) != printed.get(at)).unwrap_or(0);
    let line = |lines: &[String]| lines.get(at).map_or("(nothing)".into(), Clone::clone);
    format!(
        "\n    line {}: shown   {}\n    line {0}: printed {}",
        at + 1,
        line(shown),
        line(printed)
    )
}

/// What the commands print, stdout and stderr as they come.
fn outputs(root: &Path, target: &Path, commands: &[&str]) -> Result<Vec<String>> {
    if commands.is_empty() {
        return Ok(Vec::new());
    }
    let cargo = |args: &[&OsStr]| -> Result<bool> {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root).env("CARGO_TARGET_DIR", target).args(args);
        Ok(cargo.status().context("cannot start cargo")?.success())
    };
    ensure!(cargo(&["build", "--quiet", "--bins"].map(OsStr::new))?, "the stages do not build");
    let folder = target.join("experiments");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let script = folder.join("run.sh");
    fs::write(&script, self::script(root, target, &folder, commands))
        .with_context(|| format!("cannot write {}", script.display()))?;
    let lab = ["run", "--quiet", "--package", "xtask", "--", "lab", "--", "sh"].map(OsStr::new);
    ensure!(
        cargo(&[&lab[..], &[script.as_os_str()]].concat())?,
        "the lab did not run the experiments to their end"
    );
    let output = |number: usize| {
        let path = folder.join(number.to_string());
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end();
        Ok(if text.is_empty() { String::new() } else { format!("{text}\n") })
    };
    (0..commands.len()).map(output).collect()
}

// ANCHOR: script
/// The shell script that runs them, each with its output in a file of its number.
fn script(root: &Path, target: &Path, folder: &Path, commands: &[&str]) -> String {
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let mut script = format!(
        "cargo() {{\n  program={}/debug/$3\n  shift 3\n  [ \"$1\" != -- ] || shift\n  \"$program\" \"$@\"\n}}\ncd {} || exit\n",
        quoted(target),
        quoted(root),
    );
    for (number, command) in commands.iter().enumerate() {
        // A command that fails is an experiment, too.
        let _ = writeln!(script, "(\n{command}\n) >{}/{number} 2>&1 </dev/null", quoted(folder));
    }
    script + "exit 0\n"
}
// ANCHOR_END: script

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_experiment_is_a_block_that_begins_with_a_command() {
        let note = "text\n\n```console\n$ ls\na\nb\n```\n\n```text\n$ no\n```\n\n<!-- varies: [0-9]+ -->\n```console\n$ date\n1\n```\n";
        assert_eq!(
            experiments(note),
            [
                Experiment { command: "ls", printed: "a\nb\n", varies: None },
                Experiment { command: "date", printed: "1\n", varies: Some("[0-9]+") },
            ]
        );
    }

    #[test]
    fn times_addresses_and_what_is_named_may_differ_and_nothing_else() {
        let experiment = Experiment { command: "x", printed: "", varies: Some("[A-F]{4}") };
        let steady = |text| experiment.steady(text).unwrap();
        assert_eq!(
            steady("took 1.5 ms at 0x7fa64bc00000  ABCD"),
            steady("took 20 us at 0x55d00000aaaa ADBC\n")
        );
        assert_ne!(steady("took 3 steps"), steady("took 4 steps"));
        assert_ne!(steady("a\nb"), steady("a"));
    }

    #[test]
    fn commands_run_in_a_shell_at_the_root_and_cargo_run_is_the_program() {
        let dir = tempfile::tempdir().unwrap();
        let (root, target) = (dir.path().join("root's"), dir.path().join("target"));
        let folder = dir.path().join("out");
        for made in [&root, &target.join("debug"), &folder] {
            fs::create_dir_all(made).unwrap();
        }
        fs::copy("/bin/echo", target.join("debug/01_x")).unwrap();
        let commands =
            ["cargo run --bin 01_x -- -n a 'b  c'; exit 3", "pwd | tail -c 7", "echo x >&2"];
        let script = script(&root, &target, &folder, &commands);
        let ran = Command::new("sh").args(["-c", &script]).status().unwrap();
        assert!(ran.success());
        let outputs = [0, 1, 2].map(|n| fs::read_to_string(folder.join(n.to_string())).unwrap());
        assert_eq!(outputs, ["a b  c", "root's\n", "x\n"]);
    }
}
