/** What a sandbox or a command is made of, checked as far as it can be without a service: pure functions. */

import { isIPv4, isIPv6 } from "node:net";

import { failure } from "./failure.js";

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
const RESERVED = ["sandbox.", "microsandbox.", "service."];

/** A root that is no image: a directory or a raw disk of this host. The sandbox changes nothing of it. */
export interface Rootfs {
  readonly kind: "directory" | "disk";
  readonly path: string;
}

/** What a sandbox is made of. Durations are in milliseconds, sizes in MiB. */
export interface SandboxOptions {
  /** The reference of an image, or what `Image.bind` or `Image.disk` made. */
  image: string | Rootfs;
  cpus?: number;
  memoryMib?: number;
  rootSizeMib?: number;
  env?: Readonly<Record<string, string>>;
  labels?: Readonly<Record<string, string>>;
  workdir?: string;
  user?: string;
  hostname?: string;
  /** In place of the image's; an empty list removes it. */
  entrypoint?: readonly string[];
  /** Gives it a main workload, whose end is the sandbox's end. */
  command?: readonly string[];
  /** Gives it the image's own command as main workload. */
  main?: boolean;
  stopSignal?: string;
  stopGraceMs?: number;
  /** Lets it outlive this process. */
  detached?: boolean;
  /** Removes it when it ends. */
  ephemeral?: boolean;
  engine?: "auto" | "kvm" | "qemu";
  restart?: "default" | "no" | "on_failure" | "always" | "unless_stopped";
  maxRetries?: number;
  idleTimeoutMs?: number;
  /** What follows an idle timeout; `suspend` keeps its memory on disk and goes on from it (engine kvm). */
  onIdle?: "stop" | "restart" | "suspend";
  maxDurationMs?: number;
  /** Made by `Volume.bind`, `Volume.named`, `Volume.tmpfs` and `Volume.disk`. */
  mounts?: readonly Mount[];
  /** Published ports, each `[BIND:]HOST:GUEST[/tcp|/udp]`; host port 0 is any free one. */
  ports?: readonly string[];
  /** What it reaches: a profile, or a whole policy. */
  network?: NetworkProfile | Network;
  security?: "default" | "restricted" | "strict";
  /** Resource limits by name, as `{ nofile: 1024 }` or `{ nofile: [1024, 4096] }`. */
  rlimits?: Readonly<Record<string, number | readonly [number, number]>>;
  /** When to fetch the image from its registry. */
  pull?: "always" | "if_missing" | "never";
  /** Removes an existing sandbox of this name first; a number is its time to stop. */
  replace?: boolean | number;
}

/** Which addresses a sandbox reaches where no rule decides. */
export type NetworkProfile = "public" | "private" | "host" | "all" | "none";

/** The network of a sandbox. */
export interface Network {
  profile?: NetworkProfile;
  /** The first that fits decides, before the profile: `deny@example.com:tcp:443`. */
  rules?: readonly string[];
  /** Whether there is a network device at all. */
  enabled?: boolean;
  defaultEgress?: "allow" | "deny";
  defaultIngress?: "allow" | "deny";
  /** Upstream name servers in place of the host's own, each `ADDRESS:PORT`. */
  nameservers?: readonly string[];
}

/** One mount, as the API has it. */
export interface Mount {
  readonly target: string;
  readonly source: Readonly<Record<string, unknown>>;
  readonly options: Readonly<Record<string, boolean>>;
}

/** How a command is run. */
export interface ExecOptions {
  env?: Readonly<Record<string, string>>;
  workdir?: string;
  user?: string;
  terminal?: { rows: number; columns: number };
  /** Time in milliseconds after which its whole process group is killed. */
  timeoutMs?: number;
}

/** A name that is one. */
export function checkName(name: string): string {
  if (typeof name !== "string" || !NAME.test(name)) {
    throw failure("invalid_name", `sandbox name ${JSON.stringify(name)} breaks the rule for names`);
  }
  return name;
}

function checkEnv(env: Readonly<Record<string, string>>): void {
  for (const [name, value] of Object.entries(env)) {
    if (name === "" || /[=\0]/.test(name)) {
      throw failure("invalid_config", `environment variable name ${JSON.stringify(name)} is empty or has '=' or a zero byte`);
    }
    if (value.includes("\0")) throw failure("invalid_config", `environment variable ${name} has a zero byte in its value`);
  }
}

function words(command: readonly string[], what: string): string[] {
  if (typeof command === "string") {
    throw failure("invalid_config", `${what} is a list of words; for a shell line use shell()`);
  }
  if (command.some((word) => word.includes("\0"))) {
    throw failure("invalid_config", "a word of the command has a zero byte");
  }
  return [...command];
}

/** A duration as the API has it. */
export function milliseconds(value: number, what: string): number {
  if (!(value >= 0)) throw failure("invalid_config", `${what} must not be negative`);
  return Math.round(value);
}

function portOf(text: string): Record<string, unknown> {
  const found = /^(?:([0-9.]+|\[[0-9a-fA-F:.]+\]):)?([0-9]{1,5}):([0-9]{1,5})(?:\/(tcp|udp))?$/.exec(text);
  const [host, guest] = [Number(found?.[2]), Number(found?.[3])];
  const bind = (found?.[1] ?? "127.0.0.1").replace(/^\[|\]$/g, "");
  if (found === null || !(host < 65536) || !(guest > 0 && guest < 65536) || !(isIPv4(bind) || isIPv6(bind))) {
    throw failure("invalid_config", `published port ${JSON.stringify(text)}; write [BIND:]HOST:GUEST[/tcp|/udp]`);
  }
  return { bind, host_port: host, guest_port: guest, transport: found[4] ?? "tcp" };
}

function networkOf(options: SandboxOptions): Record<string, unknown> | undefined {
  if (options.network === undefined && options.ports === undefined) return undefined;
  const wanted: Network = typeof options.network === "string" ? { profile: options.network } : (options.network ?? {});
  return {
    profile: wanted.profile,
    enabled: wanted.enabled,
    rules: wanted.rules,
    default_egress: wanted.defaultEgress,
    default_ingress: wanted.defaultIngress,
    ports: options.ports?.map(portOf),
    dns: wanted.nameservers && { nameservers: wanted.nameservers },
  };
}

/** The request that creates a sandbox; throws before any connection is made. */
export function createRequest(name: string | undefined, options: SandboxOptions): Record<string, unknown> {
  if (!options.image) throw failure("invalid_config", "image is required");
  // Each with the message the service has for it.
  if (options.cpus !== undefined && !(options.cpus > 0)) throw failure("invalid_config", "cpus must be greater than 0");
  if (options.memoryMib !== undefined && !(options.memoryMib > 0)) {
    throw failure("invalid_config", "memory must be greater than 0");
  }
  checkEnv(options.env ?? {});
  for (const key of Object.keys(options.labels ?? {})) {
    if (key === "") throw failure("invalid_label", "label key must not be empty");
    const prefix = RESERVED.find((reserved) => key.startsWith(reserved));
    if (prefix !== undefined) throw failure("invalid_label", `label key '${key}' uses reserved prefix '${prefix}'`);
  }
  const duration = (value: number | undefined, what: string): number | undefined =>
    value === undefined ? undefined : milliseconds(value, what);
  // JSON leaves out what is undefined.
  const spec = {
    name: name === undefined ? undefined : checkName(name),
    ...(typeof options.image === "string" ? { image: options.image } : { image: options.image.path, root: options.image.kind }),
    cpus: options.cpus,
    memory_mib: options.memoryMib,
    root_size_mib: options.rootSizeMib,
    env: options.env,
    labels: options.labels,
    workdir: options.workdir,
    user: options.user,
    hostname: options.hostname,
    entrypoint: options.entrypoint && words(options.entrypoint, "an entrypoint"),
    command: options.command && words(options.command, "a command"),
    workload: options.main || options.command ? "main" : undefined,
    stop_signal: options.stopSignal,
    stop_grace_ms: duration(options.stopGraceMs, "stopGraceMs"),
    detached: options.detached,
    ephemeral: options.ephemeral,
    engine: options.engine,
    restart:
      options.restart === undefined
        ? undefined
        : { policy: options.restart, ...(options.restart === "on_failure" ? { max_retries: options.maxRetries } : {}) },
    idle_timeout_ms: duration(options.idleTimeoutMs, "idleTimeoutMs"),
    on_idle: options.onIdle,
    max_duration_ms: duration(options.maxDurationMs, "maxDurationMs"),
    mounts: options.mounts,
    network: networkOf(options),
    security: options.security,
    rlimits:
      options.rlimits &&
      Object.entries(options.rlimits).map(([resource, limit]) => {
        const [soft, hard] = typeof limit === "number" ? [limit, limit] : limit;
        return { resource, soft, hard };
      }),
  };
  const replace = options.replace === true ? 10_000 : options.replace === false ? undefined : options.replace;
  return { spec, replace_grace_ms: duration(replace, "replace"), pull: options.pull };
}

/** The request that runs a command. */
export function execRequest(command: readonly string[], stdin: boolean, options: ExecOptions): Record<string, unknown> {
  const checked = words(command, "a command");
  if (checked.length === 0) throw failure("invalid_config", "a command is required");
  checkEnv(options.env ?? {});
  return {
    command: checked,
    env: options.env,
    workdir: options.workdir,
    user: options.user,
    stdin,
    terminal: options.terminal,
    timeout_ms: options.timeoutMs === undefined ? undefined : milliseconds(options.timeoutMs, "timeoutMs"),
  };
}
