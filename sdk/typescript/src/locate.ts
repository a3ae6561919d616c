/**
 * Which service a client uses, and starting one when none answers: the same rules as `msb` itself has.
 *
 * `MSB_HOST` names a socket, which must answer. Otherwise the user's own socket is used; when nobody answers there, `msbd` is started in
 * a session of its own: `MSB_DAEMON`, else `msbd` in `MSB_PATH` or in `PATH`. Two clients that start one at the same moment do no
 * harm: a home has a lock, the slower daemon ends by itself, and both clients find the faster one.
 */

import { spawn } from "node:child_process";
import { type FileHandle, mkdir, open, rename, stat } from "node:fs/promises";
import { statSync } from "node:fs";
import * as path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

import { failure, MsbError, reason } from "./failure.js";

const START_TIMEOUT_MS = 20_000;
/** Time after our own daemon's end in which another one, that made it end, may still be coming up. */
const OTHER_TIMEOUT_MS = 5_000;
const SOCKET_PATH_LEN_MAX = 107;
const LOG_LEN_MAX = 16 << 20;
const LOG_TAIL_LINES = 20;
const INSTALL_HINT = "install msb (`cargo xtask install --prefix ~/.local` in its repository), or set MSB_PATH to where it is";

/** What a daemon keeps of our environment beside MSB_*: it lives for months, so secrets stay out of it. */
const KEPT_VARIABLES = new Set(
  (
    "HOME PATH USER LOGNAME LANG LC_ALL LC_CTYPE TZ TMPDIR XDG_RUNTIME_DIR RUST_BACKTRACE HTTP_PROXY HTTPS_PROXY NO_PROXY " +
    "http_proxy https_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR"
  ).split(" "),
);

/** The variables of a process. */
export type Environment = Readonly<Record<string, string | undefined>>;

/** `MSB_HOME`, else `~/.msb`. */
export function homeOf(environment: Environment, uid: number): string {
  return environment.MSB_HOME || (environment.HOME ? path.join(environment.HOME, ".msb") : `/tmp/msb-home-${uid}`);
}

/** The socket of the control API. */
export function socketOf(environment: Environment, uid: number): string {
  if (environment.MSB_HOST) return environment.MSB_HOST;
  let base = environment.XDG_RUNTIME_DIR ? path.join(environment.XDG_RUNTIME_DIR, "msb") : `/tmp/msb-${uid}`;
  const { MSB_HOME: own, HOME: home } = environment;
  // A home that is not the default one has a directory of its own, so that two services never share a socket.
  if (own && (!home || path.normalize(own).replace(/\/$/, "") !== path.join(home, ".msb"))) {
    base = path.join(base, `h${fnv1a(Buffer.from(own)).toString(16).padStart(16, "0")}`);
  }
  return path.join(base, "msbd.sock");
}

function fnv1a(data: Buffer): bigint {
  let value = 0xcbf29ce484222325n;
  for (const byte of data) value = ((value ^ BigInt(byte)) * 0x100000001b3n) & 0xffffffffffffffffn;
  return value;
}

/** The program to start. */
export function daemonProgram(environment: Environment): string {
  const missing = (message: string): MsbError => failure("runtime_not_found", message, { hint: INSTALL_HINT });
  const isFile = (file: string): boolean => statSync(file, { throwIfNoEntry: false })?.isFile() ?? false;
  const named = environment.MSB_DAEMON;
  if (named) {
    if (!isFile(named)) throw missing(`MSB_DAEMON names ${named}, which is no file`);
    return path.resolve(named);
  }
  const runtime = environment.MSB_PATH;
  if (runtime) {
    const isFolder = statSync(runtime, { throwIfNoEntry: false })?.isDirectory() ?? false;
    const program = path.join(isFolder ? runtime : path.dirname(runtime), "msbd");
    if (!isFile(program)) throw missing(`MSB_PATH names ${runtime}, where there is no msbd`);
    return path.resolve(program);
  }
  for (const folder of (environment.PATH ?? "").split(":")) {
    const program = path.join(folder || ".", "msbd");
    if (isFile(program)) return path.resolve(program);
  }
  throw missing("the program msbd is not in PATH");
}

/** Whether an error is one of the operating system, and which. */
export function systemCode(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
}

/** The error of a socket that cannot be connected to. */
export function cannotConnect(socket: string, error: unknown, hint?: string): MsbError {
  const code = systemCode(error) === "EACCES" || systemCode(error) === "EPERM" ? "permission_denied" : "daemon_unavailable";
  return failure(code, `cannot connect to ${socket}: ${reason(error)}`, { cause: error, ...(hint ? { hint } : {}) });
}

/** Refuses a socket that somebody else made: its directory has a predictable name, where a stranger could be waiting. */
async function checkOwner(socket: string, uid: number): Promise<void> {
  const owner = (await stat(socket)).uid;
  if (owner !== uid && owner !== 0) throw failure("permission_denied", `${socket} belongs to the user ${owner}`);
}

/** Finds services for one kind of client. `open` connects and asks for the version. */
export class Locator<T> {
  constructor(
    private readonly environment: Environment,
    private readonly open: (socket: string) => Promise<T>,
    private readonly uid: number = process.getuid?.() ?? 0,
  ) {}

  /** The service that answers now; `undefined` if none does. Starts nothing. */
  async find(): Promise<T | undefined> {
    const socket = socketOf(this.environment, this.uid);
    if (Buffer.byteLength(socket) > SOCKET_PATH_LEN_MAX) {
      throw failure("daemon_unavailable", `the path of the socket is too long: ${socket} (max ${SOCKET_PATH_LEN_MAX} bytes)`);
    }
    const named = Boolean(this.environment.MSB_HOST);
    try {
      if (!named) await checkOwner(socket, this.uid);
      return await this.open(socket);
    } catch (error) {
      if (error instanceof MsbError) throw error;
      if (named) {
        throw cannotConnect(socket, error, "MSB_HOST names this socket: start the service behind it, or unset MSB_HOST");
      }
      if (["ENOENT", "ECONNREFUSED", "ENOTDIR"].includes(systemCode(error) ?? "")) return undefined;
      throw cannotConnect(socket, error);
    }
  }

  /** The service that answers, started if there is none. */
  async connect(): Promise<T> {
    return (await this.find()) ?? (await this.start(daemonProgram(this.environment)));
  }

  private async start(program: string): Promise<T> {
    const home = homeOf(this.environment, this.uid);
    const logPath = path.join(home, "msbd.log");
    let log: FileHandle;
    try {
      await mkdir(home, { recursive: true, mode: 0o700 });
      const present = await stat(logPath).catch(() => undefined);
      if (present !== undefined && present.size >= LOG_LEN_MAX) await rename(logPath, `${logPath}.1`);
      log = await open(logPath, "a", 0o600);
    } catch (error) {
      throw failure("home_unusable", `${home}: ${reason(error)}`, { cause: error });
    }
    const began = (await log.stat()).size;
    const kept = Object.entries(this.environment).filter(
      ([name]) => KEPT_VARIABLES.has(name) || (name.startsWith("MSB_") && name !== "MSB_HOST"),
    );
    let ended: string | undefined;
    const child = spawn(program, { detached: true, stdio: ["ignore", log.fd, log.fd], env: Object.fromEntries(kept) });
    child.once("error", (error) => (ended = `cannot start ${program}: ${reason(error)}`));
    child.once("exit", (code, signal) => (ended = `msbd ended with ${signal ?? `code ${code}`} while it was starting`));
    // It outlives us on purpose.
    child.unref();
    await log.close();
    let deadline = Date.now() + START_TIMEOUT_MS;
    let endSeen = false;
    for (;;) {
      await sleep(5);
      if (ended !== undefined && !endSeen) {
        endSeen = true;
        deadline = Math.min(deadline, Date.now() + OTHER_TIMEOUT_MS);
      }
      let trouble: unknown;
      try {
        const client = await this.find();
        if (client !== undefined) return client;
      } catch (error) {
        trouble = error;
      }
      const hopeless = ended !== undefined && !(await this.tail(logPath, began)).join("\n").includes("serves");
      if (!hopeless && Date.now() < deadline) continue;
      if (trouble !== undefined) throw trouble;
      throw failure("daemon_unavailable", ended ?? "msbd did not answer in time", {
        hint: `see the end of ${logPath}, or run \`msbd\` in a terminal`,
        details: await this.tail(logPath, began),
      });
    }
  }

  private async tail(logPath: string, from: number): Promise<string[]> {
    const file = await open(logPath, "r").catch(() => undefined);
    if (file === undefined) return [];
    try {
      const size = Math.min((await file.stat()).size - from, LOG_LEN_MAX);
      const { buffer } = await file.read(Buffer.alloc(Math.max(size, 0)), 0, Math.max(size, 0), from);
      return buffer.toString("utf8").trimEnd().split("\n").slice(-LOG_TAIL_LINES);
    } finally {
      await file.close();
    }
  }
}
