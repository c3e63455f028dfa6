//! The guest at an exit: its memory and its registers.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::ioctl;
use super::process::Memory;
use super::stop::{self, How, Stop, go_on};

/// A memslot that is there now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub start: u64,
    pub size: u64,
    pub host: u64,
}

/// `struct kvm_regs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "each is the register of that name")]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// `struct kvm_segment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "each is the part of a descriptor of that name")]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    pub kind: u8,
    pub present: u8,
    pub dpl: u8,
    pub db: u8,
    pub s: u8,
    pub l: u8,
    pub g: u8,
    pub avl: u8,
    pub unusable: u8,
    _padding: u8,
}

/// `struct kvm_dtable`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "each is the part of GDTR or IDTR of that name")]
pub struct Table {
    pub base: u64,
    pub limit: u16,
    _padding: [u16; 3],
}

/// `struct kvm_sregs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "each is the register of that name")]
pub struct Sregs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: Table,
    pub idt: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    pub interrupts: [u64; 4],
}

impl Sregs {
    /// `CR0.PE`: protected mode, or more.
    pub fn protected(&self) -> bool {
        self.cr0 & 1 == 1
    }

    /// `CR0.PG`.
    pub fn paging(&self) -> bool {
        self.cr0 >> 31 & 1 == 1
    }

    /// `EFER.LMA`: long mode is active.
    pub fn long(&self) -> bool {
        self.efer >> 10 & 1 == 1
    }

    /// The ring that the guest runs in.
    pub fn ring(&self) -> u8 {
        self.ss.dpl & 3
    }
}

/// The guest behind an exit, as long as the program that runs it is stopped there.
pub struct Guest<'w> {
    pub(super) thread: Pid,
    pub(super) memory: &'w Memory,
    pub(super) slots: &'w BTreeMap<u32, Slot>,
    /// Where the program has `struct kvm_run`.
    pub(super) run: u64,
    /// The vCPU's descriptor.
    pub(super) fd: u64,
    /// A signal that came while registers were asked for, or 0: the program gets it when it goes on.
    pub(super) signal: i32,
}

impl Guest<'_> {
    /// Guest memory at a guest-physical address.
    ///
    /// # Errors
    /// No memslot has all of these bytes.
    pub fn read(&self, addr: u64, len: usize) -> Result<Vec<u8>> {
        self.memory.read(self.host(addr, len)?, len)
    }

    /// Puts other bytes there: what the program then says of its guest cannot have been written down before.
    ///
    /// # Errors
    /// See [`Self::read`].
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        self.memory.write(self.host(addr, bytes.len())?, bytes)
    }

    /// Where the program has these bytes of guest memory.
    fn host(&self, addr: u64, len: usize) -> Result<u64> {
        let fits = |slot: &&Slot| {
            let offset = addr.checked_sub(slot.start);
            offset.is_some_and(|offset| offset.saturating_add(len as u64) <= slot.size)
        };
        let slot = self.slots.values().find(fits);
        let slot = slot.with_context(|| format!("no memslot has {len} bytes at {addr:#x}"))?;
        Ok(slot.host + (addr - slot.start))
    }

    /// A number of 32 bits there.
    ///
    /// # Errors
    /// See [`Self::read`].
    pub fn read_u32(&self, addr: u64) -> Result<u32> {
        Ok(u32::from_le_bytes(self.read(addr, 4)?.try_into().expect("four bytes were read")))
    }

    /// A number of 64 bits there.
    ///
    /// # Errors
    /// See [`Self::read`].
    pub fn read_u64(&self, addr: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.read(addr, 8)?.try_into().expect("eight bytes were read")))
    }

    /// The first guest-physical address in the VM's memory where these bytes stand. It reads all that there is: for
    /// small guests.
    pub fn find(&self, bytes: &[u8]) -> Option<u64> {
        self.slots.values().find_map(|slot| {
            let all = self.memory.read(slot.host, slot.size as usize).ok()?;
            let at = all.windows(bytes.len()).position(|window| window == bytes)?;
            Some(slot.start + at as u64)
        })
    }

    /// Bytes of what the vCPU shares with the monitor: `struct kvm_run`, and behind it the ring of gathered writes.
    ///
    /// # Errors
    /// The program has unmapped it.
    pub fn run_page(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.memory.read(self.run + offset, len)
    }

    /// The vCPU's general registers (`KVM_GET_REGS`).
    ///
    /// # Errors
    /// The program has ended, or KVM gives none.
    pub fn regs(&mut self) -> Result<Regs> {
        let bytes = self.inject(ioctl::GET_REGS)?;
        Ok(Regs::read_from_bytes(&bytes).expect("the request's size is the structure's"))
    }

    /// The vCPU's system registers (`KVM_GET_SREGS`).
    ///
    /// # Errors
    /// The program has ended, or KVM gives none.
    pub fn sregs(&mut self) -> Result<Sregs> {
        let bytes = self.inject(ioctl::GET_SREGS)?;
        Ok(Sregs::read_from_bytes(&bytes).expect("the request's size is the structure's"))
    }

    /// Sends the program a signal, which reaches it when it goes on.
    ///
    /// # Errors
    /// The program has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.thread, signal)?)
    }

    /// Has the stopped thread make one more ioctl on its vCPU, and forget it.
    ///
    /// The thread stands right behind the `syscall` instruction of its `KVM_RUN`. Two bytes back it makes another one,
    /// whose answer goes to its stack, where nobody keeps anything: below the 128 bytes under its stack pointer
    /// that a function may use without asking (System V ABI, "The Stack Frame").
    fn inject(&mut self, request: u64) -> Result<Vec<u8>> {
        const SYSCALL: u64 = 2;
        const RED_ZONE: u64 = 128;
        let before = ptrace::getregs(self.thread)?;
        let scratch = (before.rsp - RED_ZONE - ioctl::size(request) as u64) & !15;
        let call = libc::user_regs_struct {
            rip: before.rip - SYSCALL,
            rax: libc::SYS_ioctl as u64,
            rdi: self.fd,
            rsi: request,
            rdx: scratch,
            ..before
        };
        ptrace::setregs(self.thread, call)?;
        // It stops when the call begins, by the filter once more, and when it ends.
        let mut begun = false;
        loop {
            go_on(self.thread, How::ToCall, 0)?;
            match stop::wait(Some(self.thread))? {
                Some((_, Stop::Begins)) => begun = true,
                Some((_, Stop::Call)) if begun => break,
                Some((_, Stop::Call)) => {}
                Some((_, Stop::Signal(signal))) => self.signal = signal,
                other => anyhow::bail!("the program ended while it was asked: {other:?}"),
            }
        }
        let result = ptrace::getregs(self.thread)?.rax as i64;
        let answer = self.memory.read(scratch, ioctl::size(request));
        ptrace::setregs(self.thread, before)?;
        ensure!(result == 0, "KVM does not tell a vCPU's registers: {result}");
        answer
    }
}

impl Memory {
    /// Bytes at an address of the program.
    pub(super) fn read(&self, addr: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let read = self.file()?.read_exact_at(&mut bytes, addr);
        read.with_context(|| format!("cannot read {len} bytes of the program at {addr:#x}"))?;
        Ok(bytes)
    }

    /// Puts bytes there.
    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file()?.write_all_at(bytes, addr);
        written.with_context(|| format!("cannot write to the program at {addr:#x}"))
    }
}
