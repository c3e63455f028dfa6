//! Disks as a guest sees them, and what is on the host afterwards.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::disk::{Access, SECTOR};
use common::disk_image::{self, Format, Options};

use crate::{answer, boot, file, program, sha256, text};

const MIB: usize = 1 << 20;

/// A folder in memory: unlike the one that the lab has from its host, it can make holes in files.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// Bytes that do not repeat soon.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(next).collect()
}

/// A program of the distribution, which a user's PATH need not lead to.
pub fn tool(name: &str) -> Option<PathBuf> {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let found =
        folders.iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists());
    if found.is_none() {
        println!("skipped: there is no {name} here");
    }
    found
}

/// Runs a tool, which has to succeed, and gives what it prints.
pub fn run(tool: &Path, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {args:?}: {said}{err}", tool.display());
    said
}

#[test]
fn what_a_guest_reads_and_writes_is_on_the_host() {
    for cpus in ["1", "4"] {
        let folder = folder();
        let mut data = noise(8 * MIB);
        let disk = file(&folder, "data", &data);
        let other = noise(MIB + 512);
        let protected = file(&folder, "protected", &other);
        let kept = file(&folder, "kept", &other);
        let sums = [sha256(&disk), sha256(&protected)].map(|sum| format!("{sum}  -"));
        let about = "about vda serial queue/write_cache size ro; about vdb size ro";
        let to_vda = "dd if=x of=/dev/vda bs=4k seek=256 conv=fsync";
        let to_vdb = "dd if=x of=/dev/vdb count=1 conv=fsync && echo written";
        let to_vdc = "dd if=x of=/dev/vdc count=1 conv=fsync; head -c 8 /dev/vdc";
        let discard = "blkdiscard -o 4194304 -l 2097152 /dev/vda && echo gone";
        let script = [
            "about() { d=$1; shift; for f; do echo $(cat /sys/block/$d/$f); done; }",
            "yes abcdefg | dd of=x bs=64k count=16 iflag=fullblock",
            about,
            "sha256sum < /dev/vda",
            "sha256sum < /dev/vdb",
            to_vda,
            to_vdb,
            to_vdc,
            discard,
            "true\n",
        ]
        .join("\n");
        let disks = [
            format!("{disk},serial=a-serial-number"),
            format!("path={protected},ro"),
            format!("{kept},snapshot"),
        ];
        let disks = disks.iter().flat_map(|disk| ["--disk", disk.as_str()]);
        let args: Vec<_> = ["-v", "--cpus", cpus].into_iter().chain(disks).collect();
        let ran = boot(&args, &script);
        ran.ended(0).stderr_has(&format!("disk /dev/vda is {disk}: raw, 8388608 bytes, writes go"));
        let expected = ["a-serial-number", "write back", "16384", "0", "2049", "1"];
        assert_eq!(answer(&ran, about), expected, "{ran}");
        assert_eq!(answer(&ran, "sha256sum < /dev/vda"), sums[..1]);
        assert_eq!(answer(&ran, "sha256sum < /dev/vdb"), sums[1..]);
        assert!(!answer(&ran, to_vdb).contains(&"written".to_owned()), "{ran}");
        assert!(answer(&ran, to_vdc).contains(&"abcdefg".to_owned()), "{ran}");
        assert_eq!(answer(&ran, discard), ["gone"]);

        // The file system on the host has got back what was discarded.
        data[MIB..2 * MIB].copy_from_slice(&b"abcdefg\n".repeat(MIB / 8));
        data[4 * MIB..6 * MIB].fill(0);
        assert!(fs::read(&disk).unwrap() == data, "the disk has something else");
        let room = fs::metadata(&disk).unwrap().blocks() * 512;
        assert!(room <= 6 * MIB as u64, "{room} bytes on the host");
        assert!(fs::read(&protected).unwrap() == other && fs::read(&kept).unwrap() == other);
    }
}

#[test]
fn a_file_system_made_on_the_host_is_whole_after_a_guest_wrote_to_it() {
    let tools = ["mke2fs", "e2fsck", "debugfs"].map(tool);
    let [Some(mke2fs), Some(e2fsck), Some(debugfs)] = tools else { return };
    let folder = folder();
    let content = noise(3 * MIB);
    fs::create_dir(folder.path().join("root")).unwrap();
    let given = file(&folder, "root/given", &content);
    let image = text(&folder.path().join("image"));
    let root = text(&folder.path().join("root"));
    run(&mke2fs, &["-q", "-t", "ext4", "-d", &root, &image, "24M"]);
    let before = fs::metadata(&image).unwrap().blocks();

    let sum = "mkdir m; mount -t ext4 /dev/vda m; sha256sum < m/given";
    let trim = "cp m/given m/new; rm m/given; sync; fstrim m && echo trimmed";
    let end = "echo word > m/word; umount m && echo all of it";
    let script = [sum, trim, end, "true\n"].join("\n");
    let ran = boot(&["--cpus", "4", "--disk", &image], &script);
    ran.ended(0);
    assert_eq!(answer(&ran, sum), [format!("{}  -", sha256(&given))], "{ran}");
    assert_eq!(answer(&ran, trim), ["trimmed"], "{ran}");
    assert_eq!(answer(&ran, end), ["all of it"], "{ran}");

    run(&e2fsck, &["-fn", &image]);
    let dump = |name: &str| {
        let to = text(&folder.path().join("dump"));
        run(&debugfs, &["-R", &format!("dump {name} {to}"), &image]);
        fs::read(to).unwrap()
    };
    assert!(dump("/new") == content && dump("/word") == b"word\n");
    // The file that went has left a hole.
    let after = fs::metadata(&image).unwrap().blocks();
    assert!(after < before + (MIB / 512) as u64, "{before} blocks before, {after} after");
}

#[test]
fn qcow2_images_of_qemu_are_read_and_written() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let folder = folder();
    let mut data = noise(2 * MIB);
    data.resize(8 * MIB, 0);
    let raw = file(&folder, "raw", &data);
    let image = |name: &str| text(&folder.path().join(name));
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    run(&qemu_img, &[&convert[..], &[&raw, &image("plain")]].concat());
    run(&qemu_img, &[&convert[..], &["-c", &raw, &image("packed")]].concat());
    let over = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "packed", &image("over")];
    run(&qemu_img, &over);

    let sums = "for d in vda vdb vdc; do sha256sum < /dev/$d; done";
    let write = "for d in vda vdb vdc; do w $d 17; w $d 6001; done; sync";
    let script = [
        "w() { yes abcdefg | dd of=/dev/$1 seek=$2 count=2000 iflag=fullblock; }",
        sums,
        write,
        "blkdiscard -o 1048576 -l 65536 /dev/vda; sha256sum < /dev/vdc",
        "true\n",
    ];
    let over = format!("{},backing", image("over"));
    // The second is written to as a snapshot, and so is the backing file of the third.
    let packed = format!("{},snapshot", image("packed"));
    let disks = [image("plain"), packed, over].map(|disk| ["--disk".to_owned(), disk]);
    let args = disks.iter().flatten().map(String::as_str);
    let ran = boot(&args.chain(["-v", "--cpus", "4"]).collect::<Vec<_>>(), &script.join("\n"));
    ran.ended(0).stderr_has(": qcow2, 8388608 bytes, writes go to it");
    assert_eq!(answer(&ran, sums), [format!("{}  -", sha256(&raw)).as_str(); 3]);

    for sector in [17, 6001] {
        let written = b"abcdefg\n".repeat(2000 * SECTOR / 8);
        data[sector * SECTOR..][..written.len()].copy_from_slice(&written);
    }
    let expected = file(&folder, "expected", &data);
    let after = answer(&ran, script[3]);
    assert_eq!(after, [format!("{}  -", sha256(&expected))]);
    for (name, with) in [("over", &expected), ("packed", &raw)] {
        run(&qemu_img, &["check", "-q", &image(name)]);
        run(&qemu_img, &["compare", "-q", "-F", "raw", &image(name), with]);
    }
    // What was discarded reads as zeros.
    data[MIB..MIB + 65536].fill(0);
    fs::write(&expected, &data).unwrap();
    run(&qemu_img, &["check", "-q", &image("plain")]);
    run(&qemu_img, &["compare", "-q", "-F", "raw", &image("plain"), &expected]);
}

/// The guest writes numbers to its disks, each to a sector of its own, and says which are there for good.
#[test]
fn what_was_flushed_survives_a_kill() {
    let qemu_img = tool("qemu-img");
    let folder = folder();
    let raw = file(&folder, "raw", &vec![0; 8 * MIB]);
    let image = text(&folder.path().join("image"));
    let mut disks = vec!["--disk", &raw];
    if let Some(qemu_img) = &qemu_img {
        run(qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
        disks.extend(["--disk", &image]);
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_08_boot_linux"))
        .args(["--cpus", "4", "--timeout", "120"])
        .args(disks)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let script = "n=0; while n=$((n+1)); do printf '%512d' $n > r; for d in /dev/vd?; do \
                  dd if=r of=$d seek=$((n*7)) conv=fsync 2> /dev/null; done; echo done:$n; done\n";
    child.stdin.as_mut().unwrap().write_all(script.as_bytes()).unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).split(b'\n');
    // The last line may be cut off, and is then not counted.
    let mut next = || {
        lines.by_ref().map_while(Result::ok).find_map(|line| {
            let line = String::from_utf8(line).ok()?;
            line.strip_suffix('\r')?.strip_prefix("done:")?.parse::<u64>().ok()
        })
    };
    let started = Instant::now();
    while next().expect("a number that was flushed") < 20 {}
    // Somewhere in the middle of what it does.
    std::thread::sleep(Duration::from_micros(started.elapsed().subsec_nanos().into()) / 10_000);
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let flushed = std::iter::from_fn(&mut next).last().unwrap_or(20);

    let all_there = |name: &str, read: &mut dyn FnMut(u64, &mut [u8])| {
        for number in 1..=flushed {
            let mut sector = [0; SECTOR];
            read(number * 7, &mut sector);
            let found = String::from_utf8_lossy(&sector);
            assert!(
                found == format!("{number:512}"),
                "{name}: {flushed} were flushed, {number} is {found:?}"
            );
        }
    };
    let raw = fs::File::open(raw).unwrap();
    all_there("raw", &mut |lba, data| raw.read_exact_at(data, lba * SECTOR as u64).unwrap());
    let Some(qemu_img) = qemu_img else { return };
    let options = Options { access: Access::ReadOnly, format: None, backing: false };
    let (mut qcow2, format) = disk_image::open(Path::new(&image), options).unwrap();
    assert_eq!(format, Format::Qcow2);
    all_there("qcow2", &mut |lba, data| qcow2.read(lba, data).unwrap());
    drop(qcow2);
    // Room that was lost by the kill is not an error: 3 says that, 2 that something is wrong.
    let check = Command::new(qemu_img).args(["check", "-q", &image]).status().unwrap();
    assert!(matches!(check.code(), Some(0 | 3)), "{check}");
}

#[test]
fn what_is_no_disk_gets_one_line() {
    let folder = folder();
    let odd = file(&folder, "odd", &[0; 1000]);
    let empty = file(&folder, "empty", &[]);
    let bad = file(&folder, "bad", &[&b"QFI\xFB\0\0\0\x03"[..], &[0xFF; 600]].concat());
    let good = file(&folder, "good", &[0; 512]);
    for (disk, why) in [
        (text(&folder.path().join("missing")), "missing: there is no such file"),
        (text(folder.path()), "this is a directory, expected a regular file"),
        (odd, "the disk has 1000 bytes, expected a multiple of 512"),
        (empty, "the file is empty"),
        (bad, "the qcow2 image is encrypted"),
        (format!("{good},format=qcow2"), "this is no qcow2 image: it begins with [00, 00, 00, 00]"),
    ] {
        program().args(["--disk", &disk]).run().refused(2, why);
    }
    let twice = ["--disk", &good, "--disk", &format!("{good},ro")];
    program().args(twice).run().refused(2, "the disk is in use already");
    for (more, why) in [
        ("serial=a b", "serial=a b has to be at most 20 ASCII letters"),
        ("serial=123456789012345678901", "has to be at most 20"),
        ("format=vmdk", "format=vmdk is unknown, expected raw or qcow2"),
        ("rw,ro", "rw and ro exclude each other"),
        ("cache=none", "is unknown, expected path=FILE, rw, ro, snapshot, format=raw|qcow2"),
    ] {
        program().args(["--disk", &format!("{good},{more}")]).run().ended(2).stderr_has(why);
    }
}
