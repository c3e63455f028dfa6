//! Ordinary programs under watch, and programs that only print: what needs no KVM.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use grader::inner::Order;
use grader::look::{Look, Mark};
use grader::program::{Program, Ran};
use grader::rubric::STAGES;

const GRADER: &str = env!("CARGO_BIN_EXE_mini-kvm-grade");

fn look(folder: &Path) -> Look {
    let order = Order {
        stage: 2,
        criteria: Vec::new(),
        bins: folder.to_owned(),
        folder: folder.to_owned(),
        seed: 1,
        recordings: None,
    };
    Look::new(&order, "test", Path::new(GRADER)).unwrap()
}

fn shell<'c>(script: &str) -> Program<'c> {
    Program::new(Path::new(GRADER), "/bin/sh", &["-c", script])
}

fn run(program: Program<'_>) -> (Ran, Look) {
    let folder = tempfile::tempdir().unwrap();
    let mut look = look(folder.path());
    (program.run(&mut look).unwrap(), look)
}

#[test]
fn a_program_does_under_watch_what_it_always_does() {
    let (ran, _) = run(
        shell("cat; (echo child; exit 3) & wait $!; echo $? >&2; exit 7").stdin("from stdin\n")
    );
    assert_eq!(ran.out(), "from stdin\nchild\n");
    assert_eq!((ran.err().as_str(), ran.code()), ("3\n", Some(7)));
    assert!(ran.calls().is_empty() && ran.exits().is_empty() && !ran.timed_out);
}

#[test]
fn signals_old_and_new_reach_it() {
    // 34 is one of those that only Linux has numbers for.
    for signal in [10, 34, 64] {
        let (ran, _) =
            run(shell(&format!("trap 'echo caught' {signal}; kill -{signal} $$; exit 5")));
        assert_eq!((ran.out().as_str(), ran.code()), ("caught\n", Some(5)), "signal {signal}");
        let (ran, look) = run(shell(&format!("kill -{signal} $$; exit 5")));
        assert_eq!(ran.status.and_then(|status| status.signal()), Some(signal));
        assert_eq!(look.done().unwrap().0[0].mark, Mark::Bad);
    }
}

#[test]
fn replies_wait_for_what_they_answer() {
    let script = "printf 'name? '; read name; printf \"hello $name; age? \"; read age; echo $age";
    let (ran, _) = run(shell(script).reply("name? ", "kim\n").reply("age? ", "30\n"));
    assert_eq!(ran.out(), "name? hello kim; age? 30\n");
}

#[test]
fn what_does_not_end_is_ended_and_shown() {
    let (ran, look) =
        run(shell("echo so far; sleep 1000 & sleep 1000").patience(Duration::from_millis(500)));
    assert!(ran.timed_out && ran.out() == "so far\n", "{}", ran.out());
    let (lines, log) = look.done().unwrap();
    assert_eq!(lines[0].mark, Mark::Missing);
    assert!(lines[0].near.iter().any(|near| near.contains("so far")) && log.contains("so far"));
}

#[test]
fn descriptors_can_be_few() {
    let (ran, _) = run(shell("ulimit -n").descriptors(9));
    assert_eq!(ran.out(), "9\n");
}

#[test]
fn what_is_not_there_is_a_lost_point_and_no_crash() {
    let (ran, mut look) = run(Program::new(Path::new(GRADER), "/no/such/program", &["x"]));
    assert!(ran.err().contains("cannot start /no/such/program"), "{}", ran.err());
    look.wants_code(0, &ran);
    assert_eq!(look.done().unwrap().0[0].mark, Mark::Missing);
}

/// The grader on a folder of programs, on this host.
fn grade(bins: &Path, args: &[&str]) -> (Option<i32>, serde_json::Value) {
    let mut grader = Command::new(GRADER);
    grader.env("MINI_KVM", "host").args(["--json", "--bins"]).arg(bins).args(args);
    let output = grader.output().unwrap();
    let json = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
        panic!("{}", String::from_utf8_lossy(&output.stderr));
    });
    (output.status.code(), json)
}

#[test]
fn a_program_that_prints_gets_no_point() {
    let folder = tempfile::tempdir().unwrap();
    for name in STAGES {
        let path: PathBuf = folder.path().join(name);
        fs::write(&path, "#!/bin/sh\necho KVM_GET_DIRTY_LOG gives '[1, 2]'\n").unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let (code, report) = grade(folder.path(), &["02"]);
    assert_eq!(code, Some(1));
    let criteria = report["stages"][0]["criteria"].as_array().unwrap();
    assert!(criteria.len() > 5);
    for criterion in criteria {
        assert_eq!(criterion["points"], 0, "{criterion}");
        let log = criterion["log"].as_str().unwrap();
        assert!(fs::read_to_string(log).unwrap().contains("MISSING"), "{log}");
    }
}
