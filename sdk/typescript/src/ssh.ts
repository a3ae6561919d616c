/** What makes `ssh` reach a sandbox: a block for `ssh_config` in which `msb` is the proxy and tells the host key. Pure but for `PATH`. */

import { statSync } from "node:fs";
import * as path from "node:path";

import { failure } from "./failure.js";
import type { Environment } from "./locate.js";
import type { SshConfig, SshHost } from "./models.js";

/** The block, in which `HostName` is the alias itself. */
export function sshConfig(host: SshHost, alias = `msb-${host.sandbox}`, environment: Environment = process.env): SshConfig {
  if (!/^[A-Za-z0-9._-]+$/.test(alias)) throw failure("invalid_config", `${JSON.stringify(alias)} is no name of a host`);
  const named = ["MSB_HOME", "MSB_HOST"].filter((name) => environment[name]).map((name) => quoted(`${name}=${environment[name]}`));
  const command = [...(named.length > 0 ? ["/usr/bin/env", ...named] : []), quoted(program(environment))].join(" ");
  const config = `# ${alias} ${host.host_key}
Host ${alias}
    HostName ${alias}
    User ${host.user}
    ProxyCommand ${command} ssh serve --stdio ${host.sandbox}
    KnownHostsCommand ${command} ssh config --known-hosts --alias ${alias} ${host.sandbox}
    StrictHostKeyChecking yes
    UserKnownHostsFile none
    HostKeyAlgorithms ssh-ed25519
`;
  return { alias, config, known_hosts: `${alias} ${host.host_key}`, host };
}

/** The `msb` beside the `msbd` that would be started, else the one in `PATH`. */
function program(environment: Environment): string {
  const isFile = (file: string): boolean => statSync(file, { throwIfNoEntry: false })?.isFile() ?? false;
  const runtime = environment.MSB_PATH;
  const beside = runtime ? [isFile(runtime) ? path.dirname(runtime) : runtime] : [];
  for (const folder of [...beside, ...(environment.PATH ?? "").split(":")]) {
    const file = path.join(folder || ".", "msb");
    if (isFile(file)) return path.resolve(file);
  }
  return "msb";
}

/** A word for the shell that runs a ProxyCommand; `%` begins ssh's own sequences. */
function quoted(word: string): string {
  const escaped = word.replaceAll("%", "%%");
  return /^[A-Za-z0-9/._=:%+@-]*$/.test(escaped) ? escaped : `"${escaped.replace(/[\\"$`]/g, "\\$&")}"`;
}
