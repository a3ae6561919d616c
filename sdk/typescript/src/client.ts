/** One typed call for each route of the control API. `Sandbox` and `Image` are built on it. No request that may have been carried out is retried. */

import { Agent, type ClientRequest, type IncomingMessage, request as httpRequest } from "node:http";
import { pipeline } from "node:stream/promises";

import { errorFromBody, errorFromValue, failure, MsbError, protocolError, reason } from "./failure.js";
import { cannotConnect, type Environment, Locator, systemCode } from "./locate.js";
import type {
  EventRecord,
  ImageDetail,
  ImageHandle,
  LogRecord,
  MetricsSnapshot,
  SandboxDetail,
  SandboxSummary,
  VersionInfo,
} from "./models.js";
import { ExecHandle } from "./session.js";
import { checkName } from "./spec.js";

/** The version of the control API this package speaks. */
export const API_VERSION = 1;
/** Largest answer that is read into memory, in bytes. */
const ANSWER_LEN_MAX = 64 << 20;
/** Longest line of a streamed answer, in bytes. */
const LINE_LEN_MAX = 8 << 20;
/** Time for a service that accepts a connection to say its version. */
const VERSION_TIMEOUT_MS = 10_000;

/** Which lines of a log. */
export interface LogQuery {
  follow?: boolean;
  tail?: number;
  since?: Date | string;
  until?: Date | string;
  /** `stdout`, `stderr`, `output`, `system` or `all`. */
  source?: string;
}

/** Which events. */
export interface EventQuery {
  follow?: boolean;
  since?: number;
}

type Pairs = readonly (readonly [string, string | number | boolean | Date | undefined])[];

function withQuery(path: string, pairs: Pairs): string {
  const query = new URLSearchParams();
  for (const [key, value] of pairs) {
    if (value !== undefined && value !== false) query.append(key, value instanceof Date ? value.toISOString() : String(value));
  }
  const text = query.toString();
  return text === "" ? path : `${path}?${text}`;
}

function sandboxPath(name: string, rest = ""): string {
  return `/v1/sandboxes/${checkName(name)}${rest}`;
}

interface Sent {
  body?: unknown;
  stream?: AsyncIterable<Uint8Array>;
  timeoutMs?: number;
}

/** A connection to a service. Make one with `connect` or `at`. */
export class Client {
  private readonly agent = new Agent({ keepAlive: true, maxFreeSockets: 1, timeout: 30_000 });
  private info: VersionInfo | undefined;

  private constructor(readonly socket: string) {}

  /** Finds the service of this environment, or starts one as `msb` does. */
  static connect(environment: Environment = process.env): Promise<Client> {
    return new Locator(environment, (socket) => Client.open(socket)).connect();
  }

  /** Connects to the service on this socket. Starts nothing. */
  static async at(socket: string): Promise<Client> {
    try {
      return await Client.open(socket);
    } catch (error) {
      throw error instanceof MsbError ? error : cannotConnect(socket, error);
    }
  }

  private static async open(socket: string): Promise<Client> {
    const client = new Client(socket);
    const info = (await client.raw("GET", "/v1/version", { timeoutMs: VERSION_TIMEOUT_MS })) as VersionInfo;
    if (info.api_version !== API_VERSION) {
      const message = `msbd ${info.version} speaks version ${info.api_version} of the control API, this client speaks ${API_VERSION}`;
      throw failure("unsupported_operation", message, {
        hint: "restart msbd, so that it runs the installed version",
        details: ["operation=connect", `needs=${API_VERSION}`, `peer=${info.api_version}`],
      });
    }
    client.info = info;
    return client;
  }

  /** What the service said it is. */
  get version(): VersionInfo {
    if (this.info === undefined) throw protocolError("no version");
    return this.info;
  }

  /** Gives up the idle connection. Sandboxes go on. */
  close(): void {
    this.agent.destroy();
  }

  /** Sends a request; gives back the answer once it is a success. Rejects with the operating system's error if there is no connection. */
  private answer(method: string, path: string, sent: Sent): Promise<IncomingMessage> {
    return new Promise((resolve, reject) => {
      const text = sent.body === undefined ? undefined : JSON.stringify(sent.body);
      const streamed = sent.stream !== undefined;
      const headers: Record<string, string | number> = {};
      if (text !== undefined) {
        headers["content-type"] = "application/json";
        headers["content-length"] = Buffer.byteLength(text);
      } else if (streamed) {
        headers["content-type"] = "application/x-tar";
      }
      const request: ClientRequest = httpRequest({
        socketPath: this.socket,
        path,
        method,
        headers,
        // What streams has a connection of its own, so that it can be given up at any time.
        agent: streamed ? false : this.agent,
        ...(sent.timeoutMs === undefined ? {} : { timeout: sent.timeoutMs }),
      });
      request.once("timeout", () => request.destroy(failure("daemon_unavailable", "msbd accepts connections but does not answer")));
      request.once("error", reject);
      request.once("response", (response) => {
        const status = response.statusCode ?? 0;
        if (status >= 200 && status < 300) return resolve(response);
        collect(response).then((body) => reject(errorFromBody(status, body)), reject);
      });
      if (sent.stream === undefined) request.end(text);
      // A service that refuses early closes its side while we still write; its answer says why.
      else pipeline(sent.stream, request).catch(() => undefined);
    });
  }

  private async raw(method: string, path: string, sent: Sent = {}): Promise<unknown> {
    const body = await collect(await this.answer(method, path, sent));
    try {
      return JSON.parse(body);
    } catch (error) {
      throw protocolError(error);
    }
  }

  private async call<T>(method: string, path: string, body?: unknown): Promise<T> {
    try {
      return (await this.raw(method, path, { body })) as T;
    } catch (error) {
      throw this.typed(error);
    }
  }

  private typed(error: unknown): MsbError {
    if (error instanceof MsbError) return error;
    if (["ENOENT", "ECONNREFUSED", "EACCES", "ENOTDIR"].includes(systemCode(error) ?? "")) return cannotConnect(this.socket, error);
    return failure("daemon_unavailable", `the connection to msbd was lost: ${reason(error)}`, { cause: error });
  }

  private async *lines<T>(method: string, path: string, sent: Sent = {}): AsyncGenerator<T, void, void> {
    let response: IncomingMessage | undefined;
    try {
      response = await this.answer(method, path, sent);
      let rest = "";
      response.setEncoding("utf8");
      for await (const piece of response as AsyncIterable<string>) {
        const whole = (rest + piece).split("\n");
        rest = whole.pop() ?? "";
        if (rest.length > LINE_LEN_MAX) throw protocolError("a line without an end");
        for (const line of whole) if (line.trim() !== "") yield parsed<T>(line);
      }
      if (rest.trim() !== "") yield parsed<T>(rest);
    } catch (error) {
      throw this.typed(error);
    } finally {
      response?.destroy();
    }
  }

  private session(target: string, first: unknown, stdin: boolean): Promise<ExecHandle> {
    return ExecHandle.open(this.socket, target, first, stdin);
  }

  /** What the host can do, as the service sees it. */
  host(): Promise<Record<string, unknown>> {
    return this.call("GET", "/v1/host");
  }

  /** Ends the service; its sandboxes go on. */
  async shutdown(): Promise<void> {
    await this.call("POST", "/v1/shutdown", {});
  }

  /** Creates a sandbox. */
  create(request: Record<string, unknown>): Promise<SandboxDetail> {
    return this.call("POST", "/v1/sandboxes", request);
  }

  /** The sandboxes whose labels fit every term (`KEY=VALUE` or `KEY`), newest first. */
  async list(labels: readonly string[] = []): Promise<SandboxSummary[]> {
    const path = withQuery("/v1/sandboxes", labels.map((label) => ["label", label] as const));
    return (await this.call<{ sandboxes: SandboxSummary[] }>("GET", path)).sandboxes;
  }

  /** Everything about one sandbox. */
  async inspect(name: string): Promise<SandboxDetail> {
    return this.call("GET", sandboxPath(name));
  }

  /** Removes a sandbox; `force` kills it first. */
  async remove(name: string, force = false): Promise<void> {
    await this.call("DELETE", withQuery(sandboxPath(name), [["force", force]]));
  }

  /** Starts a resting sandbox. */
  async start(name: string): Promise<SandboxDetail> {
    return this.call("POST", sandboxPath(name, "/start"), {});
  }

  /** Stops a sandbox; answers once it rests. */
  async stop(name: string, options: { graceMs?: number; force?: boolean } = {}): Promise<SandboxDetail> {
    return this.call("POST", sandboxPath(name, "/stop"), { grace_ms: options.graceMs, force: options.force ?? false });
  }

  /** Stops a sandbox if it runs, and starts it. */
  async restart(name: string): Promise<SandboxDetail> {
    return this.call("POST", sandboxPath(name, "/restart"), {});
  }

  /** Lets a sandbox outlive its creator. */
  async detach(name: string): Promise<SandboxDetail> {
    return this.call("POST", sandboxPath(name, "/detach"), {});
  }

  /** Counts as activity. */
  async touch(name: string): Promise<SandboxDetail> {
    return this.call("POST", sandboxPath(name, "/touch"), {});
  }

  /** Waits until a sandbox rests. */
  async wait(name: string): Promise<SandboxDetail> {
    return this.call("GET", sandboxPath(name, "/wait"));
  }

  /** Runs a command in a sandbox. */
  async exec(name: string, request: Record<string, unknown>): Promise<ExecHandle> {
    return this.session(sandboxPath(name, "/exec"), { type: "exec", exec: request }, request.stdin === true);
  }

  /** Watches the main workload. */
  async attach(name: string, stdin = false): Promise<ExecHandle> {
    return this.session(sandboxPath(name, "/attach"), { type: "attach", stdin, terminal: null, timeout_ms: null }, stdin);
  }

  /** Reads a sandbox's log. */
  logs(name: string, query: LogQuery = {}): AsyncGenerator<LogRecord, void, void> {
    const { follow, tail, since, until, source } = query;
    const pairs: Pairs = [["follow", follow], ["tail", tail], ["since", since], ["until", until], ["source", source]];
    return this.lines("GET", withQuery(sandboxPath(name, "/logs"), pairs));
  }

  /** Reads what happened. */
  events(query: EventQuery = {}): AsyncGenerator<EventRecord, void, void> {
    return this.lines("GET", withQuery("/v1/events", [["follow", query.follow], ["since", query.since]]));
  }

  /** The newest sample of every sandbox. */
  metrics(): Promise<MetricsSnapshot> {
    return this.call("GET", "/v1/metrics");
  }

  /** The newest samples at each interval, the first at once; a slow reader misses some. */
  metricsStream(intervalMs = 1000): AsyncGenerator<MetricsSnapshot, void, void> {
    return this.lines("GET", withQuery("/v1/metrics/stream", [["interval_ms", intervalMs]]));
  }

  /** The images of the store, newest first. */
  async images(): Promise<ImageHandle[]> {
    return (await this.call<{ images: ImageHandle[] }>("GET", "/v1/images")).images;
  }

  /** Everything about one image. */
  image(reference: string): Promise<ImageDetail> {
    return this.call("GET", withQuery("/v1/image", [["reference", reference]]));
  }

  /** Removes an image; `force` untags it even where sandboxes use it. */
  async removeImage(reference: string, force = false): Promise<void> {
    await this.call("DELETE", withQuery("/v1/image", [["reference", reference], ["force", force]]));
  }

  /** Loads an archive (docker or OCI, also compressed) into the store. */
  async loadImage(archive: AsyncIterable<Uint8Array>, tag?: string): Promise<ImageHandle[]> {
    type LoadEvent = { type: string; images?: ImageHandle[]; error?: unknown };
    const path = withQuery("/v1/images/load", [["tag", tag]]);
    for await (const event of this.lines<LoadEvent>("POST", path, { stream: archive })) {
      if (event.type === "done") return event.images ?? [];
      if (event.type === "error") throw errorFromValue(event.error, "the load failed");
    }
    throw failure("daemon_unavailable", "the load ended without an answer");
  }
}

async function collect(response: IncomingMessage): Promise<string> {
  const pieces: Buffer[] = [];
  let length = 0;
  for await (const piece of response as AsyncIterable<Buffer>) {
    pieces.push(piece);
    length += piece.length;
    if (length > ANSWER_LEN_MAX) throw protocolError("it is too long");
  }
  return Buffer.concat(pieces).toString("utf8");
}

function parsed<T>(line: string): T {
  try {
    return JSON.parse(line) as T;
  } catch (error) {
    throw protocolError(error);
  }
}
