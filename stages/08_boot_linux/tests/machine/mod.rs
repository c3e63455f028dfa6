//! The machine around the kernel, as the guest sees it: the boot log, the clock, the power button, processors, memory.

use common::layout::MMIO_HOLE;

use super::*;

const MIB: u64 = 1 << 20;

/// What a kernel may complain of, and why. Everything else that it logs as a warning or worse is a failure.
const ALLOWED: [(&str, &str); 5] = [
    ("PCI: Fatal: No config space access function found", "there is no PCI bus, as pci=off says"),
    ("PCI: System does not support PCI", "the same"),
    ("clocksource: Long readout interval", "the host was busy"),
    ("hrtimer: interrupt took", "the same"),
    ("Timekeeping watchdog on CPU", "the same"),
];

/// Prints all warnings and errors in the kernel's log.
pub const COMPLAINTS: &str = "dmesg -r | grep '^<[0-4]>'";

/// Fails for a kernel that complains of something.
#[track_caller]
pub fn complains_of_nothing(ran: &Ran) {
    only_allowed(&answer(ran, COMPLAINTS));
}

/// Fails for a log's warnings and errors if something else than what is allowed is among them.
#[track_caller]
pub fn only_allowed(complaints: &[String]) {
    // That PCI is off is always among them: an empty log would be no good one.
    assert!(complaints.iter().any(|line| line.contains(ALLOWED[0].0)), "{complaints:#?}");
    let other = |line: &&String| !ALLOWED.iter().any(|(text, _)| line.contains(text));
    let rest: Vec<_> = complaints.iter().filter(other).collect();
    assert!(rest.is_empty(), "{rest:#?}");
}

/// The number before the unit in the line of /proc/meminfo that `command` prints.
fn kib(ran: &Ran, command: &str) -> u64 {
    answer(ran, command).concat().split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn press_power_button(guest: &Dialogue) {
    let kill = format!("kill {}", guest.pid());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}

#[test]
fn sigterm_presses_the_power_button() {
    let asked = "the guest was asked to shut down; a second SIGTERM ends it";
    let mut guest = program().on_terminal();
    guest.expect(PROMPT);
    press_power_button(&guest);
    guest.expect(asked).expect("reboot: Power down");
    assert_eq!(guest.end(), 0);

    // Its kernel listens, but nobody there does anything about it.
    let mut guest = program().on_terminal();
    guest.expect(PROMPT).send("killall acpid; echo $((6*7))\r").expect("42");
    press_power_button(&guest);
    guest.expect(asked).send("grep acpi /proc/interrupts\r").expect("9-edge");
    press_power_button(&guest);
    assert_eq!(guest.end(), -1);
    assert!(!guest.is_raw());
}

#[test]
fn debian_s_generic_kernel_complains_of_nothing_on_four_vcpus() {
    let kernel = lab_kernel();
    let ran = boot(&["--kernel", &kernel, "--cpus", "4"], &format!("{COMPLAINTS}\nsleep 1\n"));
    ran.ended(0);
    complains_of_nothing(&ran);
}

#[test]
fn the_clock_is_right_and_its_alarm_rings() {
    let date = "date +%s";
    let hwclock = "date -d \"$(hwclock | cut -c5-24)\" -D '%b %e %T %Y' +%s";
    let alarm = "echo +2 > /sys/class/rtc/rtc0/wakealarm; sleep 4";
    let raised = "grep rtc0 /proc/interrupts";
    let ran = boot(&[], &[date, hwclock, alarm, raised, "sleep 1\n"].join("\n"));
    ran.ended(0);
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let clocks = [date, hwclock].map(|clock| answer(&ran, clock).concat().parse::<u64>().unwrap());
    // The boot's end is a while ago.
    let recent = now - PATIENCE.as_secs()..=now;
    assert!(clocks.iter().all(|time| recent.contains(time)), "{now} {ran}");
    assert!(clocks[0].abs_diff(clocks[1]) <= 5, "{ran}");
    let raised = answer(&ran, raised).concat();
    let words: Vec<_> = raised.split_whitespace().collect();
    assert!(words[0] == "8:" && words[1].parse::<u32>().unwrap() > 0, "{ran}");
}

#[test]
fn memory_may_lie_on_both_sides_of_the_hole_and_be_more_than_the_host_s() {
    let host = rustix::system::sysinfo();
    let host = (host.totalram + host.totalswap) * u64::from(host.mem_unit) / MIB;
    let (total, free) = ("grep MemTotal /proc/meminfo", "grep MemFree /proc/meminfo");
    let above = "dmesg | grep -c 'BIOS-e820: .mem 0x0000000100000000'";
    for mib in [128, 3500, host + 2048] {
        let size = format!("{mib}M");
        let ran = boot(&["-v", "--memory", &size], &[total, free, above, "sleep 1\n"].join("\n"));
        ran.ended(0);
        let total = kib(&ran, total) >> 10;
        // The kernel itself, 64 bytes for each page of 4 KiB, and from 4 GiB on 64 MiB for devices that reach less.
        assert!((mib * 9 / 10 - 64..mib).contains(&total), "{ran}");
        assert!(kib(&ran, free) >> 10 > total / 3, "{ran}");
        assert_eq!(answer(&ran, above), [if mib <= MMIO_HOLE.0 / MIB { "0" } else { "1" }]);
        let caution = format!("memory of {mib} MiB, the host has {host} MiB");
        assert_eq!(ran.err().contains(&caution), mib > host, "{ran}");
    }
}

#[test]
fn only_what_the_guest_touches_is_taken() {
    const SIZE: u64 = 2048;
    let mut guest = program().args(["--memory", &format!("{SIZE}M")]).on_terminal();
    guest.expect(PROMPT).send("echo free=$(awk '/MemFree/{print $2}' /proc/meminfo).\r");
    guest.expect("free=").expect("free=").expect(".");
    let printed = guest.printed();
    let free = printed.rsplit("free=").next().unwrap().split('.').next().unwrap();
    let free: u64 = free.parse::<u64>().unwrap() >> 10;

    let status = fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let taken = field("VmRSS:") >> 10;
    println!("the guest uses {} MiB, {taken} MiB are taken", SIZE - free);
    // What the guest had and gave back, and the rest of the host's large pages.
    assert!(taken < SIZE - free + 128, "the guest uses {} MiB\n{status}", SIZE - free);
    guest.send("\x01x");
    assert_eq!(guest.end(), 0);
}

#[test]
fn huge_pages_are_taken_where_they_are_reserved() {
    let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = || fs::read_to_string(free).unwrap().trim().parse::<u64>().unwrap();
    let refused = |size: &str, code, why: &str| {
        program().args(["--hugepages", "--memory", size]).run().refused(code, why);
    };
    refused("129M", 2, "in huge pages: expected a multiple of 2 MiB");
    let most = free() * 2 + 2;
    refused(
        &format!("{most}M"),
        3,
        "reserve more with `echo N | sudo tee /proc/sys/vm/nr_hugepages`",
    );

    // Only the administrator may reserve some: the lab's guest is, a person who runs this may not be.
    let reserved = Path::new("/proc/sys/vm/nr_hugepages");
    let before = fs::read_to_string(reserved).unwrap();
    if fs::write(reserved, "64").is_err() || free() < 64 {
        println!("skipped: no huge pages can be reserved here");
        return;
    }
    let mut guest = program().args(["--hugepages", "--memory", "128M"]).on_terminal();
    guest.expect(PROMPT);
    assert!(free() < 64, "the guest's memory is not of huge pages");
    guest.send("\x01x");
    assert_eq!(guest.end(), 0);
    fs::write(reserved, before).unwrap();
}
