//! `cargo xtask kernel` with tools that only pretend: what it keeps, goes on with and leaves behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use testkit::Program;

/// The configuration is what was asked for. While there is a file `hang`, building takes for ever, with `fail` it fails.
const MAKE: &str = r#"
tree=$2
for word; do
    case $word in
    KCONFIG_ALLCONFIG=*) cp "${word#*=}" "$tree/.config" ;;
    bzImage)
        echo '  CC      init/main.o'
        [ ! -e "$0.hang" ] || exec sleep 1000
        if [ -e "$0.fail" ]; then
            echo 'init/main.c:1:1: error: this is no C'
            echo 'make: *** [Makefile:1: bzImage] Error 2'
            exit 2
        fi
        mkdir -p "$tree/arch/x86/boot"
        echo image > "$tree/arch/x86/boot/bzImage"
        echo elf > "$tree/vmlinux"
        ;;
    esac
done
"#;

/// A folder with the tools, a source and a cache.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("bin")).unwrap();
        fs::write(place.path("linux.tar"), "a source").unwrap();
        // The last argument is where to unpack to.
        let tar = "for to; do :; done; > $to/Kconfig";
        // It is asked for a header file.
        let gcc = "cat > /dev/null";
        for (name, text) in [("make", MAKE), ("tar", tar), ("gcc", gcc)] {
            place.tool(name, text);
        }
        for name in ["flex", "bison", "bc", "xz"] {
            place.tool(name, "exit 1");
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn tool(&self, name: &str, text: &str) {
        let tool = self.path("bin").join(name);
        fs::write(&tool, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn kernel(&self) -> Program {
        let path = format!("{}:/usr/bin:/bin", self.path("bin").display());
        Program::new(env!("CARGO_BIN_EXE_xtask"))
            .args([Path::new("kernel"), Path::new("--source"), &self.path("linux.tar")])
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("PATH", path)
    }
}

#[test]
fn an_interrupted_build_goes_on_and_what_is_made_is_made_once() {
    let place = Place::new();
    let (build, kept) =
        (place.path("cache/mini-kvm/kernel-build"), place.path("cache/mini-kvm/small-kernel"));
    fs::write(place.path("bin/make.hang"), "").unwrap();
    let mut first = place.kernel().on_terminal();
    first.expect("Building the kernel").send("\x03");
    first.expect("interrupted: the next `cargo xtask kernel` goes on from here");
    assert_eq!(first.end(), 1);
    assert!(build.join("tree/Kconfig").exists() && !kept.exists());

    fs::remove_file(place.path("bin/make.hang")).unwrap();
    let ran = place.kernel().run();
    ran.ended(0).stderr_has("going on with what an earlier build has left");
    ran.stdout_has("cargo run --bin 08_boot_linux -- --kernel small");
    assert_eq!(fs::read(kept.join("vmlinuz")).unwrap(), b"image\n");
    assert_eq!(fs::read(kept.join("vmlinux")).unwrap(), b"elf\n");
    assert!(fs::read_to_string(kept.join("config")).unwrap().contains("CONFIG_VIRTIO_BLK=y\n"));
    assert!(!build.exists(), "two gigabytes are left");

    place.tool("make", "exit 1");
    place.kernel().run().ended(0).stdout_has("The small kernel is there, made from ");
    // From another source it is made anew; until it is, the old one stays.
    fs::write(place.path("linux.tar"), "another source").unwrap();
    place.kernel().run().ended(1).stderr_has("FAIL Configuring the kernel");
    assert_eq!(fs::read(kept.join("vmlinuz")).unwrap(), b"image\n");
}

#[test]
fn what_goes_wrong_is_told_in_one_line() {
    let place = Place::new();
    fs::write(place.path("bin/make.fail"), "").unwrap();
    let ran = place.kernel().run();
    ran.ended(1).stderr_has("\nerror: make: init/main.c:1:1: error: this is no C (all of it: ");

    fs::remove_dir_all(place.path("cache")).unwrap();
    place.tool("tar", "echo 'tar: This does not look like a tar archive' >&2; exit 2");
    place.kernel().run().ended(1).stderr_has("error: tar: tar: This does not look like a tar");
    assert!(!place.path("cache/mini-kvm/kernel-build").exists(), "half a source is left");

    place.tool("gcc", "cat > /dev/null; exit 1");
    place.kernel().run().ended(1).stderr_has("to build a kernel takes gelf.h: ");
    let missing = Program::new(env!("CARGO_BIN_EXE_xtask"));
    let missing = missing.args(["kernel", "--source", "/no/such.tar"]).run();
    missing.ended(1).stderr_has("error: cannot read /no/such.tar: ");
}
