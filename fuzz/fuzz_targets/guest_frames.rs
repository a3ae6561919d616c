//! Bytes on a vsock stream, as the host and as the guest read them: frames, parts, messages. Whatever arrives, nothing panics, and
//! what decodes encodes again to something that decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use msb_protocol::error::ApiError;
use msb_protocol::frame::Decoder;
use msb_protocol::guest::{Assembler, GuestBody, HostBody, encode_guest, encode_host};
use msb_protocol::state::ProcessEnd;

fuzz_target!(|data: &[u8]| {
    let (mut decoder, mut assembler) = (Decoder::new(), Assembler::new());
    decoder.push(data);
    while let Ok(Some(body)) = decoder.next_body() {
        match assembler.host(body) {
            Ok(Some(message)) => same_host(message),
            Ok(None) => {}
            Err(_) => break,
        }
    }
    let (mut decoder, mut assembler) = (Decoder::new(), Assembler::new());
    decoder.push(data);
    while let Ok(Some(body)) = decoder.next_body() {
        match assembler.guest(body) {
            Ok(Some(message)) => same_guest(message),
            Ok(None) => {}
            Err(_) => break,
        }
    }
});

fn same_host(message: HostBody) {
    let mut wire = Vec::new();
    if encode_host(message.clone(), &mut wire).is_ok() {
        let mut decoder = Decoder::new();
        decoder.push(&wire);
        let body = decoder.next_body().expect("own frame").expect("whole");
        let again = Assembler::new().host(body).expect("own message");
        assert!(again.is_none() || format!("{again:?}") == format!("{:?}", Some(message)));
    }
}

fn same_guest(message: GuestBody) {
    match &message {
        GuestBody::Refused(failure) | GuestBody::BootFailed(failure) => {
            assert!(!ApiError::from(failure.clone()).message.contains('\u{1b}'));
        }
        GuestBody::Exited(end) | GuestBody::MainExited(end) => {
            let _ = ProcessEnd::from(*end).exit_status();
        }
        _ => {}
    }
    let mut wire = Vec::new();
    let _ = encode_guest(message, &mut wire);
}
