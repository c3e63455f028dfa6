//! `root=` on the kernel's command line: the default initramfs hands the machine to the system on a disk.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cli::cache;
use testkit::Dialogue;

use crate::blk::{run, tool};
use crate::machine::only_allowed;
use crate::net::{self, isolated};
use crate::{answer, boot, sha256, text};

/// systemd's start on a busy machine without hardware virtualization.
const PATIENCE: Duration = Duration::from_secs(600);

/// A disk whose /sbin/init is a shell script, with the default guest's busybox.
fn disk(dir: &tempfile::TempDir, init: &str) -> Option<String> {
    let mke2fs = tool("mke2fs")?;
    use std::os::unix::fs::{PermissionsExt, symlink};
    let root = dir.path().join("root");
    for folder in ["bin", "sbin", "dev", "proc", "sys"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let busybox = root.join("bin/busybox");
    fs::copy(cache::dir().join("guest/busybox"), &busybox).unwrap();
    symlink("busybox", root.join("bin/sh")).unwrap();
    fs::write(root.join("sbin/init"), format!("#!/bin/sh\n{init}")).unwrap();
    for file in ["bin/busybox", "sbin/init"] {
        fs::set_permissions(root.join(file), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let image = dir.path().join("disk.img");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    run(&mke2fs, &["-q", "-F", "-t", "ext4", "-L", "rooted", "-d", &text(&root), &text(&image)]);
    Some(text(&image))
}

#[test]
fn root_on_the_command_line_starts_the_init_of_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let init = "busybox grep ' / ' /proc/mounts\necho init $$ with $*\nbusybox ls /\nbusybox poweroff -f\n";
    let Some(image) = disk(&dir, init) else { return };
    let disk = format!("path={image},ro");
    let ran = boot(&["--disk", &disk, "--append", "root=LABEL=rooted single"], "");
    ran.ended(0).stdout_has("/dev/vda / ext4 ro,").stdout_has("init 1 with single");
    ran.stdout_has("lost+found");

    // No such disk: there is a shell to find out why.
    let ran = boot(&["--append", "root=/dev/vdz"], "echo $((6*7))\n");
    ran.ended(0).stdout_has("init: root=/dev/vdz cannot be started: here is a shell instead");
    assert_eq!(answer(&ran, "echo $((6*7))"), ["42"]);
}

/// A Debian archive in `dir/debian` with one package, `carried`, whose only file says so.
fn write_archive(dir: &tempfile::TempDir) -> Option<()> {
    let dpkg_deb = tool("dpkg-deb")?;
    let about = "Package: carried\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.com>\n\
                 Description: came over the network\n";
    let package = dir.path().join("package");
    fs::create_dir_all(package.join("DEBIAN")).unwrap();
    fs::write(package.join("DEBIAN/control"), about).unwrap();
    fs::create_dir_all(package.join("srv")).unwrap();
    fs::write(package.join("srv/carried"), "by apt\n").unwrap();
    let archive = dir.path().join("debian");
    let lists = archive.join("dists/stable/main/binary-amd64");
    fs::create_dir_all(&lists).unwrap();
    let deb = archive.join("carried.deb");
    run(&dpkg_deb, &["--root-owner-group", "--build", &text(&package), &text(&deb)]);
    let entry = |file: &Path| (sha256(&text(file)), fs::metadata(file).unwrap().len());
    let (sum, size) = entry(&deb);
    let packages = format!("{about}Filename: carried.deb\nSize: {size}\nSHA256: {sum}\n");
    fs::write(lists.join("Packages"), packages).unwrap();
    let (sum, size) = entry(&lists.join("Packages"));
    let release = format!(
        "Suite: stable\nCodename: stable\nComponents: main\nArchitectures: amd64\n\
         Date: Sun, 01 Nov 2026 00:00:00 UTC\nSHA256:\n {sum} {size} main/binary-amd64/Packages\n"
    );
    fs::write(archive.join("dists/stable/Release"), release).unwrap();
    Some(())
}

/// Types `command` and gives the lines that it prints.
fn ask(debian: &mut Dialogue, command: &str) -> Vec<String> {
    let before = debian.printed().len();
    // The quotes keep what is typed from looking like the answer.
    debian.send(&format!("echo beg''in; {command}; echo en''d\r")).expect("begin\r\n");
    debian.expect("end\r\n").expect(SHELL);
    let said = debian.printed()[before..].replace('\r', "");
    let answer = said.split("begin\n").nth(1).unwrap().split("end\n").next().unwrap();
    answer.lines().map(str::to_owned).collect()
}

/// What root's shell prints when it waits for a command.
const SHELL: &str = ":~# ";

#[test]
fn debian_comes_up_with_all_units_and_works_with_a_network() {
    let image = cache::debian_disk();
    if !image.exists() {
        println!("skipped: there is no disk with Debian here, which `cargo xtask rootfs` makes");
        return;
    }
    let Some(nft) = tool("nft") else { return };
    let Some(iperf3) = tool("iperf3") else { return };
    let dir = net::folder();
    let Some(()) = write_archive(&dir) else { return };
    net::write_who(&dir);
    // The image stays as it is.
    let host = format!(
        "nft=$2 iperf3=$3 {}
        until $bb wget -q -O $dir/from-guest http://10.0.0.2/file; do sleep 1; done 2> $dir/wget &
        $program --cpus $1 --memory 1G --disk path=$4,snapshot --net tap=tap0 \\
            --append 'root=/dev/vda ip=10.0.0.2::10.0.0.1:255.255.255.0'",
        net::NAT
    );
    for cpus in ["1", "4"] {
        let args = [cpus, &text(&nft), &text(&iperf3), &text(&image)];
        let debian = &mut isolated(&host, &dir, &args).patience(PATIENCE).on_terminal();
        debian.expect("login: ").send("root\r").expect(SHELL);
        assert_eq!(ask(debian, "nproc"), [cpus]);
        let state = ask(debian, "systemctl is-system-running --wait");
        let failed = ask(debian, "systemctl list-units --failed --plain --no-legend --no-pager");
        assert!(state == ["running"] && failed.is_empty(), "{state:?} {failed:#?}");
        let log = ask(debian, "journalctl -b -p warning --no-pager -o cat");
        only_allowed(&log);
        assert_eq!(ask(debian, "findmnt -no SOURCE,FSTYPE /"), ["/dev/vda ext4"]);
        assert!(ask(debian, "findmnt -no OPTIONS /").concat().starts_with("rw,"));

        let online =
            "/lib/systemd/systemd-networkd-wait-online -i eth0 -o routable 2> log || cat log";
        assert_eq!(ask(debian, online), [] as [&str; 0]);
        let pings = ask(debian, "ping -A -q -c 100 192.0.2.2").concat();
        assert!(pings.contains("100 received, 0% packet loss"), "{pings}");
        let who = ask(debian, "wget -q -O - http://192.0.2.2/cgi-bin/who");
        assert_eq!(
            who,
            ["192.0.2.1"],
            "the router did not put its own address in place of the guest's"
        );
        let sum = ask(debian, "wget -q -O - http://192.0.2.2/file | sha256sum").concat();
        assert_eq!(sum.split(' ').next(), Some(sha256(&text(&dir.path().join("file"))).as_str()));
        for way in ["", "-R"] {
            // The server has one client at a time, and may not be done with the last one yet.
            let measure = format!(
                "until iperf3 -c 192.0.2.2 -n 8M {way} > said 2>&1 || ! grep -q 'is busy' said; do sleep 1; done"
            );
            assert_eq!(ask(debian, &measure), [] as [&str; 0]);
            assert_eq!(ask(debian, "grep iperf said | tail -n 1"), ["iperf Done."]);
        }
        // And from the host to a server in the guest.
        let from_guest = dir.path().join("from-guest");
        let _ = fs::remove_file(&from_guest);
        let serve = "mkdir www; head -c 4000000 /dev/urandom > www/file; sha256sum < www/file; busybox httpd -h www";
        let sum = ask(debian, serve).concat();
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(&from_guest).map_or(0, |about| about.len()) < 4_000_000 {
            assert!(Instant::now() < deadline, "the host has not got the guest's file");
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(sum.split(' ').next(), Some(sha256(&text(&from_guest)).as_str()));

        let source =
            "echo deb [trusted=yes] http://192.0.2.2/debian stable main > /etc/apt/sources.list";
        assert_eq!(ask(debian, source), [] as [&str; 0]);
        assert_eq!(ask(debian, "apt-get -q update > log 2>&1 || cat log"), [] as [&str; 0]);
        assert_eq!(
            ask(debian, "apt-get -qy install carried > log 2>&1 || cat log"),
            [] as [&str; 0]
        );
        assert_eq!(ask(debian, "cat /srv/carried"), ["by apt"]);

        debian.send("systemctl poweroff\r").expect("Power down");
        assert_eq!(debian.end(), 0);
    }
}
