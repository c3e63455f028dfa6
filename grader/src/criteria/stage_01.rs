//! Stage 01: what KVM says it can do, a virtual machine, and what it can really do.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use nix::errno::Errno;
use serde_json::Value;

use super::criteria;
use crate::look::Look;
use crate::program::Ran;
use crate::witness::record::{Call, On, What};

criteria![
    the_api_version_is_asked_and_checked,
    capabilities_are_what_kvm_answers,
    limits_are_what_kvm_answers,
    a_virtual_machine_is_made,
    probes_run_in_every_mode_of_the_processor,
    probes_try_what_the_stages_need,
    verdicts_follow_from_the_probes,
];

/// The capabilities that the stages rely on, by their numbers in the KVM API.
const CAPABILITIES: [(&str, u64); 13] = [
    ("KVM_CAP_USER_MEMORY", 3),
    ("KVM_CAP_SET_TSS_ADDR", 4),
    ("KVM_CAP_SET_IDENTITY_MAP_ADDR", 37),
    ("KVM_CAP_READONLY_MEM", 81),
    ("KVM_CAP_EXT_CPUID", 7),
    ("KVM_CAP_SET_GUEST_DEBUG", 23),
    ("KVM_CAP_COALESCED_MMIO", 15),
    ("KVM_CAP_IOEVENTFD", 36),
    ("KVM_CAP_IRQCHIP", 0),
    ("KVM_CAP_IRQFD", 32),
    ("KVM_CAP_PIT2", 33),
    ("KVM_CAP_MP_STATE", 14),
    ("KVM_CAP_CLOCKSOURCE", 8),
];

/// What `--json` printed.
fn json(ran: &Ran) -> Result<Value> {
    serde_json::from_slice(&ran.stdout).context("stdout of --json is JSON")
}

/// Runs it on a KVM that answers so when it is asked for these capabilities.
fn run_with(look: &mut Look, answers: &BTreeMap<u64, i64>) -> Result<Ran> {
    let answer = |call: &Call| match call.name {
        "KVM_CHECK_EXTENSION" => answers.get(&call.arg).copied(),
        _ => None,
    };
    look.program(&["--json"]).pretend(answer).run(look)
}

fn the_api_version_is_asked_and_checked(look: &mut Look) -> Result<()> {
    let ran = look.program(&["--json"]).run(look)?;
    look.wants_code(0, &ran);
    let asked = ran.calls_of("KVM_GET_API_VERSION").next();
    let asked = look.needs("KVM_GET_API_VERSION", asked)?;
    look.wants_same("on /dev/kvm", On::System, asked.on);
    look.wants_same("before anything else", asked.at, ran.calls()[0].at);
    look.wants_same("api_version", asked.result.ok(), json(&ran)?["api_version"].as_i64());
    // A KVM of another version, as nobody has seen one.
    let other = look.random(13..1000) as i64;
    let ran = look
        .program(&["--json"])
        .pretend(move |call| (call.name == "KVM_GET_API_VERSION").then_some(other))
        .run(look)?;
    look.wants_refusal(3, &other.to_string(), &ran);
    look.forbids("a VM on such a KVM", ran.vms() > 0);
    Ok(())
}

fn capabilities_are_what_kvm_answers(look: &mut Look) -> Result<()> {
    // Random answers, for those that the program only tells.
    let answers: BTreeMap<u64, i64> =
        CAPABILITIES.iter().map(|(_, cap)| (*cap, look.random(2..9999) as i64)).collect();
    let ran = run_with(look, &answers)?;
    let told = json(&ran)?;
    let told = told["capabilities"].as_array().context("an array `capabilities`")?;
    for (name, cap) in CAPABILITIES {
        let asked = ran.calls_of("KVM_CHECK_EXTENSION").any(|call| call.arg == cap);
        look.wants(format!("KVM_CHECK_EXTENSION of {name}"), asked);
        let value = told.iter().find(|entry| entry["name"] == name);
        let value = value.and_then(|entry| entry["value"].as_i64());
        look.wants_same(format!("value of {name}"), answers.get(&cap).copied(), value);
    }
    Ok(())
}

fn limits_are_what_kvm_answers(look: &mut Look) -> Result<()> {
    let limits = [(9, "vcpus_recommended"), (66, "vcpus_max"), (10, "memslots")];
    let numbers = limits.map(|(cap, _)| (cap, look.random(2..500) as i64)).into();
    let ran = run_with(look, &numbers)?;
    let told = json(&ran)?;
    let limit = |name: &str| told["limits"][name].as_i64();
    for (cap, name) in limits {
        look.wants_same(name, numbers.get(&cap).copied(), limit(name));
    }
    let size = ran.obeyed("KVM_GET_VCPU_MMAP_SIZE").next().and_then(|call| call.result.ok());
    look.wants_same("vcpu_mmap_size", size, limit("vcpu_mmap_size"));
    for (ioctl, name) in [
        ("KVM_GET_SUPPORTED_CPUID", "cpuid_entries"),
        ("KVM_GET_MSR_INDEX_LIST", "msrs"),
        ("KVM_GET_MSR_FEATURE_INDEX_LIST", "feature_msrs"),
    ] {
        let count = ran.obeyed(ioctl).next().map(|call| i64::from(call.answer_u32(0)));
        look.wants(format!("{ioctl} with entries"), count.is_some_and(|count| count > 0));
        look.wants_same(name, count, limit(name));
    }
    Ok(())
}

fn a_virtual_machine_is_made(look: &mut Look) -> Result<()> {
    let ran = look.program::<&str>(&[]).run(look)?;
    look.wants_code(0, &ran);
    let made = ran.obeyed("KVM_CREATE_VM").next();
    let made = look.needs("KVM_CREATE_VM", made)?;
    look.wants_same("on /dev/kvm", On::System, made.on);
    let fd = made.result.unwrap_or_default();
    let (out, text) = (ran.out(), format!("file descriptor {fd} "));
    let told = out.lines().any(|line| line.contains("KVM_CREATE_VM") && line.contains(&text));
    look.wants(format!("KVM_CREATE_VM told together with {text:?}"), told);
    // A host that refuses one, each time for another reason.
    let reasons = [Errno::ENOMEM, Errno::EBUSY, Errno::EPERM, Errno::EMFILE];
    let errno = reasons[look.random(0..4) as usize];
    let ran = look
        .program::<&str>(&[])
        .pretend(move |call| (call.name == "KVM_CREATE_VM").then_some(-(errno as i64)))
        .run(look)?;
    look.wants_refusal(3, "KVM_CREATE_VM", &ran);
    let refused = ran.calls_of("KVM_CREATE_VM").any(|call| call.result == Err(errno));
    look.wants(format!("it was told {errno:?}"), refused);
    Ok(())
}

/// Whether `--json` says that a probe succeeded; nothing if it says nothing of it.
fn succeeded(told: &Value, probe: &str) -> Option<bool> {
    let outcomes = told["outcomes"].as_array()?;
    Some(outcomes.iter().find(|outcome| outcome["probe"] == probe)?["failure"].is_null())
}

fn probes_run_in_every_mode_of_the_processor(look: &mut Look) -> Result<()> {
    let mut modes = BTreeSet::new();
    let ran = look
        .program(&["--json"])
        .at_exit(|_, guest| {
            let sregs = guest.sregs()?;
            modes.insert(match (sregs.protected(), sregs.paging(), sregs.long()) {
                (false, ..) => "real16",
                (true, false, _) => "protected32",
                (true, true, false) => "paging32",
                (true, true, true) => "long_mode",
            });
            Ok(())
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let told = json(&ran)?;
    for mode in ["real16", "protected32", "paging32", "long_mode"] {
        look.wants_same(format!("{mode}: success"), Some(true), succeeded(&told, mode));
        let near = [format!("the guests were seen in {modes:?}")];
        look.wants_near(format!("{mode}: a guest in it"), modes.contains(mode), &near);
    }
    Ok(())
}

fn probes_try_what_the_stages_need(look: &mut Look) -> Result<()> {
    let ran = look.program(&["--json"]).run(look)?;
    let told = json(&ran)?;
    let count =
        |is_it: fn(&What) -> bool| ran.exits().iter().filter(|exit| is_it(&exit.what)).count();
    let obeyed = |name: &str| ran.obeyed(name).count();
    let two: BTreeSet<_> = ran.exits().iter().map(|exit| (exit.vm, exit.vcpu)).collect();
    let read_only = |call: &&Call| call.u32(4) & 2 != 0;
    let seen = [
        ("single_step", count(|what| matches!(what, What::Debug { .. })) >= 8),
        ("mmio", count(|what| matches!(what, What::Read { .. } | What::Write { .. })) >= 8),
        ("read_only_slot", ran.obeyed("KVM_SET_USER_MEMORY_REGION").any(|call| read_only(&call))),
        ("dirty_log", ran.dirty_logs().iter().any(|(.., pages)| pages.len() > 2)),
        ("irqchip", obeyed("KVM_CREATE_IRQCHIP") >= 1 && obeyed("KVM_IRQFD") >= 1),
        ("smp", two.iter().any(|(_, vcpu)| *vcpu > 0)),
        ("ring3", ran.vms() > 14 && ran.exit_count() > 50),
    ];
    for (probe, seen) in seen {
        look.wants_same(format!("{probe}: success"), Some(true), succeeded(&told, probe));
        look.wants(format!("{probe}: KVM was really tried"), seen);
    }
    Ok(())
}

fn verdicts_follow_from_the_probes(look: &mut Look) -> Result<()> {
    // A KVM without a log of written pages and single steps: stages 02 and 03 cannot work there.
    let ran = look
        .program(&["--json"])
        .pretend(|call| {
            let missing = ["KVM_GET_DIRTY_LOG", "KVM_SET_GUEST_DEBUG"].contains(&call.name);
            missing.then_some(-i64::from(libc::ENOTTY))
        })
        .run(look)?;
    look.wants_code(0, &ran);
    let told = json(&ran)?;
    look.wants_same("dirty_log fails there", Some(false), succeeded(&told, "dirty_log"));
    look.wants_same("single_step fails there", Some(false), succeeded(&told, "single_step"));
    let verdicts = told["verdicts"].as_array().context("an array `verdicts`")?;
    look.wants_same("a verdict for each stage", 8, verdicts.len());
    let able = |stage: usize| verdicts.get(stage - 1).and_then(|verdict| verdict["able"].as_bool());
    look.wants_same("stage 01 can run", Some(true), able(1));
    for stage in [2, 3] {
        look.wants_same(format!("stage {stage:02} cannot run"), Some(false), able(stage));
        let reason = verdicts.get(stage - 1).and_then(|verdict| verdict["reason"].as_str());
        look.wants("and the reason is told", reason.is_some_and(|reason| !reason.is_empty()));
    }
    Ok(())
}
