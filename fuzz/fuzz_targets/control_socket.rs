//! What a daemon, or whoever got hold of its socket, sends to `msb-vmm` and what comes back, and what users write:
//! frames, names, references, settings, quantities.
#![no_main]

use libfuzzer_sys::fuzz_target;
use msb_protocol::config::Config;
use msb_protocol::control::{ClientMessage, CreateRequest};
use msb_protocol::frame::{Decoder, decode_json};
use msb_protocol::id::SandboxName;
use msb_protocol::quantity;
use msb_protocol::vmm::{Message, RequestFrame, SampleDecoder};

fuzz_target!(|data: &[u8]| {
    let (mut decoder, mut samples) = (Decoder::new(), SampleDecoder::default());
    decoder.push(data);
    while let Ok(Some(body)) = decoder.next_body() {
        let _ = decode_json::<RequestFrame>(body);
        let _ = decode_json::<Message>(body);
        let _ = samples.decode(body);
    }
    let _ = decode_json::<RequestFrame>(data);
    let _ = decode_json::<ClientMessage>(data);
    if let Ok(request) = decode_json::<CreateRequest>(data) {
        let _ = request.spec.check();
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Config::merge(&[("f", text)], |_| None);
        let _ = quantity::parse_bytes(text);
        let _ = quantity::parse_duration_ms(text);
        if let Ok(name) = SandboxName::parse(text) {
            assert!(!name.as_str().contains('/') && !name.as_str().starts_with('.'));
        }
    }
});
