//! Any bytes as each kind of answer that a registry gives: manifest, index, configuration, token, challenge, time to wait. They are read
//! or refused with a typed error, and what was read stays within the limits.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| msb_image::registry::read_as_answers(data));
