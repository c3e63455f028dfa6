//! The registers in which a command gets its address and its count.

/// In the "Device register": device 1 is meant.
pub const DEVICE_1: u8 = 1 << 4;
/// In the device register: the address is a linear one.
pub const DEVICE_LBA: u8 = 1 << 6;

/// A register and what it was before it was last written: a 48-bit address and a 16-bit count have their upper
/// halves there ("48-bit Address feature set").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Register {
    pub now: u8,
    pub previous: u8,
}

/// A disk by cylinders, heads and sectors: how many heads a cylinder has and how many sectors a head's track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub cylinders: u16,
    pub heads: u8,
    pub track: u8,
}

impl Geometry {
    /// The geometry of a disk of `count` sectors with these heads and sectors. If the disk is not a multiple of a
    /// cylinder, its end has no address of this kind; the smallest disks get one cylinder all the same.
    pub fn new(count: u64, heads: u8, track: u8, most: u16) -> Self {
        let cylinders = count / (u64::from(heads) * u64::from(track));
        Self { cylinders: cylinders.clamp(1, most.into()) as u16, heads, track }
    }

    /// How many sectors that makes.
    pub fn sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.track)
    }
}

/// How a command's registers name a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressing {
    /// Cylinder, head and sector, as before ATA-6; the first sector is number 1.
    Chs(Geometry),
    /// 28 bits.
    Lba28,
    /// 48 bits.
    Lba48,
}

/// A drive's task file, but for the data, the error and the status.
#[derive(Clone, Copy, Debug, Default)]
pub struct TaskFile {
    pub features: Register,
    pub count: Register,
    /// LBA low, mid and high; or sector, and cylinder low and high.
    pub lba: [Register; 3],
    /// Bits 24 to 27 of an address of 28 bits, or the head; and two flags.
    pub device: u8,
}

impl TaskFile {
    /// What a drive that is no CD-ROM shows after reset ("Signature and persistence").
    pub fn signature() -> Self {
        let one = Register { now: 1, previous: 0 };
        Self { count: one, lba: [one, Register::default(), Register::default()], ..Self::default() }
    }

    fn register(&mut self, offset: u64) -> Option<&mut Register> {
        match offset {
            1 => Some(&mut self.features),
            2 => Some(&mut self.count),
            3..=5 => Some(&mut self.lba[offset as usize - 3]),
            _ => None,
        }
    }

    /// Writes the register at `offset`, 1 to 6, from the first port.
    pub fn write(&mut self, offset: u64, value: u8) {
        match self.register(offset) {
            Some(register) => *register = Register { now: value, previous: register.now },
            None => self.device = value,
        }
    }

    /// Reads the register at `offset`, or what it was before.
    pub fn read(&mut self, offset: u64, previous: bool) -> u8 {
        match (self.register(offset), previous) {
            (Some(register), false) => register.now,
            (Some(register), true) => register.previous,
            (None, _) => self.device,
        }
    }

    /// The sector that the registers name. `None` if that is no sector.
    pub fn address(&self, addressing: Addressing) -> Option<u64> {
        let [low, mid, high] = self.lba;
        let top = self.device & 0x0F;
        match addressing {
            Addressing::Lba28 => Some(u32::from_le_bytes([low.now, mid.now, high.now, top]).into()),
            Addressing::Lba48 => Some(u64::from_le_bytes([
                low.now,
                mid.now,
                high.now,
                low.previous,
                mid.previous,
                high.previous,
                0,
                0,
            ])),
            Addressing::Chs(Geometry { cylinders, heads, track }) => {
                let cylinder = u16::from_le_bytes([mid.now, high.now]);
                let (head, sector) = (top, low.now);
                let valid = cylinder < cylinders && head < heads && (1..=track).contains(&sector);
                let tracks = u64::from(cylinder) * u64::from(heads) + u64::from(head);
                valid.then(|| tracks * u64::from(track) + u64::from(sector) - 1)
            }
        }
    }

    /// Has the registers name sector `lba`: this is how a guest learns where an error was.
    pub fn set_address(&mut self, addressing: Addressing, lba: u64) {
        let [b0, b1, b2, b3, b4, b5, ..] = lba.to_le_bytes();
        let (bytes, top) = match addressing {
            Addressing::Lba28 => ([b0, b1, b2], Some(b3)),
            Addressing::Lba48 => {
                for (register, previous) in self.lba.iter_mut().zip([b3, b4, b5]) {
                    register.previous = previous;
                }
                ([b0, b1, b2], None)
            }
            Addressing::Chs(Geometry { heads, track, .. }) => {
                let (tracks, sector) = (lba / u64::from(track), lba % u64::from(track) + 1);
                let (cylinder, head) = (tracks / u64::from(heads), tracks % u64::from(heads));
                let [low, high, ..] = cylinder.to_le_bytes();
                ([sector as u8, low, high], Some(head as u8))
            }
        };
        for (register, now) in self.lba.iter_mut().zip(bytes) {
            register.now = now;
        }
        if let Some(top) = top {
            self.device = self.device & 0xF0 | top & 0x0F;
        }
    }

    /// How many sectors the registers ask for: 0 stands for one more than fits.
    pub fn sectors(&self, addressing: Addressing) -> u64 {
        let Register { now, previous } = self.count;
        match (addressing, u16::from_le_bytes([now, previous])) {
            (Addressing::Lba48, 0) => 1 << 16,
            (Addressing::Lba48, count) => count.into(),
            _ if now == 0 => 1 << 8,
            _ => now.into(),
        }
    }
}
