//! `--config FILE` and `--print-config`: what the command line can say, in a TOML file.
//!
//! The command line is the only list of what there is: a key of the file is the name of a long option, its value goes
//! through the option's own parser, and what may not stand together there may not here. So an option that is
//! added is in the file as well.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use common::file;
use toml::Value;
use toml::de::{DeTable, DeValue};

use crate::manual;

/// No file that a person writes is longer.
const MAX: u64 = 1 << 20;

/// The command line's part of it.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Configuration")]
#[group(skip)]
pub struct Flags {
    /// Take options from a TOML file: `memory = "2G"` there is --memory 2G here. What is given here
    /// wins over the file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print what was given, here and in a file, as such a file, and end
    #[arg(long)]
    print_config: bool,
}

impl Flags {
    /// None for a program that has no such options.
    fn of(matches: &ArgMatches) -> Option<Self> {
        matches.try_contains_id("config").ok()?;
        Self::from_arg_matches(matches).ok()
    }
}

/// Parses a command line, whose first word is the program's name, together with the file that it names.
pub(crate) fn matches(command: &mut Command, line: Vec<OsString>) -> Result<ArgMatches> {
    command.build();
    let partly = command.clone().ignore_errors(true).try_get_matches_from(&line);
    let given = partly.ok().and_then(|given| {
        let path = Flags::of(&given)?.config?;
        Some((path, given))
    });
    let Some((path, given)) = given else { return Ok(command.try_get_matches_from_mut(line)?) };

    let name = path.display().to_string();
    let text = file::read(&path, MAX).map_err(anyhow::Error::from).and_then(|bytes| {
        String::from_utf8(bytes).map_err(|_| anyhow!("this is no text in UTF-8, expected TOML"))
    });
    let text = text.with_context(|| format!("config {name}"))?;
    let options = options(command, &text, &name, &given)?;
    let (program, given) = line.split_at(line.len().min(1));
    let both = program.iter().chain(&options).chain(given);
    command.try_get_matches_from_mut(both).map_err(|error| {
        match command.try_get_matches_from_mut(&line) {
            // Nothing is wrong here, nor with any of the file's settings: two of them exclude each other.
            Ok(_) => anyhow!("config {name}: {}", crate::usage(&error)),
            Err(error) => error.into(),
        }
    })
}

/// Prints the settings of `matches`, if that is what was asked for.
pub(crate) fn print(command: &Command, matches: &ArgMatches) -> Option<Result<String>> {
    Flags::of(matches)?.print_config.then(|| written(command, matches))
}

/// The options that are settings of the machine, with their names.
fn settings(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    let others = manual::Flags::augment_args(Flags::augment_args(Command::new("")));
    command.get_arguments().filter_map(move |arg| {
        let is_other = others.get_arguments().any(|other| other.get_id() == arg.get_id());
        let long = arg.get_long().filter(|_| !is_other && !manual::is_help(arg))?;
        Some((long, arg))
    })
}

/// The file's settings as words of a command line, without those that `given` has otherwise.
fn options(
    command: &mut Command,
    text: &str,
    name: &str,
    given: &ArgMatches,
) -> Result<Vec<OsString>> {
    let at = |start: usize| {
        let line = 1 + text.bytes().take(start).filter(|&byte| byte == b'\n').count();
        format!("config {name}:{line}")
    };
    let table = DeTable::parse(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        anyhow!("{}: {}", at(start), error.message().replace('\n', ", "))
    })?;
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);

    let (mut words, mut wrong) = (Vec::new(), command.clone());
    for (key, value) in entries {
        let at = || at(key.span().start);
        let known = settings(command).find(|(long, _)| *long == key.get_ref());
        let Some((long, arg)) = known else {
            bail!("{}: {}", at(), unknown(command, key.get_ref()));
        };
        let those =
            setting(long, arg, value.get_ref()).map_err(|why| anyhow!("{}: {why}", at()))?;
        // By itself, so that it is known where a wrong value stands.
        let alone = [OsStr::new("")].into_iter().chain(those.iter().map(OsString::as_os_str));
        if let Err(error) = wrong.try_get_matches_from_mut(alone)
            && error.kind() != ErrorKind::MissingRequiredArgument
        {
            bail!("{}: {}", at(), crate::usage(&error));
        }
        if !overridden(command, arg, given) {
            words.extend(those);
        }
    }
    Ok(words)
}

/// Whether the command line has this option itself, or one that excludes it.
fn overridden(command: &Command, arg: &Arg, given: &ArgMatches) -> bool {
    let is_given =
        |arg: &Arg| given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    let excludes = |arg: &Arg, other: &Arg| {
        command.get_arg_conflicts_with(arg).iter().any(|arg| arg.get_id() == other.get_id())
    };
    is_given(arg)
        || command
            .get_arguments()
            .any(|other| is_given(other) && (excludes(arg, other) || excludes(other, arg)))
}

fn unknown(command: &Command, key: &str) -> String {
    let nearest = settings(command)
        .map(|(long, _)| (strsim::jaro(long, key), long))
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .filter(|(similarity, _)| *similarity > 0.7);
    match nearest {
        Some((_, long)) => format!("{key:?} is unknown; is it {long}?"),
        None => format!("{key:?} is unknown; --help has what there is, as --{key} would be"),
    }
}

/// A setting as words of a command line.
fn setting(long: &str, arg: &Arg, value: &DeValue<'_>) -> Result<Vec<OsString>, String> {
    let with = |text: String| OsString::from(format!("--{long}={text}"));
    let alone = || OsString::from(format!("--{long}"));
    let takes_values = arg.get_action().takes_values();
    let optional = arg.get_num_args().is_none_or(|count| count.min_values() == 0);
    let values = match value {
        DeValue::Boolean(true) if !takes_values || optional => return Ok(vec![alone()]),
        DeValue::Boolean(false) if !takes_values => return Ok(Vec::new()),
        _ if !takes_values => return Err(format!("{long} is true or false")),
        DeValue::Array(values) => values.iter().map(|value| value.get_ref()).collect(),
        value => vec![value],
    };
    let texts = values.into_iter().map(|value| text_or_list(value).map(with));
    texts.collect::<Result<_, _>>().map_err(|why| format!("{long}: {why}"))
}

/// What stands behind the equals sign: for a table, as [`crate::list`] has it.
fn text_or_list(value: &DeValue<'_>) -> Result<String, String> {
    let DeValue::Table(table) = value else { return text(value) };
    let (mut elements, mut words) = (Vec::new(), Vec::new());
    for (key, value) in table {
        let (key, value) = (key.get_ref().replace(',', ",,"), value.get_ref());
        match value {
            DeValue::Boolean(true) => words.push(key),
            DeValue::Boolean(false) => {}
            value => elements.push(format!("{key}={}", text(value)?.replace(',', ",,"))),
        }
    }
    // In front, a word would be a value without its key.
    if elements.is_empty() {
        return Err(
            "a table has at least one key with a value; words alone are a string".to_owned()
        );
    }
    elements.append(&mut words);
    Ok(elements.join(","))
}

fn text(value: &DeValue<'_>) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map(|number| number.to_string())
            .map_err(|_| "the number is too large".to_owned()),
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        _ => Err(format!("expected a string or a number, found {}", value.type_str())),
    }
}

/// The settings as a file, with the defaults of the others as comments.
fn written(command: &Command, matches: &ArgMatches) -> Result<String> {
    let (mut given, mut defaults) = (String::new(), String::new());
    for (long, arg) in settings(command) {
        let id = arg.get_id().as_str();
        let from = matches.value_source(id);
        let value = match matches.get_raw(id) {
            Some(raw) => value(arg, raw).with_context(|| format!("--{long}"))?,
            None => continue,
        };
        match (from, value) {
            (Some(ValueSource::CommandLine), value) => given += &format!("{long} = {value}\n"),
            (_, Value::Boolean(_)) => {}
            (_, Value::String(text)) if text.is_empty() => {}
            (_, value) => defaults += &format!("# {long} = {value}\n"),
        }
    }
    let name = command.get_bin_name().unwrap_or(command.get_name());
    Ok(format!(
        "# For {name} --config FILE. Of what is not here, --help tells more.\n{given}\n\
         # The defaults of the others:\n{defaults}"
    ))
}

/// An option's value in TOML.
fn value<'a>(arg: &Arg, raw: impl Iterator<Item = &'a OsStr>) -> Result<Value> {
    let kind = arg.get_value_parser().type_id();
    let is_number =
        [TypeId::of::<u8>(), TypeId::of::<u16>(), TypeId::of::<u32>(), TypeId::of::<u64>()]
            .into_iter()
            .any(|number| kind == number);
    let one = |raw: &OsStr| {
        let Some(text) = raw.to_str() else {
            bail!("{raw:?} is not UTF-8, and TOML cannot hold it; rename the file");
        };
        Ok(match text.parse::<i64>() {
            Ok(number) if is_number && number.to_string() == text => Value::Integer(number),
            _ => Value::String(text.to_owned()),
        })
    };
    let mut values = raw.map(one).collect::<Result<Vec<_>>>()?;
    Ok(match arg.get_action() {
        ArgAction::Append => Value::Array(values),
        ArgAction::SetTrue => {
            Value::Boolean(values.pop() == Some(Value::String("true".to_owned())))
        }
        _ => values.pop().unwrap_or(Value::Boolean(true)),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;
    use proptest::prelude::*;
    use proptest::sample::subsequence;

    use super::*;
    use crate::list::List;

    /// One option of each kind that stage 08 has.
    #[derive(Debug, Parser, PartialEq)]
    struct Machine {
        #[arg(long)]
        kernel: Option<PathBuf>,
        #[arg(long)]
        initrd: Option<PathBuf>,
        #[arg(long, conflicts_with = "initrd")]
        no_initrd: bool,
        #[arg(long, default_value = "quiet")]
        cmdline: String,
        #[arg(long, default_value = "512M", value_parser = crate::size::parse)]
        memory: u64,
        #[arg(long, default_value = "1", value_parser = clap::value_parser!(u8).range(1..))]
        cpus: u8,
        #[arg(long = "disk", value_parser = disk)]
        disks: Vec<(String, bool)>,
        #[arg(long, value_parser = crate::seconds)]
        timeout: Option<Duration>,
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "all")]
        trace: Option<String>,
        #[arg(short, long)]
        verbose: bool,
        #[command(flatten)]
        config: Ours,
        #[command(flatten)]
        manual: manual::Flags,
    }

    /// Where the settings come from is no part of the machine.
    #[derive(Args, Debug)]
    #[group(skip)]
    struct Ours {
        #[command(flatten)]
        flags: Flags,
    }

    impl PartialEq for Ours {
        fn eq(&self, _: &Self) -> bool {
            true
        }
    }

    fn disk(text: &str) -> Result<(String, bool), String> {
        let mut list = List::parse(OsStr::new(text))?;
        let path = list.first("path", "FILE")?.into_string().expect("is UTF-8");
        let read_only = list.word(&[("rw", false), ("ro", true)])?;
        list.end()?;
        Ok((path, read_only.unwrap_or(false)))
    }

    /// The machine that a command line makes, beside a file with this text; and the file that says the same.
    fn machine(file: Option<&str>, words: &[&str]) -> Result<(Machine, String)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        let mut line = vec![OsString::from("program")];
        if let Some(text) = file {
            std::fs::write(&path, text).unwrap();
            line.extend(["--config".into(), path.clone().into()]);
        }
        line.extend(words.iter().map(OsString::from));
        let mut command = crate::command::<Machine>();
        let parsed = matches(&mut command, line).map_err(|error| match error.downcast() {
            Ok(error) => anyhow!(crate::usage(&error)),
            Err(error) => anyhow!(format!("{error:#}").replace(&path.display().to_string(), "F")),
        })?;
        Ok((Machine::from_arg_matches(&parsed)?, written(&command, &parsed)?))
    }

    #[track_caller]
    fn same(file: &str, words: &[&str]) {
        assert_eq!(machine(Some(file), &[]).unwrap().0, machine(None, words).unwrap().0);
    }

    #[test]
    fn a_key_is_an_option() {
        same("# nothing", &[]);
        same("cpus = 2\nmemory = '1G'\nverbose = true", &["--cpus=2", "--memory=1G", "-v"]);
        same("no-initrd = true\nverbose = false", &["--no-initrd"]);
        same("timeout = 1.5\ntrace = true", &["--timeout=1.5", "--trace"]);
        same("cpus = 0x1_0\ntrace = 'io'", &["--cpus=16", "--trace=io"]);
        same("cmdline = ''", &["--cmdline="]);
        same("cmdline = '--cpus 3'", &["--cmdline=--cpus 3"]);
        same("disk = 'a'", &["--disk=a"]);
        same("disk = ['a', 'b,ro']", &["--disk=a", "--disk=b,ro"]);
        let tables = "[[disk]]\npath = 'a,b'\nro = true\nrw = false\n[[disk]]\npath = 'c'";
        same(tables, &["--disk=a,,b,ro", "--disk=c"]);
    }

    #[test]
    fn the_command_line_wins() {
        let file = "cpus = 2\nno-initrd = true\ndisk = ['a', 'b']\ntimeout = 3";
        let (both, _) = machine(Some(file), &["--initrd=x", "--disk=c", "--timeout=5"]).unwrap();
        let words = ["--cpus=2", "--initrd=x", "--disk=c", "--timeout=5"];
        assert_eq!(both, machine(None, &words).unwrap().0);
        let (both, _) = machine(Some("initrd = 'x'"), &["--no-initrd"]).unwrap();
        assert_eq!(both, machine(None, &["--no-initrd"]).unwrap().0);
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        for (file, why) in [
            ("cpus = 2\n\nmemroy = '1G'", "config F:3: \"memroy\" is unknown; is it memory?"),
            ("x = 1", "config F:1: \"x\" is unknown; --help has what there is"),
            ("config = 'x'", "config F:1: \"config\" is unknown"),
            ("man = true", "config F:1: \"man\" is unknown"),
            ("help = true", "config F:1: \"help\" is unknown"),
            (
                "\ncpus = 0",
                "config F:2: invalid value '0' for '--cpus <CPUS>': 0 is not in 1..=255",
            ),
            ("cpus = -1", "config F:1: invalid value '-1' for '--cpus <CPUS>'"),
            ("memory = 512", "config F:1: invalid value '512' for '--memory <MEMORY>': expected a"),
            (
                "cpus = [1, 2]",
                "config F:1: the argument '--cpus <CPUS>' cannot be used multiple times",
            ),
            ("verbose = 1", "config F:1: verbose is true or false"),
            ("cpus = true", "config F:1: cpus: expected a string or a number, found boolean"),
            ("disk = [['a']]", "config F:1: disk: expected a string or a number, found array"),
            ("[[disk]]\nro = true", "config F:1: disk: a table has at least one key with a value"),
            ("[[disk]]\npath = 'a'\nx = 1", "\"x\" is unknown, expected path=FILE, rw, ro"),
            ("cpus = 2\ncpus = 3", "config F:2: duplicate key"),
            ("cpus = ", "config F:1: string values must be quoted"),
            (
                "initrd = 'x'\nno-initrd = true",
                "config F: the argument '--initrd <INITRD>' cannot be",
            ),
            (
                "cpus = 99999999999999999999999999999999999999999",
                "config F:1: cpus: the number is too",
            ),
        ] {
            match machine(Some(file), &[]) {
                Err(error) => {
                    let error = format!("{error:#}");
                    assert!(error.contains(why) && !error.contains('\n'), "{file}: {error}");
                }
                Ok((machine, _)) => panic!("{file}: {machine:?}"),
            }
        }
        // What is wrong on the command line is not the file's fault.
        let error = machine(Some("cpus = 2"), &["--no-initrd", "--initrd=x"]).unwrap_err();
        assert!(error.to_string().starts_with("the argument '--no-initrd' cannot be"), "{error}");
    }

    #[test]
    fn what_toml_cannot_hold_is_refused() {
        use std::os::unix::ffi::OsStrExt;
        let mut command = crate::command::<Machine>();
        let line =
            [b"program" as &[u8], b"--kernel=\xFF"].map(|word| OsStr::from_bytes(word).to_owned());
        let matches = matches(&mut command, line.to_vec()).unwrap();
        let error = format!("{:#}", written(&command, &matches).unwrap_err());
        assert_eq!(
            error,
            "--kernel: \"\\xFF\" is not UTF-8, and TOML cannot hold it; rename the file"
        );
    }

    proptest! {
        /// Whatever a command line says, the file that is printed for it says the same, and is printed for itself.
        #[test]
        fn a_printed_file_makes_the_same_machine(
            cmdline in "\\PC*|[\"'\\\\\n\t#=\\[\\]]*",
            disks in prop::collection::vec("([a-z\"' =#]|,,){1,8}(,ro|,rw)?", 0..3),
            cpus in 1..=255_u8,
            memory in "[0-9]{1,5}[KMG]",
            timeout in 1..10_000_u32,
            chosen in subsequence((0..7_usize).collect::<Vec<_>>(), 0..=7),
        ) {
            let all: [Vec<String>; 7] = [
                vec![format!("--cmdline={cmdline}")],
                disks.iter().map(|disk| format!("--disk=path={disk}")).collect(),
                vec![format!("--cpus={cpus}")],
                vec![format!("--memory={memory}")],
                vec![format!("--timeout={}", f64::from(timeout) / 8.0)],
                vec!["--trace".to_owned(), "--no-initrd".to_owned()],
                vec!["-v".to_owned(), format!("--kernel={cmdline}x")],
            ];
            let words: Vec<_> = chosen.iter().flat_map(|&at| &all[at]).map(String::as_str).collect();
            let (given, file) = machine(None, &words).unwrap();
            let (read, again) = machine(Some(&file), &[]).unwrap();
            prop_assert_eq!(given, read);
            prop_assert_eq!(file, again);
        }

        /// Whatever is in the file, it is read or refused.
        #[test]
        fn no_file_does_harm(file in "([a-z]{1,6}|cpus|disk|memory)( = |\\.|\n)(\\PC{0,20}|[0-9eE.x_]*)") {
            let _ = machine(Some(&file), &[]);
        }
    }
}
