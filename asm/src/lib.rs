//! The assembly guests of mini-kvm.
//!
//! One module a folder of NASM sources, one constant a file: `asm/real/hello.asm` is
//! [`real::HELLO`]. They are flat binaries; each source names in its `org` the guest-physical
//! address that it expects to be loaded at.

include!(concat!(env!("OUT_DIR"), "/guests.rs"));
