/** One typed call for each route of the control API. `Sandbox` and `Image` are built on it. No request that may have been carried out is retried. */

import { Agent, type ClientRequest, type IncomingMessage, request as httpRequest } from "node:http";
import { pipeline } from "node:stream/promises";

import { errorFromBody, errorFromValue, failure, MsbError, protocolError, reason } from "./failure.js";
import { cannotConnect, type Environment, Locator, systemCode } from "./locate.js";
import type {
  EventRecord,
  FileAttributes,
  ImageDetail,
  ImageHandle,
  ImagePruneReport,
  LogRecord,
  MetricsHistory,
  MetricsSnapshot,
  PingReport,
  PullEvent,
  SandboxDetail,
  SandboxPage,
  SandboxSummary,
  SshHost,
  VersionInfo,
  VolumeDetail,
  WatchRecord,
} from "./models.js";
import { ExecHandle } from "./session.js";
import { checkName, milliseconds } from "./spec.js";

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
  /** Only lines that contain this text. */
  grep?: string;
}

/** Which sandboxes. */
export interface ListQuery {
  /** Terms that all must fit: `KEY=VALUE` or `KEY`. */
  labels?: readonly string[] | undefined;
  /** An expression, as `team in (ml,web),!debug`. */
  selector?: string | undefined;
  /** At most so many. */
  limit?: number | undefined;
  /** Those after the page whose `next` this is. */
  after?: string | undefined;
}

/** Which samples. */
export interface MetricsQuery {
  /** Only this sandbox. */
  name?: string | undefined;
  /** Only those whose labels fit all of these. */
  labels?: readonly string[] | undefined;
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

const metricsPairs = (query: MetricsQuery): Pairs => [
  ["name", query.name],
  ...(query.labels ?? []).map((label) => ["label", label] as const),
];

interface Sent {
  body?: unknown;
  contentType?: string;
  /** Whether the answer is a stream, which has a connection of its own, so that it can be given up at any time. */
  streamed?: boolean;
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
      const streamed = sent.stream !== undefined || sent.streamed === true;
      const headers: Record<string, string | number> = {};
      if (text !== undefined) {
        headers["content-type"] = "application/json";
        headers["content-length"] = Buffer.byteLength(text);
      } else if (sent.stream !== undefined) {
        headers["content-type"] = sent.contentType ?? "application/x-tar";
      }
      const request: ClientRequest = httpRequest({
        socketPath: this.socket,
        path,
        method,
        headers,
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
      response = await this.answer(method, path, { ...sent, streamed: true });
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

  /** The bytes of an answer. */
  private async *bytes(method: string, path: string, sent: Sent = {}): AsyncGenerator<Buffer, void, void> {
    let response: IncomingMessage | undefined;
    try {
      response = await this.answer(method, path, { ...sent, streamed: true });
      for await (const piece of response as AsyncIterable<Buffer>) yield piece;
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

  /** The sandboxes that fit, newest first. */
  async list(query: ListQuery = {}): Promise<SandboxSummary[]> {
    return (await this.listPage(query)).sandboxes;
  }

  /** At most `limit` of them, and where the next page begins. */
  listPage(query: ListQuery): Promise<SandboxPage> {
    const labels = (query.labels ?? []).map((label) => ["label", label] as const);
    const pairs: Pairs = [...labels, ["selector", query.selector], ["limit", query.limit], ["after", query.after]];
    return this.call("GET", withQuery("/v1/sandboxes", pairs));
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

  /** Asks a running sandbox's agent for a sign of life. It is no activity, and wakes nothing. */
  async ping(name: string): Promise<PingReport> {
    return this.call("POST", sandboxPath(name, "/ping"), {});
  }

  /** How an SSH client finds a sandbox. */
  async sshHost(name: string): Promise<SshHost> {
    return this.call("GET", sandboxPath(name, "/ssh/host"));
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
    const { follow, tail, since, until, source, grep } = query;
    const pairs: Pairs = [["follow", follow], ["tail", tail], ["since", since], ["until", until], ["source", source], ["grep", grep]];
    return this.lines("GET", withQuery(sandboxPath(name, "/logs"), pairs));
  }

  /** Reads what happened. */
  events(query: EventQuery = {}): AsyncGenerator<EventRecord, void, void> {
    return this.lines("GET", withQuery("/v1/events", [["follow", query.follow], ["since", query.since]]));
  }

  /** The newest sample of every sandbox, or of those that are asked for. */
  metrics(query: MetricsQuery = {}): Promise<MetricsSnapshot> {
    return this.call("GET", withQuery("/v1/metrics", metricsPairs(query)));
  }

  /** The same at each interval (100 ms to an hour), the first at once. A reader that is slow misses some. */
  metricsStream(query: MetricsQuery & { intervalMs?: number } = {}): AsyncGenerator<MetricsSnapshot, void, void> {
    const intervalMs = milliseconds(query.intervalMs ?? 1000, "intervalMs");
    return this.lines("GET", withQuery("/v1/metrics/stream", [...metricsPairs(query), ["interval_ms", intervalMs]]));
  }

  /** The last hour of one sandbox, or a part of it. */
  async metricsHistory(name: string, query: { lastMs?: number; pointsMax?: number } = {}): Promise<MetricsHistory> {
    const pairs: Pairs = [["last_ms", query.lastMs], ["points_max", query.pointsMax]];
    return this.call("GET", withQuery(sandboxPath(name, "/metrics"), pairs));
  }

  /** A tree of a sandbox as a tar stream, in either direction. */
  async archive(name: string, action: Record<string, unknown>, user: string | undefined, stdin: boolean): Promise<ExecHandle> {
    return this.session(sandboxPath(name, "/archive"), { type: "archive", archive: { action, user } }, stdin);
  }

  /** One call on a sandbox's files. */
  async fileCall<T>(name: string, call: Record<string, unknown>, user?: string): Promise<T> {
    return this.call("POST", sandboxPath(name, "/files"), { call, user });
  }

  /** The content of a file, piece by piece. */
  async *fileContent(
    name: string,
    path: string,
    user: string | undefined,
    part: { offset?: number; length?: number } = {},
  ): AsyncGenerator<Buffer, void, void> {
    const pairs: Pairs = [["path", path], ["user", user], ["offset", part.offset], ["len", part.length]];
    yield* this.bytes("GET", withQuery(sandboxPath(name, "/files/content"), pairs));
  }

  /** Writes the content of a file. */
  async fileWrite(
    name: string,
    path: string,
    content: AsyncIterable<Uint8Array>,
    user: string | undefined,
    how: { mode?: number; append?: boolean } = {},
  ): Promise<FileAttributes> {
    const pairs: Pairs = [["path", path], ["user", user], ["mode", how.mode], ["append", how.append]];
    const target = withQuery(sandboxPath(name, "/files/content"), pairs);
    try {
      const answer = await this.raw("PUT", target, { stream: content, contentType: "application/octet-stream" });
      return (answer as { attributes: FileAttributes }).attributes;
    } catch (error) {
      throw this.typed(error);
    }
  }

  /** Changes of a directory's entries, or of a file. */
  async *fileWatch(name: string, path: string, user: string | undefined, recursive: boolean): AsyncGenerator<WatchRecord, void, void> {
    const pairs: Pairs = [["path", path], ["user", user], ["recursive", recursive]];
    yield* this.lines<WatchRecord>("GET", withQuery(sandboxPath(name, "/files/watch"), pairs));
  }

  /** Every volume, by name. */
  async volumes(): Promise<VolumeDetail[]> {
    return (await this.call<{ volumes: VolumeDetail[] }>("GET", "/v1/volumes")).volumes;
  }

  /** One volume. */
  async volume(name: string): Promise<VolumeDetail> {
    return this.call("GET", `/v1/volumes/${checkName(name)}`);
  }

  /** Makes a volume. */
  async createVolume(name: string, options: { kind?: "dir" | "disk"; sizeMib?: number } = {}): Promise<VolumeDetail> {
    return this.call("POST", "/v1/volumes", { name: checkName(name), kind: options.kind ?? "dir", size_mib: options.sizeMib });
  }

  /** Removes a volume. */
  async removeVolume(name: string): Promise<void> {
    await this.call("DELETE", `/v1/volumes/${checkName(name)}`);
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

  /** Gives an image another name. */
  tagImage(reference: string, name: string): Promise<ImageHandle> {
    return this.call("POST", "/v1/images/tag", { reference, name });
  }

  /** Keeps prune from an image, or no more. */
  pinImage(reference: string, pinned = true): Promise<ImageHandle> {
    return this.call("POST", "/v1/images/pin", { reference, pinned });
  }

  /** Removes the images that the request allows and nothing needs. */
  pruneImages(request: Record<string, unknown>): Promise<ImagePruneReport> {
    return this.call("POST", "/v1/images/prune", request);
  }

  /** Fetches an image; the last event is `done`. What has come when the iteration is given up is kept for the next pull. */
  async *pullImage(request: Record<string, unknown>): AsyncGenerator<PullEvent, void, void> {
    for await (const event of this.lines<PullEvent | { type: "error"; error: unknown }>("POST", "/v1/images/pull", { body: request })) {
      if (event.type === "error") throw errorFromValue(event.error, "the pull failed");
      yield event;
      if (event.type === "done") return;
    }
    throw failure("daemon_unavailable", "the pull ended without an answer");
  }

  /** Images as one archive; it is whole only when the iteration has ended by itself. */
  saveImages(references: readonly string[], format: "docker" | "oci" = "docker"): AsyncGenerator<Buffer, void, void> {
    return this.bytes("POST", "/v1/images/save", { body: { references, format } });
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
