//! One sandbox: the pure machine of its life and the actor that does what the machine says.

pub mod machine;
