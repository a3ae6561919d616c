//! Engine kvm: our own VMM on `/dev/kvm`.

pub mod probe;
