//! The lab: a `/dev/kvm` for machines that have none.
