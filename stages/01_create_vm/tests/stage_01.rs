//! Milestone 1: what stage 01 says of KVM is what KVM says, and without KVM it says what to do.

mod checkup;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use common::checkup::{Probe, RING0_SPEED};
use kvm_ioctls::{Cap, Kvm};
use serde_json::Value;
use testkit::{Program, Ran};

const BINARY: &str = env!("CARGO_BIN_EXE_01_create_vm");

fn stage_01(args: &[&str]) -> Ran {
    Program::new(BINARY).args(args).run()
}

/// What `--json` printed, once for all tests.
fn found() -> &'static Value {
    static FOUND: OnceLock<Value> = OnceLock::new();
    FOUND.get_or_init(|| {
        let ran = stage_01(&["--json"]);
        serde_json::from_slice(&ran.ended(0).stdout).unwrap_or_else(|error| {
            ran.fail(&format!("stdout is not JSON: {error}"));
        })
    })
}

#[test]
fn version_and_limits_are_those_that_kvm_tells() {
    let kvm = Kvm::new().unwrap();
    assert_eq!(found()["api_version"], kvm.get_api_version());
    let limits = &found()["limits"];
    assert_eq!(limits["vcpus_recommended"], kvm.get_nr_vcpus());
    assert_eq!(limits["vcpus_max"], kvm.get_max_vcpus());
    assert_eq!(limits["memslots"], kvm.get_nr_memslots());
    assert_eq!(limits["vcpu_mmap_size"], kvm.get_vcpu_mmap_size().unwrap());
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    assert_eq!(limits["cpuid_entries"], cpuid.as_slice().len());
    assert_eq!(limits["msrs"], kvm.get_msr_index_list().unwrap().as_slice().len());
    let features = kvm.get_msr_feature_index_list().unwrap();
    assert_eq!(limits["feature_msrs"], features.as_slice().len());
}

#[test]
fn capabilities_have_the_values_that_kvm_tells() {
    let kvm = Kvm::new().unwrap();
    let value = |name: &str| {
        let all = found()["capabilities"].as_array().unwrap();
        all.iter().find(|entry| entry["name"] == name).map(|entry| entry["value"].clone())
    };
    // By name here, and by number in the program: a wrong pair in its table would show.
    let table = [
        ("KVM_CAP_USER_MEMORY", Cap::UserMemory),
        ("KVM_CAP_SET_TSS_ADDR", Cap::SetTssAddr),
        ("KVM_CAP_SET_IDENTITY_MAP_ADDR", Cap::SetIdentityMapAddr),
        ("KVM_CAP_READONLY_MEM", Cap::ReadonlyMem),
        ("KVM_CAP_EXT_CPUID", Cap::ExtCpuid),
        ("KVM_CAP_SET_GUEST_DEBUG", Cap::SetGuestDebug),
        ("KVM_CAP_COALESCED_MMIO", Cap::CoalescedMmio),
        ("KVM_CAP_IOEVENTFD", Cap::Ioeventfd),
        ("KVM_CAP_IRQCHIP", Cap::Irqchip),
        ("KVM_CAP_IRQFD", Cap::Irqfd),
        ("KVM_CAP_PIT2", Cap::Pit2),
        ("KVM_CAP_MP_STATE", Cap::MpState),
        ("KVM_CAP_CLOCKSOURCE", Cap::Clocksource),
    ];
    for (name, cap) in table {
        assert_eq!(value(name), Some(kvm.check_extension_int(cap).into()), "{name}");
    }
    assert_eq!(found()["capabilities"].as_array().unwrap().len(), table.len());
}

#[test]
fn verdicts_follow_from_the_probes() {
    let outcomes = found()["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), Probe::ALL.len());
    let verdicts = found()["verdicts"].as_array().unwrap();
    assert_eq!(verdicts.len(), 8);
    for (stage, verdict) in (1..).zip(verdicts) {
        assert_eq!(verdict["stage"], stage);
        let lacks = Probe::needed_by(stage).iter().filter(|&&probe| {
            let name = serde_json::to_value(probe).unwrap();
            let outcome = outcomes.iter().find(|outcome| outcome["probe"] == name).unwrap();
            !outcome["failure"].is_null()
        });
        let lacks: Vec<_> = lacks.map(|probe| probe.what()).collect();
        assert_eq!(verdict["lacks"], serde_json::json!(lacks));
        assert_eq!(verdict["able"], lacks.is_empty());
        assert_eq!(verdict["reason"] == "", lacks.is_empty());
        // The lab is there for the stages that a host cannot run.
        let in_lab = std::env::var_os("MINI_KVM_IN_LAB").is_some();
        assert!(!in_lab || verdict["able"] == true, "{verdict}");
    }
    let fast = found()["ring0_speed"].as_f64().unwrap() >= RING0_SPEED;
    let speed = outcomes.iter().find(|outcome| outcome["probe"] == "ring0_speed").unwrap();
    assert_eq!(speed["failure"].is_null(), fast);
}

#[test]
fn tables_tell_the_same_in_80_columns_without_colours() {
    let ran = stage_01(&[]);
    let out = ran.ended(0).out();
    assert!(!out.contains('\x1b'), "{out:?}");
    for line in out.lines() {
        assert!(line.chars().count() <= 80, "{line:?}");
    }
    for capability in found()["capabilities"].as_array().unwrap() {
        let (name, value) = (capability["name"].as_str().unwrap(), &capability["value"]);
        let line = out.lines().find(|line| line.contains(name)).unwrap();
        assert_eq!(line.split_whitespace().nth(1), Some(value.to_string().as_str()), "{line}");
    }
    for verdict in found()["verdicts"].as_array().unwrap() {
        let word = if verdict["able"] == true { "yes" } else { "no" };
        let stage = format!(" {:02}_", verdict["stage"].as_u64().unwrap());
        let line = out.lines().find(|line| line.contains(&stage)).unwrap();
        assert_eq!(line.split_whitespace().next(), Some(word), "{line}");
    }
    ran.stdout_has(&format!("API version {}", found()["api_version"]));
}

#[test]
fn colours_are_for_terminals() {
    let mut dialogue = Program::new(BINARY).env("NO_COLOR", "").on_terminal();
    dialogue.expect("\x1b[1mVerdict\x1b[0m").expect("\x1b[32myes");
    assert_eq!(dialogue.end(), 0);
}

#[test]
fn a_virtual_machine_is_really_made() {
    // The system's descriptor is the last one that a limit of four allows.
    let script = format!("ulimit -n 4; exec {BINARY}");
    let ran = Program::new("/bin/sh").args(["-c", &script]).run();
    ran.refused(3, "KVM_CREATE_VM failed: Too many open files").stderr_has("MINI_KVM=lab");
}

#[test]
fn wrong_usage_is_told_from_a_host_that_cannot() {
    let ran = stage_01(&["--no-such-option"]);
    ran.ended(2).stderr_has("--no-such-option");
    assert!(ran.stdout.is_empty());
    stage_01(&["--help"]).ended(0).stdout_has("Exit codes:").stdout_has("--json");
}

/// Runs the binary after `prepare`, a shell script, in a mount namespace where /dev may be changed
/// without anyone else noticing. Nothing if this user may not make one.
fn with_dev_changed(prepare: &str, run: &str) -> Option<Ran> {
    let unshare = ["--mount", "--propagation", "unchanged"];
    let user: &[&str] = if is_root() { &[] } else { &["--map-root-user"] };
    let private = "mount --make-rprivate /dev";
    let may = Command::new("unshare")
        .args(unshare)
        .args(user)
        .args(["sh", "-c", private])
        .output()
        .is_ok_and(|output| output.status.success());
    if !may {
        println!("skipped: this user may not make a mount namespace here");
        return None;
    }
    let script = format!("set -e; {private}; {prepare}; exec {run}");
    Some(Program::new("unshare").args(unshare).args(user).args(["sh", "-c", &script]).run())
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout == b"0\n"
}

#[test]
fn a_missing_dev_kvm_is_explained() {
    for args in ["", "--json"] {
        let run = format!("{BINARY} {args}");
        let Some(ran) = with_dev_changed("mount -t tmpfs none /dev", &run) else { return };
        ran.refused(3, "no /dev/kvm").stderr_has("MINI_KVM=lab");
    }
}

#[test]
fn the_doctor_says_what_is_missing_and_what_to_do() {
    let ran = stage_01(&["--doctor"]);
    let out = ran.ended(0).out();
    assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
    for verdict in found()["verdicts"].as_array().unwrap() {
        let word = if verdict["able"] == true { "yes" } else { "no" };
        let stage = format!(" {:02}_", verdict["stage"].as_u64().unwrap());
        let line = out.lines().find(|line| line.contains(&stage)).unwrap();
        assert_eq!(line.split_whitespace().next(), Some(word), "{line}");
    }
    // What is missing has a remedy, and the last one is the lab.
    let able = found()["verdicts"].as_array().unwrap().iter().all(|it| it["able"] == true);
    match able {
        true => ran.stdout_has("Nothing is missing"),
        false => ran.stdout_has("  1. ").stdout_has("  2. Or change nothing: `cargo run`"),
    };
    let run = format!("{BINARY} --doctor");
    let Some(ran) = with_dev_changed("mount -t tmpfs none /dev", &run) else { return };
    ran.ended(3).stdout_has("/dev/kvm        no /dev/kvm\n").stdout_has("no   01_create_vm");
    ran.stdout_has("  1. ").stdout_has("MINI_KVM=lab");
}

#[test]
fn something_else_behind_dev_kvm_is_explained() {
    let Some(ran) = with_dev_changed("mount --bind /dev/null /dev/kvm", BINARY) else { return };
    ran.refused(3, "/dev/kvm is not KVM").stderr_has("KVM_GET_API_VERSION");
}

#[test]
fn a_forbidden_dev_kvm_names_the_group_to_join() {
    if !is_root() {
        println!("skipped: only root can become a user who may not open /dev/kvm");
        return;
    }
    // Somewhere that every user can reach.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let copy: PathBuf = dir.path().join("01_create_vm");
    std::fs::copy(BINARY, &copy).unwrap();
    let as_nobody = format!(
        "setpriv --reuid=65534 --regid=65534 --clear-groups {}",
        copy.to_str().expect("a temporary path is UTF-8")
    );
    let node = |owner: &str, mode: &str| {
        let prepare = format!(
            "mount -t tmpfs none /dev; mknod /dev/kvm c 10 232; chown {owner} /dev/kvm; \
             chmod {mode} /dev/kvm"
        );
        with_dev_changed(&prepare, &as_nobody)
    };
    // Every Linux has this group.
    let Some(ran) = node("root:daemon", "660") else { return };
    ran.refused(3, "owned by group daemon").stderr_has("usermod -aG daemon");
    let Some(ran) = node("root:4000000", "660") else { return };
    ran.refused(3, "owned by group 4000000");
    let Some(ran) = node("root:root", "600") else { return };
    ran.refused(3, "only root may").stderr_has("sudo");
}

#[test]
fn a_full_disk_is_told() {
    Program::full_disk(BINARY, &[]);
    Program::full_disk(BINARY, &["--json"]);
    Program::full_disk(BINARY, &["--doctor"]);
}
