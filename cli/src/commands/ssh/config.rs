//! `msb ssh config`: a block for `ssh_config` that makes `ssh msb-NAME` work, with the sandbox's host key in a file beside it.
//!
//! ```text
//!  msb ssh config box >> ~/.ssh/config        ssh msb-box
//! ```

use std::path::{Path, PathBuf};

use clap::Args;
use msb_protocol::control::SshHost;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::parse;

/// Options of `ssh config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Name of the host in the block [default: msb-NAME]
    #[arg(long, value_name = "HOST")]
    pub alias: Option<String>,
    /// Print only the host key, as a line of known_hosts
    #[arg(long)]
    pub known_hosts: bool,
}

#[derive(Serialize)]
struct Block<'a> {
    alias: &'a str,
    config: &'a str,
    known_hosts: &'a str,
    #[serde(flatten)]
    host: &'a SshHost,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `invalid_config` for an alias that is no host name.
pub(super) async fn run(args: ConfigArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let alias = args.alias.unwrap_or_else(|| format!("msb-{name}"));
    if alias.is_empty() || !alias.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
        return Err(invalid(format!("{alias:?} is no name of a host")));
    }
    let host = context.client().await?.ssh_host(&name).await?;
    let known_hosts = format!("{alias} {}", host.host_key);
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("msb"));
    let surroundings = &context.locator.surroundings;
    let environment: Vec<(&str, &Path)> = [("MSB_HOME", &surroundings.msb_home), ("MSB_HOST", &surroundings.msb_host)]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value.as_deref()?)))
        .collect();
    let config = block(&alias, &host, &program, &environment);
    if context.printer.is_json() {
        context.printer.json(&Block { alias: &alias, config: &config, known_hosts: &known_hosts, host: &host })?;
    } else if args.known_hosts {
        context.printer.text(&format!("{known_hosts}\n"))?;
    } else {
        context.printer.text(&config)?;
    }
    Ok(ExitStatus::SUCCESS)
}

/// The block. `KnownHostsCommand` gives the host key, so that nothing has to be written anywhere and a sandbox that was made anew is
/// known at once.
fn block(alias: &str, host: &SshHost, program: &Path, environment: &[(&str, &Path)]) -> String {
    let mut words = Vec::new();
    if !environment.is_empty() {
        words.push("/usr/bin/env".to_owned());
        words.extend(environment.iter().map(|(name, value)| quoted(&format!("{name}={}", value.display()))));
    }
    words.push(quoted(&program.display().to_string()));
    let command = words.join(" ");
    format!(
        "# {alias} {host_key}\nHost {alias}\n    HostName {alias}\n    User {user}\n    ProxyCommand {command} ssh serve --stdio {sandbox}\n    \
         KnownHostsCommand {command} ssh config --known-hosts --alias {alias} {sandbox}\n    StrictHostKeyChecking yes\n    \
         UserKnownHostsFile none\n    HostKeyAlgorithms ssh-ed25519\n",
        host_key = host.host_key,
        user = host.user,
        sandbox = host.sandbox,
    )
}

/// A word for the shell that runs a ProxyCommand and for the splitting of a KnownHostsCommand; `%` begins their own sequences.
fn quoted(word: &str) -> String {
    let word = word.replace('%', "%%");
    if word.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-=:%+@".contains(&b)) {
        return word;
    }
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"").replace('$', "\\$").replace('`', "\\`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_what_ssh_reads() {
        let host = SshHost {
            sandbox: "box".parse().unwrap(),
            user: "app".into(),
            host_key: "ssh-ed25519 AAAA".into(),
            fingerprint: "SHA256:x".into(),
        };
        insta::assert_snapshot!(block("msb-box", &host, Path::new("/usr/bin/msb"), &[]), @r"
        # msb-box ssh-ed25519 AAAA
        Host msb-box
            HostName msb-box
            User app
            ProxyCommand /usr/bin/msb ssh serve --stdio box
            KnownHostsCommand /usr/bin/msb ssh config --known-hosts --alias msb-box box
            StrictHostKeyChecking yes
            UserKnownHostsFile none
            HostKeyAlgorithms ssh-ed25519
        ");
        let odd = block("b", &host, Path::new("/a b/msb"), &[("MSB_HOME", Path::new("/100%/$x"))]);
        assert!(odd.contains("ProxyCommand /usr/bin/env \"MSB_HOME=/100%%/\\$x\" \"/a b/msb\" ssh serve"), "{odd}");
    }
}
