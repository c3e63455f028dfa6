//! What a maintainer of mini-kvm types: `cargo xtask setup | demo | test | grade | bench | soak | book | reports |
//! record | image | grub-image | kernel | rootfs | lab`.

mod bench;
mod demo;
mod grade;
mod grub;
mod image;
mod initramfs;
mod interrupt;
mod kernel;
mod packages;
mod progress;
mod rootfs;
mod setup;
mod soak;
mod test;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use setup::Done;

/// Sets mini-kvm up, shows it, tests it and measures it
///
/// The stages themselves are started with `cargo run --bin 05_mmio`. What is fetched or built for them
/// goes to the user's cache folder and to target/, never into the repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
#[command(after_help = "\
Try: cargo xtask demo             from a fresh clone to a Linux shell
     cargo xtask test 05 clippy   some of the checks
     cargo xtask lab -- dmesg     one command on the lab's own Linux

Exit codes: 0 done, 1 a check failed or something is missing, 2 bad usage; `demo`
and `lab` end with the code of what they ran.")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring what the project needs and this machine lacks: packages, kernels, the lab
    Setup(setup::Args),
    /// Set up, build, and boot Linux to a shell; with no terminal on stdin, play a short script
    #[command(after_help = "\
In the shell: `exit` or Ctrl-D switches the machine off, Ctrl-A x leaves it
whatever it does, Ctrl-A h lists these keys. It is stage 08 without arguments:
cargo run --bin 08_boot_linux")]
    Demo,
    /// Set up and run the checks: format, clippy, docs, unit tests, milestones on /dev/kvm
    #[command(after_help = "\
Try: cargo xtask test --list      what there is
     cargo xtask test 05          all about stage 05
     cargo xtask test clippy docs

The whole output of each check stays in target/checks/.")]
    Test(test::Args),
    /// Grade the stages by what their guests and KVM did; --repo grades somebody else's checkout
    #[command(disable_help_flag = true)]
    Grade {
        /// What `cargo xtask grade --help` tells
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
        options: Vec<OsString>,
    },
    /// Measure what exits, starts, a boot and the lab cost, and print a table or JSON
    #[command(after_help = "\
Try: cargo xtask bench exits             one port and one MMIO exit
     cargo xtask bench --json=now.json   the table, and a file to compare with

bench/README.md says what each row means and how it is measured.")]
    Bench(bench::Args),
    /// Boot Linux again and again, look at each boot from inside, and write a table and a plot of the times
    #[command(after_help = "\
Try: cargo xtask soak --boots 12               all kernels under 1, 2 and 4 vCPUs
     cargo xtask soak --boots 10000            over night; Ctrl-C ends it with what
                                               there is so far
     cargo xtask soak --kernel bzImage --cpus 8

What a boot that failed has printed is kept beside the table. The exit code is 0
if none did.")]
    Soak(soak::Args),
    /// Build the research notes as a book, with the excerpts, links and experiments in them checked
    #[command(disable_help_flag = true)]
    Book {
        /// What `cargo xtask book --help` tells
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
        options: Vec<OsString>,
    },
    /// Write the reports in the notes as PDF files to target/reports
    #[command(disable_help_flag = true)]
    Reports {
        /// What `cargo xtask reports --help` tells
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
        options: Vec<OsString>,
    },
    /// Play the stages on a terminal by a script, and make recordings, pictures and films of that
    #[command(disable_help_flag = true)]
    Record {
        /// What `cargo xtask record --help` tells
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
        options: Vec<OsString>,
    },
    /// Write stage 07's own boot disk to a file: MBR, second stage, and a FAT16 partition with the Rust kernel
    #[command(after_help = "\
Try: cargo xtask image boot.img
     hexdump -C boot.img | head -40
     cargo run --bin 07_bootloader -- --disk boot.img

It is a PC's disk: the same image boots in QEMU, by QEMU's own BIOS (Ctrl-A x leaves
it), and from a USB stick that it is written to. The kernel talks on COM1.
     qemu-system-x86_64 -nographic -drive file=boot.img,format=raw \\
                        -device isa-debug-exit,iobase=0xf4

mtools look into its partition: mdir -i boot.img@@1M")]
    Image(image::Args),
    /// Write a disk image from which GRUB boots Linux, to the shell of stage 08, on the machine of stage 07
    #[command(after_help = "\
Try: cargo xtask grub-image grub.img
     cargo run --bin 07_bootloader -- --disk grub.img --cpus 2")]
    GrubImage(grub::Args),
    /// Make a disk image with a whole Debian for stage 08: systemd, a login on the console, the network by DHCP or `ip=`
    ///
    /// The console logs in root without a password; nothing listens on the network. It takes root, and
    /// mmdebstrap, which fetches the packages.
    #[command(after_help = "\
Try: cargo xtask rootfs
     cargo xtask rootfs --include curl,iperf3 --size 8G work.img
     cargo run --bin 08_boot_linux -- --disk path=work.img --append root=/dev/vda")]
    Rootfs(rootfs::Args),
    /// Build a small Linux for stage 08, from the source of this system's kernel
    ///
    /// It has what stage 08 offers built in, and what a distribution on a disk needs, and little else:
    /// guests/linux/kernel.config lists it. Some minutes of work; an interrupted build goes on, and one whose
    /// source and configuration have not changed is not made again. It takes a compiler and 2 GB on the disk, of
    /// which some megabytes stay.
    #[command(after_help = "\
Try: cargo xtask kernel
     cargo run --bin 08_boot_linux -- --kernel small")]
    Kernel(kernel::Args),
    /// Open a shell in the lab, or run one command in it
    ///
    /// The lab is an emulated machine with a complete /dev/kvm, for hosts that have none. It sees this
    /// host's files at their own paths, with the rights of the user who calls.
    #[command(after_help = "\
Try: cargo xtask lab                      a shell; `exit` leaves it
     cargo xtask lab -- ls -l /dev/kvm    one command, with its exit code

To run a stage there: MINI_KVM=lab cargo run --bin 05_mmio
For guests whose timers tick too often for it: MINI_KVM_LAB_MIN_TIMER_PERIOD_US=50000 (lab/README.md)")]
    Lab {
        /// The command and its arguments; without one, a shell
        #[arg(last = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup(args) => setup::run(&args).map(|done| match done {
            Done::InPlace => {
                println!("Everything is in place.");
                ExitCode::SUCCESS
            }
            Done::Complete => ExitCode::SUCCESS,
            Done::Incomplete => ExitCode::FAILURE,
        }),
        Task::Demo => demo::run(),
        Task::Test(args) => test::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Grade { options } => grade::run(&options),
        Task::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Soak(args) => soak::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Book { options } => workspace::run("book", &["book"], &options),
        Task::Reports { options } => workspace::run("book", &["reports"], &options),
        Task::Record { options } => workspace::run("record", &[], &options),
        Task::Image(args) => image::run(&args),
        Task::GrubImage(args) => grub::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Kernel(args) => kernel::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Rootfs(args) => rootfs::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Lab { command } => lab::shell(&command),
    };
    done.unwrap_or_else(|error| {
        cli::print_error(&error);
        ExitCode::FAILURE
    })
}
