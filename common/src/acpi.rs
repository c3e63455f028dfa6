//! Introduced by stage 08: ACPI, the tables in which a machine describes itself to its operating system.
//!
//! ```text
//! RSDP --> XSDT --+--> FADT --+--> FACS   shared with the firmware; here only its place
//!                 |           '--> DSDT   bytecode (AML): devices, and how to power off
//!                 '--> MADT               processors and interrupt controllers
//! ```
//!
//! The tables are written by [`acpi_tables`]; what stands in them is ours. So are the registers that they name:
//! [`Pm1`], by which the guest powers its machine off and learns of its power button, and the i8042's, which resets
//! it. A PC has these registers; a machine without them, *hardware-reduced* in ACPI's words, would also be one
//! without the interrupt controllers and the timer that KVM has.

use std::sync::PoisonError;

use acpi_tables::aml::{
    self, Device as AmlDevice, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use serde_json::Value;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::byteorder::{LE, U16, U32};
use zerocopy::{Immutable, IntoBytes};

use crate::bus::{Device, Interrupt as Line, Shared};
use crate::error::{Blame, Blamed};
use crate::layout::{ACPI_TABLES, ACPI_TABLES_SIZE, IOAPIC, LOCAL_APIC, virtio_mmio};
use crate::memory::Ram;
use crate::run::{Ending, Stop};
use crate::snapshot::{self, Keep};
use crate::{cmos, i8042, uart};

const OEM: [u8; 6] = *b"MINKVM";
const OEM_TABLE: [u8; 8] = *b"MINIKVM ";
const OEM_REVISION: u32 = 1;

/// First port of [`Pm1`].
pub const PM1_PORT: u16 = 0x600;

/// How many ports it has.
pub const PM1_PORTS: u16 = 6;

// Offsets of the PM1 registers (ACPI 6.5, 4.8.3 "PM1 Event Grouping" and "PM1 Control Grouping").
const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;

/// The interrupt line of ACPI's events, the SCI, by tradition.
pub const SCI: u32 = 9;

/// In PM1_STS: the power button was pressed. In PM1_EN: the guest wants an SCI for it.
const POWER_BUTTON: u16 = 1 << 8;

/// In PM1_CNT: the machine is in ACPI mode, as opposed to the mode of BIOSes before it.
const SCI_EN: u16 = 1 << 0;
/// In PM1_CNT: enter the sleep state whose type is in bits 10 to 12.
const SLP_EN: u16 = 1 << 13;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_TYP_MASK: u16 = 7;

/// The sleep type that `\_S5` in the DSDT gives to "soft off". Which number it is, is the machine's choice.
const S5: u8 = 5;

// IAPC_BOOT_ARCH in the FADT (ACPI 6.5, table 5.11): what an operating system need not look for.
const LEGACY_DEVICES: u16 = 1 << 0;
const VGA_NOT_PRESENT: u16 = 1 << 2;

// As the error below says it.
const _: () = assert!(ACPI_TABLES.0 == 0xE_0000);

/// Why the tables could not be written.
#[derive(Debug, Error)]
pub enum Error {
    /// Guest RAM doesn't reach where they belong.
    #[error("no room for the ACPI tables at 0xe0000: {0}; give a larger --memory")]
    Ram(#[from] GuestMemoryError),
    /// There is more to describe than fits.
    #[error("the ACPI tables have {0} bytes, expected at most {ACPI_TABLES_SIZE}")]
    TooLong(usize),
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        Blame::Input
    }
}

/// Writes the tables for a machine with vCPUs 0 to `vcpus` - 1 and the first `virtio_devices` of the places that
/// [`virtio_mmio`] gives, at [`ACPI_TABLES`]. Returns the RSDP's address.
pub fn write_tables(ram: &Ram, vcpus: u8, virtio_devices: usize) -> Result<GuestAddress, Error> {
    // The RSDP comes first, where a kernel that is not told its address finds it; its checksum wants
    // the XSDT's address, which is known once all else has a place.
    let mut tables = Tables { bytes: vec![0; Rsdp::len()] };
    let dsdt = tables.add(dsdt(virtio_devices).as_slice());
    let facs = tables.add(&bytes(&FACS::new()));
    let fadt = tables.add(&bytes(&fadt(dsdt, facs).finalize()));
    let madt = tables.add(&bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    if tables.bytes.len() as u64 > ACPI_TABLES_SIZE {
        return Err(Error::TooLong(tables.bytes.len()));
    }
    ram.write_slice(&tables.bytes, ACPI_TABLES)?;
    Ok(ACPI_TABLES)
}

/// Tables one behind the other, as they will stand at [`ACPI_TABLES`].
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table at a multiple of 64 bytes, which the FACS needs. Returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let at = ACPI_TABLES.0 + self.bytes.len() as u64;
        self.bytes.extend(table);
        at
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The Fixed ACPI Description Table: where the registers are (ACPI 6.5, 5.2.9).
fn fadt(dsdt: u64, facs: u64) -> FADTBuilder {
    let port = |bits, access, offset: u64| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(PM1_PORT) + offset)
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        // With a flag like these set, the event is not in the PM1 registers. The power button is.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sci_int = (SCI as u16).into();
    // An SMI command port of 0: the machine is always in ACPI mode.
    fadt.smi_cmd = 0.into();
    fadt.pm1a_evt_blk = (u32::from(PM1_PORT) + STATUS as u32).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, STATUS);
    fadt.pm1a_cnt_blk = (u32::from(PM1_PORT) + CONTROL as u32).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, CONTROL);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    fadt.century = cmos::CENTURY;
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(i8042::PORT) + i8042::COMMAND,
    );
    fadt.reset_value = i8042::RESET;
    fadt
}

/// The Multiple APIC Description Table: processors, and where interrupts go in (ACPI 6.5, 5.2.12).
fn madt(vcpus: u8) -> MADT {
    let local = LocalInterruptController::Address(LOCAL_APIC.0 as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // KVM's IOAPIC has 24 pins, pin n for GSI n: also pin 0 for the timer's line 0, which a PC often has at pin 2. So
    // one ISA line alone needs a word.
    madt.add_structure(IoApic::new(0, IOAPIC.0 as u32, 0));
    madt.add_structure(SourceOverride {
        kind: 2,
        length: size_of::<SourceOverride>() as u8,
        bus: 0,
        source: SCI as u8,
        gsi: SCI.into(),
        flags: ACTIVE_HIGH_EDGE.into(),
    });
    madt
}

/// How the lines of an ISA bus are: high for an interrupt, which begins with the edge. The SCI would be low for as long
/// as there is an event, but an irqfd pulses it.
const ACTIVE_HIGH_EDGE: u16 = 0b01_01;

/// Interrupt Source Override Structure (ACPI 6.5, 5.2.12.5): an ISA line that is not what such lines are by default.
#[repr(C)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: U32<LE>,
    flags: U16<LE>,
}

const _: () = assert!(size_of::<SourceOverride>() == 10);

impl Aml for SourceOverride {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        self.as_bytes().iter().for_each(|&byte| sink.byte(byte));
    }
}

/// The Differentiated System Description Table: what no register block says (ACPI 6.5, 5.2.11.1). Its bytecode names
/// the number of the sleep state "off" and the devices that no bus finds.
fn dsdt(virtio_devices: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    // Soft off is sleep type S5 in PM1a_CNT; there is no PM1b (ACPI 6.5, 7.4.2 "\_Sx").
    let off = Name::new("_S5_".into(), &Package::new(vec![&S5, &0u8]));
    dsdt.append_slice(&bytes(&off));

    let ports = IO::new(uart::COM1, uart::COM1, 1, uart::PORTS as u8);
    let line = Interrupt::new(true, true, false, false, uart::COM1_IRQ);
    dsdt.append_slice(&device("COM1", &EISAName::new("PNP0501"), 0, &[&ports, &line]));

    let ports = IO::new(cmos::PORT, cmos::PORT, 1, cmos::PORTS as u8);
    let line = Interrupt::new(true, true, false, false, cmos::IRQ);
    dsdt.append_slice(&device("RTC0", &EISAName::new("PNP0B00"), 0, &[&ports, &line]));

    for n in 0..virtio_devices {
        let (addresses, gsi) = virtio_mmio(n);
        let size = addresses.end - addresses.start;
        let registers = Memory32Fixed::new(true, addresses.start as u32, size as u32);
        // An irqfd pulses its line, so the edge counts; devices share lines.
        let line = Interrupt::new(true, true, false, true, gsi);
        // The name under which Linux looks for virtio-mmio, given by Linaro.
        let name = format!("VR{n:02}");
        dsdt.append_slice(&device(&name, &"LNRO0005", n, &[&registers, &line]));
    }
    dsdt
}

/// A device of the DSDT: what it is, which one of these, and the resources that it has. It sees memory as the
/// processors do (`_CCA`, ACPI 6.5, 6.2.17).
fn device(name: &str, hid: &dyn Aml, uid: usize, resources: &[&dyn Aml]) -> Vec<u8> {
    bytes(&AmlDevice::new(
        format!("_SB_.{name}").as_str().into(),
        vec![
            &Name::new("_HID".into(), hid),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec())),
        ],
    ))
}

/// The PM1 registers: status and enable bits of events, of which this machine has one, the power button, and the control
/// register, through which a guest goes to sleep. A machine that sleeps in S5 is off.
pub struct Pm1<I> {
    line: I,
    stop: Stop,
    status: u16,
    enable: u16,
}

impl<I: Line> Pm1<I> {
    /// Registers whose events interrupt by `line`, the [`SCI`], and which end the machine through `stop`.
    pub fn new(line: I, stop: Stop) -> Self {
        Self { line, stop, status: 0, enable: 0 }
    }

    /// Presses the power button: the guest is to shut down by itself. Returns whether it listens to the button; if not,
    /// nothing will happen.
    pub fn press_power_button(&mut self) -> bool {
        self.change(|pm1| pm1.status |= POWER_BUTTON);
        self.enable & POWER_BUTTON != 0
    }

    /// Makes a change, and interrupts the guest if it brings an event that the guest wants to know of.
    fn change(&mut self, change: impl FnOnce(&mut Self)) {
        let before = self.status & self.enable;
        change(self);
        if before == 0 && self.status & self.enable != 0 {
            // An eventfd takes 2^64 pulses before it fails.
            let _ = self.line.trigger();
        }
    }

    fn register(&mut self, offset: u64) -> u16 {
        match offset {
            STATUS => self.status,
            ENABLE => self.enable,
            _ => SCI_EN,
        }
    }

    fn set(&mut self, offset: u64, value: u8) {
        let [low, high] = [u16::from(value), u16::from(value) << 8];
        match offset {
            // Status bits are cleared by writing ones to them.
            STATUS => self.status &= !low,
            1 => self.status &= !high,
            ENABLE => self.enable = self.enable & 0xFF00 | low,
            3 => self.enable = self.enable & 0xFF | high,
            5 => {
                let sleep = high >> SLP_TYP_SHIFT & SLP_TYP_MASK;
                if high & SLP_EN != 0 && sleep == u16::from(S5) {
                    self.stop.now(Ending::PowerOff);
                }
            }
            _ => {}
        }
    }
}

/// Presses the power button of a machine that runs ([`Pm1::press_power_button`]).
pub fn press_power_button<I: Line>(pm1: &Shared<Pm1<I>>) -> bool {
    pm1.lock().unwrap_or_else(PoisonError::into_inner).press_power_button()
}

impl<I: Line> Device for Pm1<I> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.register(offset & !1).to_le_bytes()[(offset & 1) as usize];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.change(|pm1| {
            (offset..).zip(data).for_each(|(offset, &byte)| pm1.set(offset, byte));
        });
    }
}

impl<I: Line> Keep for Pm1<I> {
    fn keep(&self) -> Value {
        [self.status, self.enable].as_slice().into()
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        [self.status, self.enable] = snapshot::read(state)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::layout::VIRTIO_MMIO_DEVICES;
    use crate::run;

    fn table(ram: &Ram, at: u64) -> Vec<u8> {
        let len: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn a_kernel_finds_every_table_and_every_checksum_is_right() {
        let ram = ram();
        let at = write_tables(&ram, 3, 2).unwrap();
        let mut rsdp = [0; 36];
        ram.read_slice(&mut rsdp, at).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&ram, u64_at(&rsdp, 24));
        assert_eq!((&xsdt[..4], sum(&xsdt), xsdt.len()), (&b"XSDT"[..], 0, 36 + 2 * 8));

        let fadt = table(&ram, u64_at(&xsdt, 36));
        assert_eq!((&fadt[..4], sum(&fadt), fadt.len()), (&b"FACP"[..], 0, 276));
        assert_eq!(u32_at(&fadt, 64), 0x604, "PM1a_CNT_BLK");
        assert_eq!(u64_at(&fadt, 148 + 4), 0x600, "X_PM1a_EVT_BLK");
        assert_eq!(u64_at(&fadt, 172 + 4), 0x604, "X_PM1a_CNT_BLK");
        assert_eq!((fadt[108], u32_at(&fadt, 112) & 1 << 4), (0x32, 0), "century, PWR_BUTTON");
        assert_eq!(fadt[128], 0xFE, "RESET_VALUE");
        assert_eq!(u64_at(&fadt, 120), 0x64, "RESET_REG");
        let facs = u64::from(u32_at(&fadt, 36));
        assert_eq!((&table(&ram, facs)[..4], facs % 64), (&b"FACS"[..], 0));
        let dsdt = table(&ram, u64_at(&fadt, 140));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
        let has = |name: &[u8]| dsdt.windows(name.len()).any(|bytes| bytes == name);
        assert!(has(b"_S5_") && has(b"VR00") && has(b"VR01") && !has(b"VR02"));
        // Of the second virtio device: Memory32Fixed, read and write, 0x1000 bytes at 0xD000_1000; an extended
        // interrupt, edge, active high, shared, 17 (ACPI 6.5, 6.4.3.4 and 6.4.3.6).
        assert!(has(b"\x86\x09\0\x01\0\x10\0\xD0\0\x10\0\0\x89\x06\0\x0B\x01\x11\0\0\0"));

        let madt = table(&ram, u64_at(&xsdt, 44));
        assert_eq!((&madt[..4], sum(&madt)), (&b"APIC"[..], 0));
        assert_eq!(u32_at(&madt, 36), 0xFEE0_0000);
        let processors: Vec<_> = (0..3).map(|i| madt[44 + 8 * i..][..5].to_vec()).collect();
        assert!(madt.ends_with(&[2, 10, 0, 9, 9, 0, 0, 0, 5, 0]), "the SCI is edge, active high");
        assert_eq!(processors, [[0, 8, 0, 0, 1], [0, 8, 1, 1, 1], [0, 8, 2, 2, 1]]);
    }

    #[test]
    fn as_many_processors_as_apic_ids_fit() {
        write_tables(&ram(), u8::MAX, VIRTIO_MMIO_DEVICES).unwrap();
        let small = Ram::from_ranges(&[(GuestAddress(0), 0x8_0000)]).unwrap();
        assert!(matches!(write_tables(&small, 1, 0), Err(Error::Ram(_))));
    }

    /// Counts how often the line was raised.
    #[derive(Clone, Default)]
    struct Counter(Arc<AtomicU32>);

    impl Line for Counter {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn read(pm1: &mut Pm1<Counter>, offset: u64) -> u16 {
        let mut data = [0xFF; 2];
        pm1.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn only_sleep_type_5_with_slp_en_powers_off() {
        let (stop, stopped) = run::stop();
        let mut pm1 = Pm1::new(Counter::default(), stop);
        let mut write = |value: u16| pm1.write(CONTROL, &value.to_le_bytes());
        for value in [0, SLP_EN, 5 << 10, SLP_EN | 4 << 10, SLP_EN | 6 << 10] {
            write(value);
            assert_eq!(stopped.ending(), None, "{value:#x}");
        }
        write(SLP_EN | 5 << 10);
        assert_eq!(stopped.ending(), Some(Ending::PowerOff));
    }

    #[test]
    fn the_registers_read_as_a_machine_in_acpi_mode() {
        let mut pm1 = Pm1::new(Counter::default(), run::stop().0);
        pm1.write(ENABLE, &0x0120u16.to_le_bytes());
        assert_eq!([STATUS, ENABLE, CONTROL].map(|at| read(&mut pm1, at)), [0, 0x0120, SCI_EN]);
        let mut high = [0xFF];
        pm1.read(ENABLE + 1, &mut high);
        assert_eq!(high, [0x01]);
        let mut both = [0xFF; 4];
        pm1.read(STATUS, &mut both);
        assert_eq!(both, [0, 0, 0x20, 0x01]);
    }

    #[test]
    fn the_power_button_interrupts_a_guest_that_listens() {
        let line = Counter::default();
        let mut pm1 = Pm1::new(line.clone(), run::stop().0);
        let raised = || line.0.load(Ordering::Relaxed);
        assert!(!pm1.press_power_button(), "nobody listens");
        assert_eq!((read(&mut pm1, STATUS), raised()), (POWER_BUTTON, 0));
        // Linux clears what is old before it listens. Who doesn't is told at once.
        pm1.write(ENABLE, &POWER_BUTTON.to_le_bytes());
        assert_eq!(raised(), 1);
        pm1.write(STATUS, &(!POWER_BUTTON).to_le_bytes());
        assert_eq!(read(&mut pm1, STATUS), POWER_BUTTON, "only ones clear");
        pm1.write(STATUS, &POWER_BUTTON.to_le_bytes());
        assert_eq!((read(&mut pm1, STATUS), raised()), (0, 1));
        assert!(pm1.press_power_button() && pm1.press_power_button());
        assert_eq!(raised(), 2, "it was pressed twice before the guest looked");
        pm1.write(STATUS + 1, &[0xFF]);
        assert_eq!(read(&mut pm1, STATUS), 0);
    }
}
