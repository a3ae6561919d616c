//! Debian's docker-registry on loopback, with htpasswd and with TLS, and a proxy before it that does what networks do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::tools::{run, shell};

/// A registry that ends with its test.
pub struct Registry {
    pub directory: tempfile::TempDir,
    pub host: String,
    child: Child,
}

/// What a registry is like beside plain.
#[derive(Clone, Copy, Default)]
pub struct Kind {
    /// User `me` with password `secret` alone may enter.
    pub password: bool,
    /// HTTPS with a certificate that only `ca.pem` in its directory vouches for.
    pub tls: bool,
}

impl Registry {
    pub fn start(kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let mut settings = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n",
            at("data").display()
        );
        if kind.tls {
            make_certificate(directory.path());
            settings.push_str(&format!(
                "  tls:\n    certificate: {}\n    key: {}\n",
                at("server.pem").display(),
                at("server.key").display()
            ));
        }
        if kind.password {
            let line = run(Command::new("htpasswd").args(["-Bbn", "me", "secret"]));
            std::fs::write(at("htpasswd"), line.trim()).unwrap();
            settings
                .push_str(&format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", at("htpasswd").display()));
        }
        std::fs::write(at("config.yml"), settings).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(at("config.yml"))
            .env_remove("REGISTRY_HTTP_ADDR")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(at("log")).unwrap())
            .spawn()
            .unwrap();
        let registry = Self { directory, host, child };
        let begun = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "the registry does not come up: {}",
                std::fs::read_to_string(registry.at("log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Pushes an OCI layout as `name`, with everything in it.
    pub fn push(&self, layout: &Path, name: &str) {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--quiet", "--all", "--dest-tls-verify=false"]);
        if self.at("htpasswd").exists() {
            command.args(["--dest-creds", "me:secret"]);
        }
        run(command.arg(format!("oci:{}", layout.display())).arg(format!("docker://{}/{name}", self.host)));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn make_certificate(directory: &Path) {
    shell(
        r#"cd "$1"
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=msb-test-ca -keyout ca.key -out ca.pem \
  -addext basicConstraints=critical,CA:TRUE 2>openssl.log
openssl req -newkey rsa:2048 -nodes -subj /CN=registry -keyout server.key -out server.csr 2>>openssl.log
printf 'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n' > ext
openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.pem 2>>openssl.log"#,
        &[directory],
    );
}

/// What a proxy does to requests of blobs, each as often as it says.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Answers with this status and `Retry-After`.
    pub refuse: Vec<(u16, &'static str)>,
    /// Ends the connection after so many bytes of the body.
    pub cut: Vec<usize>,
    /// Changes the byte at this place of the body.
    pub corrupt: Vec<usize>,
    /// Takes the `Range` out of every request, as a registry that knows none.
    pub no_ranges: bool,
    /// Waits before every answer.
    pub delay: Duration,
}

/// What a proxy saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Paths with the range that was asked for.
    pub requests: Vec<(String, Option<String>)>,
    /// Bytes of bodies that went through.
    pub body_bytes: usize,
}

/// A proxy before a plain registry.
pub struct Proxy {
    pub host: String,
    faults: Arc<Mutex<Faults>>,
    seen: Arc<Mutex<Seen>>,
}

impl Proxy {
    pub fn start(upstream: &str, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let (faults, seen) = (Arc::new(Mutex::new(faults)), Arc::new(Mutex::new(Seen::default())));
        let proxy = Self { host, faults: Arc::clone(&faults), seen: Arc::clone(&seen) };
        let upstream = upstream.to_owned();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (upstream, faults, seen) = (upstream.clone(), Arc::clone(&faults), Arc::clone(&seen));
                // A connection that breaks is what it is for.
                std::thread::spawn(move || drop(serve(client, &upstream, &faults, &seen)));
            }
        });
        proxy
    }

    /// What to pull from. It says that it is plain, because the proxy does not know TLS well enough to refuse it.
    pub fn origin(&self) -> String {
        format!("http://{}", self.host)
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    pub fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }
}

/// One request to one connection.
fn serve(mut client: TcpStream, upstream: &str, faults: &Mutex<Faults>, seen: &Mutex<Seen>) -> std::io::Result<()> {
    let head = read_head(&mut client)?;
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    seen.lock().unwrap().requests.push((path.clone(), header("range")));
    let is_blob = path.contains("/blobs/");
    let mut cut = None;
    let mut corrupt = None;
    let (no_ranges, delay) = {
        let mut faults = faults.lock().unwrap();
        if is_blob {
            if !faults.refuse.is_empty() {
                let (status, after) = faults.refuse.remove(0);
                let answer = format!(
                    "HTTP/1.1 {status} No\r\nRetry-After: {after}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
                return client.write_all(answer.as_bytes());
            }
            cut = (!faults.cut.is_empty()).then(|| faults.cut.remove(0));
            corrupt = (!faults.corrupt.is_empty()).then(|| faults.corrupt.remove(0));
        }
        (faults.no_ranges, faults.delay)
    };
    std::thread::sleep(delay);
    let mut server = TcpStream::connect(upstream)?;
    let mut request = String::new();
    for (index, line) in head.lines().filter(|line| !line.is_empty()).enumerate() {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        let dropped = name == "connection" || (no_ranges && name == "range");
        if index == 0 || !dropped {
            request.push_str(line);
            request.push_str("\r\n");
        }
    }
    request.push_str("Connection: close\r\n\r\n");
    server.write_all(request.as_bytes())?;
    let answer = read_head(&mut server)?;
    client.write_all(answer.as_bytes())?;
    let mut sent = 0;
    let mut buffer = vec![0; 16 << 10];
    loop {
        let limit = cut.map_or(buffer.len(), |cut: usize| buffer.len().min(cut - sent));
        if limit == 0 {
            return client.shutdown(Shutdown::Both);
        }
        let count = server.read(&mut buffer[..limit])?;
        if count == 0 {
            return client.shutdown(Shutdown::Both);
        }
        if let Some(place) = corrupt.and_then(|place: usize| place.checked_sub(sent)).filter(|place| *place < count) {
            buffer[place] ^= 0x55;
        }
        client.write_all(&buffer[..count])?;
        sent += count;
        seen.lock().unwrap().body_bytes += count;
    }
}

fn read_head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 || head.len() > 64 << 10 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
