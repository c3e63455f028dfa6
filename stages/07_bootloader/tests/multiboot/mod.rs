//! `--kernel`: a kernel of our own (asm/boot/multiboot.asm) says what it was told, and what is none is refused.

use std::fs::File;

use common::e820;
use common::layout::ram_ranges;

use crate::{Disks, program};

#[test]
fn a_multiboot_kernel_is_told_of_its_machine() {
    let disks = Disks::new();
    let kernel = disks.write("kernel", asm::boot::MULTIBOOT);
    let ran =
        program().args(["--memory", "48M", "--append", "one two", "--kernel"]).args([&kernel]);
    let ran = ran.args(["--timeout", "60"]).run();
    // Memory sizes, a command line, modules (none), a memory map, the loader's name.
    let mut told = "flags 0000024d\nlower 0000027f\nupper 0000bc00\nloader mini-kvm\n".to_owned();
    told += "cmdline one two\n";
    for e820::Entry { range, kind } in e820::map_ranges(
        ram_ranges(48 << 20).iter().map(|(start, len)| start.0..start.0 + *len as u64),
    ) {
        let (start, len) = (range.start, range.end - range.start);
        told += &format!("range {start:016x} {len:016x} {:08x}\n", kind as u32);
    }
    assert_eq!(ran.ended(0).out(), told);
}

#[test]
fn what_is_no_multiboot_kernel_gets_one_line() {
    let disks = Disks::new();
    let kernel = asm::boot::MULTIBOOT;
    let change = |at: usize, word: u32| {
        let mut kernel = kernel.to_vec();
        kernel[at..at + 4].copy_from_slice(&word.to_le_bytes());
        kernel
    };
    let video = 1 << 16 | 1 << 2;
    let mut wants_video = change(4, video);
    wants_video[8..12].copy_from_slice(&0u32.wrapping_sub(0x1BAD_B002 + video).to_le_bytes());
    let huge = disks.path("huge");
    File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    for (file, why) in [
        (disks.path("missing"), "there is no such file"),
        (disks.write("empty", b""), "the file is empty"),
        (disks.0.path().to_owned(), "this is a directory"),
        (disks.write("text", b"no kernel"), "this is no Multiboot kernel"),
        (huge, "this is no Multiboot kernel"),
        (disks.write("linux", guests::KERNEL), "this is no Multiboot kernel"),
        (disks.write("sum", &change(8, 0)), "this is no Multiboot kernel"),
        (disks.write("video", &wants_video), "asks for a video mode"),
        (disks.write("low", &change(16, 0x7C00)), "load_addr is 0x7c00, expected 0x100000 to"),
        (disks.write("long", &change(20, 0x20_0000)), "the kernel is truncated"),
        (disks.write("bss", &change(24, 0xFFFF_FFFF)), "bss_end_addr is 0xffffffff"),
        (disks.write("entry", &change(28, 0)), "entry_addr is 0x0"),
    ] {
        program().args(["--timeout", "60", "--kernel"]).args([&file]).run().refused(2, why);
    }
    let file = disks.write("kernel", kernel);
    let long = "x".repeat(0x1_0000);
    let append = program().args(["--append", &long, "--kernel"]).args([&file]);
    append.run().refused(2, "the command line has 65536 bytes, expected at most 65535");
    program().args(["--append", "x"]).run().ended(2).stderr_has("--kernel <FILE>");
}
