//! Milestone 8: unmodified Linux boots, looks right from inside, and ends as its guest wants.
//!
//! Each boot takes seconds in the lab, so the checks from inside share one.

mod autopsy;
mod blk;
mod command_line;
mod devices;
mod gdb;
mod machine;
mod net;
mod root_disk;
mod small_kernel;
mod snapshot;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cli::cache;
use cli::cast::{Cast, Event};
use common::bus::{Bus, shared};
use common::error::{Blame, Blamed};
use common::i8042::{self, I8042};
use common::irqfd::{self, Irqfd};
use common::layout::{MMIO_HOLE_END, ram_ranges};
use common::linux::{self, Options, Way};
use common::memory::{Ram, SlotFlags, Vm};
use common::run::{self, Ending};
use common::uart::{self, Uart};
use common::vcpu::Vcpu;
use common::{acpi, cpuid, e820, kvm};
use machine::{COMPLAINTS, complains_of_nothing};
use proptest::prelude::*;
use testkit::{Dialogue, Printed, Program, Ran};
use vm_memory::GuestAddress;

/// A boot on a busy machine without hardware virtualization.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the shell prints when it waits for a command.
const PROMPT: &str = "guest:/root# ";

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_08_boot_linux")).patience(PATIENCE)
}

/// Runs `script` in the default guest's shell, which ends with it and powers off.
fn boot(args: &[&str], script: &str) -> Ran {
    program().args(args).stdin(script).run()
}

/// The lines that `command` printed: between the line with the command and the next prompt.
fn answer(ran: &Ran, command: &str) -> Vec<String> {
    let out = ran.out().replace('\r', "");
    let asked = format!("{PROMPT}{command}\n");
    let Some(start) = out.find(&asked) else { ran.fail(&format!("{command} was not run")) };
    let rest = &out[start + asked.len()..];
    rest.split(PROMPT).next().unwrap().lines().map(str::to_owned).collect()
}

/// Debian's generic kernel, which the lab runs; its payload is XZ in Debian 12.
fn lab_kernel() -> String {
    let boot = fs::read_dir(cache::lab_kernel().join("boot")).unwrap();
    let mut files = boot.map(|entry| text(&entry.unwrap().path()));
    files.find(|path| path.contains("/vmlinuz-")).unwrap()
}

/// A file in a folder that goes away with the test.
fn file(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> String {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    text(&path)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn sparse(dir: &tempfile::TempDir, name: &str, len: u64) -> String {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(len).unwrap();
    text(&path)
}

/// The default initrd with more in it, files and folders with their modes: an initrd may be several archives in a row.
fn initrd_with(dir: &tempfile::TempDir, entries: &[(&str, (u32, &[u8]))]) -> String {
    let mut archive = fs::read(cache::default_initrd()).unwrap();
    archive.resize(archive.len().next_multiple_of(512), 0);
    for (name, (mode, content)) in entries {
        let entry = cpio::newc::Builder::new(name).mode(*mode);
        let mut entry = entry.write(&mut archive, content.len() as u32);
        entry.write_all(content).unwrap();
        entry.finish().unwrap();
    }
    cpio::newc::trailer(&mut archive).unwrap();
    file(dir, "initrd", &archive)
}

fn sha256(path: &str) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

/// The kernel in the default bzImage, unpacked.
fn vmlinux() -> Vec<u8> {
    let image = fs::read(cache::default_kernel()).unwrap();
    let u32_at = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let start = (usize::from(image[0x1F1]) + 1) * 512 + u32_at(0x248);
    linux::unpack(&image[start..start + u32_at(0x24C)], 512 << 20).unwrap()
}

#[test]
fn linux_sees_the_machine_that_it_was_given() {
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> =
        (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let probe = file(&dir, "probe", &content);
    let initrd = initrd_with(&dir, &[("probe", (0o100_644, &content))]);
    // So many lines do not fit into the serial port, nor into the terminal's buffer.
    let typed_ahead = "n=$((n+1))\n".repeat(400);
    let script = format!(
        "{typed_ahead}echo n=$n\ncat /proc/cmdline\ngrep MemTotal /proc/meminfo\ndmesg | grep BIOS-e820:\n\
         grep -c ^processor /proc/cpuinfo\ngrep ^apicid /proc/cpuinfo\nsha256sum /probe\n\
         cat /sys/bus/clocksource/devices/*/current_clocksource\n\
         grep ttyS0 /proc/interrupts\n{COMPLAINTS}\nsleep 1\n"
    );
    let args =
        ["--memory", "384M", "--initrd", &initrd, "--append", "mini.test=1", "--stats", "-v"];
    let ran = boot(&args, &script);
    ran.ended(0);

    // The guest did not unpack its kernel: it began with the kernel's own first instruction.
    let entry = u64::from_le_bytes(vmlinux()[24..32].try_into().unwrap());
    ran.stderr_has("unpacked by the host to ");
    ran.stderr_has(&format!("kernel is entered at {entry:#x} in 64-bit mode\n"));

    assert_eq!(answer(&ran, "echo n=$n"), ["n=400"], "typed lines were lost");
    let cmdline = format!("{} mini.test=1", linux::DEFAULT_CMDLINE);
    assert_eq!(answer(&ran, "cat /proc/cmdline"), [cmdline]);

    let memory = answer(&ran, "grep MemTotal /proc/meminfo").concat();
    let kib: u64 = memory.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((320 << 10..384 << 10).contains(&kib), "{memory}");

    let ram = Ram::from_ranges(&ram_ranges(384 << 20)).unwrap();
    let given: Vec<String> = e820::map(&ram)
        .into_iter()
        .map(|e820::Entry { range, kind }| {
            let kind = match kind {
                e820::Kind::Ram => "usable",
                e820::Kind::Reserved => "reserved",
            };
            format!("[mem {:#018x}-{:#018x}] {kind}", range.start, range.end - 1)
        })
        .collect();
    let seen: Vec<String> = answer(&ran, "dmesg | grep BIOS-e820:")
        .iter()
        .map(|line| line.split_once("BIOS-e820: ").unwrap().1.to_owned())
        .collect();
    assert_eq!(seen, given);

    assert_eq!(answer(&ran, "grep -c ^processor /proc/cpuinfo"), ["1"]);
    assert_eq!(answer(&ran, "grep ^apicid /proc/cpuinfo"), ["apicid\t\t: 0"]);
    assert_eq!(answer(&ran, "sha256sum /probe"), [format!("{}  /probe", sha256(&probe))]);
    let clock = "cat /sys/bus/clocksource/devices/*/current_clocksource";
    assert_eq!(answer(&ran, clock), ["kvm-clock"]);
    let line = answer(&ran, "grep ttyS0 /proc/interrupts").concat();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!((words[0], words[2]), ("4:", "IO-APIC"), "{line}");
    assert!(words[1].parse::<u32>().unwrap() > 0, "the console raised no interrupt: {line}");
    complains_of_nothing(&ran);
    ran.stdout_has("Power down");
    // Each byte that was seen is one exit at least.
    assert!(ran.exits("out 3F8") >= ran.stdout.len() as u64, "{ran}");
}

#[test]
fn linux_is_entered_by_its_32_bit_entries() {
    // The bzImage's own, where it unpacks itself, and that of the vmlinux inside for hypervisors.
    for (entry, mode) in
        [("packed32", "at 0x1000000 in 32-bit protected mode\n"), ("pvh", "by PVH\n")]
    {
        let ran = boot(&["-v", "--entry", entry], "dmesg | grep BIOS-e820: | tail -n 1\n");
        ran.ended(0).stderr_has("kernel is entered ").stderr_has(mode);
        let memory = answer(&ran, "dmesg | grep BIOS-e820: | tail -n 1").concat();
        assert!(memory.ends_with("[mem 0x0000000000100000-0x000000001fffffff] usable"), "{memory}");
    }
}

#[test]
fn a_kernel_that_cannot_be_unpacked_is_left_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = fs::read(cache::default_kernel()).unwrap();
    // The header no longer says how long the compressed kernel is; its own decompressor doesn't ask.
    image[0x24C..0x250].fill(0);
    let kernel = file(&dir, "kernel", &image);
    let ran = boot(&["-v", "--kernel", &kernel], "echo $((6*7))\n");
    ran.ended(0).stderr_has("kernel is loaded as it is: its header names no compressed kernel");
    assert_eq!(answer(&ran, "echo $((6*7))"), ["42"]);
}

#[test]
fn memtest86_starts_by_its_32_bit_and_by_its_64_bit_entry() {
    let Ok(folder) = fs::read_dir(cache::memtest()) else {
        println!("skipped: set-up has fetched no memtest86+ here");
        return;
    };
    let files: Vec<_> = folder.map(|entry| text(&entry.unwrap().path())).collect();
    for (kind, mode) in [("ia32", "0x100000 in 32-bit protected"), ("x64", "0x100200 in 64-bit")] {
        let kernel = files.iter().find(|file| file.ends_with(&format!("{kind}.bin"))).unwrap();
        let args = ["-v", "--kernel", kernel, "--no-initrd", "--memory", "64M"];
        let cmdline = ["--cmdline", "console=ttyS0,115200"];
        // It has found its way to the memory map.
        let ran =
            program().args(args).args(cmdline).args(["--exit-when", "Memory  :   64MB"]).run();
        ran.ended(0).stdout_has("Memtest86+ v");
        ran.stderr_has("kernel is loaded as it is: its header names no compressed kernel");
        ran.stderr_has(&format!("kernel is entered at {mode} mode\n"));
    }
}

#[test]
fn a_kernel_that_takes_long_to_unpack_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let run = |kernel: &str, more: &[&str]| {
        let args = ["-v", "--no-initrd", "--exit-when", "Linux version", "--kernel", kernel];
        let cmdline = ["--cmdline", "console=ttyS0 earlyprintk=ttyS0 pci=off panic=-1"];
        let ran = program().env("XDG_CACHE_HOME", dir.path()).args(args).args(cmdline);
        let ran = ran.args(more).run();
        ran.ended(0);
        ran
    };
    let kernel = lab_kernel();
    run(&kernel, &["--no-cache"]).stderr_has("unpacked by the host to ");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "--no-cache kept something");
    run(&kernel, &[]).stderr_has("is kept unpacked as ");
    run(&kernel, &[]).stderr_has("known from an earlier boot: loaded from ");
    // What is kept is a vmlinux, for tools and for us.
    let mut kept = fs::read_dir(dir.path().join("mini-kvm/unpacked")).unwrap();
    run(&text(&kept.next().unwrap().unwrap().path()), &[]).stderr_has("kernel is a vmlinux");
}

#[test]
fn linux_starts_every_vcpu() {
    // Each line is short enough for the guest's terminal.
    let on_each = "for c in `seq $(nproc)`; do on $c; done";
    let ids = "grep ^apicid /proc/cpuinfo";
    let counts = "grep -E 'siblings|cpu cores' /proc/cpuinfo | sort -u";
    let [cores, packages, threads, together] =
        ["core_id", "physical_package_id", "thread_siblings_list", "core_siblings_list"]
            .map(|what| format!("cat /sys/devices/system/cpu/cpu?/topology/{what}"));
    let script = [
        "on() { taskset $((1<<$1-1)) cut -d' ' -f39 /proc/self/stat; }",
        on_each,
        ids,
        counts,
        &cores,
        &packages,
        &threads,
        &together,
        COMPLAINTS,
        // What has just been printed may still be in the guest's buffer when it powers off.
        "sleep 1\n",
    ]
    .join("\n");
    for cpus in 1..=4 {
        let ran = boot(&["--cpus", &cpus.to_string()], &script);
        ran.ended(0);
        let for_all = |text: &str| (0..cpus).map(|id| format!("{text}{id}")).collect::<Vec<_>>();
        // Where a process found itself that was bound to each in turn.
        assert_eq!(answer(&ran, on_each), for_all(""));
        assert_eq!(answer(&ran, ids), for_all("apicid\t\t: "));
        // One package, one thread a core.
        let expected = [format!("cpu cores\t: {cpus}"), format!("siblings\t: {cpus}")];
        assert_eq!(answer(&ran, counts), expected);
        assert_eq!(answer(&ran, &cores), for_all(""));
        assert_eq!(answer(&ran, &packages), vec!["0"; cpus]);
        assert_eq!(answer(&ran, &threads), for_all(""));
        let all = if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) };
        assert_eq!(answer(&ran, &together), vec![all; cpus]);
        complains_of_nothing(&ran);
    }
}

#[test]
fn a_restart_ends_the_machine_and_its_trace_tells_what_was_printed() {
    let ran = boot(&["--trace=serial,every"], "reboot -f\n");
    ran.ended(0).stdout_has("Restarting system");
    assert_eq!(String::from_utf8_lossy(&ran.traced_serial()), ran.out());
    // Linux runs in 64-bit code from its first instruction on, soon in the upper half, and each of its accesses
    // to the port is one of these.
    let err = ran.err();
    let lines: Vec<_> = err.lines().filter(|line| line.contains(" serial port: ")).collect();
    assert!(lines.iter().any(|line| line.contains(" long64 FFFFFFFF")), "{ran}");
    for line in lines {
        let words: Vec<_> = line.split_whitespace().skip(2).take(4).collect();
        let [mode, _, name, operands] = words[..] else { panic!("{line}") };
        let known = [("in", "al,dx"), ("out", "dx,al")].contains(&(name, operands));
        assert!(mode == "long64" && known, "{line}");
    }
}

#[test]
fn a_kernel_panic_is_a_crash() {
    let ran = boot(&[], "echo c > /proc/sysrq-trigger\n");
    ran.ended(1).stderr_has("the guest's kernel panicked: sysrq triggered crash");
    // Without `panic=-1` the kernel stays where it is, and says that it does.
    let ran = boot(&["--no-initrd", "--cmdline", "console=ttyS0 loglevel=1 pci=off"], "");
    ran.ended(1).stderr_has("the guest's kernel panicked: VFS: Unable to mount root fs");
}

#[test]
fn a_vmlinux_finds_memory_on_both_sides_of_the_hole_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let vmlinux = file(&dir, "vmlinux", &vmlinux());
    // A machine put together here, with less memory below the hole than `08_boot_linux` has.
    let kvm = kvm::open().unwrap();
    let vm = Vm::new(&kvm).unwrap();
    vm.add_slot(0, GuestAddress(0), 384 << 20, SlotFlags::default()).unwrap();
    vm.add_slot(1, MMIO_HOLE_END, 256 << 20, SlotFlags::default()).unwrap();
    let ram = vm.ram();
    let kernel = linux::load_kernel(&ram, Path::new(&vmlinux), &Options::default()).unwrap();
    let initrd = linux::load_initrd(&ram, &kernel, &cache::default_initrd()).unwrap();
    let rsdp = acpi::write_tables(&ram, 1, 0).unwrap();
    linux::write_boot_params(&ram, &kernel, Some(initrd), linux::DEFAULT_CMDLINE, rsdp).unwrap();
    irqfd::create_irqchip(&vm).unwrap();
    irqfd::create_pit(&vm).unwrap();
    let vcpu = Vcpu::new(&vm, 0).unwrap();
    cpuid::set(&kvm, &vcpu, 1).unwrap();
    linux::enter(&vcpu, &ram, &kernel).unwrap();

    let (stop, stopped) = run::stop();
    let printed = Printed::default();
    let line = Irqfd::new(&vm, uart::COM1_IRQ).unwrap();
    let uart = shared(Uart::new(line, printed.clone()));
    let mut ports = Bus::new();
    ports.insert("serial port", 0x3F8..0x400, uart.clone()).unwrap();
    let i8042 = I8042::new(Irqfd::new(&vm, i8042::IRQ).unwrap(), stop);
    ports.insert("i8042", 0x60..0x65, shared(i8042)).unwrap();
    thread::spawn(move || {
        uart::type_in(&uart, b"free -m\ndmesg | grep BIOS-e820: | tail -n 1\nreboot -f\n")
    });
    let ran = run::run(vec![vcpu], ports, Bus::new(), stopped, Some(PATIENCE)).unwrap();

    let printed = printed.text();
    assert_eq!(ran.ending, Ending::Reset, "{printed}");
    let above = "BIOS-e820: [mem 0x0000000100000000-0x000000010fffffff] usable";
    assert!(printed.contains(above), "{printed}");
    let free = printed.split("Mem:").nth(1).and_then(|rest| rest.split_whitespace().next());
    let total: u32 = free.unwrap().parse().unwrap();
    assert!((500..640).contains(&total), "{printed}");
}

#[test]
fn a_text_can_end_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let recording = text(&dir.path().join("boot.cast"));
    let ran = boot(&["--exit-when", "reached user space", "--record", &recording], "");
    ran.ended(0).stderr_has(&format!("recorded to {recording}\n"));
    assert!(ran.out().ends_with("reached user space"), "something follows the text");
    let cast = recorded(&recording);
    assert_eq!((cast.header.width, cast.header.height), (80, 24));
    assert_eq!(printed(&cast), ran.out());
    let (last, _) = cast.events.last().unwrap();
    assert!(*last < ran.took && *last > Duration::from_millis(100), "{last:?} of {:?}", ran.took);

    // It may be somebody's only one.
    let before = fs::read(&recording).unwrap();
    program().args(["--record", &recording]).run().refused(2, "boot.cast: it is there already");
    assert_eq!(fs::read(&recording).unwrap(), before);
    let nowhere = text(&dir.path().join("no/boot.cast"));
    program().args(["--record", &nowhere]).run().refused(2, "cannot record to ");
}

/// A recording, read as the package `record` reads it.
fn recorded(path: &str) -> Cast {
    Cast::parse(&fs::read(path).unwrap()).unwrap()
}

/// All that was printed in it.
fn printed(cast: &Cast) -> String {
    let output = |(_, event): &(Duration, Event)| match event {
        Event::Output(text) => Some(text.clone()),
        _ => None,
    };
    cast.events.iter().filter_map(output).collect()
}

#[test]
fn a_person_at_a_terminal_gets_every_key_through_and_the_terminal_back() {
    let dir = tempfile::tempdir().unwrap();
    let recording = text(&dir.path().join("person.cast"));
    let mut guest: Dialogue = program().args(["--record", &recording]).on_terminal();
    guest.expect(PROMPT);
    assert!(guest.is_raw());
    guest.resize(30, 100);
    guest.send("\x01h").expect("Ctrl-A x").expect("leave");
    // Ctrl-C goes to the guest, and ends what runs there.
    // One process: Ctrl-C between two of them would reach the shell only, which then waits for the second.
    guest.send("sh -c 'echo $((6*7)); exec sleep 1000'\r").expect("42").send("\x03").expect(PROMPT);
    guest.send("\x01x");
    assert_eq!(guest.end(), 0);
    assert!(!guest.is_raw());
    let cast = recorded(&recording);
    let text = printed(&cast);
    assert!(text.contains("\n42\r\n^C"), "{text}");
    // What the program itself says is not the guest's.
    assert!(!text.contains("Ctrl-A x"), "{text}");
    assert!(cast.events.iter().any(|(_, event)| *event == Event::Resize(100, 30)), "{cast:?}");
}

#[test]
fn the_terminal_comes_back_after_a_signal() {
    // The guest has not started to listen to its power button, so that SIGTERM ends the program, as the others do.
    for signal in ["TERM", "HUP", "INT", "QUIT"] {
        let mut guest = program().on_terminal();
        let until = Instant::now() + PATIENCE;
        while !guest.is_raw() {
            assert!(Instant::now() < until, "the terminal is not raw");
            thread::sleep(Duration::from_millis(5));
        }
        let kill = format!("kill -{signal} {}", guest.pid());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        assert_eq!(guest.end(), -1, "{signal}");
        assert!(!guest.is_raw(), "{signal}");
    }
}

#[test]
fn the_time_can_be_limited() {
    let ran = program().args(["--timeout", "0.3"]).run();
    ran.ended(4).stderr_has("the time given with --timeout ran out");
}

#[test]
fn a_triple_fault_is_a_crash() {
    // The smallest kernel: UD2 without an IDT.
    let mut elf = vec![0; 64 + 56];
    elf[..20].copy_from_slice(b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3E\0");
    elf[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes()); // e_entry
    elf[32] = 64; // e_phoff
    elf[54] = 56; // e_phentsize
    elf[56] = 1; // e_phnum
    elf[64] = 1; // PT_LOAD
    elf[72] = 64 + 56; // p_offset
    elf[88..96].copy_from_slice(&0x100_0000u64.to_le_bytes()); // p_paddr
    elf[96] = 2; // p_filesz
    elf[104] = 2; // p_memsz
    elf.extend([0x0F, 0x0B]);
    let dir = tempfile::tempdir().unwrap();
    let kernel = file(&dir, "kernel", &elf);
    let ran = boot(&["--kernel", &kernel, "--no-initrd"], "");
    ran.ended(1).stderr_has("the guest crashed: triple fault");
}

#[test]
fn what_is_no_kernel_gets_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = fs::read(cache::default_kernel()).unwrap();
    let random: Vec<u8> = (1..100_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    for (file, why) in [
        (text(&dir.path().join("missing")), "there is no such file"),
        (file(&dir, "truncated", &kernel[..kernel.len() / 2]), "the kernel is truncated"),
        (sparse(&dir, "huge", 1 << 40), "this is no Linux kernel"),
        (text(dir.path()), "this is a directory"),
        (file(&dir, "random", &random), "this is no Linux kernel"),
    ] {
        let ran = program().args(["--kernel", &file, "--no-initrd"]).run();
        ran.refused(2, why).stderr_has(&file);
    }
}

proptest! {
    // One case has many damages, each of which may be read to its end.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1) })]

    /// Real kernels with flipped bits in their headers, and cut off anywhere: they are refused, or lie in RAM.
    #[test]
    fn damage_to_a_real_kernel_does_not_bring_the_loader_down(
        damages in prop::collection::vec(
            prop::collection::vec((any::<prop::sample::Index>(), 0..8), 1..6),
            24,
        ),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 10),
    ) {
        const RAM: u64 = 128 << 20;
        let ram = Ram::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        let load = |options: &Options| {
            let loaded = linux::load_kernel(&ram, &path, options);
            match &loaded {
                Ok(kernel) => {
                    assert!(kernel.range.start >= 1 << 20 && kernel.range.end <= RAM);
                    assert!(kernel.range.contains(&kernel.entry.0));
                }
                Err(error) => assert_eq!(error.blame(), Blame::Input, "{error}"),
            }
            loaded
        };
        // The setup header; the ELF header and the table of segments behind it.
        let bzimage = fs::read(cache::default_kernel()).unwrap();
        // Unpacking each would take long; damage to what is packed is the unit tests' matter.
        let packed = Options { way: Way::Packed, cache: None };
        for (image, header, options) in [
            (bzimage, 0x1F1..0x270, packed),
            (vmlinux(), 0..64 + 5 * 56, Options::default()),
        ] {
            let load = || load(&options);
            fs::write(&path, &image).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            load().unwrap();
            for damage in &damages {
                let mut damaged = image[header.clone()].to_vec();
                for (at, bit) in damage {
                    damaged[at.index(header.len())] ^= 1_u8 << bit;
                }
                file.write_all_at(&damaged, header.start as u64).unwrap();
                let _ = load();
            }
            file.write_all_at(&image[header.clone()], header.start as u64).unwrap();
            // Each shorter than the one before. A signature or symbols may follow what is loaded.
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(image.len() * 3 / 4)).collect();
            cuts.sort_unstable_by(|a, b| b.cmp(a));
            for cut in cuts {
                file.set_len(cut as u64).unwrap();
                prop_assert!(load().is_err(), "{}", cut);
            }
        }
    }
}

#[test]
fn what_is_no_initrd_gets_one_line() {
    let dir = tempfile::tempdir().unwrap();
    for (file, why) in [
        (text(&dir.path().join("missing")), "there is no such file"),
        (sparse(&dir, "huge", 1 << 40), "the initrd has 1099511627776 bytes"),
        (text(dir.path()), "this is a directory"),
    ] {
        program().args(["--initrd", &file]).run().refused(2, why).stderr_has(&file);
    }
}

#[test]
fn memory_that_makes_no_sense_gets_one_line() {
    for (size, why) in [
        ("0M", "expected a multiple of 4 KiB, at least one page"),
        ("1025K", "expected a multiple of 4 KiB"),
        ("32M", "of memory to start, the guest has 32 MiB; give a larger --memory"),
        ("100T", "bytes of guest memory"),
        ("4096T", "the host cannot map"),
    ] {
        program().args(["--memory", size]).run().refused(2, why);
    }
    program().args(["--memory", "12345"]).run().ended(2).stderr_has("--memory");
}

#[test]
fn a_command_line_that_the_kernel_would_cut_off_gets_one_line() {
    let ran = program().args(["--append", &"x".repeat(2048)]).run();
    ran.refused(2, "this kernel takes at most 2047; shorten it");
}

#[test]
fn without_set_up_the_error_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let ran = program().env("XDG_CACHE_HOME", dir.path()).run();
    ran.refused(2, "run `cargo xtask setup`");
}

#[test]
fn a_reader_that_leaves_ends_the_machine() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_08_boot_linux"))
        .args(["--append", "loglevel=7", "--timeout", "100"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Where the default kernel and initrd are, so that a missing set-up is named and not guessed at.
#[test]
fn set_up_has_been_run() {
    let missing: Vec<PathBuf> = [cache::default_kernel(), cache::default_initrd()]
        .into_iter()
        .filter(|path| !path.exists())
        .collect();
    assert_eq!(missing, [] as [PathBuf; 0], "run `cargo xtask setup` first");
}
