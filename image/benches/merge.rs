//! How long the merged metadata of an image takes whose layers are in the store: `merge ARCHIVE ROUNDS`. Run by `cargo xtask bench`.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a measurement prints, and stops at the first surprise")]

use std::time::{Duration, Instant};

use msb_image::{LoadOptions, LoadSource, Store};

fn main() {
    // cargo puts `--bench` behind.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [archive, rounds] = words.as_slice() else {
        println!("merge ARCHIVE ROUNDS");
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    let source = LoadSource::File(std::fs::File::open(archive).unwrap());
    let image = store.load(source, &LoadOptions::default(), &mut |_| {}).unwrap().remove(0);
    store.flush();
    let whole = store.root_image(image.digest).unwrap();
    let mut times: Vec<Duration> = (0..rounds.parse().unwrap())
        .map(|_| {
            std::fs::remove_file(&whole.metadata).unwrap();
            let began = Instant::now();
            assert_eq!(store.root_image(image.digest).unwrap(), whole);
            began.elapsed()
        })
        .collect();
    times.sort();
    println!("merged in microseconds: {}", times[times.len() / 2].as_micros());
}
