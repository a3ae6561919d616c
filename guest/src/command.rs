//! From what was asked ([`ExecConfig`]) and how the guest is set up ([`GuestConfig`]) to what is executed: argv, the candidates
//! of the PATH look-up, environment, directory, identity and limits. Pure but for the two account files, which the caller reads.
//! Called by `session`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CString;

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{EnvVar, ExecConfig, GuestConfig};

use crate::account::{self, Identity};
use crate::failure::GuestError;
use crate::limits::{self, Limit};

/// PATH when neither image nor caller sets one.
pub const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The shell of a login whose user has none.
const SHELL_DEFAULT: &str = "/bin/sh";
/// Most directories of PATH that are tried.
const PATH_ENTRIES_MAX: usize = 256;

/// A process ready to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Paths to try in turn.
    pub candidates: Vec<CString>,
    /// Arguments, the first is the command as it was written.
    pub argv: Vec<CString>,
    /// Environment as `NAME=value`.
    pub env: Vec<CString>,
    /// Working directory inside the root.
    pub workdir: CString,
    /// Who it runs as.
    pub identity: Identity,
    /// Its limits.
    pub limits: Vec<Limit>,
}

/// Puts a command together.
///
/// # Errors
/// `invalid_config` for an empty command or a NUL byte, `user_not_found`.
pub fn prepare(guest: &GuestConfig, exec: &ExecConfig, passwd: &[u8], group: &[u8]) -> Result<Command, GuestError> {
    let wanted_user = if exec.user.is_empty() { &guest.user } else { &exec.user };
    let identity = account::resolve(wanted_user, passwd, group)?;
    let shell = identity.shell.as_deref().unwrap_or(SHELL_DEFAULT);
    let argv = if exec.login { login_argv(shell, exec.argv.first()) } else { exec.argv.clone() };
    let name = if exec.login { Some(shell) } else { argv.first().map(String::as_str) };
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Err(GuestError::new(ErrorCode::InvalidConfig, "the command is empty"));
    };
    let mut env = environment(guest, exec, !wanted_user.is_empty(), identity.home.as_deref())?;
    if exec.login {
        login_environment(&mut env, &identity, shell);
    }
    let path = env.iter().find(|var| var.name == "PATH").map_or(PATH_DEFAULT, |var| var.value.as_str());
    let usual = if exec.login { identity.home.as_deref().unwrap_or("/") } else { &guest.workdir };
    let workdir = [exec.workdir.as_str(), usual].into_iter().find(|path| !path.is_empty()).unwrap_or("/");
    Ok(Command {
        candidates: candidates(name, path).map(|path| c_string("the command", path)).collect::<Result<_, _>>()?,
        argv: argv.iter().map(|argument| c_string("an argument", argument.as_str())).collect::<Result<_, _>>()?,
        env: env
            .iter()
            .map(|var| c_string("the environment", format!("{}={}", var.name, var.value)))
            .collect::<Result<_, _>>()?,
        workdir: c_string("the working directory", workdir)?,
        identity,
        limits: limits::merge(&[&guest.rlimits, &exec.rlimits])?,
    })
}

/// A shell that is to read the user's profile has a name that begins with a dash; one with a command line has not.
fn login_argv(shell: &str, line: Option<&String>) -> Vec<String> {
    let name = shell.rsplit('/').next().unwrap_or(shell);
    match line {
        Some(line) => vec![name.to_owned(), "-c".to_owned(), line.clone()],
        None => vec![format!("-{name}")],
    }
}

/// What login(1) sets, over what image and sandbox say: it is about this user.
fn login_environment(env: &mut Vec<EnvVar>, identity: &Identity, shell: &str) {
    let user = identity.name.clone().unwrap_or_else(|| identity.uid.to_string());
    let home = identity.home.clone().unwrap_or_else(|| "/".to_owned());
    for (name, value) in [("HOME", home), ("USER", user.clone()), ("LOGNAME", user), ("SHELL", shell.to_owned())] {
        env.retain(|var| var.name != name);
        env.push(EnvVar { name: name.into(), value });
    }
}

fn c_string(what: &str, text: impl Into<Vec<u8>>) -> Result<CString, GuestError> {
    CString::new(text).map_err(|_| GuestError::new(ErrorCode::InvalidConfig, format!("{what} holds a NUL byte")))
}

/// The paths that execvp(3) would try.
fn candidates<'a>(name: &'a str, path: &'a str) -> impl Iterator<Item = String> + 'a {
    let direct = name.contains('/').then(|| name.to_owned());
    let searched = (direct.is_none()).then(|| {
        // An empty entry of PATH is the current directory.
        path.split(':')
            .take(PATH_ENTRIES_MAX)
            .map(move |dir| if dir.is_empty() { format!("./{name}") } else { format!("{dir}/{name}") })
    });
    direct.into_iter().chain(searched.into_iter().flatten())
}

/// The environment: the guest's, over it the caller's, then what is missing: PATH, HOSTNAME, TERM for a terminal, HOME.
fn environment(
    guest: &GuestConfig,
    exec: &ExecConfig,
    user_named: bool,
    home: Option<&str>,
) -> Result<Vec<EnvVar>, GuestError> {
    let mut env = merge(guest.env.iter().chain(&exec.env))?;
    let mut default = |name: &str, value: &str| {
        if !env.iter().any(|var| var.name == name) {
            env.push(EnvVar { name: name.into(), value: value.into() });
        }
    };
    default("PATH", PATH_DEFAULT);
    default("HOSTNAME", &guest.hostname);
    if exec.terminal.is_some() {
        default("TERM", "xterm");
    }
    // Somebody named a user: their entry or nothing. Nobody did: root's entry, and `/` where the image has none.
    match (home, user_named) {
        (Some(home), _) => default("HOME", home),
        (None, false) => default("HOME", "/"),
        (None, true) => {}
    }
    Ok(env)
}

/// Variables in order of first appearance, the last value of each.
fn merge<'a>(vars: impl Iterator<Item = &'a EnvVar>) -> Result<Vec<EnvVar>, GuestError> {
    let mut merged: Vec<EnvVar> = Vec::new();
    let mut positions: HashMap<&str, usize> = HashMap::new();
    for var in vars {
        if var.name.is_empty() || var.name.contains(['=', '\0']) || var.value.contains('\0') {
            let message = "a variable of the environment has an empty name, or '=' or NUL where it must not";
            return Err(GuestError::new(ErrorCode::InvalidConfig, message));
        }
        match positions.entry(var.name.as_str()) {
            Entry::Occupied(at) => merged[*at.get()].value.clone_from(&var.value),
            Entry::Vacant(free) => {
                free.insert(merged.len());
                merged.push(var.clone());
            }
        }
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] = b"root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";

    fn vars(pairs: &[(&str, &str)]) -> Vec<EnvVar> {
        pairs.iter().map(|(name, value)| EnvVar { name: (*name).into(), value: (*value).into() }).collect()
    }

    fn run(guest: GuestConfig, exec: ExecConfig, passwd: &[u8]) -> Command {
        let argv = if exec.argv.is_empty() { vec!["ls".into()] } else { exec.argv.clone() };
        prepare(&guest, &ExecConfig { argv, ..exec }, passwd, b"").unwrap()
    }

    fn env_of(command: &Command, name: &str) -> Option<String> {
        let prefix = format!("{name}=");
        command.env.iter().find_map(|var| var.to_str().unwrap().strip_prefix(&prefix).map(str::to_owned))
    }

    #[test]
    fn home_follows_its_rule() {
        type Row = (
            &'static [(&'static str, &'static str)],
            &'static [(&'static str, &'static str)],
            &'static str,
            &'static str,
            Option<&'static str>,
        );
        // guest env, exec env, guest user, exec user, HOME
        let table: [Row; 9] = [
            (&[], &[], "", "", Some("/root")),
            (&[("HOME", "/a")], &[], "", "", Some("/a")),
            (&[("HOME", "/a")], &[("HOME", "/b")], "", "ann", Some("/b")),
            (&[("HOME", "")], &[], "", "", Some("")),
            (&[], &[], "ann", "", Some("/home/ann")),
            (&[], &[], "ann", "root", Some("/root")),
            (&[], &[], "", "1000", Some("/home/ann")),
            (&[], &[], "4711", "", None),
            (&[], &[], "ann", "4711:5", None),
        ];
        for (guest_env, exec_env, guest_user, exec_user, home) in table {
            let guest = GuestConfig { env: vars(guest_env), user: guest_user.into(), ..Default::default() };
            let exec = ExecConfig { env: vars(exec_env), user: exec_user.into(), ..Default::default() };
            assert_eq!(env_of(&run(guest, exec, PASSWD), "HOME").as_deref(), home, "{guest_user} {exec_user}");
        }
        assert_eq!(env_of(&run(GuestConfig::default(), ExecConfig::default(), b""), "HOME").as_deref(), Some("/"));
    }

    #[test]
    fn path_is_searched_only_for_bare_names() {
        let guest = GuestConfig { env: vars(&[("PATH", "/x::/y")]), ..Default::default() };
        let of = |name: &str| {
            let exec = ExecConfig { argv: vec![name.into(), "-l".into()], ..Default::default() };
            run(guest.clone(), exec, PASSWD)
                .candidates
                .into_iter()
                .map(|path| path.into_string().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(of("ls"), ["/x/ls", "./ls", "/y/ls"]);
        assert_eq!(of("./ls"), ["./ls"]);
        let without = run(GuestConfig::default(), ExecConfig::default(), PASSWD);
        assert_eq!(without.candidates.len(), PATH_DEFAULT.split(':').count());
    }

    #[test]
    fn what_is_missing_is_added_and_what_is_set_stays() {
        let guest = GuestConfig { hostname: "web".into(), workdir: "/srv".into(), ..Default::default() };
        let plain = run(guest.clone(), ExecConfig::default(), PASSWD);
        assert_eq!(env_of(&plain, "HOSTNAME").as_deref(), Some("web"));
        assert_eq!(env_of(&plain, "TERM"), None);
        assert_eq!(plain.workdir.to_str(), Ok("/srv"));
        let terminal = Some(msb_protocol::guest::TerminalSize { rows: 24, columns: 80 });
        let exec = ExecConfig { terminal, workdir: "/tmp".into(), ..Default::default() };
        let with = run(guest.clone(), exec.clone(), PASSWD);
        assert_eq!((env_of(&with, "TERM").as_deref(), with.workdir.to_str()), (Some("xterm"), Ok("/tmp")));
        let own = run(guest, ExecConfig { env: vars(&[("TERM", "vt100")]), ..exec }, PASSWD);
        assert_eq!(env_of(&own, "TERM").as_deref(), Some("vt100"));
    }

    #[test]
    fn a_login_is_the_users_own_shell_at_home() {
        let guest = GuestConfig { workdir: "/srv".into(), env: vars(&[("HOME", "/image")]), ..Default::default() };
        let login = |user: &str, argv: &[&str]| {
            let argv = argv.iter().map(|word| (*word).to_owned()).collect();
            let exec = ExecConfig { argv, user: user.into(), login: true, ..Default::default() };
            prepare(&guest, &exec, b"ann:x:1000:1000::/home/ann:/bin/ash\nbob:x:7:7::/b:\n", b"").unwrap()
        };
        let words =
            |command: &Command| command.argv.iter().map(|word| word.to_str().unwrap().to_owned()).collect::<Vec<_>>();
        let shell = login("ann", &[]);
        assert_eq!((words(&shell), shell.candidates[0].to_str()), (vec!["-ash".to_owned()], Ok("/bin/ash")));
        assert_eq!(shell.workdir.to_str(), Ok("/home/ann"));
        for (name, value) in [("HOME", "/home/ann"), ("USER", "ann"), ("LOGNAME", "ann"), ("SHELL", "/bin/ash")] {
            assert_eq!(env_of(&shell, name).as_deref(), Some(value), "{name}");
        }
        let line = login("bob", &["echo a; echo b"]);
        assert_eq!(
            (words(&line), line.candidates[0].to_str()),
            (vec!["sh".into(), "-c".into(), "echo a; echo b".into()], Ok("/bin/sh"))
        );
        assert_eq!(login("4711", &[]).workdir.to_str(), Ok("/"));
    }

    #[test]
    fn what_cannot_be_a_command_is_refused() {
        let argv = |words: &[&str]| ExecConfig {
            argv: words.iter().map(|word| (*word).into()).collect(),
            ..Default::default()
        };
        let bad_env = ExecConfig { env: vars(&[("A=B", "1")]), ..argv(&["x"]) };
        for exec in [argv(&[]), argv(&[""]), argv(&["a\0b"]), argv(&["a", "\0"]), bad_env] {
            assert_eq!(
                prepare(&GuestConfig::default(), &exec, PASSWD, b"").unwrap_err().code,
                ErrorCode::InvalidConfig
            );
        }
    }

    proptest! {
        #[test]
        fn each_name_appears_once_with_its_last_value(pairs in prop::collection::vec(("[A-C]", "[0-9]"), 0..20)) {
            let all = pairs.iter().map(|(name, value)| EnvVar { name: name.clone(), value: value.clone() }).collect::<Vec<_>>();
            let merged = merge(all.iter()).unwrap();
            for var in &merged {
                prop_assert_eq!(merged.iter().filter(|other| other.name == var.name).count(), 1);
                prop_assert_eq!(&pairs.iter().rfind(|(name, _)| *name == var.name).unwrap().1, &var.value);
            }
        }
    }
}
