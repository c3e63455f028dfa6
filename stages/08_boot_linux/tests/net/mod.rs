//! Network interfaces: a guest and this machine reach each other through a tap, and by passt.
//!
//! Each test has a network namespace of its own, in which it is root; and one of processes, so that all that it
//! started ends with it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use cli::cache;
use testkit::{Program, Ran};

use crate::blk::tool;
use crate::{PATIENCE, answer, initrd_with, program, sha256, text};

/// So many bytes go each way.
const LEN: usize = 4 << 20;

/// Runs a shell script apart. `$bb` is busybox, `$program` the stage, `$dir` the folder, `$1` and so on are `args`.
pub fn isolated(script: &str, dir: &tempfile::TempDir, args: &[&str]) -> Program {
    let busybox = text(&cache::default_initrd().with_file_name("busybox"));
    let ours = format!("bb=$1 program=$2 dir=$3; shift 3; {script}");
    // Who is root already may be other users, too.
    let root = if is_root() { [].as_slice() } else { &["--map-root-user"] };
    Program::new("unshare")
        .args(root)
        .args([
            "--net",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child",
            "sh",
            "-euc",
            &ours,
            "sh",
        ])
        .args([&busybox, env!("CARGO_BIN_EXE_08_boot_linux"), &text(dir.path())])
        .args(args)
        .patience(PATIENCE * 2)
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout == b"0\n"
}

/// A folder with a file that no damage would leave the same.
pub fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> =
        (0..LEN as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(dir.path().join("file"), content).unwrap();
    dir
}

/// The first word of what `command` printed.
fn word(ran: &Ran, command: &str) -> String {
    let lines = answer(ran, command).concat();
    lines.split_whitespace().next().unwrap_or_default().to_owned()
}

const TAP: &str = r#"
    $bb tunctl -t tap0 > $dir/log
    $bb ip address add 10.0.0.1/24 dev tap0
    $bb ip link set tap0 mtu $2 up
    $bb httpd -f -p 10.0.0.1:80 -h $dir &
    {
        until $bb wget -q -O $dir/from-guest http://10.0.0.2/file; do sleep 0.2; done
        $bb ping -A -q -c 100 10.0.0.2 > $dir/ping
        $program --net tap=tap0 || echo $?
        > $dir/done
    } > $dir/busy 2>&1 &
    $program --cpus $1 --net tap=tap0,mac=02:00:00:12:34:56 \
        --append 'ip=10.0.0.2::10.0.0.1:255.255.255.0'
"#;

#[test]
fn guest_and_host_reach_each_other_through_a_tap() {
    let script = [
        "n=/sys/class/net/eth0",
        "cat $n/address $n/mtu $n/carrier",
        "cat /sys/bus/virtio/devices/virtio0/features",
        "ping -A -q -c 100 10.0.0.1 | grep loss",
        "wget -q -O - http://10.0.0.1/file | sha256sum",
        "cat $n/statistics/rx_packets",
        "mkdir /www; head -c 4194304 /dev/urandom > /www/file",
        "sha256sum < /www/file; httpd -h /www",
        "until wget -q -O - http://10.0.0.1/done; do sleep 0.2; done",
        "true\n",
    ];
    for (cpus, mtu) in [("1", "1500"), ("4", "1400")] {
        let dir = folder();
        let ran = isolated(TAP, &dir, &[cpus, mtu]).stdin(script.join("\n")).run();
        ran.ended(0);
        assert_eq!(answer(&ran, script[1]), ["02:00:00:12:34:56", mtu, "1"]);
        // CSUM, GUEST_CSUM, MTU, MAC, TSO and ECN both ways, MRG_RXBUF, STATUS: a bit each, the lowest first.
        assert!(word(&ran, script[2]).starts_with("11010101110111011"), "{ran}");
        let path = |name| text(&dir.path().join(name));
        let read = |name| fs::read_to_string(path(name)).unwrap();
        for pings in [answer(&ran, script[3]).concat(), read("ping")] {
            assert!(pings.contains("100 packets received, 0% packet loss"), "{pings}");
        }
        assert_eq!(word(&ran, script[4]), sha256(&path("file")));
        assert_eq!(word(&ran, script[7]), sha256(&path("from-guest")));
        assert_eq!(fs::metadata(path("from-guest")).unwrap().len(), LEN as u64);
        // The host's TCP hands over more at once than fits into a packet: two of them, where it is slow.
        let packets: usize = word(&ran, script[5]).parse().unwrap();
        assert!(packets < 200 + LEN / 1448 * 3 / 4, "{packets} packets for {LEN} bytes");
        let busy = read("busy");
        let busy: Vec<_> = busy.lines().filter(|line| !line.starts_with("wget")).collect();
        assert_eq!(busy.len(), 2, "{busy:?}");
        assert!(busy[0].starts_with("error: the tap interface tap0 is in use"), "{busy:?}");
        assert_eq!(busy[1], "2");
    }
}

/// A router with NAT: `tap0` leads to the guest at 10.0.0.2, `out` to another namespace, which knows no way back but to the
/// router itself. There a web server for the folder and iperf3 listen at 192.0.2.2. `$nft` and `$iperf3` are the tools.
pub const NAT: &str = r#"
    $bb tunctl -t tap0 > $dir/log
    $bb ip address add 10.0.0.1/24 dev tap0
    $bb ip link set tap0 up
    unshare --net sleep 1000000 &
    other=$!
    beyond() { nsenter --net --target $other "$@"; }
    until [ $(readlink /proc/$other/ns/net) != $(readlink /proc/$$/ns/net) ]; do sleep 0.1; done
    $bb ip link add out type veth
    $bb ip link set veth0 netns $other
    $bb ip address add 192.0.2.1/24 dev out
    $bb ip link set out up
    beyond $bb ip address add 192.0.2.2/24 dev veth0
    beyond $bb ip link set veth0 up
    echo 1 > /proc/sys/net/ipv4/ip_forward
    $nft add table ip nat
    $nft add chain ip nat leaving '{ type nat hook postrouting priority 100; }'
    $nft add rule ip nat leaving oifname out masquerade
    beyond $bb httpd -f -p 192.0.2.2:80 -h $dir &
    # It goes on with files that have no name any more, which the lab's view of its host's files does not allow.
    TMPDIR=/dev/shm beyond $iperf3 --server > $dir/iperf3 &
"#;

/// A page that names who asks for it.
pub fn write_who(dir: &tempfile::TempDir) {
    let folder = dir.path().join("cgi-bin");
    fs::create_dir(&folder).unwrap();
    let page = "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\necho $REMOTE_ADDR\n";
    fs::write(folder.join("who"), page).unwrap();
    fs::set_permissions(folder.join("who"), fs::Permissions::from_mode(0o755)).unwrap();
}

/// The default initrd with the host's iperf3 and its libraries: `/iperf/run` starts it.
fn initrd_with_iperf3(dir: &tempfile::TempDir, iperf3: &Path) -> String {
    let needed = Command::new("ldd").arg(iperf3).output().unwrap();
    let needed = String::from_utf8(needed.stdout).unwrap();
    let needed = needed.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new);
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let files: Vec<_> = needed.chain([iperf3]).map(|path| (name(path), path)).collect();
    let loader = files.iter().find(|(name, _)| name.starts_with("ld-")).unwrap();
    // The server has one client at a time, and may not be done with the last one yet.
    let run = format!(
        "#!/bin/sh
        iperf3() {{ /iperf/{} --library-path /iperf /iperf/iperf3 \"$@\" > /tmp/said 2>&1; }}
        until iperf3 \"$@\" || ! grep -q 'server is busy' /tmp/said; do sleep 1; done
        cat /tmp/said\n",
        loader.0
    );
    let files = files.iter().map(|(name, path)| (name.as_str(), fs::read(path).unwrap()));
    let files: Vec<_> = files.chain([("run", run.into_bytes())]).collect();
    let paths: Vec<_> = files.iter().map(|(name, _)| format!("iperf/{name}")).collect();
    let contents = files.iter().map(|(_, bytes)| (0o100_755, bytes.as_slice()));
    let entries = paths.iter().map(String::as_str).zip(contents);
    let entries: Vec<_> =
        [("iperf", (0o40_755, [].as_slice()))].into_iter().chain(entries).collect();
    initrd_with(dir, &entries)
}

#[test]
fn a_guest_reaches_what_lies_behind_a_router_with_nat() {
    let Some(nft) = tool("nft") else { return };
    let Some(iperf3) = tool("iperf3") else { return };
    let host = format!(
        "nft=$2 iperf3=$3 {NAT}
        $program --cpus $1 --initrd $dir/initrd --net tap=tap0 \\
            --append ip=10.0.0.2::10.0.0.1:255.255.255.0"
    );
    let script = [
        "ping -A -q -c 100 192.0.2.2 | grep loss",
        "wget -q -O - http://192.0.2.2/cgi-bin/who",
        "wget -q -O - http://192.0.2.2/file | sha256sum",
        "/iperf/run -c 192.0.2.2 -n 8M -f m | grep -v local",
        "/iperf/run -c 192.0.2.2 -n 8M -f m -R | grep -v local",
        "true\n",
    ];
    for cpus in ["1", "4"] {
        let dir = folder();
        write_who(&dir);
        initrd_with_iperf3(&dir, &iperf3);
        let args = [cpus, &text(&nft), &text(&iperf3)];
        let ran = isolated(&host, &dir, &args).stdin(script.join("\n")).run();
        ran.ended(0);
        let pings = answer(&ran, script[0]).concat();
        assert!(pings.contains("100 packets received, 0% packet loss"), "{ran}");
        // The router's address: the guest's own is not known there.
        assert_eq!(word(&ran, script[1]), "192.0.2.1");
        assert_eq!(word(&ran, script[2]), sha256(&text(&dir.path().join("file"))));
        for measured in &script[3..5] {
            let lines = answer(&ran, measured);
            assert!(lines.iter().any(|line| line == "iperf Done."), "{ran}");
            let received = lines.iter().find(|line| line.ends_with("receiver")).unwrap();
            let words: Vec<_> = received.split_whitespace().collect();
            let unit = words.iter().position(|word| *word == "MBytes").unwrap();
            assert!(words[unit - 1].parse::<f64>().unwrap() > 4.0, "{ran}");
        }
    }
}

#[test]
fn a_guest_reaches_the_host_by_passt() {
    if Command::new("passt").arg("--version").output().is_err() {
        println!("skipped: passt is not installed");
        return;
    }
    let dir = folder();
    // passt gives the guest the address of the interface with the default route, and takes what goes to the gateway
    // to this machine itself.
    let host = r#"
        $bb ip link set lo up
        $bb tunctl -t uplink > $dir/log
        $bb ip address add 192.0.2.2/24 dev uplink
        $bb ip link set uplink up
        $bb ip route add default via 192.0.2.1
        $bb httpd -f -p 127.0.0.1:80 -h $dir &
        # It would hang up at the end of its input.
        sleep 1000 | { $bb nc -l -p 9000 > $dir/from-guest; > $dir/done; } &
        $program --net user --append ip=dhcp
    "#;
    let script = [
        "ip -4 addr show eth0 | grep -o '192[0-9./]*'",
        "ip route | grep default",
        "wget -q -O - http://192.0.2.1/file | sha256sum",
        "head -c 4194304 /dev/urandom > file; sha256sum < file",
        "nc 192.0.2.1 9000 < file",
        "until wget -q -O - http://192.0.2.1/done; do sleep 0.2; done",
        "true\n",
    ];
    let ran = isolated(host, &dir, &[]).stdin(script.join("\n")).run();
    ran.ended(0);
    assert_eq!(answer(&ran, script[0])[0], "192.0.2.2/24");
    assert!(answer(&ran, script[1]).concat().contains("via 192.0.2.1 dev eth0"), "{ran}");
    let path = |name| text(&dir.path().join(name));
    assert_eq!(word(&ran, script[2]), sha256(&path("file")));
    assert_eq!(word(&ran, script[3]), sha256(&path("from-guest")));
}

#[test]
fn an_interface_that_cannot_be_had_gets_one_line() {
    for (net, why) in [
        ("tap=no-such-tap", "there is no interface no-such-tap; make it: `sudo ip tuntap add"),
        ("tap=a/b", r#""a/b" is no name of an interface"#),
        ("tap=sixteen-letters-", "is no name of an interface"),
        ("tap=lo", "lo is not a tap interface"),
        ("tap", "tap has no value: tap=NAME"),
        ("tap=tap0,user", "expected one of tap=NAME and user"),
        ("mac=02:00:00:12:34:56", "expected one of tap=NAME and user"),
        ("user,mac=02:00:00:12:34", "is no MAC address, expected six bytes"),
        ("user,mac=03:00:00:12:34:56", "is not one interface's address"),
        ("user,fast", r#""fast" is unknown, expected user, tap=NAME, mac=ADDRESS"#),
    ] {
        program().args(["--net", net]).run().refused(2, why);
    }
    let without = program().env("PATH", "/nonexistent").args(["--net", "user"]);
    without.run().refused(3, "passt is not installed: `apt install passt`");
    // busybox's tunctl knows no owner.
    if !is_root() || Command::new("ip").args(["tuntap", "help"]).output().is_err() {
        println!("skipped: making another user's interface takes root, and ip of iproute2");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "ip tuntap add tap0 mode tap user 65534
        setpriv --bounding-set=-net_admin $program --net tap=tap0";
    let ran = isolated(script, &dir, &[]).run();
    ran.refused(2, "the tap interface tap0 belongs to another user");
}
