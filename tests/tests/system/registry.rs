//! A registry, from login to a running sandbox and back to an archive. The registry is Debian's, with a password, on loopback.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use msb_tests::{Home, image};

/// A registry that ends with its test.
struct Registry {
    host: String,
    child: Child,
}

impl Registry {
    /// `None` where its programs are missing, which is said.
    fn start(home: &Home) -> Option<Self> {
        for tool in ["docker-registry", "htpasswd", "skopeo"] {
            let found = std::env::var_os("PATH")
                .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()));
            if !found {
                println!("skipped: {tool} is not installed");
                return None;
            }
        }
        let folder = home.scratch();
        let port = TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
        let host = format!("127.0.0.1:{port}");
        let line = Command::new("htpasswd").args(["-Bbn", "me", "secret"]).output().expect("htpasswd").stdout;
        std::fs::write(folder.join("htpasswd"), line.trim_ascii_end()).expect("the password file");
        let settings = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {0}/registry\nhttp:\n  addr: {host}\n\
             auth:\n  htpasswd:\n    realm: test\n    path: {0}/htpasswd\n",
            folder.display()
        );
        std::fs::write(folder.join("registry.yml"), settings).expect("the registry's settings");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(folder.join("registry.yml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the registry starts");
        let registry = Self { host, child };
        let begun = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the registry does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_is_pulled_run_saved_and_pruned() {
    let home = Home::new("registry");
    let Some(registry) = Registry::start(&home) else { return };
    let name = format!("{}/team/busybox:1", registry.host);
    let skopeo = "skopeo --insecure-policy";
    home.shell(&format!(
        "{skopeo} copy -q --dest-tls-verify=false --dest-creds me:secret oci-archive:{} docker://{name}",
        image("busybox-oci.tar").display()
    ))
    .run()
    .succeeds()
    .is_quiet();

    // Nobody is logged in: the registry refuses, and `run` says so, and what there is and what else could be done.
    let refused = home.fails(&["run", &name, "true"], 125, "registry_denied");
    assert!(refused.contains("it holds none yet") && refused.contains("image load"), "{refused}");
    let login = ["registry", "login", "-u", "me", "--password-stdin", &registry.host];
    home.msb(login).input("wrong\n").run().exits(1).complains("refuses the name or the password");
    home.msb(login).input("secret\n").run().succeeds().complains("not encrypted");
    let listed = home.json(&["registry", "list"]);
    assert_eq!((listed[0]["username"].as_str(), listed[0]["source"].as_str()), (Some("me"), Some("file")), "{listed}");
    assert!(!listed.to_string().contains("secret"), "{listed}");

    // `run` fetches what is missing; `--pull never` would not have.
    home.fails(&["run", "--pull", "never", &name, "true"], 125, "image_not_found");
    home.msb(["run", &name, "echo", "pulled"]).run().succeeds().prints("pulled\n");
    home.msb(["pull", &name]).run().succeeds().prints(&format!("{name}\n"));
    let detail = home.json(&["image", "inspect", &name]);
    let digest = detail["digest"].as_str().expect("a digest");
    let raw = home
        .shell(&format!("{skopeo} inspect --raw --tls-verify=false --creds me:secret docker://{name} | sha256sum"))
        .run()
        .succeeds()
        .text();
    assert_eq!(digest, format!("sha256:{}", raw.split(' ').next().unwrap_or_default()), "the registry's own manifest");

    // Saved through a pipe it is the same image to skopeo, and to a second store under another name.
    let saved = home.shell(&format!(
        "msb save --format oci {name} > saved.tar && {skopeo} inspect --raw oci-archive:saved.tar | sha256sum"
    ));
    assert_eq!(saved.run().succeeds().text(), raw);
    home.shell(&format!("msb image save {name} | gzip | msb image load --tag {name}=mine:2"))
        .run()
        .succeeds()
        // One record a digest: it is shown with every name it has now.
        .prints(&format!("{name}\nmine:2\n"));
    assert_eq!(home.json(&["image", "inspect", "mine:2"])["digest"], detail["digest"]);
    home.succeeds(&["image", "tag", "mine:2", "mine:3"]);

    // What is pinned or in use stays; the rest goes, and what it took is measured.
    home.succeeds(&["image", "pin", "mine:2"]);
    let pinned = home.json(&["image", "prune", "--yes"]);
    assert_eq!(pinned["manifests_removed"], 0, "{pinned}");
    home.succeeds(&["image", "unpin", "mine:2"]);
    home.succeeds(&["create", "--name", "box", "mine:2"]);
    let complaint = home.fails(&["image", "rm", digest], 1, "image_in_use");
    assert!(complaint.contains("box"), "{complaint}");
    assert_eq!(home.json(&["image", "prune", "--yes"])["manifests_removed"], 0);
    home.msb(["image", "rm", "--force", digest]).run().succeeds().shows("Untagged: mine:2");
    home.msb(["exec", "box", "--", "echo", "still here"]).run().succeeds().prints("still here\n");
    home.succeeds(&["rm", "--force", "box"]);
    home.msb(["image", "prune"]).run().exits(1).complains("--yes");
    let usage = home.json(&["df"]);
    assert!(usage["rows"][0]["reclaimable_bytes"].as_u64() > Some(0), "{usage}");
    let planned = home.json(&["image", "prune", "--dry-run"]);
    let pruned = home.json(&["image", "prune", "--yes"]);
    assert_eq!((&pruned["manifests_removed"], &pruned["bytes_reclaimed"]), (&1.into(), &planned["bytes_reclaimed"]));
    home.succeeds(&["registry", "logout", &registry.host]);
    home.fails(&["pull", &name], 1, "registry_denied");
    drop(registry);
    home.finish();
}
