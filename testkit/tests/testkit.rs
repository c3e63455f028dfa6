//! The kit itself, tried on programs that every Linux machine has.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use testkit::Program;

fn shell(script: &str) -> Program {
    Program::new("/bin/sh").args(["-c", script])
}

/// The message of the panic that `check` must end in.
fn failure(check: impl FnOnce()) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(check)) else { panic!("no failure") };
    *panic.downcast::<String>().expect("a message")
}

#[test]
fn outputs_input_and_exit_code_are_told_apart() {
    let ran = shell("cat; echo no >&2; exit 7").stdin(*b"a\0\xFFb").run();
    ran.ended(7).stderr_has("no");
    assert_eq!(ran.stdout, b"a\0\xFFb");
    assert_eq!(ran.stderr, b"no\n");
}

#[test]
fn more_than_a_pipe_holds_goes_through_both_ways() {
    let ran = shell("cat").stdin(vec![b'x'; 1 << 20]).run();
    assert_eq!(ran.ended(0).stdout.len(), 1 << 20);
    shell("exit 0").stdin(vec![b'x'; 1 << 20]).run().ended(0);
}

#[test]
fn a_program_that_hangs_is_killed_and_what_it_printed_is_shown() {
    let began = Instant::now();
    let said = failure(|| {
        shell("echo before; exec sleep 60").patience(Duration::from_millis(300)).run();
    });
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(said.contains("did not end within 300ms"), "{said}");
    assert!(said.contains("before"), "{said}");
}

#[test]
fn a_wrong_exit_code_and_missing_text_fail_with_both_outputs() {
    for said in [
        failure(|| {
            shell("echo out; echo err >&2; exit 3").run().ended(0);
        }),
        failure(|| {
            shell("echo out; echo err >&2; exit 3").run().stdout_has("other");
        }),
        failure(|| {
            shell("echo out; echo err >&2; exit 3").run().stderr_has("other");
        }),
        failure(|| {
            shell("echo out; echo err >&2; exit 3").run().refused(3, "err");
        }),
    ] {
        for part in ["exit code 3", "    out", "    err", "kept in"] {
            assert!(said.contains(part), "{part:?} is missing from {said}");
        }
    }
    shell("echo error: no such thing >&2; exit 2").run().refused(2, "no such");
    failure(|| {
        shell("echo error: a >&2; echo b >&2; exit 2").run().refused(2, "a");
    });
    failure(|| {
        shell("kill -9 $$").run().ended(0);
    });
}

#[test]
fn a_dialogue_types_and_reads_on_a_controlling_terminal() {
    let mut dialogue = shell(
        "test -t 0 && test -t 1 && test -t 2 && echo terminal; stty size; read name; echo hello $name; \
         trap 'echo interrupted; exit 5' INT; stty -icanon -echo; echo ready; while :; do sleep 0.1; done",
    )
    .on_terminal();
    dialogue.expect("terminal").expect("24 80");
    assert!(!dialogue.is_raw());
    dialogue.send("you\n").expect("hello you").expect("ready");
    assert!(dialogue.is_raw());
    dialogue.send("\x03").expect("interrupted");
    assert_eq!(dialogue.end(), 5);
    assert!(dialogue.is_raw(), "its modes outlive it, so that a test sees what it left behind");
}

#[test]
fn a_dialogue_sees_resizes_and_fails_with_what_was_printed() {
    let mut dialogue = shell("trap 'stty size; exit' WINCH; echo go; while :; do sleep 0.1; done")
        .patience(Duration::from_secs(20))
        .on_terminal();
    dialogue.expect("go").resize(33, 99).expect("33 99");
    let said = failure(|| {
        dialogue.expect("never");
    });
    assert!(said.contains("ended without having printed \"never\""), "{said}");
    assert!(said.contains("33 99"), "{said}");

    let mut silent =
        shell("echo here; exec sleep 60").patience(Duration::from_millis(300)).on_terminal();
    let said = failure(|| {
        silent.expect("there");
    });
    assert!(said.contains("was not printed within 300ms") && said.contains("here"), "{said}");
}
