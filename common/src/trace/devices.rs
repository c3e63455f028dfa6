//! What a trace calls a machine's devices.

use std::ops::Range;

#[cfg(feature = "stage04")]
use crate::bus::Bus;
use crate::last_exits::{Request, Space};

/// The names of a machine's devices, by their addresses.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    ports: Vec<(Range<u64>, &'static str)>,
    memory: Vec<(Range<u64>, &'static str)>,
}

impl Devices {
    /// Those on a bus of ports and on one of memory addresses.
    #[cfg(feature = "stage04")]
    pub fn of(ports: &Bus, memory: &Bus) -> Self {
        Self { ports: ports.places().collect(), memory: memory.places().collect() }
    }

    /// Each name once, ports first, in the order of their addresses.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for (_, name) in self.ports.iter().chain(&self.memory) {
            if !names.contains(name) {
                names.push(*name);
            }
        }
        names
    }

    /// Whose request it is: the device's that has all of it, as on the bus.
    pub fn find(&self, request: &Request) -> Option<&'static str> {
        let places = match request.space {
            Space::Port => &self.ports,
            Space::Memory => &self.memory,
        };
        let end = request.addr.checked_add(request.size.into())?;
        let holds = |range: &Range<u64>| range.start <= request.addr && end <= range.end;
        places.iter().find(|(range, _)| holds(range)).map(|(_, name)| *name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_its_devices_if_that_has_all_of_it() {
        let devices = Devices {
            ports: vec![(0x60..0x61, "keys"), (0x64..0x66, "keys"), (0x70..0x72, "clock")],
            memory: vec![(0x60..0x70, "screen"), (u64::MAX - 8..u64::MAX, "keys")],
        };
        assert_eq!(devices.names(), ["keys", "clock", "screen"]);
        let find = |space, addr, size| {
            devices.find(&Request { space, addr, size, write: true, len: size.into() })
        };
        assert_eq!(find(Space::Port, 0x64, 2), Some("keys"));
        assert_eq!(find(Space::Port, 0x65, 2), None);
        assert_eq!(find(Space::Port, 0x61, 1), None);
        assert_eq!(find(Space::Memory, 0x64, 8), Some("screen"));
        assert_eq!(find(Space::Memory, u64::MAX, 8), None);
    }
}
