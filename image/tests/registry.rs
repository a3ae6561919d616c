//! Pulling from a real registry (Debian's docker-registry), through a proxy that refuses, cuts and corrupts; skopeo pushes and compares.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use msb_image::registry::{
    Credential, CredentialStore, Explicit, PullEvent, PullOptions, PulledImage, RetryPolicy, Source, Trust,
};
use msb_image::{Digest, ImageError, ImageReference, SaveFormat, Store};
use serde_json::json;
use support::archive::{self, Files, Layer};
use support::registry::{Faults, Kind, Proxy, Registry};
use support::tools::{have, run};
use support::{assert_empty, assert_sound, home};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// How a layer is packed.
type Packing = fn(&[u8]) -> Vec<u8>;

/// Whether everything these tests talk to is here.
fn ready() -> bool {
    let _ = rustls::crypto::ring::default_provider().install_default();
    ["docker-registry", "skopeo", "htpasswd", "openssl"].iter().all(|tool| have(tool))
}

/// Bytes that no compression makes small, the same for the same seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn layer(seed: u64, length: usize) -> Vec<u8> {
    Layer::new().directory("etc/").file(&format!("etc/noise-{seed}"), &noise(seed, length)).finish()
}

/// Writes an OCI layout as a directory.
fn layout(directory: &Path, files: &Files) -> PathBuf {
    for (name, data) in files {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, data).unwrap();
    }
    directory.to_owned()
}

fn options(origin: &str) -> PullOptions {
    let source = Source { origin: origin.into(), trust: Trust::default(), credential: None };
    let retry = RetryPolicy { first: Duration::from_millis(10), ..RetryPolicy::default() };
    PullOptions { retry, ..PullOptions::new(vec![source]) }
}

fn pull(store: &Store, reference: &str, options: &PullOptions) -> Result<(PulledImage, Vec<PullEvent>), ImageError> {
    let runtime = Runtime::new().unwrap();
    let reference: ImageReference = reference.parse().unwrap();
    let mut events = Vec::new();
    let handle = runtime.handle().clone();
    let pulled = store.pull(&reference, options, handle, &CancellationToken::new(), &mut |event| events.push(event))?;
    Ok((pulled, events))
}

fn partials(home: &support::Home) -> Vec<PathBuf> {
    support::files_below(&home.directory.path().join("images/partial"))
}

#[test]
fn a_pulled_image_is_the_pushed_one_and_is_saved_byte_for_byte() {
    if !ready() {
        return;
    }
    let registry = Registry::start(Kind::default());
    let scratch = tempfile::tempdir().unwrap();
    let layers = [layer(1, 900_000), layer(2, 10), layer(3, 300_000)];
    let packings: [(&str, Packing); 3] = [("gzip", archive::gzip), ("zstd", archive::zstd), ("plain", <[u8]>::to_vec)];
    for (name, compress) in packings {
        let files = archive::oci("x", &layers, compress);
        registry.push(&layout(&scratch.path().join(name), &files), &format!("team/app:{name}"));
    }
    let home = home();
    for name in ["gzip", "zstd", "plain"] {
        let reference = format!("{}/team/app:{name}", registry.host);
        let (pulled, events) = pull(&home.store, &reference, &options(&registry.host)).unwrap();
        let raw = run(Command::new("skopeo")
            .args(["inspect", "--raw", "--tls-verify=false"])
            .arg(format!("docker://{reference}")));
        assert_eq!(pulled.digest, Digest::of(raw.as_bytes()), "{name}: the manifest is the registry's own");
        assert!(matches!(&events[0], PullEvent::Resolved { layers, .. } if layers.len() == 3), "{events:?}");
        let details = home.store.get(&reference).unwrap();
        assert_eq!(details.summary.references, std::slice::from_ref(&reference));
        assert_eq!(details.config.labels["team"], "ml");
        // The digests survive a save and skopeo's reading of it.
        let saved = scratch.path().join(format!("{name}.tar"));
        let mut out = std::fs::File::create(&saved).unwrap();
        home.store.save(std::slice::from_ref(&reference), SaveFormat::Oci, &mut out).unwrap();
        let copied =
            run(Command::new("skopeo").args(["inspect", "--raw"]).arg(format!("oci-archive:{}", saved.display())));
        assert_eq!(copied, raw, "{name}");
    }
    // The same layers under three packings are three blobs and one layer each.
    assert_eq!(home.store.usage(&Default::default()).unwrap().layers.count, 3);
    let again = format!("{}/team/app:gzip", registry.host);
    let (pulled, events) = pull(&home.store, &again, &options(&registry.host)).unwrap();
    let known = events.iter().filter(|event| matches!(event, PullEvent::LayerDone { known: true, .. })).count();
    assert!(pulled.was_present && known == 3, "{events:?}");
    assert!(partials(&home).is_empty());
    assert_sound(&home.store);
}

#[test]
fn of_an_index_the_platform_is_chosen_and_the_indexes_digest_finds_it_again() {
    if !ready() {
        return;
    }
    let registry = Registry::start(Kind::default());
    let mut files = Files::new();
    let ours = [layer(1, 1000)];
    let mut manifests = Vec::new();
    for (architecture, layers) in [("arm64", [layer(2, 1000)]), ("amd64", ours)] {
        let mut config = archive::config(&layers);
        config["architecture"] = json!(architecture);
        let mut descriptor = archive::add_image(&mut files, &config, &layers, archive::gzip);
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        manifests.push(descriptor);
    }
    let index = json!({"schemaVersion": 2, "mediaType": archive::INDEX, "manifests": manifests});
    let index = archive::add_blob(&mut files, archive::INDEX, serde_json::to_vec(&index).unwrap());
    let digest = index["digest"].as_str().unwrap().to_owned();
    archive::add_index(&mut files, vec![archive::named(index, "x")]);
    let scratch = tempfile::tempdir().unwrap();
    registry.push(&layout(scratch.path(), &files), "many:1");
    let home = home();
    let pinned = format!("{}/many@{digest}", registry.host);
    let mut wanted = options(&registry.host);
    wanted.platform = Some("linux/amd64".parse().unwrap());
    pull(&home.store, &pinned, &wanted).unwrap();
    assert!(home.store.contains(&pinned).unwrap(), "the digest of the index means the image");
    assert_eq!(home.store.get(&pinned).unwrap().summary.platform, "linux/amd64");
    wanted.platform = Some("linux/arm64".parse().unwrap());
    pull(&home.store, &format!("{}/many:1", registry.host), &wanted).unwrap();
    assert_eq!(home.store.list().unwrap().len(), 2);
    wanted.platform = Some("linux/s390x".parse().unwrap());
    let error = pull(&home.store, &pinned, &wanted).unwrap_err().to_string();
    assert!(error.contains("linux/amd64, linux/arm64"), "{error}");
    assert_sound(&home.store);
}

#[test]
fn a_transfer_that_is_refused_cut_and_corrupted_comes_through() {
    if !ready() {
        return;
    }
    let registry = Registry::start(Kind::default());
    let scratch = tempfile::tempdir().unwrap();
    let big = layer(1, 3_000_000);
    let files = archive::oci("x", std::slice::from_ref(&big), archive::gzip);
    registry.push(&layout(scratch.path(), &files), "app:1");
    let blob = archive::gzip(&big).len();
    let quick = |proxy: &Proxy| PullOptions { parallel: 1, ..options(&proxy.origin()) };

    // Cut three times: each request goes on where the last one ended. The first blob is the configuration's.
    let proxy =
        Proxy::start(&registry.host, Faults { cut: vec![usize::MAX, 900_000, 300_000, 700_000], ..Faults::default() });
    let home = home();
    let reference = format!("{}/app:1", proxy.host);
    let (_, events) = pull(&home.store, &reference, &quick(&proxy)).unwrap();
    assert_eq!(events.iter().filter(|event| matches!(event, PullEvent::Retry { .. })).count(), 3, "{events:?}");
    let seen = proxy.seen();
    let ranges: Vec<_> = seen.requests.iter().filter_map(|(_, range)| range.clone()).collect();
    assert_eq!(ranges, ["bytes=900000-", "bytes=1200000-", "bytes=1900000-"]);
    assert!(seen.body_bytes < blob + 10_000, "nothing came twice: {} of {blob}", seen.body_bytes);
    assert_sound(&home.store);

    // Refused with a time to wait, then served by a registry that knows no ranges and cuts all the same.
    let home = support::home();
    proxy.set(Faults {
        refuse: vec![(429, "1"), (503, "0")],
        cut: vec![usize::MAX, 1_000_000],
        no_ranges: true,
        ..Faults::default()
    });
    let (_, events) = pull(&home.store, &reference, &quick(&proxy)).unwrap();
    let waits: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            PullEvent::Retry { wait, .. } => Some(*wait),
            _ => None,
        })
        .collect();
    assert!(waits[0] >= Duration::from_secs(1) && waits.len() == 3, "{waits:?}");
    assert_sound(&home.store);

    // Corrupted once: thrown away and fetched again. Corrupted for ever: an error that names the digest, and nothing is left.
    let home = support::home();
    proxy.set(Faults { corrupt: vec![usize::MAX, 5_000], ..Faults::default() });
    pull(&home.store, &reference, &quick(&proxy)).unwrap();
    assert_sound(&home.store);
    let home = support::home();
    proxy.set(Faults { corrupt: vec![usize::MAX, 5_000, 6_000, 2_000_000], ..Faults::default() });
    let error = pull(&home.store, &reference, &quick(&proxy)).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
    assert!(partials(&home).is_empty());
    assert_empty(&home);

    // A registry that asks for an hour is not waited for.
    proxy.set(Faults { refuse: vec![(429, "3600")], ..Faults::default() });
    let error = pull(&home.store, &reference, &quick(&proxy)).unwrap_err();
    assert!(matches!(error, ImageError::Registry { .. }), "{error}");
}

#[test]
fn a_pull_goes_on_where_a_failed_or_killed_one_ended() {
    if !ready() {
        return;
    }
    let registry = Registry::start(Kind::default());
    let scratch = tempfile::tempdir().unwrap();
    let layers = [layer(1, 2_000_000), layer(2, 500_000)];
    registry.push(&layout(scratch.path(), &archive::oci("x", &layers, archive::gzip)), "app:1");
    let total: usize = layers.iter().map(|layer| archive::gzip(layer).len()).sum();
    let home = home();
    // The larger layer is cut for good; patience ends after two tries.
    let proxy = Proxy::start(&registry.host, Faults { cut: vec![usize::MAX, 1_200_000, 0, 0, 0], ..Faults::default() });
    let reference = format!("{}/app:1", proxy.host);
    let mut impatient = options(&proxy.origin());
    impatient.retry.tries = 2;
    impatient.parallel = 1;
    let error = pull(&home.store, &reference, &impatient).unwrap_err();
    assert!(matches!(error, ImageError::Registry { .. }), "{error}");
    assert_eq!(partials(&home).len(), 1, "what came is kept");
    assert!(!home.store.contains(&reference).unwrap());
    // Killed at this point: whoever opens the store next finds it.
    let support::Home { directory, store } = home;
    drop(store);
    let home = support::Home { store: Store::open(directory.path()).unwrap(), directory };
    proxy.set(Faults::default());
    let before = proxy.seen().body_bytes;
    pull(&home.store, &reference, &options(&proxy.origin())).unwrap();
    let fetched = proxy.seen().body_bytes - before;
    assert!(fetched < total - 1_100_000, "{fetched} of {total}");
    assert!(partials(&home).is_empty());
    assert_sound(&home.store);
    // An unfinished download that nobody comes back for goes in a prune.
    std::fs::write(home.directory.path().join("images/partial").join(Digest::of(b"x").hex()), "half").unwrap();
    let report = home.store.prune(&Default::default(), &[home.store.list().unwrap()[0].digest].into()).unwrap();
    assert_eq!((report.partials_removed, report.manifests_removed), (1, 0));
}

#[test]
fn pulls_that_share_layers_fetch_them_once_and_a_prune_takes_nothing_from_them() {
    if !ready() {
        return;
    }
    let registry = Registry::start(Kind::default());
    let scratch = tempfile::tempdir().unwrap();
    let shared = layer(1, 1_500_000);
    for name in ["a", "b"] {
        let own = Layer::new().file(name, b"own").finish();
        let files = archive::oci("x", &[shared.clone(), own], archive::gzip);
        registry.push(&layout(&scratch.path().join(name), &files), &format!("{name}:1"));
    }
    let proxy = Proxy::start(&registry.host, Faults { delay: Duration::from_millis(100), ..Faults::default() });
    let home = home();
    let shared_digest = Digest::of(&archive::gzip(&shared)).to_string();
    std::thread::scope(|scope| {
        let pulls: Vec<_> = ["a", "b", "a", "b"]
            .map(|name| {
                let (home, proxy) = (&home, &proxy);
                scope.spawn(move || pull(&home.store, &format!("{}/{name}:1", proxy.host), &options(&proxy.origin())))
            })
            .into_iter()
            .collect();
        while !pulls.iter().all(|pull| pull.is_finished()) {
            home.store
                .prune(
                    &msb_image::PruneOptions { labels: vec![("none".into(), None)], ..Default::default() },
                    &Default::default(),
                )
                .unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        for pulled in pulls {
            pulled.join().unwrap().unwrap();
        }
    });
    let fetches = proxy.seen().requests.iter().filter(|(path, _)| path.ends_with(&shared_digest)).count();
    assert_eq!(fetches, 1, "{:?}", proxy.seen().requests);
    assert_eq!(home.store.list().unwrap().len(), 2);
    assert_sound(&home.store);
}

#[test]
fn credentials_certificates_and_mirrors() {
    if !ready() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let files = archive::oci("x", &[layer(1, 1000)], archive::gzip);
    let layout = layout(&scratch.path().join("layout"), &files);
    let locked = Registry::start(Kind { password: true, tls: true });
    locked.push(&layout, "app:1");
    let reference = format!("{}/app:1", locked.host);
    let password = |password: &str| Some(Credential::Password { username: "me".into(), password: password.into() });
    let trusted = Trust { insecure: false, ca_certs: Some(std::fs::read_to_string(locked.at("ca.pem")).unwrap()) };
    let with = |trust: &Trust, credential: Option<Credential>| {
        let source = Source { origin: locked.host.clone(), trust: trust.clone(), credential };
        PullOptions { sources: vec![source], ..options("") }
    };
    let home = home();
    let error = pull(&home.store, &reference, &with(&trusted, None)).unwrap_err();
    assert!(matches!(error, ImageError::RegistryDenied { .. }) && error.to_string().contains("nobody"), "{error}");
    let error = pull(&home.store, &reference, &with(&trusted, password("wrong"))).unwrap_err();
    assert!(matches!(error, ImageError::RegistryDenied { .. }) && !error.to_string().contains("wrong"), "{error}");
    // A loopback registry may be plain, but a certificate that is there and bad is not passed over.
    let error = pull(&home.store, &reference, &with(&Trust::default(), password("secret"))).unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    pull(&home.store, &reference, &with(&Trust { insecure: true, ca_certs: None }, password("secret"))).unwrap();
    let (pulled, _) = pull(&home.store, &reference, &with(&trusted, password("secret"))).unwrap();
    assert!(pulled.was_present);

    // Plain and locked: the refusal is told, not that it does not speak TLS.
    let plain = Registry::start(Kind { password: true, tls: false });
    let error = pull(&home.store, &format!("{}/app:1", plain.host), &options(&plain.host)).unwrap_err();
    assert!(matches!(error, ImageError::RegistryDenied { .. }), "{error}");

    // A login is checked before it is kept; then the sources have it.
    let runtime = Runtime::new().unwrap();
    let explicit =
        |word: &str| Explicit { credential: password(word), ca_certs: trusted.ca_certs.clone(), ..Explicit::default() };
    let table = Default::default();
    let check =
        |word: &str| msb_image::registry::check_login(&locked.host, &table, &explicit(word), runtime.handle().clone());
    assert!(matches!(check("wrong"), Err(ImageError::RegistryDenied { .. })));
    check("secret").unwrap();
    let credentials = CredentialStore::new(home.directory.path(), |_| None);
    credentials.login(&locked.host, "me", "secret").unwrap();
    let found = msb_image::registry::sources(&reference.parse().unwrap(), &table, &Explicit::default(), &credentials);
    assert_eq!(found.unwrap()[0].credential, password("secret"));

    // Mirrors are asked first; one that is dead or does not have the image is passed over with a warning.
    let mirror = Registry::start(Kind::default());
    let name = "registry.invalid/app:1";
    let settings = msb_protocol::images::RegistrySettings {
        mirrors: vec!["127.0.0.1:1".into(), mirror.host.clone()],
        ..Default::default()
    };
    let table = [("registry.invalid".to_owned(), settings)].into();
    let sources =
        msb_image::registry::sources(&name.parse().unwrap(), &table, &Explicit::default(), &credentials).unwrap();
    mirror.push(&layout, "app:1");
    let (_, events) = pull(&home.store, name, &PullOptions { sources, ..options("") }).unwrap();
    assert!(
        events.iter().any(|event| matches!(event, PullEvent::Warning(text) if text.contains("127.0.0.1:1"))),
        "{events:?}"
    );
    assert!(home.store.contains(name).unwrap(), "it is called what was asked for");
    let error = pull(&home.store, &format!("{}/none:1", mirror.host), &options(&mirror.host)).unwrap_err();
    assert!(matches!(error, ImageError::RegistryNotFound { .. }), "{error}");
    assert_sound(&home.store);
}

#[test]
fn a_cancelled_pull_ends_at_once_and_a_registry_that_lies_gets_nothing_in() {
    if !ready() {
        return;
    }
    let registry = Registry::start(Kind::default());
    let scratch = tempfile::tempdir().unwrap();
    let good = layer(1, 400_000);
    registry.push(
        &layout(&scratch.path().join("good"), &archive::oci("x", std::slice::from_ref(&good), archive::gzip)),
        "app:1",
    );
    // A configuration that lists another layer than the manifest brings.
    let mut lying = Files::new();
    let config = archive::config(&[layer(9, 10)]);
    let manifest = archive::add_image(&mut lying, &config, &[good], archive::gzip);
    archive::add_index(&mut lying, vec![archive::named(manifest, "x")]);
    registry.push(&layout(&scratch.path().join("lying"), &lying), "lying:1");
    let home = home();
    let error = pull(&home.store, &format!("{}/lying:1", registry.host), &options(&registry.host)).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");

    // No pull waits for a registry that is silent once nobody wants it any more.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let origin = silent.local_addr().unwrap().to_string();
    let runtime = Runtime::new().unwrap();
    let cancelled = CancellationToken::new();
    let later = cancelled.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        later.cancel();
    });
    let reference = format!("{origin}/app:1").parse().unwrap();
    let mut patient = options(&origin);
    patient.retry.silence = Duration::from_secs(3_600);
    let error = home.store.pull(&reference, &patient, runtime.handle().clone(), &cancelled, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ImageError::Cancelled), "{error}");
    assert_eq!(error.code(), msb_protocol::error::ErrorCode::Cancelled);
    drop(silent);
    assert!(home.store.list().unwrap().is_empty());
}
