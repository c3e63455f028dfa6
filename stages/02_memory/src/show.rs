//! How what was found is shown: the picture of a guest's memory, and single results.

use anstyle::Style;
use cli::println;
use common::layout::mmio_hole;
use common::memory::{Error, SlotInfo};
use common::touch::Met;

const BOLD: Style = Style::new().bold();

/// An address as the layout writes it: the part above 4 GiB apart from the rest.
pub fn address(addr: u64) -> String {
    format!("{:#x}_{:04X}_{:04X}", addr >> 32, addr >> 16 & 0xFFFF, addr & 0xFFFF)
}

/// A size in the largest unit of which there is at least one.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let (shift, unit) = units.into_iter().find(|(shift, _)| bytes >> shift > 0).unwrap_or((0, "B"));
    let digits = if bytes.trailing_zeros() >= shift { 0 } else { 1 };
    format!("{:.digits$} {unit}", bytes as f64 / (1u64 << shift) as f64)
}

/// Draws the slots in the order of their addresses, with what is between them. `name` names a slot.
pub fn draw(mut slots: Vec<SlotInfo>, name: impl Fn(u32) -> &'static str) {
    slots.sort_by_key(|slot| slot.start);
    let edge = |addr| println!("  {:14} +----------------------+", address(addr));
    println!("{BOLD}  guest-physical{:25}slot       size  host pointer{BOLD:#}", "");
    let mut end = None;
    for slot in slots {
        let start = slot.start.0;
        if let Some(end) = end.filter(|&end| end < start) {
            edge(end);
            let what = if mmio_hole().contains(&end) { "MMIO hole" } else { "nothing" };
            println!("  {:16} {what:26} {:>10}", "", size(start - end));
        }
        edge(start);
        let (number, name, size) = (slot.slot, name(slot.slot), size(slot.size));
        println!("  {:14} | {name:20} | {number:>4} {size:>10}  {:#x}", "", slot.host);
        end = Some(start + slot.size);
    }
    end.into_iter().for_each(edge);
}

/// What the guest met, in eight columns or less.
pub fn met(met: Met) -> String {
    match met {
        Met::Memory(value) => format!("{value:08X}"),
        Met::Exit => "an exit".into(),
    }
}

/// One line on what KVM said to a slot that cannot be, and why it cannot.
pub fn told(what: &str, why: &str, said: Result<(), Error>) {
    let said = match said {
        Ok(()) => "taken".into(),
        Err(Error::Slot { source, .. }) => match source.errno() {
            libc::EEXIST => format!("EEXIST: {why}"),
            libc::EINVAL => format!("EINVAL: {why}"),
            _ => source.to_string(),
        },
        Err(error) => error.to_string(),
    };
    println!("  {what:24}{said}");
}
