//! The queue between the serial port's interrupt and the program that reads.

/// Ctrl-C.
pub const INTERRUPT: u8 = 0x03;

const SIZE: usize = 1024;

/// Typed bytes that nobody has read yet: a ring.
pub struct Queue {
    bytes: [u8; SIZE],
    start: usize,
    length: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Self::new()
    }
}

impl Queue {
    /// An empty queue.
    pub const fn new() -> Self {
        Self { bytes: [0; SIZE], start: 0, length: 0 }
    }

    /// Whether another byte must wait where it is.
    pub fn is_full(&self) -> bool {
        self.length == SIZE
    }

    /// Adds a byte; a full queue drops it, so ask first.
    pub fn push(&mut self, byte: u8) {
        if !self.is_full() {
            self.bytes[(self.start + self.length) % SIZE] = byte;
            self.length += 1;
        }
    }

    /// The oldest byte.
    pub fn pop(&mut self) -> Option<u8> {
        let byte = (self.length > 0).then_some(self.bytes[self.start])?;
        self.drop_first(1);
        Some(byte)
    }

    /// If Ctrl-C was typed, forgets it and what was typed before it, as a terminal does. What was
    /// typed after it stays, a second Ctrl-C included: a script that stops two programs works.
    pub fn take_interrupt(&mut self) -> bool {
        let found = (0..self.length).find(|i| self.bytes[(self.start + i) % SIZE] == INTERRUPT);
        found.inspect(|index| self.drop_first(index + 1)).is_some()
    }

    fn drop_first(&mut self, count: usize) {
        self.start = (self.start + count) % SIZE;
        self.length -= count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(text: &[u8]) -> Queue {
        let mut queue = Queue::new();
        text.iter().for_each(|&byte| queue.push(byte));
        queue
    }

    fn rest(queue: &mut Queue) -> Vec<u8> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn bytes_come_out_in_order_around_the_end() {
        let mut queue = queue(&[b'x'; SIZE - 2]);
        assert_eq!(rest(&mut queue).len(), SIZE - 2);
        b"hello".iter().for_each(|&byte| queue.push(byte));
        assert_eq!(rest(&mut queue), b"hello");
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn a_full_queue_keeps_what_it_has() {
        let mut queue = queue(&[b'x'; SIZE]);
        assert!(queue.is_full());
        queue.push(b'y');
        assert_eq!(rest(&mut queue), [b'x'; SIZE]);
    }

    #[test]
    fn ctrl_c_takes_what_was_typed_before_it() {
        let mut queue = queue(b"ab\x03cd\x03ef");
        assert!(queue.take_interrupt());
        assert_eq!(queue.pop(), Some(b'c'));
        assert!(queue.take_interrupt());
        assert!(!queue.take_interrupt());
        assert_eq!(rest(&mut queue), b"ef");
    }
}
