//! The kernel that `cargo xtask kernel` builds: everything that stage 08 offers built in, and nothing to complain about.

use cli::cache;

use crate::net::isolated;
use crate::{COMPLAINTS, PROMPT, answer, boot, complains_of_nothing, program, sparse, text};

fn is_here() -> bool {
    let is_here = cache::small_kernel().exists();
    if !is_here {
        println!("skipped: there is no small kernel here, which `cargo xtask kernel` builds");
    }
    is_here
}

#[test]
fn it_boots_in_64_mib_with_all_its_drivers_and_without_a_warning() {
    if !is_here() {
        return;
    }
    // In memory: the lab's view of its host's files has no Unix sockets.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = sparse(&dir, "disk", 16 << 20);
    let vsock = format!("cid=3,uds={}", text(&dir.path().join("vsock")));
    let devices = "ls -d /sys/bus/virtio/drivers/*/virtio*";
    let modules = "ls /proc/modules /lib/modules/$(uname -r)";
    let random = "cat /sys/class/misc/hw_random/rng_current";
    let file_systems = "grep -cE '\\s(ext4|overlay|tmpfs)$' /proc/filesystems";
    let button = "grep -A4 'Power Button' /proc/bus/input/devices | grep -c event";
    let clock = "cat /sys/class/rtc/rtc0/name";
    let year = "date +%Y";
    let serial = "cat /sys/class/tty/console/active";
    let total = "grep MemTotal /proc/meminfo";
    let uname = "uname -r";
    let processors = "grep -c ^processor /proc/cpuinfo";
    let script = [
        uname,
        processors,
        devices,
        modules,
        random,
        file_systems,
        button,
        clock,
        year,
        serial,
        total,
        COMPLAINTS,
        "sleep 1\n",
    ];
    for (cpus, entry) in [("1", "elf"), ("4", "pvh")] {
        let args = ["--kernel", "small", "--memory", "64M", "--cpus", cpus, "--entry", entry];
        let more = ["--disk", &disk, "--rng", "--balloon", "--vsock", &vsock];
        let ran = boot(&[&args[..], &more].concat(), &script.join("\n"));
        ran.ended(0).stdout_has("Power down");
        assert!(answer(&ran, uname).concat().ends_with("-mini-kvm"), "{ran}");
        assert_eq!(answer(&ran, processors), [cpus]);
        let drivers = [
            "virtio_balloon/virtio2",
            "virtio_blk/virtio0",
            "virtio_rng/virtio1",
            "vmw_vsock_virtio_transport/virtio3",
        ];
        let drivers = drivers.map(|driver| format!("/sys/bus/virtio/drivers/{driver}"));
        assert_eq!(answer(&ran, devices), drivers);
        assert!(answer(&ran, modules).iter().all(|line| line.contains("No such file")), "{ran}");
        assert!(answer(&ran, random).concat().starts_with("virtio_rng."), "{ran}");
        assert_eq!(answer(&ran, file_systems), ["3"]);
        assert_eq!(answer(&ran, button), ["1"]);
        assert!(answer(&ran, clock).concat().starts_with("rtc_cmos"), "{ran}");
        assert!(answer(&ran, year).concat().parse::<u32>().unwrap() > 2025, "{ran}");
        assert_eq!(answer(&ran, serial), ["ttyS0"]);
        let total = answer(&ran, total).concat();
        let kib: u32 = total.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!((32 << 10..64 << 10).contains(&kib), "{total}");
        complains_of_nothing(&ran);
    }
}

#[test]
fn its_virtio_console_and_its_network_work() {
    if !is_here() {
        return;
    }
    // What the kernel itself makes of `ip=`: it has the driver built in.
    let script = r#"
        $bb tunctl -t tap0 > $dir/log
        $bb ip address add 10.0.0.1/24 dev tap0
        $bb ip link set tap0 up
        exec $program --kernel small --net tap=tap0 --append ip=10.0.0.2::10.0.0.1:255.255.255.0 --console hvc0
    "#;
    let dir = tempfile::tempdir().unwrap();
    let mut guest = isolated(script, &dir, &[]).on_terminal();
    guest.expect(PROMPT).send("stty size\r").expect("24 80");
    guest.send("dmesg | grep -c IP-Config:.Complete\r").expect("1\r");
    guest.send("ping -A -q -c 100 10.0.0.1\r").expect("100 packets received, 0% packet loss");
    guest.send("poweroff\r");
    assert_eq!(guest.end(), 0);
}

#[test]
fn without_it_the_error_names_what_builds_it() {
    let dir = tempfile::tempdir().unwrap();
    let ran = program().env("XDG_CACHE_HOME", dir.path()).args(["--kernel", "small"]).run();
    ran.refused(2, "run `cargo xtask kernel`");
}
