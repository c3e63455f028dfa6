//! The check-up against this machine's `/dev/kvm`: what it says of real probes, and that it finds out
//! probes which hang, crash, lie or never stop talking.

use std::time::{Duration, Instant};

use common::checkup::{self, Probe, Probes};
use common::kvm;

#[test]
fn each_probe_runs_once_and_the_verdicts_follow_from_them() {
    let report = checkup::run(&kvm::open().unwrap(), &asm::checkup());
    let ran: Vec<_> = report.outcomes.iter().map(|outcome| outcome.probe).collect();
    assert_eq!(ran, Probe::ALL);
    for stage in 1..=8 {
        let verdict = report.verdict(stage);
        let failed: Vec<_> = Probe::needed_by(stage)
            .iter()
            .filter(|&&probe| report.outcome(probe).unwrap().failure.is_some())
            .collect();
        assert_eq!(verdict.able, failed.is_empty(), "{verdict:?}");
        for probe in failed {
            assert!(verdict.reason.contains(probe.what()), "{verdict:?}");
        }
    }
    // Every KVM that is worth the name can do these, one that interprets ring 0 too.
    for probe in [Probe::Real16, Probe::LongMode, Probe::Mmio, Probe::DirtyLog, Probe::Irqchip] {
        let outcome = report.outcome(probe).unwrap();
        assert!(outcome.failure.is_none(), "{outcome:?}");
    }
    assert!(report.ring0_speed.unwrap() > 1e5, "{:?}", report.ring0_speed);
}

/// The verdict on stage 04, which needs the real-mode probe only, with another program in its place.
fn stage04_with(real16: &'static [u8]) -> String {
    let probes = Probes { real16, ..asm::checkup() };
    let verdict = checkup::run_for(&kvm::open().unwrap(), &probes, 4);
    assert!(!verdict.able);
    assert_eq!(verdict.stage, 4);
    verdict.reason
}

#[test]
fn a_probe_that_never_ends_is_stopped() {
    let began = Instant::now();
    let reason = stage04_with(b"\xB0\x07\xE6\x80\xEB\xFE"); // mov al, 7; out 0x80, al; jmp $
    assert!(reason.contains("no end within 2s after step 7"), "{reason}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

#[test]
fn a_probe_that_keeps_exiting_is_stopped() {
    let reason = stage04_with(b"\xE6\x80\xEB\xFC"); // out 0x80, al; jmp to it
    assert!(reason.contains("no end after 10000 exits"), "{reason}");
}

#[test]
fn a_probe_that_ends_without_having_done_its_work_is_found_out() {
    let reason = stage04_with(b"\xF4"); // hlt
    assert!(reason.contains("three times the number"), "{reason}");
    assert!(reason.contains("found 0x0"), "{reason}");
}

#[test]
fn a_probe_that_crashes_is_reported() {
    // lidt [0x1100], where there are zeroes; ud2
    let reason = stage04_with(b"\x0F\x01\x1E\x00\x11\x0F\x0B");
    // A KVM that interprets ring 0 gives up where a processor has its triple fault.
    let crashed = ["KVM_EXIT_SHUTDOWN", "KVM_INTERNAL_ERROR"];
    assert!(crashed.iter().any(|how| reason.contains(how)), "{reason}");
    assert!(reason.ends_with("before its first step"), "{reason}");
}

#[test]
fn a_probe_that_does_something_else_is_reported() {
    let reason = stage04_with(b"\xE6\x55\xF4"); // out 0x55, al
    assert!(reason.contains("unexpected IoOut") && reason.contains("55"), "{reason}");
}
