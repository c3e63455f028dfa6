//! The experiments: blocks of a Markdown file that begin with a command and go on with what it printed.
//!
//! They are run in the lab, where they print the same on every host, each in a shell at the repository's root.
//! `cargo run --bin NAME` is the program itself there. Two labs share the files between them, each resumed only once;
//! those of one file are run one after the other.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use mdbook_markdown::pulldown_cmark::{CodeBlockKind, Event, Tag};
use regex::Regex;

use crate::links;

/// How a block begins, and how its end.
const FENCE: &str = "```console\n$ ";
const END: &str = "```";

/// What a block is named that is not run: someone types into it, or it takes a network, root, files that are not here,
/// a host of a certain kind, or many minutes.
const NOT_RUN: &str = "sh-session";

/// How many labs run at a time. Each has one processor.
const LABS: usize = 2;

/// What differs from run to run in every output: times, and addresses in a process.
const VARIES: &str = r"\b\d+(\.\d+)? ?(ns|us|µs|ms|s)\b|0x[57][0-9a-f]{11}\b";

/// What stands for it in comparisons.
const VARIED: &str = "…";

/// A command and what is shown as its output.
#[derive(Clone, Debug, PartialEq)]
struct Experiment<'a> {
    command: &'a str,
    printed: &'a str,
    /// What else differs from run to run, by a regular expression.
    varies: Option<&'a str>,
}

/// The experiments of a text, in their order.
fn experiments(text: &str) -> Vec<Experiment<'_>> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices(FENCE) {
        let rest = &text[at + FENCE.len()..];
        let Some((command, rest)) = rest.split_once('\n') else { continue };
        let Some(end) = rest.find(END) else { continue };
        let above = text[..at].trim_end_matches('\n').lines().last();
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
            Some(more) => format!("{VARIES}|{more}"),
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

/// What is wrong with the blocks' names, a line each: whoever pastes a command has to say whether it is run.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for path in links::markdown(root)? {
        let text = read(&path)?;
        let mut block = None;
        for event in links::parse(&text) {
            match (event, &block) {
                (Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(name))), _) => {
                    block = Some(name);
                }
                (Event::Text(text), Some(name)) => {
                    let first = text.lines().next().unwrap_or_default();
                    let should = match (first.starts_with("$ "), &**name) {
                        (false, "console") => "begin with `$ ` and a command",
                        (true, "console" | NOT_RUN) | (false, _) => "",
                        (true, _) => "be named `console`, or `sh-session` if it cannot be run",
                    };
                    if !should.is_empty() {
                        let file = links::relative(root, &path);
                        faults.push(format!("{file}: the block `{first}` should {should}"));
                    }
                    block = None;
                }
                _ => block = None,
            }
        }
    }
    Ok(faults)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Runs the experiments of all Markdown files. Where one shows something else, this is a fault, or, to `refresh` it, it
/// is replaced.
pub fn run(root: &Path, target: &Path, refresh: bool) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for path in links::markdown(root)? {
        let text = read(&path)?;
        texts.push((links::relative(root, &path), text));
    }
    let mut files: Vec<_> =
        texts.iter().map(|(name, text)| (&**name, &**text, experiments(text))).collect();
    files.retain(|(.., experiments)| !experiments.is_empty());
    let mut outputs = outputs(root, target, &files)?.into_iter();
    let mut faults = Vec::new();
    for (name, text, experiments) in files {
        let mut new = text.to_owned();
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
            fs::write(root.join(name), new).with_context(|| format!("cannot write {name}"))?;
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

/// A file's name, its text, and the experiments in it.
type File<'a> = (&'a str, &'a str, Vec<Experiment<'a>>);

/// What the commands print, stdout and stderr as they come.
fn outputs(root: &Path, target: &Path, files: &[File<'_>]) -> Result<Vec<String>> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let cargo = |args: &[&OsStr]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root).env("CARGO_TARGET_DIR", target).args(args);
        cargo
    };
    let mut build = cargo(&["build", "--quiet"].map(OsStr::new));
    build.args(programs(files).into_iter().flat_map(|program| ["--bin", program]));
    ensure!(build.status().context("cannot start cargo")?.success(), "the programs do not build");
    let folder = target.join("experiments");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let script = folder.join("run.sh");
    fs::write(&script, self::script(root, target, &folder, files))
        .with_context(|| format!("cannot write {}", script.display()))?;
    let lab = ["run", "--quiet", "--package", "xtask", "--", "lab", "--", "sh"].map(OsStr::new);
    let lab = [&lab[..], &[script.as_os_str()]].concat();
    let start = || cargo(&lab).spawn().context("cannot start cargo");
    let labs: Vec<_> = (0..LABS).map(|_| start()).collect();
    let ended: Vec<_> =
        labs.into_iter().map(|lab| lab.and_then(|mut lab| Ok(lab.wait()?.success()))).collect();
    for ended in ended {
        ensure!(ended?, "the lab did not run the experiments to their end");
    }
    let output = |number: usize| {
        let path = folder.join(number.to_string());
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        // A firmware ends its lines by CR and LF, as a terminal wants it.
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let text = text.trim_end();
        Ok(if text.is_empty() { String::new() } else { format!("{text}\n") })
    };
    let count = files.iter().map(|(.., experiments)| experiments.len()).sum();
    (0..count).map(output).collect()
}

/// What `cargo xtask image` runs.
const IMAGE: &str = "mini-kvm-image";

/// The programs that the commands name.
fn programs<'a>(files: &[File<'a>]) -> BTreeSet<&'a str> {
    let named = Regex::new(r"cargo run --bin (\w+)|cargo xtask image\b").expect("a pattern");
    let commands = files.iter().flat_map(|(.., experiments)| experiments);
    let found = commands.flat_map(|experiment| {
        let names = named.captures_iter(experiment.command);
        names.map(|found| found.get(1).map_or(IMAGE, |name| name.as_str()))
    });
    found.collect()
}

// ANCHOR: script
/// The shell script that runs them, each with its output in a file of its number. Of several shells that run it at the same
/// time, each takes the next file that no other has: `mkdir` can make a folder only once.
fn script(root: &Path, target: &Path, folder: &Path, files: &[File<'_>]) -> String {
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let mut script = format!(
        "cargo() {{\n  \
           case \"$1 $2\" in\n    \
             'xtask image') program={IMAGE}; shift 2 ;;\n    \
             *) program=$3; shift 3 ;;\n  \
           esac\n  \
           [ \"$1\" != -- ] || shift\n  \
           {}/debug/\"$program\" \"$@\"\n\
         }}\n\
         cd {} || exit\n",
        quoted(target),
        quoted(root),
    );
    let folder = quoted(folder);
    let mut number = 0;
    for (name, _, experiments) in files {
        let mine = quoted(Path::new(&format!("of {}", name.replace('/', " "))));
        let _ = writeln!(
            script,
            "if mkdir {folder}/{mine} 2>/dev/null; then\necho {} >&2",
            quoted(Path::new(name))
        );
        for Experiment { command, .. } in experiments {
            // A command that fails is an experiment, too.
            let _ = writeln!(script, "(\n{command}\n) >{folder}/{number} 2>&1 </dev/null");
            number += 1;
        }
        script += "fi\n";
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
    fn a_block_with_a_command_says_whether_it_is_run() {
        let dir = tempfile::tempdir().unwrap();
        let block = |name: &str, text: &str| format!("```{name}\n{text}\n```\n\n");
        let good =
            block("console", "$ ls\na") + &block("sh-session", "$ ssh x") + &block("sh", "ls");
        let bad = block("text", "$ ls") + &block("console", "ls");
        fs::write(dir.path().join("a.md"), good + &bad).unwrap();
        assert_eq!(
            check(dir.path()).unwrap(),
            [
                "a.md: the block `$ ls` should be named `console`, or `sh-session` if it cannot be run",
                "a.md: the block `ls` should begin with `$ ` and a command",
            ]
        );
    }

    #[test]
    fn commands_run_in_a_shell_at_the_root_and_cargo_run_is_the_program() {
        let dir = tempfile::tempdir().unwrap();
        let (root, target) = (dir.path().join("root's"), dir.path().join("target"));
        let folder = dir.path().join("out");
        for made in [&root, &target.join("debug"), &folder] {
            fs::create_dir_all(made).unwrap();
        }
        for program in ["01_x", IMAGE] {
            fs::copy("/bin/echo", target.join("debug").join(program)).unwrap();
        }
        let experiment = |command| Experiment { command, printed: "", varies: None };
        let one = [
            "cargo run --bin 01_x -- -n a 'b  c'; exit 3",
            "pwd | tail -c 7",
            "cargo xtask image x >&2",
        ];
        let files = [
            ("notes/one.md", "", one.map(experiment).to_vec()),
            ("it's.md", "", vec![experiment("echo $((1 + 1))")]),
        ];
        assert_eq!(programs(&files), BTreeSet::from(["01_x", IMAGE]));
        let script = script(&root, &target, &folder, &files);
        // The second finds nothing left to do.
        for _ in 0..2 {
            let ran = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert!(ran.status.success(), "{ran:?}");
            let outputs =
                [0, 1, 2, 3].map(|n| fs::read_to_string(folder.join(n.to_string())).unwrap());
            assert_eq!(outputs, ["a b  c", "root's\n", "x\n", "2\n"]);
            fs::copy("/bin/false", target.join("debug/01_x")).unwrap();
        }
    }
}
