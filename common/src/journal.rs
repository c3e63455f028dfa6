//! Introduced by stage 03: all that a vCPU has been told by its machine, so that it can be told again.
//!
//! A guest that takes no interrupts is a function of where it starts and of what its devices answer. Who has both can
//! run it again, to the very instruction at which it died, and look closer. Where it starts is known to whoever made
//! the machine; the answers are here. A guest that exits more often than is kept has no journal.

use crate::last_exits::Request;

/// How many exits are kept: as many as a guest makes that dies while it is being started.
pub const EXITS: usize = 1 << 14;

/// How many bytes of answers are kept.
pub const ANSWERS: usize = 1 << 20;

/// The exits of a vCPU from its first instruction on, with their answers.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    /// `KVM_EXIT_*` and what it was for.
    exits: Vec<(u32, Option<Request>)>,
    answers: Vec<u8>,
    /// There were too many.
    overflown: bool,
}

impl Journal {
    /// What the vCPU exited for, the first first; nothing if there were too many to keep.
    pub fn exits(&self) -> Option<impl Iterator<Item = (u32, Option<Request>)>> {
        (!self.overflown).then(|| self.exits.iter().copied())
    }

    /// The answers to all reads, one behind the other.
    pub fn answers(&self) -> &[u8] {
        &self.answers
    }

    /// Takes down an exit.
    pub(crate) fn exit(&mut self, reason: u32, request: Option<Request>) {
        if self.exits.len() == EXITS {
            self.give_up();
        }
        if !self.overflown {
            self.exits.push((reason, request));
        }
    }

    /// Takes down what the last exit was answered with.
    pub(crate) fn answer(&mut self, data: &[u8]) {
        if self.answers.len() + data.len() > ANSWERS {
            self.give_up();
        }
        if !self.overflown {
            self.answers.extend_from_slice(data);
        }
    }

    fn give_up(&mut self) {
        *self = Self { overflown: true, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_kept_until_it_is_too_much_and_then_nothing() {
        let mut journal = Journal::default();
        for _ in 0..EXITS {
            journal.exit(2, None);
            journal.answer(&[7]);
        }
        assert_eq!(journal.exits().unwrap().count(), EXITS);
        assert_eq!(journal.answers(), [7; EXITS]);
        journal.exit(2, None);
        journal.answer(&[7]);
        assert!(journal.exits().is_none() && journal.answers().is_empty());

        let mut journal = Journal::default();
        journal.exit(2, None);
        journal.answer(&[0; ANSWERS]);
        assert_eq!(journal.exits().unwrap().count(), 1);
        journal.answer(&[0]);
        assert!(journal.exits().is_none());
    }
}
