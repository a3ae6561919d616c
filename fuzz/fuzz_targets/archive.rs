//! Any bytes as an image archive: docker, OCI, compressed or not. A load fails with a typed error or succeeds, and the store passes its
//! own check afterwards either way.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use msb_image::{CheckDepth, Limits, LoadOptions, LoadSource, Store};

/// One store for all inputs, in a directory of this process: opening one costs more than a load.
fn store() -> &'static Store {
    static STORE: OnceLock<(tempfile::TempDir, Store)> = OnceLock::new();
    let (_, store) = STORE.get_or_init(|| {
        let home = tempfile::tempdir().expect("home");
        let store = Store::open(home.path()).expect("store");
        (home, store)
    });
    store
}

fuzz_target!(|data: &[u8]| {
    let limits = Limits { layer_bytes: 1 << 20, blob_bytes: 1 << 20, metadata_bytes: 1 << 16, archive_entries: 256, ..Limits::default() };
    let options = LoadOptions { limits, ..LoadOptions::default() };
    if store().load(LoadSource::Stream(Box::new(data)), &options, &mut |_| {}).is_ok() {
        let report = store().check(CheckDepth::Content).expect("a store that can be read");
        assert!(report.problems.is_empty(), "{:?}", report.problems);
    }
});
