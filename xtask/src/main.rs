//! What a maintainer of mini-kvm types.

fn main() {}
