//! The command line: mistakes, the config file, and what is made for shells and for `man`.

use std::process::{Command, Stdio};

use proptest::prelude::*;
use proptest::sample::subsequence;
use testkit::{PATIENCE, Program};

use crate::{file, program, text};

/// What the program prints and ends, without any machine.
fn printed(args: &[&str]) -> String {
    let ran = program().args(args).run();
    ran.ended(0);
    assert_eq!(ran.err(), "");
    ran.out()
}

#[test]
fn a_mistake_gets_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = |text: &str| file(&dir, "vm.toml", text.as_bytes());
    for (args, why) in [
        (
            vec!["--memroy", "1G"],
            "unexpected argument '--memroy' found; tip: a similar argument exists: '--memory'",
        ),
        (vec!["--zzz"], "unexpected argument '--zzz' found; --help has what there is"),
        (vec!["bzImage"], "unexpected argument 'bzImage' found"),
        (
            vec!["--memory", "512"],
            "expected a whole number with K, M, G or T behind it, such as 512M",
        ),
        (vec!["--memory"], "a value is required for '--memory <SIZE>' but none was supplied"),
        (vec!["--memory=1G", "--memory=2G"], "'--memory <SIZE>' cannot be used multiple times"),
        (vec!["--cpus", "0"], "invalid value '0' for '--cpus <N>': 0 is not in 1..=255"),
        (vec!["--cpus", "many"], "invalid value 'many' for '--cpus <N>'"),
        (
            vec!["--entry", "pvm"],
            "[possible values: auto, elf, packed, packed32, pvh]; tip: a similar value",
        ),
        (vec!["--timeout", "soon"], "expected a number of seconds"),
        (
            vec!["--no-initrd", "--initrd", "x"],
            "'--no-initrd' cannot be used with '--initrd <FILE>'",
        ),
        (
            vec!["--man", "--cpus", "2"],
            "cannot be used with one or more of the other specified arguments",
        ),
        (vec!["--kernel", "/nonexistent"], "kernel /nonexistent: there is no such file"),
        (vec!["--kernel", "/"], "kernel /: this is a directory, expected a regular file"),
        (vec!["--config", "/nonexistent"], "config /nonexistent: there is no such file"),
        (
            vec!["--config", &config("\nmemroy = '1G'")],
            "vm.toml:2: \"memroy\" is unknown; is it memory?",
        ),
        (vec!["--config", "/", "--what"], "config /: this is a directory"),
    ] {
        program().args(args).run().refused(2, why);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    /// What is printed for a command line is read as the same.
    #[test]
    fn a_printed_config_says_the_same(
        texts in prop::collection::vec("[a-z=\"'\\\\# ,]{0,12}", 3),
        cpus in 1..=255_u8,
        memory in "[1-9][0-9]{0,3}[KMGT]",
        chosen in subsequence((0..9_usize).collect::<Vec<_>>(), 0..=9),
    ) {
        let all = [
            format!("--kernel={}x", texts[0]),
            format!("--cmdline={}", texts[1]),
            format!("--append={}", texts[2]),
            format!("--cpus={cpus}"),
            format!("--memory={memory}"),
            "--timeout=1.5".to_owned(),
            "--trace".to_owned(),
            "--no-initrd".to_owned(),
            "-v".to_owned(),
        ];
        let words: Vec<_> = chosen.iter().map(|&at| all[at].as_str()).collect();
        let config = printed(&[&words[..], &["--print-config"]].concat());
        for (word, option) in words.iter().filter_map(|word| Some((word, word.strip_prefix("--")?))) {
            let key = option.split('=').next().unwrap();
            prop_assert!(config.contains(&format!("\n{key} = ")), "{}: {}", word, config);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "vm.toml", config.as_bytes());
        prop_assert_eq!(printed(&["--config", &path, "--print-config"]), config);
    }
}

#[test]
fn bash_completes_the_options_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let script = file(&dir, "completions", printed(&["--completions", "bash"]).as_bytes());
    // As readline calls it: the command's words, and which of them the cursor is in.
    let ask = r#"
        source "$0" && complete -p 08_boot_linux >&2 || exit 1
        COMP_WORDS=(08_boot_linux "$@") COMP_CWORD=$#
        _08_boot_linux 08_boot_linux "${@: -1}" "${@: -2:1}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let complete = |words: &[&str]| {
        let ran = Program::new("bash").args(["-c", ask, &script]).args(words).run();
        ran.ended(0).stderr_has("-F _08_boot_linux");
        ran.out().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(complete(&["--mem"]), ["--memory"]);
    assert_eq!(complete(&["--print-config", "--cp"]), ["--cpus"]);
    assert_eq!(complete(&["--entry", "pack"]), ["packed", "packed32"]);
    assert_eq!(complete(&["--kernel", &script[..script.len() - 1]]), [script.as_str()]);
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let script = printed(&["--completions", shell]);
        assert!(script.contains("print-config") && script.contains("08_boot_linux"), "{script}");
    }
}

#[test]
fn the_manual_page_has_every_option() {
    let page = printed(&["--man"]);
    assert!(page.contains(".TH 08_boot_linux 1 "), "{page}");
    for line in printed(&["--help"]).lines().map(str::trim).filter(|line| line.starts_with("--")) {
        let option = line.split([' ', '[', '=']).next().unwrap();
        assert!(page.contains(&option.replace('-', "\\-")), "{option}");
    }
    // Where there is `man`, it is shown without a complaint, as wide as a terminal.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("08_boot_linux.1");
    std::fs::write(&path, page).unwrap();
    if Command::new("man").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: there is no man program here");
        return;
    }
    let man = Program::new("man").args(["--warnings", "-l", &text(&path)]).patience(PATIENCE);
    let ran = man.env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8").run();
    ran.ended(0).stdout_has("--memory <SIZE> [default: 512M]").stdout_has("DEBUGGING");
    assert_eq!(ran.err(), "");
    // The examples stand as they were written.
    ran.stdout_has("\n       Try: 08_boot_linux  ");
}
