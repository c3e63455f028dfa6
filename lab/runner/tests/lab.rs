//! The lab as a program in it and its user see it, through the runner.
//!
//! These need the lab that `cargo xtask setup` makes. Without it they say that they were skipped, or
//! fail if `MINI_KVM_REQUIRE_LAB` is set.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use testkit::Program;

/// `sh -c script` in the lab; nothing if there is no lab.
fn shell(script: &str) -> Option<Program> {
    run(&["/bin/sh", "-c", script])
}

fn run(argv: &[&str]) -> Option<Program> {
    if !lab::is_ready() {
        assert!(
            std::env::var_os("MINI_KVM_REQUIRE_LAB").is_none(),
            "the lab is not set up: run `cargo xtask setup`"
        );
        println!("skipped: the lab is not set up (cargo xtask setup)");
        return None;
    }
    let runner = env!("CARGO_BIN_EXE_mini-kvm-runner");
    Some(Program::new(runner).args(argv).env("MINI_KVM", "lab"))
}

/// The body of a test, with `return` where the lab is missing.
macro_rules! lab {
    ($program:expr) => {
        match $program {
            Some(program) => program,
            None => return,
        }
    };
}

/// Numbers without a pattern that a mistake could keep (xorshift64*).
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut noise = Vec::with_capacity(bytes);
    while noise.len() < bytes {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        noise.extend(state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_be_bytes());
    }
    noise.truncate(bytes);
    noise
}

#[test]
fn kvm_opens_and_its_modules_are_loaded_and_nesting_is_on() {
    let script = "test -r /dev/kvm -a -w /dev/kvm && grep -c ^kvm_amd /proc/modules && \
                  cat /sys/module/kvm_amd/parameters/npt && echo $MINI_KVM_IN_LAB";
    let ran = lab!(shell(script)).run();
    ran.ended(0);
    assert_eq!(ran.stdout, b"1\nY\n1\n");
}

#[test]
fn the_shortest_period_of_timers_is_kvms_own_unless_the_variable_says_so() {
    const VARIABLE: &str = "MINI_KVM_LAB_MIN_TIMER_PERIOD_US";
    let script = "cat /sys/module/kvm/parameters/min_timer_period_us";
    let period = |value: Option<&str>| {
        let lab = shell(script)?;
        let ran = value.into_iter().fold(lab, |lab, value| lab.env(VARIABLE, value)).run();
        ran.ended(0);
        Some(String::from_utf8(ran.stdout).unwrap())
    };
    assert_eq!(lab!(period(Some("50000"))), "50000\n");
    // The parameter was changed in that lab only, and not in the saved one.
    let own = lab!(period(None));
    assert!(own.trim().parse::<u32>().is_ok_and(|period| period < 1000), "{own}");
    assert_eq!(lab!(period(Some(""))), own);
    for wrong in ["50ms", "-1", "4294967296"] {
        let ran = lab!(shell("echo ran")).env(VARIABLE, wrong).run();
        ran.ended(2).stderr_has(&format!("error: {VARIABLE} is {wrong:?}: set it to a number of"));
        assert_eq!(ran.stdout, b"");
        assert_eq!(ran.stderr.iter().filter(|byte| **byte == b'\n').count(), 1);
    }
}

#[test]
fn the_loopback_device_is_up() {
    lab!(shell("cat /sys/class/net/lo/operstate /sys/class/net/lo/flags"))
        .run()
        .ended(0)
        .stdout_has("0x9\n");
}

#[test]
fn exit_codes_pass() {
    for code in [0, 1, 77, 255] {
        lab!(shell(&format!("exit {code}"))).run().ended(code);
    }
}

#[test]
fn a_death_by_signal_is_told_as_a_shell_does() {
    lab!(shell("kill -SEGV $$")).run().ended(128 + 11);
    lab!(shell("kill -KILL $$")).run().ended(128 + 9);
}

#[test]
fn a_program_that_is_not_there_or_no_program_is_told_in_one_line() {
    let ran = lab!(run(&["/no/such/program"])).run();
    ran.ended(127).stderr_has("cannot run /no/such/program in the lab: No such file");
    lab!(run(&["/etc/passwd"])).run().ended(126).stderr_has("Permission denied");
}

#[test]
fn the_runner_says_why_it_takes_the_lab_and_nothing_else() {
    let ran = lab!(run(&["/bin/true"])).run();
    ran.ended(0);
    assert_eq!(ran.stderr, b"mini-kvm: MINI_KVM=lab: running in the lab\n");
    assert_eq!(ran.stdout, b"");
}

#[test]
fn every_byte_passes_both_ways_in_megabytes() {
    let mut sent: Vec<u8> = (0..=255).collect();
    sent.extend(noise(5 << 20));
    let ran = lab!(run(&["/bin/cat"])).stdin(sent.clone()).run();
    ran.ended(0);
    assert!(ran.stdout == sent, "{} of {} bytes came back", ran.stdout.len(), sent.len());
}

#[test]
fn stdout_and_stderr_are_two() {
    let ran = lab!(shell("echo out; echo err >&2")).run();
    ran.ended(0);
    assert_eq!(ran.stdout, b"out\n");
    assert!(ran.stderr.ends_with(b"\nerr\n"));
}

#[test]
fn the_end_of_stdin_arrives_and_a_program_may_leave_stdin_alone() {
    lab!(shell("wc -c")).stdin("abc").run().ended(0).stdout_has("3\n");
    // Far more than any window: it must not hold up the program's end.
    lab!(shell("echo fine")).stdin(noise(3 << 20)).run().ended(0).stdout_has("fine\n");
}

#[test]
fn a_closed_stdout_reaches_the_program_as_sigpipe() {
    lab!(shell("true"));
    let script = format!(
        "MINI_KVM=lab {} /bin/sh -c 'yes; echo $? >&2' | head -n 1",
        env!("CARGO_BIN_EXE_mini-kvm-runner")
    );
    let ran = Program::new("/bin/sh").args(["-c", &script]).run();
    ran.ended(0).stderr_has("141");
    assert_eq!(ran.stdout, b"y\n");
}

#[test]
fn folder_environment_and_mask_are_the_callers() {
    let dir = tempfile::Builder::new().prefix("with space ").tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    let ran = lab!(shell("pwd; echo \"$GREETING\"; umask"))
        .env("GREETING", "two\nlines = 'quoted'")
        .current_dir(&path)
        .run();
    ran.ended(0);
    let umask = Command::new("/bin/sh").args(["-c", "umask"]).output().unwrap().stdout;
    let expected = format!("{}\ntwo\nlines = 'quoted'\n", path.display());
    assert_eq!(ran.stdout, [expected.as_bytes(), &umask].concat());
}

#[test]
fn the_clock_is_the_hosts() {
    let ran = lab!(shell("date +%s")).run();
    ran.ended(0);
    let inside: u64 = String::from_utf8_lossy(&ran.stdout).trim().parse().unwrap();
    let here = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(here.abs_diff(inside) < 30, "{inside} inside, {here} outside");
}

#[test]
fn files_are_the_hosts_both_ways_with_owner_and_content() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("from-host"), "made outside").unwrap();
    let script = "cat from-host && echo 'made inside' > from-lab && chmod 640 from-lab && \
                  mkdir sub && mv from-host sub/ && ln -s sub/from-host link";
    let ran = lab!(shell(script)).current_dir(dir.path()).run();
    ran.ended(0);
    assert_eq!(ran.stdout, b"made outside");
    let made = dir.path().join("from-lab");
    assert_eq!(fs::read_to_string(&made).unwrap(), "made inside\n");
    let meta = made.metadata().unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o640);
    assert_eq!(meta.uid(), rustix::process::geteuid().as_raw());
    assert_eq!(meta.gid(), rustix::process::getegid().as_raw());
    assert_eq!(fs::read_to_string(dir.path().join("link")).unwrap(), "made outside");
}

#[test]
fn what_the_host_writes_meanwhile_is_seen_and_a_killed_lab_has_lost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let script = "until test -e go; do sleep 0.05; done; cat go; printf kept > kept; echo written; \
                  sleep 1000";
    let mut lab = lab!(shell(script)).current_dir(dir.path()).on_terminal();
    fs::write(dir.path().join("go"), "gone\n").unwrap();
    lab.expect("gone").expect("written");
    let runner = Pid::from_raw(lab.pid().cast_signed()).unwrap();
    kill_process(runner, Signal::KILL).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("kept")).unwrap(), "kept");
}

#[test]
fn two_labs_run_side_by_side_and_are_not_each_other() {
    let dir = tempfile::tempdir().unwrap();
    // Each waits for the other's file: one after the other they would never end.
    let script = |mine: &str, other: &str| {
        format!(
            "cat /proc/sys/kernel/random/uuid; : > {mine}; until test -e {other}; do sleep 0.05; done"
        )
    };
    let a = lab!(shell(&script("a", "b"))).current_dir(dir.path());
    let b = lab!(shell(&script("b", "a"))).current_dir(dir.path());
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| a.run());
        let b = scope.spawn(|| b.run());
        (a.join().unwrap(), b.join().unwrap())
    });
    a.ended(0);
    b.ended(0);
    assert_ne!(a.stdout, b.stdout, "both labs draw the same random numbers");
}

/// The QEMU that a runner has started.
fn child_of(runner: u32) -> Pid {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let children = fs::read_to_string(format!("/proc/{runner}/task/{runner}/children"));
        let child = children.unwrap_or_default().split_whitespace().next().map(str::parse);
        if let Some(Ok(pid)) = child {
            return Pid::from_raw(pid).unwrap();
        }
        assert!(Instant::now() < deadline, "the runner has started no QEMU");
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_killed_runner_leaves_no_qemu_behind() {
    lab!(shell("true"));
    let mut runner = Command::new(env!("CARGO_BIN_EXE_mini-kvm-runner"))
        .args(["/bin/sh", "-c", "echo up; sleep 1000"])
        .env("MINI_KVM", "lab")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let qemu = child_of(runner.id());
    runner.kill().unwrap();
    runner.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    // Gone, or a zombie that waits for whoever adopts orphans here.
    while test_kill_process(qemu).is_ok() {
        let status = fs::read_to_string(format!("/proc/{}/stat", qemu.as_raw_nonzero()));
        if status.is_ok_and(|status| status.contains(") Z ")) {
            break;
        }
        assert!(Instant::now() < deadline, "QEMU lives on");
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn signals_to_the_runner_reach_the_program_which_decides() {
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut lab = lab!(shell(script)).on_terminal();
    lab.expect("ready");
    kill_process(Pid::from_raw(lab.pid().cast_signed()).unwrap(), Signal::TERM).unwrap();
    lab.expect("caught");
    assert_eq!(lab.end(), 5);
    assert!(!lab.is_raw(), "the terminal is left raw");
}

#[test]
fn the_terminal_has_its_size_its_name_and_follows_changes() {
    let script = "trap 'stty size; exit' WINCH; stty size; tty -s && echo $TERM; \
                  while :; do sleep 0.05; done";
    let mut lab = lab!(shell(script)).on_terminal();
    lab.expect("24 80").expect("xterm-256color");
    lab.resize(50, 132).expect("50 132");
    assert_eq!(lab.end(), 0);
}

#[test]
fn keys_arrive_raw_when_the_program_wants_them_so() {
    let script = "stty raw -echo; echo ready; dd bs=1 count=4 2>/dev/null | od -An -tx1; stty sane";
    let mut lab = lab!(shell(script)).on_terminal();
    lab.expect("ready").send("a\x03\x04\x1a").expect("61 03 04 1a");
    assert_eq!(lab.end(), 0);
    assert!(!lab.is_raw(), "the terminal is left raw");
}

#[test]
fn ctrl_c_interrupts_and_ctrl_d_ends_the_input() {
    let mut lab = lab!(shell("echo ready; sleep 1000")).on_terminal();
    lab.expect("ready").send("\x03");
    assert_eq!(lab.end(), 128 + 2);
    assert!(!lab.is_raw(), "the terminal is left raw");
    let mut lab = lab!(shell("echo ready; cat; echo over")).on_terminal();
    lab.expect("ready\r\n").send("line\n").expect("line\r\nline").send("\x04").expect("over");
    assert_eq!(lab.end(), 0);
}

#[test]
fn ctrl_c_works_with_a_terminal_for_the_output_alone() {
    lab!(shell("true"));
    let script = format!(
        "sleep 1000 | MINI_KVM=lab {} /bin/sh -c 'trap \"echo caught; exit 6\" INT; echo ready; \
         while :; do sleep 0.05; done'; echo \"code $?\"",
        env!("CARGO_BIN_EXE_mini-kvm-runner")
    );
    // The outer shell ignores Ctrl-C to be able to tell the code.
    let script = format!("trap : INT; {script}");
    let mut lab = Program::new("/bin/sh").args(["-c", &script]).on_terminal();
    lab.expect("ready\r\n").send("\x03").expect("caught").expect("code 6");
    assert!(!lab.printed().contains("\r\r\n"), "line ends are made twice");
}

#[test]
fn lines_end_once_whether_they_come_through_a_pipe_or_not() {
    lab!(shell("true"));
    // One end by the program itself, one by Ctrl-C. The last line shows whether the terminal is as it was.
    for (key, code) in [("\n", 0), ("\x03", 6)] {
        let script = format!(
            "{{ MINI_KVM=lab {} /bin/sh -c 'trap \"echo caught; exit 6\" INT; echo out; \
             echo err >&2; read line; echo \"got $line\"; read line'; echo \"code $?\"; }} | cat; \
             echo over",
            env!("CARGO_BIN_EXE_mini-kvm-runner")
        );
        let mut lab = Program::new("/bin/sh").args(["-c", &script]).on_terminal();
        // What goes through the pipe and what doesn't may overtake each other.
        lab.shows("out").shows("err").send("key\n").shows("got key").send(key);
        lab.expect(&format!("code {code}\r\n")).expect("over\r\n");
        assert_eq!(lab.end(), 0);
        assert!(!lab.is_raw(), "the terminal is left raw");
        let printed = lab.printed();
        let wrong = printed
            .split_inclusive('\n')
            .find(|line| !line.ends_with("\r\n") || line.ends_with("\r\r\n"));
        assert_eq!(wrong, None, "{printed:?}");
    }
}

#[test]
fn what_is_a_pipe_is_a_pipe_inside_beside_a_terminal() {
    lab!(shell("true"));
    let script = format!(
        "MINI_KVM=lab {} /bin/sh -c 'test -t 0 && echo in; test -t 1 || echo out >&2; \
         test -t 2 && echo err >&2; echo data' | tr a-z A-Z",
        env!("CARGO_BIN_EXE_mini-kvm-runner")
    );
    let mut lab = Program::new("/bin/sh").args(["-c", &script]).on_terminal();
    lab.end();
    // What goes through the pipe and what doesn't may overtake each other.
    for text in ["out", "err", "IN", "DATA"] {
        assert!(lab.printed().contains(text), "{text}: {:?}", lab.printed());
    }
}

#[test]
fn a_panic_of_the_labs_kernel_ends_in_a_message() {
    let ran = lab!(shell("echo c > /proc/sysrq-trigger; sleep 1000")).run();
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root may make the lab's kernel panic");
        return;
    }
    ran.ended(3).stderr_has("the lab broke down").stderr_has("Kernel panic");
}

#[test]
fn a_shell_in_the_lab_has_job_control() {
    let mut lab = lab!(run(&["/bin/sh", "-i"])).env("PS1", "lab> ").on_terminal();
    lab.expect("lab> ").send("sleep 1000\n").expect("sleep 1000\r\n");
    // The shell has to have handed the terminal to its job before the key comes.
    sleep(Duration::from_millis(500));
    lab.send("\x1a").expect("Stopped").expect("lab> ");
    lab.send("fg\n").expect("fg\r\nsleep 1000");
    sleep(Duration::from_millis(500));
    lab.send("\x03").expect("lab> ").send("exit 9\n");
    assert_eq!(lab.end(), 9);
}

/// Ends what a failed test would leave running.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn neither_a_full_stdin_nor_a_full_stdout_holds_up_a_signal() {
    lab!(shell("true"));
    let dir = tempfile::tempdir().unwrap();
    // It never reads, writes without end to a pipe that nobody empties, and tells when it runs.
    let script = "trap 'exit 5' TERM; yes & : > up; while :; do sleep 0.05; done";
    let mut child = Killed(
        Command::new(env!("CARGO_BIN_EXE_mini-kvm-runner"))
            .args(["/bin/sh", "-c", script])
            .env("MINI_KVM", "lab")
            .current_dir(dir.path())
            .stdin(fs::File::open("/dev/zero").unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while !dir.path().join("up").exists() {
        assert!(Instant::now() < deadline, "the program does not start");
        sleep(Duration::from_millis(10));
    }
    // Until every window is full.
    sleep(Duration::from_secs(2));
    // The runner ends once its own output is taken, as the program's code tells.
    kill_process(Pid::from_child(&child.0), Signal::TERM).unwrap();
    drop(child.0.stdout.take());
    while child.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the signal did not arrive");
        sleep(Duration::from_millis(10));
    }
    assert_eq!(child.0.wait().unwrap().code(), Some(5));
}

#[test]
fn a_damaged_saved_lab_is_made_anew_by_the_run_that_finds_it() {
    lab!(shell("true"));
    // A cache folder of its own, with the same kernel and agent: nobody else's lab is touched.
    let dir = tempfile::tempdir().unwrap();
    let lab = dir.path().join("mini-kvm/lab");
    fs::create_dir_all(&lab).unwrap();
    symlink(cli::cache::lab_kernel(), dir.path().join("mini-kvm/lab-kernel")).unwrap();
    for entry in fs::read_dir(cli::cache::dir().join("lab")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cpio") {
            fs::copy(&path, lab.join(path.file_name().unwrap())).unwrap();
        }
    }
    let run = || shell("exit 7").unwrap().env("XDG_CACHE_HOME", dir.path()).run();
    run().ended(7).stderr_has("starting the lab once");
    let state = fs::read_dir(&lab)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("state-"))
        .unwrap();

    for damaged in ["devices", "memory"] {
        let file = fs::File::options().write(true).open(state.join(damaged)).unwrap();
        file.set_len(1000).unwrap();
        run().ended(7).stderr_has("making it anew");
        let after = run();
        after.ended(7);
        assert_eq!(after.stderr, b"mini-kvm: MINI_KVM=lab: running in the lab\n", "{damaged}");
    }
}

#[test]
fn what_cannot_be_printed_is_told_and_a_reader_that_leaves_is_none() {
    let full = lab!(shell("echo text")).redirected("> /dev/full").run();
    full.ended(3).stderr_has("error: cannot write to stdout: No space left on device");
    lab!(shell("echo text")).redirected("2> /dev/full").run().ended(0).stdout_has("text");
    lab!(shell("echo text")).redirected("| true; exit 0").run().ended(0);
}
